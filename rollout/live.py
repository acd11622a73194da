"""Continuous batching: answers join and leave a batch that is being decoded, each with its own sampling.

Legend: B rows being decoded, N answers that enter, V vocabulary.

`rollout.engine` answers a list of prompts that is known from the start, under one distribution. Here prompts come at
any time, as in chat and in a server. Both decode with the same runner, slots and draw. An answer depends on its prompt,
its distribution and its random numbers, and not on the answers beside it.

`Live.add` and `Answer.cancel` may be called from any thread. Everything else belongs to one thread, and the `Live`s of
all models of a process share that thread, because attention is switched for the whole process (`rollout.attention`).
"""

import math
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from handoff.errors import GateError
from rollout.forward import attached, reason_against
from rollout.live_rows import Held, PlainRows, Rows, SlotRows
from rollout.sampling import SamplingSpec, draw

_PREFILL_TOKENS = {"cpu": 512}
_PREFILL_TOKENS_GPU = 8192
_PROBE = 12  # tokens with which rollout attention is tried

End = Literal["stop", "length"]


class Constraint(Protocol):
    """What restricts the tokens of an answer, such as a grammar."""

    def allowed(self) -> Tensor:
        """(V,) bool on the CPU: the tokens that may come next."""
        ...

    def advance(self, token: int) -> bool:
        """Takes the next token; returns whether the answer is complete, so that nothing may follow."""
        ...


@dataclass(frozen=True, slots=True)
class Token:
    """One token of an answer. `logprob` and `top` are nats under the model's own distribution, softmax(logits), before
    temperature, truncation and constraints; None and empty unless they were asked for."""

    id: int
    end: End | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(eq=False)
class Answer:
    """An answer that is wanted, and how far it is."""

    prompt: Sequence[int]
    spec: SamplingSpec
    uniforms: np.ndarray | None
    """(max_new_tokens,) random numbers in [0, 1); None when greedy."""
    receive: Callable[[Token], bool]
    """Called with each token as soon as it is drawn, in the thread that decodes; returns whether to go on."""
    failed: Callable[[Exception], None]
    """Called instead of further tokens when the model cannot go on with this answer."""
    constraint: Constraint | None = None
    top: int | None = None
    """How many of the likeliest tokens come with each token; 0: its own log-probability only; None: not even that."""
    ids: list[int] = field(default_factory=list)
    _cancelled: threading.Event = field(default_factory=threading.Event)

    def cancel(self) -> None:
        """Nobody waits for the rest of this answer: its row is free from the next step on."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether `cancel` was called."""
        return self._cancelled.is_set()


class Live:
    """One model that answers while new prompts arrive. It is in evaluation mode until `close`."""

    def __init__(self, model: PreTrainedModel, batch_size: int, vocab_size: int | None = None) -> None:
        """`batch_size`: the most rows that are decoded at once. `vocab_size`: as in `SamplingSpec`, of all answers."""
        self.model, self.batch_size, self._vocab_size = model.eval(), batch_size, vocab_size
        self._waiting: deque[list[Answer]] = deque()
        self._running: list[Answer] = []  # in the order of the rows
        self._stack = ExitStack()
        self._prefill_tokens = _PREFILL_TOKENS.get(model.device.type, _PREFILL_TOKENS_GPU)
        self._rows: Rows
        with torch.no_grad():
            size = model.config.get_text_config(decoder=True).vocab_size
            plain = reason_against(model, [i % size for i in range(_PROBE)]) is not None
        if plain:
            self._rows = PlainRows(model)
        else:
            self._rows = SlotRows(self._stack.enter_context(attached(model)))

    def close(self) -> None:
        """Gives the model its own attention back."""
        self._stack.close()

    @property
    def waiting(self) -> int:
        """Answers that wait for a row."""
        return sum(map(len, list(self._waiting)))

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return len(self._running)

    def add(self, answers: Sequence[Answer]) -> None:
        """Asks for answers to one prompt, at most `batch_size`; the prompt is computed once for all of them."""
        assert 0 < len(answers) <= self.batch_size and all(answer.prompt is answers[0].prompt for answer in answers)
        assert all(answer.spec.vocab_size == self._vocab_size for answer in answers)
        self._waiting.append(list(answers))

    def clear(self) -> None:
        """Forgets all answers; nobody is told. Also mends the state after a step that was interrupted."""
        self._waiting.clear()
        self._running = []
        self._rows.clear()

    @torch.no_grad()
    def hidden(self, prompt: Sequence[int]) -> Tensor:
        """The last layer's hidden state of each token (T, C)."""
        return self._rows.hidden(prompt)

    @torch.no_grad()
    def logprobs(self, prompt: Sequence[int], top: int) -> list[Token]:
        """The tokens after the first, each with its log-probability and the `top` likeliest in its place.

        Raises:
            GateError: the model's logits are not finite.
        """
        found = []
        for start, logits in self._rows.logits(prompt):
            ids = prompt[start + 1 : start + 1 + len(logits)]
            found += _tokens(logits[: len(ids), : self._vocab_size].float(), ids, [top] * len(ids))
        if not all(token.logprob is not None and math.isfinite(token.logprob) for token in found):
            raise GateError("the model's logits are not finite: its weights are broken")
        return found

    @torch.no_grad()
    def step(self) -> bool:
        """Lets waiting answers enter and decodes one token of each row. Returns False if there was nothing to do."""
        leaving = [i for i, answer in enumerate(self._running) if answer.cancelled]
        entering = self._enter(len(self._running) - len(leaving))
        if leaving or entering:
            self._exchange(leaving, entering)
        if not self._running:
            return bool(leaving or entering or self._waiting)
        running = self._running
        try:
            tokens = [answer.ids[-1] for answer in running]
            positions = [len(answer.prompt) + len(answer.ids) - 1 for answer in running]
            ended = self._record(running, self._rows.decode(tokens, positions))
        except Exception as error:
            self._running = []
            self._rows.clear()
            for answer in running:
                answer.failed(error)
            return True
        if ended:
            self._exchange(ended, [])
        return True

    def _enter(self, taken: int) -> list[tuple[Answer, Held]]:
        """Computes the next waiting prompts, as many as there are rows for, and the first token of their answers."""
        chosen: list[list[Answer]] = []
        tokens = 0
        while self._waiting:
            group = self._waiting[0] = [answer for answer in self._waiting[0] if not answer.cancelled]
            size = len(group[0].prompt) if group else 0
            if group and (taken + len(group) > self.batch_size or (chosen and tokens + size > self._prefill_tokens)):
                break
            self._waiting.popleft()
            if group:
                chosen.append(group)
                taken += len(group)
                tokens += size
        if not chosen:
            return []
        answers = [answer for group in chosen for answer in group]
        try:
            logits, held = self._rows.prefill([group[0].prompt for group in chosen])  # (number of groups, V)
            of = [i for i, group in enumerate(chosen) for _ in group]
            ended = set(self._record(answers, logits[torch.tensor(of, device=logits.device)]))
        except Exception as error:
            for answer in answers:
                answer.failed(error)
            return []
        return [(answer, held[of[i]]) for i, answer in enumerate(answers) if i not in ended]

    def _exchange(self, leaving: Sequence[int], entering: Sequence[tuple[Answer, Held]]) -> None:
        try:
            origin = self._rows.exchange(leaving, [held for _, held in entering])
        except Exception as error:
            lost = [*self._running, *(answer for answer, _ in entering)]
            self._running = []
            self._rows.clear()
            for answer in lost:
                answer.failed(error)
            return
        self._running = [self._running[o] if o >= 0 else entering[~o][0] for o in origin]

    def _record(self, answers: Sequence[Answer], logits: Tensor) -> list[int]:
        """Draws a token for each answer and hands it over; returns the answers that end. logits (B, V)."""
        left, bound = self._bound(answers, logits)
        drawn, finite = self._drawn(answers, left)
        told = [i for i, answer in enumerate(answers) if answer.top is not None]
        numbers: dict[int, Token] = {}
        if told:
            tops = [answers[i].top for i in told]
            own = logits[told, : self._vocab_size].float()
            found = _tokens(own, [drawn[i] for i in told], tops)
            numbers = dict(zip(told, found, strict=True))
        ended = []
        for i, (answer, token) in enumerate(zip(answers, drawn, strict=True)):
            if not finite[i]:
                answer.failed(bound.get(i) or GateError("the model's logits are not finite: its weights are broken"))
                ended.append(i)
                continue
            answer.ids.append(token)
            try:
                if not self._hand_over(answer, token, numbers.get(i)):
                    ended.append(i)
            except Exception as error:  # of this answer alone
                answer.failed(error)
                ended.append(i)
        return ended

    @staticmethod
    def _hand_over(answer: Answer, token: int, number: Token | None) -> bool:
        """Gives an answer its next token; returns whether it goes on."""
        end: End | None = "length" if len(answer.ids) >= answer.spec.max_new_tokens else None
        constraint = answer.constraint
        if token in answer.spec.stop_ids or (constraint is not None and constraint.advance(token)):
            end = "stop"
        said = Token(token, end) if number is None else Token(token, end, number.logprob, number.top)
        return answer.receive(said) and end is None

    def _bound(self, answers: Sequence[Answer], logits: Tensor) -> tuple[Tensor, dict[int, Exception]]:
        """The logits (B, V) without the tokens that constraints forbid, and the errors of constraints."""
        errors: dict[int, Exception] = {}
        bound = [i for i, answer in enumerate(answers) if answer.constraint is not None]
        if not bound:
            return logits, errors
        size = logits.shape[1]
        forbidden = torch.zeros(logits.shape, dtype=torch.bool)
        for i in bound:
            constraint = answers[i].constraint
            assert constraint is not None
            forbidden[i] = True
            try:
                allowed = constraint.allowed()[:size]
                forbidden[i, : len(allowed)] = ~allowed
            except Exception as error:  # of this answer alone
                errors[i] = error
        return logits.masked_fill(forbidden.to(logits.device), -torch.inf), errors

    def _drawn(self, answers: Sequence[Answer], logits: Tensor) -> tuple[list[int], list[bool]]:
        """A token for each answer, and whether its log-probability is finite. Answers of one distribution are drawn
        together."""
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, answer in enumerate(answers):
            spec = answer.spec
            groups.setdefault((spec.temperature, spec.top_k, spec.top_p), []).append(i)
        tokens, finite = [0] * len(answers), [False] * len(answers)
        for members in groups.values():
            spec = answers[members[0]].spec
            own = logits if len(members) == len(answers) else logits[members]  # (members, V)
            uniforms = None
            if spec.temperature > 0:
                numbers = [_number(answers[i]) for i in members]
                uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)
            ids, logprobs = draw(own, spec, uniforms)
            for i, token, logprob in zip(members, ids.tolist(), logprobs.tolist(), strict=True):
                tokens[i], finite[i] = token, math.isfinite(logprob)
        return tokens, finite


def _number(answer: Answer) -> float:
    assert answer.uniforms is not None
    return float(answer.uniforms[len(answer.ids)])


def _tokens(logits: Tensor, ids: Sequence[int], tops: Sequence[int | None]) -> list[Token]:
    """Tokens with their log-probabilities, and the likeliest in their places. logits (N, V)."""
    if not len(ids):
        return []
    logp = torch.log_softmax(logits, -1)
    own = logp.gather(-1, torch.tensor([[i] for i in ids], device=logp.device)).squeeze(-1).tolist()
    most = min(max(top or 0 for top in tops), logp.shape[-1])
    best = logp.topk(most, -1)
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        Token(token, None, logprob, tuple(zip(names[:top], values[:top], strict=True)))
        for token, logprob, (names, values), top in zip(ids, own, pairs, tops, strict=True)
    ]
