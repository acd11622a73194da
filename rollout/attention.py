"""Attention for rollouts, which replaces the model's own attention during generation.

Legend: B rows, Hq query heads, H key and value heads (Hq a multiple of H), T tokens, W columns, D head size, G shared
prompts, M the most rows of one prompt, P columns of the longest prompt.

transformers selects a model's attention by name, and builds no masks for a name that it does not know. So the model's
forward pass computes the layers alone. Attention goes to the current `Pass`, which stores the keys and values and
knows which tokens each row may see.

- `Prefill`: prompts are concatenated in a single row, without padding. Each sees only itself.
- `Ragged`: rows of different lengths are concatenated without padding, for training and scoring, with gradients. It is
  passed in the model's arguments, because a layer recomputed by gradient checkpointing needs it again.
- `Decode`: one token per row. It reads the keys and values in `Slots`. Where rows share prompts, it reads each prompt's
  keys and values once for all its rows, and combines the two parts by their softmax denominators (Dao et al. 2023,
  Flash-Decoding).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, Cache

from rollout.slots import Slots

NAME = "baton_rollout"
_RUN_TOKENS = 32  # from this mean on, each run of rows of equal length gets its own call of attention
# Arguments that models pass to their attention besides the tensors, and that have no effect here, since the pass
# supplies masks, windows and positions. Any other argument that is not None (sinks, biases) may change the result, so
# the model is not supported.
_WITHOUT_EFFECT = {"sliding_window", "position_ids", "position_embeddings", "cache_position", "use_cache", "is_causal"}
_WITHOUT_EFFECT |= {"output_attentions", "output_hidden_states", "output_router_logits", "return_dict"}


class UnsupportedError(Exception):
    """The model needs a kind of attention that this module does not compute."""


class Pass(Protocol):
    """One forward pass of the model."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """query (B, Hq, T, D), key and value (B, H, T, D) -> (B, T, Hq, D)."""
        ...


class Unstored(Cache):
    """A cache that stores nothing and returns keys and values unchanged; the current pass stores them."""

    def __init__(self) -> None:
        self.layers: list[Any] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


_in_force: list[Pass] = []


@contextmanager
def in_force(this: Pass) -> Iterator[None]:
    """Inside this context, the model's attention calls go to the pass `this`."""
    _in_force.append(this)
    try:
        yield
    finally:
        _in_force.pop()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    ragged: "Ragged | None" = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function that transformers calls, with its arguments."""
    unknown = sorted(name for name, value in kwargs.items() if value is not None and name not in _WITHOUT_EFFECT)
    if attention_mask is not None or unknown:
        raise UnsupportedError(f"its attention takes {', '.join(unknown) or 'its own mask'}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    this = _in_force[-1] if ragged is None else ragged
    return this.attend(module.layer_idx, query, key, value, scaling, softcap), None


AttentionInterface.register(NAME, _attention)


@dataclass
class Prefill:
    """Concatenated prompts. `windows`: one per layer. Collects keys and values (H, T, D) of each layer."""

    lengths: Sequence[int]
    windows: Sequence[int | None]
    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        self.layers[layer] = key[0], value[0]
        return _in_runs(query, key, value, _runs(self.lengths), scaling, softcap, self.windows[layer])


@dataclass(frozen=True)
class Ragged:
    """Concatenated rows of these lengths, with `place` (T,) as in `rollout.batch.Unpadded`.

    Only attention needs the rows as a batch. There they are padded on the right, where no real token looks. On a CPU,
    they are processed one by one instead, unless there are very many short rows.
    """

    lengths: Sequence[int]
    place: Tensor
    windows: Sequence[int | None]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        window, runs = self.windows[layer], _runs(self.lengths)
        # In float32 on a CPU, whatever the precision around it, since the gradient of bfloat16 attention takes several
        # times as long there.
        on_cpu = query.device.type == "cpu"
        dtype = torch.float32 if on_cpu else value.dtype
        with torch.autocast(query.device.type, enabled=False):
            query, key, given = query.to(dtype), key.to(dtype), value.to(dtype)
            if on_cpu and sum(self.lengths) >= _RUN_TOKENS * len(runs):
                return _in_runs(query, key, given, runs, scaling, softcap, window).to(value.dtype)
            length = max(self.lengths)
            q, k, v = (self._beside(x, length) for x in (query, key, given))  # (B, heads, L, D)
            out = _causal(q, k, v, scaling, softcap, window)
            return out.transpose(1, 2).flatten(0, 1).index_select(0, self.place)[None].to(value.dtype)

    def _beside(self, x: Tensor, length: int) -> Tensor:
        """(1, heads, T, D) -> (B, heads, L, D)."""
        tokens, rows = x[0].transpose(0, 1), len(self.lengths)  # (T, heads, D)
        padded = tokens.new_zeros(rows * length, *tokens.shape[1:]).index_copy(0, self.place, tokens)
        beside: Tensor = padded.unflatten(0, (rows, length))
        return beside.transpose(1, 2)


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of consecutive rows of equal length: (number of rows, length)."""
    return [(len(list(same)), length) for length, same in groupby(lengths)]


def _in_runs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Sequence[tuple[int, int]],
    scaling: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    """Attention of concatenated rows, each of which sees only itself: (1, heads, T, D) -> (1, T, Hq, D)."""
    sizes = [count * length for count, length in runs]
    parts = []
    for (count, length), *run in zip(runs, *(x[0].split(sizes, 1) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in run)  # (count, heads, length, D)
        parts.append(_causal(q, k, v, scaling, softcap, window).transpose(1, 2).flatten(0, 1))
    return torch.cat(parts)[None]


def _causal(q: Tensor, k: Tensor, v: Tensor, scaling: float, softcap: float | None, window: int | None) -> Tensor:
    """Causal attention over at most `window` tokens, including the token itself: (B, Hq, T, D) -> (B, Hq, T, D)."""
    length = q.shape[2]
    if window is not None and window >= length:
        window = None
    mask = None
    if window is not None or softcap is not None:
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril_()
        if window is not None:
            mask.triu_(1 - window)
    repeats = q.shape[1] // k.shape[1]
    if softcap is None:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=repeats > 1
        )
    assert mask is not None
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = _capped(q @ k.transpose(2, 3) * scaling, softcap).masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, -1, dtype=torch.float32).to(v.dtype) @ v


def _capped(scores: Tensor, softcap: float) -> Tensor:
    """Gemma 2's soft cap of attention scores."""
    return torch.tanh(scores / softcap) * softcap


@dataclass(frozen=True)
class Shared:
    """Prompts that rows share: their keys and values, and which rows belong to each prompt.

    members (G · M,): the rows of each prompt, padded with row 0. back (B,): each row's index in `members`.
    """

    slots: Slots
    members: Tensor
    back: Tensor


@dataclass(frozen=True)
class Decode:
    """One token per row, after those in the slots. Call `slots.advance()` first, which adds the column for it."""

    slots: Slots
    shared: Shared | None = None

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        view, column = self.slots.views[layer], self.slots.end - 1
        view.keys.select(2, column).copy_(key.squeeze(2))
        view.values.select(2, column).copy_(value.squeeze(2))
        rows, heads, _, size = key.shape
        # Under autocast the queries may have another precision than the slots.
        q = query.to(view.keys.dtype).reshape(rows * heads, -1, size)  # (B · H, Hq / H, D)
        scores = _scores(q, self.slots, layer, scaling, softcap)  # (B · H, Hq / H, W)
        p = torch.softmax(scores, -1, dtype=torch.float32)
        out = torch.bmm(p.to(value.dtype), view.values_3d)
        if self.shared is not None:
            out = self._with_prompts(layer, q, scores, out, scaling, softcap)
        return out.view(rows, 1, query.shape[1], -1)

    def _with_prompts(
        self, layer: int, q: Tensor, scores: Tensor, out: Tensor, scaling: float, softcap: float | None
    ) -> Tensor:
        """Extends attention over the answer to prompt and answer. q, scores, out: (B · H, Hq / H, ·)."""
        shared = self.shared
        assert shared is not None
        prompts, heads = len(shared.slots.lengths), len(q) // len(shared.back)
        # (B · H, Hq / H, D) -> (G · H, M · Hq / H, D)
        grouped = q.unflatten(0, (-1, heads)).index_select(0, shared.members).unflatten(0, (prompts, -1))
        grouped = grouped.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        theirs = _scores(grouped, shared.slots, layer, scaling, softcap)  # (G · H, M · Hq / H, P)
        p = torch.softmax(theirs, -1, dtype=torch.float32)
        prompt_out = torch.bmm(p.to(out.dtype), shared.slots.views[layer].values_3d)
        packed = torch.cat([prompt_out.float(), theirs.float().logsumexp(-1, keepdim=True)], -1)
        # (G · H, M · Hq / H, D + 1) -> (B · H, Hq / H, D + 1)
        packed = packed.unflatten(0, (prompts, heads)).unflatten(2, (-1, q.shape[1])).transpose(1, 2).flatten(0, 1)
        packed = packed.index_select(0, shared.back).flatten(0, 1)
        weight = torch.sigmoid(packed[..., -1:] - scores.float().logsumexp(-1, keepdim=True))
        return torch.lerp(out.float(), packed[..., :-1], weight).to(out.dtype)


def _scores(q: Tensor, slots: Slots, layer: int, scaling: float, softcap: float | None) -> Tensor:
    """(B · H, R, D) -> (B · H, R, W), hidden columns −∞."""
    keys = slots.views[layer].keys_t
    if softcap is None:
        return torch.baddbmm(slots.bias(layer), q, keys, alpha=scaling)
    return _capped(torch.bmm(q, keys) * scaling, softcap) + slots.bias(layer)
