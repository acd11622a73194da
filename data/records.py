"""The five record types into which every source is converted before encoding. Each record has its origin."""

from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

Role: TypeAlias = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a record comes from: `file` as the user named it (or `world:<kind>`), `row` counted from 1."""

    file: str
    row: int

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str
    trained: bool = field(default=True, repr=False)
    """Whether the loss counts the turn, if it is an answer. Not in `repr`, by whose hash mixtures choose rows."""
    extra: str = field(default="", repr=False)
    """What the turn holds besides its text (see data/calls.py), as JSON; empty if nothing."""


@dataclass(frozen=True, slots=True)
class Text:
    """A document for pretraining."""

    text: str
    origin: Origin


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation for instruction tuning; its last message is the assistant's."""

    messages: tuple[Message, ...]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Preference:
    """A conversation that ends with the user's turn, and two answers to it, the first better than the second."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: Origin
    columns: dict[str, Any] = field(default_factory=dict, repr=False)
    """The other columns of the row. Not in `repr`, by whose hash mixtures choose rows."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with the user's turn, and the columns for reward functions and checkers."""

    messages: tuple[Message, ...]
    origin: Origin
    columns: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Question:
    """A question with several answers to choose from, of which one is right."""

    text: str
    choices: tuple[str, ...]
    right: int
    """Index of the right choice."""
    origin: Origin
    columns: dict[str, Any] = field(default_factory=dict, repr=False)
    """The other columns of the row."""


Record: TypeAlias = Text | Chat | Preference | Prompt | Question
