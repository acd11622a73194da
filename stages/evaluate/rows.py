"""What the models read: the prompts, questions and pairs of a task in the form that its entry of the recipe says."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

from data.encode import Encoder
from data.errors import DataError, RowRefused
from data.records import Message, Origin, Preference, Prompt, Question
from data.rows import Column, Kind, Prompts, Row, json_columns
from stages.evaluate.tasks import FIELD, QUESTION

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_APART = "\n\n"


Shot: TypeAlias = tuple[str | None, str, str]
"""A solved example: its value of the column `by`, the question in the task's form, and the answer."""


@dataclass(frozen=True)
class Asked(Prompts):
    """Prompts in a task's form."""

    plain: bool = False
    """Whether the model continues plain text, instead of answering in a conversation."""
    prompt: str = QUESTION
    system: str | None = None
    intro: str = ""
    shots: tuple[Shot, ...] = ()
    """Solved examples."""
    by: str | None = None
    """Column whose value examples share with the question."""
    columns: ClassVar[dict[str, Column]] = Prompts.columns

    def encode(
        self, records: Sequence[Prompt], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row | RowRefused]:
        """Yields each prompt's ids with its record, whose messages are those that the model reads."""
        made = [self._asked(record) for record in records]
        rows = super().encode([one for one in made if isinstance(one, Prompt)], encoder, notes, facts)
        for one in made:
            yield one if isinstance(one, RowRefused) else next(rows)

    def ids(self, records: Sequence[Prompt], encoder: Encoder) -> list[list[int] | RowRefused]:
        """What the model reads of each, whose form is made already."""
        if not self.plain:
            return super().ids(records, encoder)
        return [ids[:-1] for ids in encoder.documents([record.messages[-1].content for record in records])]

    def _asked(self, record: Prompt) -> Prompt | RowRefused:
        messages = record.messages
        question = messages[-1].content

        def fill(form: str) -> str:
            return filled(form, question, record.columns, record.origin)

        if self.prompt != QUESTION:
            messages = (*messages[:-1], replace(messages[-1], content=fill(self.prompt)))
        shots = shots_for(self.shots, self.by, record.columns)
        if self.plain:
            if len(messages) > 1:
                return RowRefused("several turns, where plain text asks one question", "set `form: chat`")
            text = fill(self.intro) + continued(shots, messages[-1].content)
            return replace(record, messages=(Message("user", text),))
        shown = [turn for asked, said in shots for turn in (Message("user", asked), Message("assistant", said))]
        begin, rest = (messages[:1], messages[1:]) if messages[0].role == "system" else ((), messages)
        if self.system is not None and not begin:
            begin = (Message("system", fill(self.system)),)
        return replace(record, messages=(*begin, *shown, *rest))


@dataclass(frozen=True)
class Compared(Kind[Preference]):
    """Pairs of answers, not encoded: models with different tokenizers read them."""

    want = Preference
    columns: ClassVar[dict[str, Column]] = {"texts": "texts", "record": "text"}

    def encode(
        self, records: Sequence[Preference], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row]:
        """Yields both answers, and beside them the prompt and where the row comes from."""
        for record in records:
            messages = [[message.role, message.content, True, message.extra] for message in record.prompt]
            rest = [messages, [record.origin.file, record.origin.row], json_columns(record, notes)]
            yield {"texts": [record.chosen, record.rejected], "record": json.dumps(rest)}

    def length(self, row: Row) -> int:
        """Number of answers."""
        return len(row["texts"])

    def read(self, row: Row) -> Preference:
        """The record as it was read."""
        chosen, rejected = row["texts"]
        messages, origin, columns = json.loads(row["record"])
        return Preference(tuple(Message(*m) for m in messages), chosen, rejected, Origin(*origin), columns)


def filled(form: str, question: str, columns: Mapping[str, Any], origin: Origin, **more: str) -> str:
    """The form with its fields: the question, what is in `more`, and columns of the row.

    Raises:
        DataError: the row has no such column.
    """

    def value(found: Any) -> str:
        name, way = found[1], found[2]
        if name is None:
            return str(found[0][1:-1])
        own = {"question": question, **more}
        if name not in own and columns.get(name) is None:
            there = ", ".join(name for name in columns if columns[name] is not None)
            raise DataError(
                f"{origin}: the task's `prompt` reads the column `{name}`, which the row does not have; besides "
                f"`{'`, `'.join(own)}` there are {there or 'none'}"
            )
        told = own.get(name, columns.get(name))
        if not isinstance(told, str):
            if isinstance(told, list) and all(isinstance(one, str) for one in told):
                told = "\n".join(told)
            else:
                told = json.dumps(told, ensure_ascii=False)
        ways = {"words": told.replace("_", " "), "strip": told.strip(), "capitalize": told.capitalize()}
        return ways.get(way, told)

    return FIELD.sub(value, form)


def continued(shots: Sequence[tuple[str, str]], asked: str) -> str:
    """The solved examples and the question as plain text, as lm-evaluation-harness joins them."""
    return "".join(f"{before} {answer}{_APART}" for before, answer in shots) + asked


def shots_for(shots: Sequence[Shot], by: str | None, columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The examples for a row with these columns: (question, answer)."""
    key = None if by is None else str(columns.get(by))
    return [(asked, answer) for of, asked, answer in shots if of == key]


def first_of_each(count: int, keys: Sequence[str | None]) -> list[int]:
    """The places of the first `count` of each key."""
    seen: Counter[str | None] = Counter()
    kept = []
    for place, key in enumerate(keys):
        seen[key] += 1
        if seen[key] <= count:
            kept.append(place)
    return kept


def without_marks(text: str) -> str:
    """Text of WikiHow without the marks that HellaSwag's rows have, as lm-evaluation-harness takes them off."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def listed(question: Question) -> str:
    """The choices as lines `A. ...`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, question.choices))


def group_keys(place: str, column: str | None, columns: Sequence[Mapping[str, Any]]) -> tuple[str, list[str | None]]:
    """(column, each row's group: the column's value as text, or None if the row lacks the column).

    Args:
        place: the key of the recipe that names the column, for the message.
        column: that column; None: `family`, if there is one.

    Raises:
        DataError: no row has the column.
    """
    name = column or "family"
    values = [row.get(name) for row in columns]
    keys = [None if value is None else str(value) for value in values]
    if column is not None and not any(keys):
        there = sorted({name for row in columns for name in row})
        raise DataError(f"{place}: no row has the column {name}; there are {', '.join(there) or 'none'}")
    return name, keys
