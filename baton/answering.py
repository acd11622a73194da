"""A model that answers, loaded for `baton chat` and `baton serve`, and how a conversation is put to it.

A model with a chat template gets the conversation as in training (`data.encode`). One without, a base model, gets it as
text, after two exchanges that show the form; its answer ends where it begins to write the user's next turn.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from data.encode import Encoder
from data.errors import RowRefused
from data.records import Message
from data.streaming import Form, Streamed
from handoff.parent import Parent
from handoff.window import window
from rollout.positions import longest_alike
from rollout.sampling import SamplingSpec
from training import engines
from training.config import ModelArguments
from training.model import Model, load_encoder
from training.precision import answering_dtype

_SYSTEM = "A conversation between a user and an assistant. The assistant's answers are short and true."
_SHOWN = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "The capital of France is Paris."),
    Message("user", "How many days are in a week?"),
    Message("assistant", "A week has seven days."),
)
_NAMES = {"user": "User", "assistant": "Assistant"}
NEXT_TURN = "\nUser:"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. `temperature` 0: always the likeliest token."""

    temperature: float
    top_p: float = 1.0
    top_k: int | None = None


class Answering:
    """One model with its encoder."""

    def __init__(self, parent: Parent) -> None:
        self.parent, self.name = parent, parent.name
        self.encoder: Encoder = load_encoder(parent)
        self._encoding = threading.Lock()  # the tokenizer has a switch for special tokens
        engine = engines.current()
        keys: dict[str, Any] = {"dtype": answering_dtype(engine), "dropout": False, "bf16": False, "frozen": True}
        model = Model.load(engine, parent, "policy", self.encoder, ModelArguments(), **keys)
        self.model: PreTrainedModel = model.freeze().module
        self.context = min(_context(self.model.config), longest_alike(self.model.config) or 1 << 30)
        """The most tokens of a prompt and its answer together."""

    @property
    def as_text(self) -> str:
        """Why conversations are put to the model as text; empty if it has a template."""
        return self.encoder.lacks

    @property
    def stops(self) -> list[str]:
        """Texts at which an answer in a conversation ends, besides the model's stop tokens."""
        return [NEXT_TURN] if self.as_text else []

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The conversation as ids. Raises DataError if it cannot be expressed."""
        if self.as_text:
            return self.document(conversation_text(messages))
        with self._encoding:
            return self.encoder.prompt(messages)

    def chat(self, messages: Sequence[Message]) -> tuple[list[int], list[bool]]:
        """The whole conversation as ids, and the mask of its answers. Raises DataError if it cannot be expressed."""
        with self._encoding:
            return self.encoder.chat(messages)

    def document(self, text: str) -> list[int]:
        """The beginning of a text as ids; a text that spells a special token stays text."""
        with self._encoding:
            return self.encoder.document(text)[:-1]

    def streamed(self, stops: Sequence[str] = (), form: Form = "answer") -> Streamed:
        """The text of an answer in a conversation while its tokens arrive."""
        return Streamed(self.encoder, [*stops, *self.stops], form=form, trimmed=bool(self.as_text))

    def spec(self, max_new_tokens: int, sampling: Sampling) -> SamplingSpec:
        """The distribution of an answer. Greedy answers have no other parameters."""
        more = {}
        if sampling.temperature > 0:
            more = {"top_k": sampling.top_k, "top_p": sampling.top_p if sampling.top_p < 1 else None}
        return SamplingSpec.of(self.encoder, max_new_tokens, temperature=sampling.temperature, **more)

    @property
    def hidden_size(self) -> int:
        """Size of a hidden state."""
        return int(self.model.config.get_text_config(decoder=True).hidden_size)

    def vector(self, hidden: torch.Tensor, pooling: str) -> list[float]:
        """The embedding of a text, of length 1, from its hidden states (T, C): their mean, or the last one."""
        pooled = hidden.float().mean(0) if pooling == "mean" else hidden[-1].float()
        found: list[float] = torch.nn.functional.normalize(pooled, dim=0).tolist()
        return found


def conversation_text(messages: Sequence[Message]) -> str:
    """The conversation as text, up to where the assistant's answer begins. Raises RowRefused.

    >>> print(conversation_text([Message("user", "Why?")])[-43:])
    A week has seven days.
    <BLANKLINE>
    User: Why?
    Assistant:
    """
    system, turns = [m.content for m in messages if m.role == "system"], [m for m in messages if m.role != "system"]
    parts = [" ".join(system) or _SYSTEM]
    for message in (*_SHOWN, *turns):
        if message.role == "tool" or message.extra:
            raise RowRefused("tools need a chat template, which this model does not have")
        begins = "\n\n" if message.role == "user" else "\n"
        parts.append(f"{begins}{_NAMES[message.role]}: {message.content.strip()}")
    return "".join(parts) + "\nAssistant:"


def _context(config: PretrainedConfig) -> int:
    """The model's window; some architectures have no limit."""
    found = window(config.to_dict())
    return 1 << 30 if found is None else found.tokens
