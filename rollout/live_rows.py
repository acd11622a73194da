"""Rows of a batch that others join and leave while it is decoded, with rollout attention or the model's own cache.

Legend: B rows, T tokens, C hidden size, V vocabulary, H heads of keys and values, D head size.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from rollout.attention import Decode
from rollout.forward import Runner, Source
from rollout.plain import state_name
from rollout.slots import Slots

Held = Any
"""What a prompt's computation leaves behind for the rows that continue it."""
_FIRST_ROWS, _FIRST_COLUMNS = 4, 256
_LOGITS = 2**25  # the most logits that are computed at once


class Rows(Protocol):
    """The rows that are being decoded."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Held]]:
        """Logits after each prompt (N, V), and what its rows need."""
        ...

    def exchange(self, leaving: Sequence[int], entering: Sequence[Held]) -> list[int]:
        """Removes rows and adds new ones; for each place its row: i >= 0 was at i before, ~k is the k-th new row."""
        ...

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Logits (B, V) after one more token in every row."""
        ...

    def clear(self) -> None:
        """Removes all rows, whatever their state."""
        ...

    def hidden(self, prompt: Sequence[int]) -> Tensor:
        """(T, C): the last hidden state of each token."""
        ...

    def logits(self, prompt: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Logits after each token, in pieces: the first token's place, and (tokens, V)."""
        ...


@dataclass(frozen=True)
class _Computed:
    """Keys and values of a prompt: tokens `start` to `start + length` in `source`."""

    source: Source
    start: int
    length: int


class SlotRows:
    """Rows with rollout attention. Their memory grows with what they hold."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._slots: Slots | None = None

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Held]]:
        """As `Rows.prefill`."""
        logits, source = self._runner.prefill(prompts)
        starts = [sum(map(len, prompts[:i])) for i in range(len(prompts))]
        return logits, [_Computed(source, start, len(p)) for start, p in zip(starts, prompts, strict=True)]

    def exchange(self, leaving: Sequence[int], entering: Sequence[Held]) -> list[int]:
        """As `Rows.exchange`."""
        if self._slots is None:
            if not entering:
                return []
            self._slots = self._runner.slots(entering[0].source, _FIRST_ROWS, _FIRST_COLUMNS)
        slots, lengths = self._slots, [held.length for held in entering]
        slots.reserve(max(lengths, default=0) + 1)
        origin = slots.exchange(leaving, lengths)
        for place, o in enumerate(origin):
            if o < 0:
                held = entering[~o]
                slots.fill(place, held.source, held.start, held.length)
        slots.settle()
        return origin

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Rows.decode`."""
        assert self._slots is not None
        self._slots.reserve(max(self._slots.lengths) + 1)
        self._slots.advance()
        device = self._runner.device
        return self._runner.decode(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), Decode(self._slots)
        )

    def clear(self) -> None:
        """As `Rows.clear`."""
        self._slots = None

    def hidden(self, prompt: Sequence[int]) -> Tensor:
        """As `Rows.hidden`."""
        return self._runner.hidden(prompt)

    def logits(self, prompt: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """As `Rows.logits`."""
        size = max(_LOGITS // self._runner.vocab_size, 1)
        for start in range(0, len(prompt), size):
            where = range(start, min(start + size, len(prompt)))
            yield start, self._runner.logits(prompt, where)


class PlainRows:
    """Rows of a model that does not support rollout attention: each has a cache of its own and is decoded alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model, self._state = model, state_name(model)
        self._caches: list[DynamicCache] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, list[Held]]:
        """As `Rows.prefill`."""
        caches = [DynamicCache(config=self._model.config) for _ in prompts]
        return torch.cat([self._after(p, cache) for p, cache in zip(prompts, caches, strict=True)]), caches

    def exchange(self, leaving: Sequence[int], entering: Sequence[Held]) -> list[int]:
        """As `Rows.exchange`."""
        kept = [i for i in range(len(self._caches)) if i not in set(leaving)]
        self._caches = [self._caches[i] for i in kept] + [copy.deepcopy(cache) for cache in entering]
        return [*kept, *(~k for k in range(len(entering)))]

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """As `Rows.decode`."""
        return torch.cat([self._after([token], cache) for token, cache in zip(tokens, self._caches, strict=True)])

    def clear(self) -> None:
        """As `Rows.clear`."""
        self._caches = []

    def hidden(self, prompt: Sequence[int]) -> Tensor:
        """As `Rows.hidden`."""
        found: Tensor = self._model.base_model(input_ids=self._ids(prompt)).last_hidden_state[0]
        return found

    def logits(self, prompt: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """As `Rows.logits`."""
        yield 0, self._model(input_ids=self._ids(prompt), use_cache=False).logits[0]

    def _after(self, ids: Sequence[int], cache: DynamicCache) -> Tensor:
        logits: Tensor = self._model(input_ids=self._ids(ids), use_cache=True, **{self._state: cache}).logits[:, -1]
        return logits

    def _ids(self, ids: Sequence[int]) -> Tensor:
        return torch.tensor([list(ids)], device=self._model.device)
