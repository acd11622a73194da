"""A model's side of a conversation in the terminal. It answers with the engine of rollouts, one answer at a time."""

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from baton.answering import Answering, Sampling
from data.errors import DataError
from data.records import Message
from data.sampling import uniform
from handoff.parent import Parent
from rollout.live import Answer, Live, Token


@dataclass(frozen=True)
class ChatSampling:
    """The sampling parameters. `temperature` 0: always the likeliest token."""

    temperature: float
    max_new_tokens: int
    seed: int


class Speaker(Answering):
    """A model with its own conversation. What it samples depends on the seed and the conversation alone."""

    def __init__(self, parent: Parent, sampling: ChatSampling) -> None:
        super().__init__(parent)
        self.sampling = sampling
        self.live = Live(self.model, 1, self.encoder.vocab_size)
        self.system: str | None = None
        self.turns: list[Message] = []

    def reset(self, system: str | None) -> None:
        """Forgets the conversation."""
        self.system = system
        self.turns = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields pieces of the answer to the user's next message; after its end, both join the conversation.

        Raises DataError if the message cannot be expressed in the model's template, or fills the whole context.
        """
        asked = [*self.turns, Message("user", text)]
        ids = self._prompt(asked)
        said, tokens, errors = self.streamed(), list[Token](), list[Exception]()

        def receive(token: Token) -> bool:
            tokens.append(token)
            return True

        room = min(self.sampling.max_new_tokens, self.context - len(ids))
        spec = self.spec(room, Sampling(self.sampling.temperature))
        noise = uniform((room,), self.sampling.seed, "chat", len(asked)) if spec.temperature > 0 else None
        self.live.add([Answer(ids, spec, noise, receive, errors.append)])
        done = False
        try:
            while not done:
                self.live.step()
                if errors:
                    raise errors[0]
                for token in tokens:
                    piece = "" if token.id in spec.stop_ids else said.add(token.id)
                    done = token.end is not None or said.stopped
                    if piece:
                        yield piece
                tokens.clear()
            if rest := said.finish():
                yield rest
        finally:
            self.live.clear()
            self.turns = [*asked, Message("assistant", said.text)]

    def _prompt(self, turns: Sequence[Message]) -> list[int]:
        """The conversation as ids, without its oldest exchanges if they leave no room for an answer."""
        before = [] if self.system is None else [Message("system", self.system)]
        room = self.context - min(self.sampling.max_new_tokens, self.context // 2)
        kept = list(turns)
        while True:
            ids = self.prompt([*before, *kept])
            if len(ids) <= room:
                return ids
            if len(kept) == 1:
                raise DataError(f"{len(ids)} tokens are too many for {self.name}: {room} fit beside an answer")
            kept = kept[2:]
