"""The KV cache of the rows that are being decoded.

Legend: N rows in use, H heads of keys and values, W columns, D size of a head.

Memory is allocated once, for the largest number of rows and columns. The part in use is a contiguous (N, H, W, D) view
of its front. A decode step reads all of it, and contiguous memory reads several times faster than memory with gaps. So
W follows the longest row in use, growing by several columns at a time; each growth copies the cache once.

Every row ends at the same column. So a decode step writes one column, whatever the rows' lengths, and a sliding window
is a range of columns. A bias of −∞ hides the unused columns before a shorter row and after the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEP = 16  # the least number of columns by which W grows


@dataclass(frozen=True)
class Shape:
    """The shape of a layer: heads, key size, value size, and how many columns back a query sees (None: all)."""

    heads: int
    key_size: int
    value_size: int
    window: int | None


@dataclass(frozen=True)
class View:
    """The part of a layer in use: keys and values (N, H, W, D), and views of them for products: keys (N·H, D, W) and
    values (N·H, W, D)."""

    keys: Tensor
    values: Tensor
    keys_t: Tensor
    values_3d: Tensor


class Slots:
    """Rows of keys and values that end at the same column.

    Args:
        shapes: one per layer.
        rows: the largest number of rows.
        columns: the greatest length of a row.
        growing: whether rows grow by `advance`; otherwise W is exactly the longest row's length.
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        rows: int,
        columns: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        growing: bool = True,
    ) -> None:
        self._shapes, self._columns, self._growing = list(shapes), columns, growing
        self._dtype, self._device = dtype, device
        self.lengths: list[int] = []  # of each row in use
        self.width = 0
        self.end = 0  # the column after the last one in use
        self.views: list[View] = []
        self._bias: dict[tuple[int, int | None], Tensor] = {}
        self.rows = rows
        self._memory, self._spare = self._allocate(rows)

    def bias(self, layer: int) -> Tensor:
        """(N·H, 1, W): 0 for columns that a query at the last column may see, −∞ elsewhere."""
        shape = self._shapes[layer]
        return self._bias[shape.heads, shape.window]

    def reserve(self, columns: int) -> None:
        """Makes room for rows of this length, where it was not known from the start how long they become."""
        if columns > self._columns:
            self._columns = max(columns, 2 * self._columns)
            self._enlarge()
            self._look()

    def exchange(self, leaving: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Removes rows, and adds new ones of these lengths in their places or at the end. Call `settle` afterwards.

        Returns:
            For each place its row: i >= 0 is the row that was at i before, and ~k is the k-th new row.
        """
        old = len(self.lengths)
        origin = list(range(old))
        places = [*sorted(leaving), *range(old, old + len(lengths))]
        for k, (place, length) in enumerate(zip(places, lengths, strict=False)):
            origin[place : place + 1] = [~k]
            self.lengths[place : place + 1] = [length]
        if len(self.lengths) > self.rows:
            self.rows = max(2 * self.rows, len(self.lengths))
            self._enlarge()
        if lengths:
            longest = max(self.lengths)
            if old == 0 or longest > self.end or (not self._growing and 8 * longest < 7 * self.width):
                self._fit(old)
            self._look()
        # From the end, so that the last row, which fills the gap, is never one that is leaving.
        for place in places[len(lengths) : len(leaving)][::-1]:
            last = len(self.lengths) - 1
            if place != last:
                for view in self.views:
                    view.keys[place].copy_(view.keys[last])
                    view.values[place].copy_(view.values[last])
                self.lengths[place], origin[place] = self.lengths[last], origin[last]
            self.lengths.pop()
            origin.pop()
        return origin

    def fill(self, row: int, source: Sequence[tuple[Tensor, Tensor]], start: int, length: int) -> None:
        """Copies keys and values into a row of this length.

        source: each layer's keys and values (H, tokens, D); the row's begin at `start`.
        """
        for view, pair in zip(self.views, source, strict=True):
            for target, tokens in zip((view.keys, view.values), pair, strict=True):
                target[row, :, self.end - length : self.end].copy_(tokens[:, start : start + length])

    def settle(self) -> None:
        """Renews views and bias after rows were added or removed."""
        if not self.lengths:
            return
        self._look()
        columns = torch.arange(self.width, device=self._device)
        lengths = torch.tensor(self.lengths, device=self._device)[:, None]
        for heads, window in {(s.heads, s.window) for s in self._shapes}:
            reach = lengths if window is None else lengths.clamp(max=window)
            seen = (columns >= self.end - reach) & (columns < self.end)  # (N, W)
            bias = torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, -torch.inf)
            self._bias[heads, window] = bias.repeat_interleave(heads, 0).unsqueeze(1)

    def advance(self) -> None:
        """Adds a column for the tokens that are computed next."""
        if self.end == self.width:
            self._fit(len(self.lengths))
            self.settle()
        for (_, window), bias in self._bias.items():
            bias[:, :, self.end] = 0
            if window is not None and self.end >= window:
                bias[:, :, self.end - window] = -torch.inf
        self.end += 1
        self.lengths = [length + 1 for length in self.lengths]

    def _fit(self, rows: int) -> None:
        """Adapts W to the lengths, and moves the first `rows` rows so that they end at the new end."""
        end = max(self.lengths)
        width = end
        if self._growing:
            step = max(_STEP, end // (8 * _STEP) * _STEP)
            width = min(-(-(end + 1) // step) * step, self._columns)
        kept = min(end, self.end)
        if kept and rows:
            for i, shape in enumerate(self._shapes):
                for j, size in enumerate((shape.key_size, shape.value_size)):
                    old = self._memory[i][j]
                    new = self._spare[len(old)]
                    source = _front(old, rows, shape.heads, self.width, size)
                    target = _front(new, rows, shape.heads, width, size)
                    target[:, :, end - kept : end] = source[:, :, self.end - kept : self.end]
                    self._memory[i][j], self._spare[len(old)] = new, old
        self.width, self.end = width, end

    def _look(self) -> None:
        """Renews the views of the rows in use."""
        self.views = []
        for shape, (keys, values) in zip(self._shapes, self._memory, strict=True):
            k = _front(keys, len(self.lengths), shape.heads, self.width, shape.key_size)
            v = _front(values, len(self.lengths), shape.heads, self.width, shape.value_size)
            self.views.append(View(k, v, k.flatten(0, 1).transpose(1, 2), v.flatten(0, 1)))

    def _allocate(self, rows: int) -> tuple[list[list[Tensor]], dict[int, Tensor]]:
        """Allocates each layer's memory, and a spare buffer of each size for moving columns."""
        # Zeros, since hidden columns still enter the product as 0 · value, which must not be 0 · NaN.
        sizes = [[rows * self._columns * s.heads * d for d in (s.key_size, s.value_size)] for s in self._shapes]
        memory = [[torch.zeros(n, dtype=self._dtype, device=self._device) for n in pair] for pair in sizes]
        spare = {n: torch.zeros(n, dtype=self._dtype, device=self._device) for pair in sizes for n in pair}
        return memory, spare

    def _enlarge(self) -> None:
        """Moves everything to memory for `rows` rows of `_columns` columns, which have become more."""
        old = self._memory
        self._memory, self._spare = self._allocate(self.rows)
        for pair, before in zip(self._memory, old, strict=True):
            for target, source in zip(pair, before, strict=True):
                target[: len(source)] = source


def _front(memory: Tensor, rows: int, heads: int, width: int, size: int) -> Tensor:
    """The front of a layer's memory as (rows, heads, width, size)."""
    return memory[: rows * heads * width * size].view(rows, heads, width, size)
