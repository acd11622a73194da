"""Converts a row's columns to a conversation, a pair or a document, for every common published format.

Each reader takes the columns that it knows. Other columns are passed on to prompts, where reward functions read them;
for other records the accounting names them once, so that nothing is ignored silently. A missing column or an empty cell
(`null`) is an error at once, because it means that the format was misunderstood. A row that is merely unsuitable (two
answers to different prompts) is refused with a reason and counted.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, TypeAlias

from data.errors import DataError, RowRefused
from data.records import Message, Origin, Role
from data.sources import Row

Format: TypeAlias = Literal[
    "text", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "hh_rlhf", "gsm8k"
]

EXPECTED: Final[dict[Format, str]] = {
    "text": "`text`",
    "prompt_completion": "`prompt` and `completion` (or `response`); `prompt` alone where only prompts are wanted",
    "alpaca": "`instruction` and `output` (or `response`), optionally `input` and `system`",
    "messages": "`messages`: a list of {role, content}",
    "sharegpt": "`conversations`: a list of {from, value}, optionally `system`",
    "preference": "`chosen` and `rejected`; where they are bare answers, also `prompt`, `question`, `instruction` or "
    "`conversations`",
    "hh_rlhf": "`chosen` and `rejected`: transcripts that begin with `Human:`",
    "gsm8k": "`question` and `answer`, the final answer after `####`",
}
"""The columns of each format, for error messages."""

_ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# The instruction header inside the prompts of Alpaca and Dolly data. The chat template replaces it.
_HEADER = re.compile(
    r"\ABelow is an instruction that describes a task.*?\n\n### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*\Z",
    re.DOTALL,
)
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")

HEADER_REMOVED = "prompts whose instruction header was taken off"


@dataclass(frozen=True, slots=True)
class Document:
    text: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the last may be of any role."""

    messages: tuple[Message, ...]
    columns: dict[str, Any]
    """Columns that the reader did not use."""
    found: dict[str, Any] = field(default_factory=dict)
    """Values that it derived for checkers, e.g. the final answer."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Pair:
    """Turns up to the answer, and two answers."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    columns: dict[str, Any]


Parsed: TypeAlias = Document | Conversation | Pair


@dataclass
class Columns:
    """A row's columns, with a record of which were read."""

    values: Mapping[str, Any]
    origin: Origin
    format: Format
    needs_answer: bool
    used: set[str] = field(default_factory=set)

    def has(self, name: str) -> bool:
        """Whether the column exists and is not empty; an empty optional column counts as absent."""
        return self.values.get(name) is not None

    def get(self, *names: str) -> Any:
        """The first of these columns that the row has.

        Raises:
            DataError: the row has none of them, or the value is null.
        """
        for name in names:
            if name in self.values:
                self.used.add(name)
                if self.values[name] is None:
                    raise DataError(f"{self.origin}: `{name}` is null; give it a value, or remove the row")
                return self.values[name]
        raise DataError(
            f"{self.origin}: no column {' or '.join(f'`{n}`' for n in names)}; the row has "
            f"{', '.join(self.values) or 'none'}. Format {self.format} expects {EXPECTED[self.format]}"
        )

    def text(self, *names: str) -> str:
        """As `get`, for a column that must hold text."""
        value = self.get(*names)
        if not isinstance(value, str):
            name = next(n for n in names if n in self.values)
            raise DataError(f"{self.origin}: `{name}` is {type(value).__name__}; expected text")
        return value

    def rest(self) -> dict[str, Any]:
        return {name: value for name, value in self.values.items() if name not in self.used}


def detect(row: Row, wants_text: bool, origin: Origin) -> Format:
    """The format of a file, detected from its first row.

    Raises:
        DataError: no format fits; names the row's columns and those that each format expects.
    """
    if isinstance(row, str):
        return "text"
    names = set(row)
    if wants_text and "text" in names:
        return "text"
    if {"chosen", "rejected"} <= names:
        bare = not names & {"prompt", "question", "instruction", "conversations", "messages"}
        return "hh_rlhf" if bare and isinstance(row["chosen"], str) else "preference"
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if "instruction" in names and names & {"output", "response"}:
        return "alpaca"
    if {"question", "answer"} <= names:
        return "gsm8k"
    if "prompt" in names:
        return "prompt_completion"
    if "text" in names:
        return "text"
    known = "\n".join(f"  {name}: {columns}" for name, columns in EXPECTED.items())
    raise DataError(
        f"{origin}: columns {', '.join(row) or '(none)'} are of no known format. Rename them to fit one of:\n{known}"
    )


def parse(row: Row, format: Format, origin: Origin, needs_answer: bool) -> Parsed:
    """Parses one row. `needs_answer`: a prompt without a column for its answer is an error.

    Raises:
        DataError: a column is missing, null or of the wrong type.
        RowRefused: the row cannot be used.
    """
    if isinstance(row, str):
        if format != "text":
            raise DataError(f"{origin}: a string; format {format} expects an object with {EXPECTED[format]}")
        return Document(row)
    return _READERS[format](Columns(row, origin, format, needs_answer))


def _text(row: Columns) -> Document:
    return Document(row.text("text"))


def _prompt_completion(row: Columns) -> Conversation:
    prompt, header = _prompt(row, "prompt")
    notes = (HEADER_REMOVED,) if header else ()
    if not row.needs_answer and "completion" not in row.values and "response" not in row.values:
        return Conversation(prompt, row.rest(), notes=notes)
    answer = row.get("completion", "response")
    answers = (Message("assistant", answer),) if isinstance(answer, str) else _turns(answer, row, "completion")
    return Conversation(prompt + answers, row.rest(), notes=notes)


def _alpaca(row: Columns) -> Conversation:
    question = Message("user", _instruction(row))
    answer = Message("assistant", row.text("output", "response"))
    return Conversation((*_system(row), question, answer), row.rest())


def _messages(row: Columns) -> Conversation:
    messages = _turns(row.get("messages"), row, "messages")
    if row.values.get("label") is False:
        raise RowRefused("labelled as a bad answer (label: false)")
    if row.values.get("label") is True:
        row.used.add("label")
    return Conversation(messages, row.rest())


def _sharegpt(row: Columns) -> Conversation:
    messages = _turns(row.get("conversations"), row, "conversations")
    return Conversation(_system(row) + messages, row.rest())


def _preference(row: Columns) -> Pair:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if isinstance(chosen, list) and isinstance(rejected, list):
        good, bad = _turns(chosen, row, "chosen"), _turns(rejected, row, "rejected")
        if good and good[0].role != "assistant":
            # Both are whole conversations: the prompt is their common beginning, so a prompt column adds nothing.
            row.used.update({"prompt", "messages"})
            return _fork(good, bad, row)
        prompt = _pair_prompt(row)
        return _fork(prompt + good, prompt + bad, row)
    prompt = _pair_prompt(row)
    return Pair(prompt, _answer(chosen, row, "chosen"), _answer(rejected, row, "rejected"), row.rest())


def _pair_prompt(row: Columns) -> tuple[Message, ...]:
    if row.has("conversations"):
        return _system(row) + _turns(row.get("conversations"), row, "conversations")
    if row.has("instruction"):
        # The single answer that Alpaca data had before pairs were added.
        row.used.add("output")
        return (*_system(row), Message("user", _instruction(row)))
    if row.has("question"):
        return (*_system(row), Message("user", row.text("question")))
    return _system(row) + _prompt(row, "prompt")[0]


def _answer(value: Any, row: Columns, name: str) -> str:
    """An answer given as text or as one turn."""
    if isinstance(value, str):
        return value
    turn = _turn(value, row.origin, name)
    if turn.role != "assistant":
        raise RowRefused("chosen or rejected is not a turn of the assistant")
    return turn.content


def _fork(good: tuple[Message, ...], bad: tuple[Message, ...], row: Columns) -> Pair:
    """A pair from two whole conversations that differ only in their last answer."""
    if not good or not bad or good[-1].role != "assistant" or bad[-1].role != "assistant" or good[:-1] != bad[:-1]:
        raise RowRefused("chosen and rejected do not answer the same prompt")
    return Pair(good[:-1], good[-1].content, bad[-1].content, row.rest())


def _hh_rlhf(row: Columns) -> Pair:
    good, bad = (_transcript(row.text(name), row.origin, name) for name in ("chosen", "rejected"))
    return _fork(good, bad, row)


def _transcript(text: str, origin: Origin, name: str) -> tuple[Message, ...]:
    before, *parts = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise DataError(
            f"{origin}: `{name}` does not begin with `Human:`; format hh_rlhf expects {EXPECTED['hh_rlhf']}; bare "
            "answers need a `prompt` column beside them"
        )
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[parts[i]], parts[i + 1].strip()) for i in range(0, len(parts), 2))


def _gsm8k(row: Columns) -> Conversation:
    question, answer = row.text("question"), row.text("answer")
    solution, mark, final = answer.rpartition("####")
    if not mark or not solution.strip() or not final.strip():
        raise RowRefused("no final answer after ####")
    # Commas only group digits here, and checkers compare numbers.
    found = {"answer": final.strip().replace(",", "")}
    return Conversation((Message("user", question), Message("assistant", answer)), row.rest(), found)


_READERS: Final[dict[Format, Callable[[Columns], Parsed]]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "hh_rlhf": _hh_rlhf,
    "gsm8k": _gsm8k,
}


def _system(row: Columns) -> tuple[Message, ...]:
    """The system message, if it has its own column."""
    return (Message("system", row.text("system")),) if row.has("system") else ()


def _instruction(row: Columns) -> str:
    instruction = row.text("instruction")
    context = row.text("input") if row.has("input") else ""
    row.used.add("input")
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _prompt(row: Columns, name: str) -> tuple[tuple[Message, ...], bool]:
    """A prompt given as text or as turns, and whether an instruction header was removed from it."""
    value = row.get(name)
    if not isinstance(value, str):
        return _turns(value, row, name), False
    header = _HEADER.match(value)
    if header is None:
        return (Message("user", value),), False
    parts = [part for part in (header["instruction"], header["input"]) if part]
    return (Message("user", "\n\n".join(parts)),), True


def _turns(value: Any, row: Columns, column: str) -> tuple[Message, ...]:
    """A list of turns, each {role, content} or {from, value}."""
    if not isinstance(value, list):
        raise DataError(f"{row.origin}: `{column}` is {type(value).__name__}; expected a list of turns")
    return tuple(_turn(turn, row.origin, f"{column}[{i}]") for i, turn in enumerate(value))


def _turn(turn: Any, origin: Origin, place: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{origin}: `{place}` is {type(turn).__name__}; expected {{role, content}} or {{from, value}}")
    who, what = ("from", "value") if "from" in turn else ("role", "content")
    if turn.get(who) is None or turn.get(what) is None:
        missing = who if turn.get(who) is None else what
        state = "is null" if missing in turn else "is missing"
        raise DataError(
            f"{origin}: `{place}.{missing}` {state}; the turn has {', '.join(turn)}; remove the row or give it"
        )
    role = _ROLES.get(turn[who])
    if role is None:
        raise DataError(f"{origin}: `{place}.{who}` is {turn[who]!r}; known roles are {', '.join(_ROLES)}")
    return Message(role, _content(turn[what], origin, f"{place}.{what}"))


def _content(value: Any, origin: Origin, place: str) -> str:
    """Text, or a list of text parts {type: text, text: ...} (some data has `value` instead of `text`)."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{origin}: `{place}` is {type(value).__name__}; expected text or a list of text parts")
    texts = []
    for i, part in enumerate(value):
        text = part.get("text", part.get("value")) if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise DataError(f"{origin}: `{place}[{i}]` is not a text part; only text can be trained on")
        texts.append(text)
    return "".join(texts)
