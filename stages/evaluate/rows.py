"""What the models read: the prompts, questions and pairs of a task in the form that its entry of the recipe says."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from data.encode import Encoder
from data.errors import DataError, RowRefused
from data.records import Message, Origin, Preference, Prompt, Question
from data.rows import Column, Kind, Prompts, Row, json_columns
from stages.evaluate.tasks import FIELD, QUESTION

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_APART = "\n\n"


@dataclass(frozen=True)
class Asked(Prompts):
    """Prompts in a task's form. `shots` are solved examples: (question in the same form, answer)."""

    plain: bool = False
    """Whether the model continues plain text, instead of answering in a conversation."""
    prompt: str = QUESTION
    system: str | None = None
    shots: tuple[tuple[str, str], ...] = ()
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
        if self.prompt != QUESTION:
            text = filled(self.prompt, messages[-1].content, record.columns, record.origin)
            messages = (*messages[:-1], replace(messages[-1], content=text))
        if self.plain:
            if len(messages) > 1:
                return RowRefused("several turns, where plain text asks one question", "set `form: chat`")
            return replace(record, messages=(Message("user", continued(self.shots, messages[-1].content)),))
        shown = [turn for asked, said in self.shots for turn in (Message("user", asked), Message("assistant", said))]
        begin, rest = (messages[:1], messages[1:]) if messages[0].role == "system" else ((), messages)
        if self.system is not None and not begin:
            begin = (Message("system", self.system),)
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
        name = found[1]
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
        return "\n".join(map(str, told)) if isinstance(told, list) else str(told)

    return FIELD.sub(value, form)


def continued(shots: Sequence[tuple[str, str]], asked: str) -> str:
    """The solved examples and the question as plain text, as lm-evaluation-harness joins them."""
    return "".join(f"{before} {answer}{_APART}" for before, answer in shots) + asked


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
