"""In-process generation with the model that is being trained: samples completions and their log-probabilities.

Legend: B rows being decoded, V vocabulary.

It replaces `model.generate` because the policy gradient needs the log-probability of each sampled token under exactly
the sampling distribution, a row must not depend on the batch or process that decodes it, and no row should wait for
another. It is fast for four reasons:

1. Finished rows leave the batch and waiting prompts take their places, longest first, so that the batch stays full.
2. Each prompt is computed once for all its answers, and without padding. The answers to long prompts share one copy of
   the prompt's keys and values.
3. Memory for keys and values is allocated once, and a step copies none of them (`rollout.slots`). Attention reads them
   in place, without masks (`rollout.attention`).
4. The draw computes no more over the vocabulary than it needs (`rollout.sampling`).

A model with another kind of attention uses its own cache (`rollout.plain`), with the same result but more slowly.

Sampling is by inversion. The random numbers depend on (seed, key of the row), not on a stream, so that a resumed run,
or one on another number of processes, draws the same tokens.
"""

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.sampling import uniform
from handoff.errors import GateError
from handoff.window import window
from rollout.attention import Decode, Shared
from rollout.errors import RolloutError
from rollout.forward import Runner, Source, attached, reason_against
from rollout.plain import generate_plainly
from rollout.positions import check_positions
from rollout.sampling import Completion, SamplingSpec, draw
from rollout.slots import Slots

# Prompts are computed in pieces of about this many tokens: what fits a CPU's cache, or what keeps a GPU busy.
_PREFILL_TOKENS = {"cpu": 512}
_PREFILL_TOKENS_GPU = 8192
_SHARED_TOKENS = 64  # from this mean length on, answers share the prompt's keys and values instead of copying them
_FETCH_STEPS = 32  # log-probabilities are fetched and checked once in this many steps


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
    keys: Sequence[tuple[int | str, ...]],
    seed: int,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Completes every prompt; the result is in the order of `prompts`.

    Args:
        model: a causal language model, gathered if it is sharded; it is in evaluation mode during the call.
        prompts: token ids, each at least one token. Equal prompts are computed once.
        spec: the sampling distribution and the stop ids.
        keys: one key per prompt; (seed, key) determines the row's random numbers, whatever the batch.
        seed: the run's seed.
        batch_size: the largest number of rows decoded at once.
        advance: called with the number of newly finished prompts.

    Raises:
        RolloutError: a prompt and its answer are longer than the model's window, or there is not enough memory.
        GateError: the model's logits are not finite.
    """
    assert len(keys) == len(prompts) and all(prompts)
    if not prompts:
        return []
    _check_window(model, prompts, spec)
    noise = None
    if spec.temperature > 0:

        def noise(i: int) -> np.ndarray:
            return uniform((spec.max_new_tokens,), seed, *keys[i])

    was_training = model.training
    model.eval()
    try:
        if reason_against(model, prompts[0]) is not None:
            return generate_plainly(model, prompts, spec, noise, batch_size, advance or _ignore_progress)
        with attached(model) as runner:
            return _Engine(runner, model.device, prompts, spec, noise, batch_size, advance or _ignore_progress).run()
    except RuntimeError as error:
        # torch has an exception type for this on GPUs only.
        if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
            raise
        raise RolloutError(
            f"not enough memory for {batch_size} rows of up to {max(map(len, prompts)) + spec.max_new_tokens} "
            f"tokens at once ({str(error).splitlines()[0]}); lower the number of rows (train.rollout_micro_batch_size "
            "in PPO, batch_size in evaluation) or max_new_tokens"
        ) from error
    finally:
        model.train(was_training)


def _ignore_progress(count: int) -> None:
    """The default of `advance`: ignores progress."""


def _check_window(model: PreTrainedModel, prompts: Sequence[Sequence[int]], spec: SamplingSpec) -> None:
    found = window(model.config.to_dict())
    longest = max(range(len(prompts)), key=lambda i: len(prompts[i]))
    length = len(prompts[longest])
    if found is not None and length + spec.max_new_tokens > found.tokens:
        raise RolloutError(
            f"prompt {longest} has {length} tokens; with max_new_tokens {spec.max_new_tokens} that is more than "
            f"the model's window of {found.tokens} ({found.key}); shorten the prompt or lower max_new_tokens"
        )
    check_positions(model, length + spec.max_new_tokens)


@dataclass(frozen=True)
class _Row:
    """An unfinished answer: its index in the caller's list, its prompt, and its random numbers."""

    answer: int
    prompt: int
    noise: np.ndarray | None


@dataclass(frozen=True)
class _Computed:
    """Keys and values of a prompt: tokens `start` to `start + length` in `source`."""

    source: Source
    start: int
    length: int


class _Engine:
    """The state of one call of `generate`. Distinct prompts are numbered in the order of their first occurrence."""

    def __init__(
        self,
        runner: Runner,
        device: torch.device,
        prompts: Sequence[Sequence[int]],
        spec: SamplingSpec,
        noise: Callable[[int], np.ndarray] | None,
        batch_size: int,
        advance: Callable[[int], None],
    ) -> None:
        self._runner, self._device, self._spec, self._noise = runner, device, spec, noise
        self._batch_size, self._advance = batch_size, advance
        self._stops = frozenset(spec.stop_ids)
        self._prefill_tokens = _PREFILL_TOKENS.get(device.type, _PREFILL_TOKENS_GPU)
        self._completions = [Completion() for _ in prompts]
        self._logprobs: list[tuple[list[int], Tensor]] = []  # answers, and their log-probabilities not yet fetched

        answers: dict[tuple[int, ...], list[int]] = {}
        for i, prompt in enumerate(prompts):
            answers.setdefault(tuple(prompt), []).append(i)
        self._prompts, self._answers = list(answers), list(answers.values())
        self._unfinished = [len(a) for a in self._answers]  # number of unfinished answers of each prompt
        # Longest first, so that memory peaks at the start and no later prompt is longer than the first ones.
        self._waiting = deque(sorted(range(len(self._prompts)), key=lambda i: (-len(self._prompts[i]), i)))
        self._ready: deque[tuple[_Row, _Computed]] = deque()  # rows with their first token that wait for a place
        self._rows: list[_Row] = []  # in the order of the slots
        self._slots: Slots | None = None
        self._sharing = self._shares()
        self._shared: Slots | None = None
        self._placed: list[int] = []  # prompts in the order of the shared slots
        self._decode: Decode | None = None
        self._tokens = self._positions = torch.empty(0, dtype=torch.long, device=device)  # (B,)

    def _shares(self) -> bool:
        """Whether rows share their prompt's keys and values instead of each having a copy."""
        window = self._runner.shortest_window()
        return (
            len(self._completions) >= 2 * len(self._prompts)
            and sum(map(len, self._prompts)) >= _SHARED_TOKENS * len(self._prompts)
            # A window that begins inside the prompt would begin at a different token for each row.
            and (window is None or window >= max(map(len, self._prompts)) + self._spec.max_new_tokens)
        )

    def run(self) -> list[Completion]:
        """Answers everything."""
        self._change([])
        while self._rows:
            self._step()
        self._fetch()
        return self._completions

    def _step(self) -> None:
        """Decodes one token for every row."""
        assert self._slots is not None and self._decode is not None
        self._slots.advance()
        logits = self._runner.decode(self._tokens, self._positions, self._decode)
        self._tokens, ended = self._record(self._rows, logits)
        self._positions = self._positions + 1
        if ended:
            self._change(ended)

    def _record(self, rows: Sequence[_Row], logits: Tensor) -> tuple[Tensor, list[int]]:
        """Draws a token for each row; returns the tokens (B,) and the rows that they end. logits (B, V)."""
        uniforms = None
        if self._noise is not None:
            numbers = []
            for row in rows:
                assert row.noise is not None
                numbers.append(row.noise[len(self._completions[row.answer].ids)])
            uniforms = torch.tensor(numbers, dtype=torch.float64, device=self._device)
        tokens, logprobs = draw(logits, self._spec, uniforms)
        self._logprobs.append(([row.answer for row in rows], logprobs))
        if len(self._logprobs) == _FETCH_STEPS:
            self._fetch()
        ended = []
        for i, (row, token) in enumerate(zip(rows, tokens.tolist(), strict=True)):
            completion = self._completions[row.answer]
            completion.ids.append(token)
            if token in self._stops:
                completion.end = "stop"
            elif len(completion.ids) < self._spec.max_new_tokens:
                continue
            ended.append(i)
            self._unfinished[row.prompt] -= 1
        if ended:
            self._advance(len(ended))
        return tokens, ended

    def _fetch(self) -> None:
        """Copies the pending log-probabilities from the device into their completions, and checks them."""
        if not self._logprobs:
            return
        values = iter(torch.cat([values for _, values in self._logprobs]).tolist())
        for answer in (a for answers, _ in self._logprobs for a in answers):
            value = next(values)
            if not math.isfinite(value):
                raise GateError(
                    f"the model's logits are not finite: the log-probability of token "
                    f"{len(self._completions[answer].logprobs)} of the answer to prompt {answer} is {value}. Its "
                    "weights are broken, or too large for the precision that it runs in. Usual causes: learning_rate "
                    "too high, max_grad_norm 0, float16"
                )
            self._completions[answer].logprobs.append(value)
        self._logprobs.clear()

    def _prefill(self) -> None:
        """Computes the next waiting prompts, and the first token of all their answers."""
        chosen: list[int] = []
        tokens = 0
        while self._waiting and (not chosen or tokens + len(self._prompts[self._waiting[0]]) <= self._prefill_tokens):
            chosen.append(self._waiting.popleft())
            tokens += len(self._prompts[chosen[-1]])
        logits, source = self._runner.prefill([self._prompts[p] for p in chosen])  # (N, V)
        rows, computed, of, start = [], [], [], 0
        for i, prompt in enumerate(chosen):
            for answer in self._answers[prompt]:
                rows.append(_Row(answer, prompt, None if self._noise is None else self._noise(answer)))
                computed.append(_Computed(source, start, len(self._prompts[prompt])))
                of.append(i)
            start += len(self._prompts[prompt])
        if len(rows) > len(chosen):
            logits = logits[torch.tensor(of, device=self._device)]
        _, ended = self._record(rows, logits)
        gone = set(ended)
        self._ready.extend((row, c) for i, (row, c) in enumerate(zip(rows, computed, strict=True)) if i not in gone)

    def _change(self, ended: Sequence[int]) -> None:
        """Removes finished rows and fills their places with waiting ones."""
        entering: list[tuple[_Row, _Computed]] = []
        while len(self._rows) - len(ended) + len(entering) < self._batch_size and (self._ready or self._waiting):
            if self._ready:
                entering.append(self._ready.popleft())
            else:
                self._prefill()
        if self._slots is None:
            if not entering:  # every answer had only one token
                return
            self._allocate(entering[0][1].source)
        assert self._slots is not None
        origin = self._slots.exchange(ended, [0 if self._sharing else c.length for _, c in entering])
        self._rows = [self._rows[o] if o >= 0 else entering[~o][0] for o in origin]
        if not self._sharing:
            _fill(self._slots, origin, [c for _, c in entering])
        self._slots.settle()
        self._decode = Decode(self._slots, self._share(entering) if self._sharing else None)
        last = [self._completions[row.answer].ids for row in self._rows]
        self._tokens = torch.tensor([ids[-1] for ids in last], device=self._device)
        positions = [len(self._prompts[row.prompt]) + len(ids) - 1 for row, ids in zip(self._rows, last, strict=True)]
        self._positions = torch.tensor(positions, device=self._device)

    def _allocate(self, source: Source) -> None:
        """Allocates slots for the most rows that will be decoded at once."""
        rows = min(self._batch_size, len(self._completions))
        longest, new = max(map(len, self._prompts)), self._spec.max_new_tokens - 1
        if not self._sharing:
            self._slots = self._runner.slots(source, rows, longest + new)
            return
        self._slots = self._runner.slots(source, rows, new, whole=True)
        # Enough prompts to fill the rows, plus one that is about to leave; it grows if prompts keep only few rows.
        prompts = math.ceil(rows * len(self._prompts) / len(self._completions)) + 1
        self._shared = self._runner.slots(source, prompts, longest, whole=True, growing=False)

    def _share(self, entering: Sequence[tuple[_Row, _Computed]]) -> Shared:
        """Removes prompts whose answers are all finished from the shared slots, and adds those of new rows."""
        assert self._shared is not None
        new = {row.prompt: c for row, c in entering if row.prompt not in self._placed}
        leaving = [i for i, prompt in enumerate(self._placed) if not self._unfinished[prompt]]
        origin = self._shared.exchange(leaving, [c.length for c in new.values()])
        names = list(new)
        self._placed = [self._placed[o] if o >= 0 else names[~o] for o in origin]
        _fill(self._shared, origin, list(new.values()))
        self._shared.settle()
        place = {prompt: i for i, prompt in enumerate(self._placed)}
        members: list[list[int]] = [[] for _ in self._placed]
        for i, row in enumerate(self._rows):
            members[place[row.prompt]].append(i)
        most = max(map(len, members), default=0)
        back = [0] * len(self._rows)
        for g, rows in enumerate(members):
            for j, i in enumerate(rows):
                back[i] = g * most + j
        padded = [i for rows in members for i in rows + [0] * (most - len(rows))]
        return Shared(self._shared, torch.tensor(padded, device=self._device), torch.tensor(back, device=self._device))


def _fill(slots: Slots, origin: Sequence[int], entering: Sequence[_Computed]) -> None:
    """Copies the prompts' keys and values into the new rows' places."""
    for place, o in enumerate(origin):
        if o < 0:
            c = entering[~o]
            slots.fill(place, c.source, c.start, c.length)
