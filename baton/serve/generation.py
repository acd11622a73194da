"""The answers to one request, from the thread that computes them to the one that sends them."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from baton.answering import Sampling
from baton.serve.errors import Refused, wrong
from baton.serve.fields import Sampled
from baton.serve.served import Served, Worker, log
from data.sampling import uniform
from data.streaming import Streamed
from handoff.errors import GateError, UserError
from rollout.live import Answer, Constraint, End, Token


@dataclass
class Piece:
    """The next part of an answer."""

    index: int
    text: str
    tokens: list[Token]
    end: End | None


@dataclass
class Choice:
    """One answer, as far as it is. `receive` is called in the thread that computes."""

    index: int
    said: Streamed
    stop_ids: frozenset[int]
    post: Callable[[Piece], None]
    whole: bool
    """Whether it is handed over at its end only."""
    tokens: int = 0
    _text: str = ""
    _held: list[Token] = field(default_factory=list)

    def receive(self, token: Token) -> bool:
        """Takes a token; returns whether more are wanted."""
        self.tokens += 1
        self._held.append(token)
        if token.id not in self.stop_ids:
            self._text += self.said.add(token.id)
        end: End | None = "stop" if self.said.stopped else token.end
        if end is not None:
            self._text += self.said.finish()
            end = "stop" if self.said.stopped else end
        if end is not None or (not self.whole and (self._text or token.logprob is not None)):
            self.post(Piece(self.index, self._text, self._held, end))
            self._text, self._held = "", []
        return end is None


class Generation:
    """All answers to a request. Close it when nobody waits any longer."""

    def __init__(
        self,
        served: Served,
        worker: Worker,
        request: Sampled,
        prompts: Sequence[Sequence[int]],
        *,
        room: int,
        field_name: str,
        said: Callable[[], Streamed],
        top: int | None,
        constraint: Callable[[], Constraint] | None = None,
    ) -> None:
        """
        Args:
            served: the model.
            worker: the thread that computes.
            request: for its sampling.
            prompts: ids; `request.n` answers to each.
            room: the most tokens of an answer.
            field_name: the field that the prompts come from.
            said: makes the text of an answer.
            top: as in `rollout.live.Answer`.
            constraint: makes the constraint of an answer.

        Raises:
            Refused: a prompt or the number of answers is too large, or there is no place in the queue.
        """
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Piece | Exception] = asyncio.Queue()
        check_size(served, request, prompts, field_name)
        seed = secrets.randbits(62) if request.seed is None else request.seed
        sampling = Sampling(request.temperature, request.top_p, request.top_k)
        self.choices: list[Choice] = []
        self.prompt_tokens = sum(map(len, prompts))
        groups = []
        for number, prompt in enumerate(prompts):
            spec = served.spec(max(min(room, served.context - len(prompt)), 1), sampling)
            group = []
            for i in range(request.n):
                choice = Choice(
                    number * request.n + i, said(), frozenset(spec.stop_ids), self._post, not request.stream
                )
                noise = uniform((spec.max_new_tokens,), seed, "serve", i) if spec.temperature > 0 else None
                bound = None if constraint is None else constraint()
                group.append(Answer(prompt, spec, noise, choice.receive, self._failed, bound, top))
                self.choices.append(choice)
            groups.append(group)
        self._left = len(self.choices)
        self.first: float | None = None
        """When the first part of an answer came."""
        self._answers = [answer for group in groups for answer in group]
        worker.add(served, groups)

    async def pieces(self) -> AsyncIterator[Piece]:
        """Parts of the answers in the order of their generation. Raises Refused, 500, when the model fails."""
        while self._left:
            piece = await self._queue.get()
            self.first = self.first or time.monotonic()
            if isinstance(piece, Exception):
                raise failure(piece)
            self._left -= piece.end is not None
            yield piece

    @property
    def complete(self) -> bool:
        """Whether every answer has ended."""
        return self._left == 0

    @property
    def completion_tokens(self) -> int:
        """Tokens of all answers up to now."""
        return sum(choice.tokens for choice in self.choices)

    def close(self) -> None:
        """Frees the rows of answers that are not finished."""
        for answer in self._answers:
            answer.cancel()
        self._worker.wake()

    def _post(self, piece: Piece | Exception) -> None:
        try:
            self._loop.call_soon_threadsafe(self._queue.put_nowait, piece)
        except RuntimeError:  # the loop has ended, and with it everyone who waits
            self.close()

    def _failed(self, error: Exception) -> None:
        self._post(error)


def check_size(served: Served, request: Sampled, prompts: Sequence[Sequence[int]], field_name: str) -> None:
    """Raises Refused, 400, if the model or the server cannot take these prompts."""
    limits = served.limits
    if request.n > min(limits.max_n, limits.batch_size):
        raise wrong("n", f"at most {min(limits.max_n, limits.batch_size)} answers")
    if len(prompts) * request.n > limits.queue:
        raise wrong(field_name, f"{len(prompts)} prompts with n {request.n}; at most {limits.queue} answers a request")
    asked = request.max_tokens
    for prompt in prompts:
        if len(prompt) + max(asked or 1, 1) > served.context:
            told = f" and max_tokens {asked}" if asked and len(prompt) < served.context else ""
            raise wrong(
                field_name if len(prompt) >= served.context or asked is None else "max_tokens",
                f"{len(prompt)} tokens of the prompt{told} are more than the {served.context} that fit",
                "context_length_exceeded",
            )


def failure(error: Exception) -> Refused:
    """What a client is told when the model fails. An unknown error's text may have some of the request in it, and is
    neither logged nor sent."""
    known = isinstance(error, UserError | GateError)
    message = str(error) if known else f"the model failed ({type(error).__name__})"
    log.error("an answer failed: %s", message)
    log.debug("where it failed", exc_info=error)
    return Refused(500, message, code="model_failed")
