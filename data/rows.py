"""The kinds of rows that stages train on, and `Rows`, which reads rows of one kind from memory-mapped files.

A kind defines which records it reads, how a batch of them is encoded, and which columns are stored. data/shards.py
writes and opens the files.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, TypeAlias, TypeVar, overload

from data.accounting import Accounting
from data.encode import EncodedPrompt, Encoder
from data.errors import DataError, RowRefused, TemplateFailed
from data.records import Chat, Message, Origin, Preference, Prompt, Question, Record, Text
from data.turns import EarlierTurns

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from numpy.typing import NDArray

T = TypeVar("T")
Row: TypeAlias = dict[str, Any]
Column: TypeAlias = Literal["ids", "flags", "text", "texts"]
"""How a column is stored: token ids (int32), one bit for each token, one string, several strings."""
Truncation: TypeAlias = Literal["drop", "error", "keep_end"]

_READ_TOGETHER = 1000


class TooLong(RowRefused):
    """A row with more tokens than are allowed."""

    def __init__(self, tokens: int, key: str, otherwise: str = "") -> None:
        """`key`: the one of the recipe that says how many are allowed. `otherwise`: what helps besides raising it."""
        super().__init__(f"longer than {key}", f"raise {key}{otherwise}")
        self.tokens = tokens


class Kind(Generic[T]):
    """A kind of rows; `T` is the type that a stage receives for a row. A subclass is a dataclass of its settings."""

    want: type[Record]
    """The type of the records to read."""
    columns: ClassVar[dict[str, Column]]
    stream: ClassVar[bool] = False
    """Whether the rows are stored as one stream of their column `ids`, in the order of use."""
    max_length: int
    """Maximum tokens of a row; only for kinds that drop longer rows."""
    length_key: ClassVar[str] = "max_length"
    """The recipe's key that gives it."""

    def encode(
        self, records: Sequence[Any], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row | list[Row] | RowRefused]:
        """Yields each record's row or rows, or the reason why it is dropped.

        Args:
            notes: counts for the user (see `Accounting.notes`); added to.
            facts: counts over the rows for the stage (see `Rows.facts`); added to.

        Raises:
            DataError: a row is too long and `truncation` is `error`.
        """
        raise NotImplementedError

    def length(self, row: Row) -> int:
        """Tokens of a row."""
        raise NotImplementedError

    def facts(self, value: T) -> Counter[str]:
        """What a row that is dropped later takes out of the facts. A stream's rows are not dropped later."""
        return Counter()

    def read(self, row: Row) -> T:
        """Converts a stored row to the form that the stage receives."""
        return row  # type: ignore[return-value]


@dataclass(frozen=True)
class Documents(Kind[Row]):
    """Documents, concatenated into one stream of tokens (`Rows.tokens`). `facts["bytes"]`: UTF-8 bytes of all texts."""

    want = Text
    columns: ClassVar[dict[str, Column]] = {"ids": "ids"}
    stream: ClassVar[bool] = True

    def encode(
        self, records: Sequence[Text], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row]:
        """Yields each document's ids, which end with the end token; drops none."""
        assert encoder is not None
        texts = [record.text for record in records]
        facts["bytes"] += sum(len(text.encode()) for text in texts)
        for ids in encoder.documents(texts):
            yield {"ids": ids}

    def length(self, row: Row) -> int:
        """Tokens of a document."""
        return len(row["ids"])


@dataclass(frozen=True)
class Chats(Kind[Row]):
    """Conversations, read as `{"input_ids", "labels"}` of equal length; labels are -100 at tokens without a loss.

    `truncation` decides about rows with more than `max_length` tokens. `drop`: drop and count them. `error`: raise.
    `keep_end`: cut off the beginning (but keep a beginning token), so that the last answer and its stop token remain.
    `earlier_turns` decides about answers that the chat template changes when later turns follow (data/turns.py).
    """

    max_length: int
    truncation: Truncation
    earlier_turns: EarlierTurns = "strip"
    want = Chat
    columns: ClassVar[dict[str, Column]] = {"input_ids": "ids", "mask": "flags"}

    def encode(
        self, records: Sequence[Chat], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[list[Row] | RowRefused]:
        """Yields ids, and a mask of the supervised ones. A conversation is dropped if one of its rows is too long."""
        assert encoder is not None
        chats = encoder.chats([r.messages for r in records], self.earlier_turns, notes)
        for record, result in zip(records, chats, strict=True):
            if isinstance(result, RowRefused):
                yield result
                continue
            long = max(len(ids) for ids, _ in result)
            if long > self.max_length and self.truncation != "keep_end":
                yield _too_long(record, long, self.max_length, self.truncation)
                continue
            yield [self._row(ids, mask, encoder, notes) for ids, mask in result]

    def _row(self, ids: list[int], mask: list[bool], encoder: Encoder, notes: Counter[str]) -> Row:
        assert any(mask), "a chat without an answer"
        if len(ids) > self.max_length:
            notes["rows whose beginning was cut to max_length"] += 1
            head = 1 if ids[0] == encoder.bos_id else 0
            ids = ids[:head] + ids[len(ids) - self.max_length + head :]
            mask = [False] * head + mask[len(mask) - self.max_length + head :]
        return {"input_ids": ids, "mask": mask}

    def length(self, row: Row) -> int:
        """Tokens of a conversation."""
        return len(row["input_ids"])

    def read(self, row: Row) -> Row:
        """Ids and labels."""
        labels = [i if supervised else -100 for i, supervised in zip(row["input_ids"], row["mask"], strict=True)]
        return {"input_ids": row["input_ids"], "labels": labels}


@dataclass(frozen=True)
class Pairs(Kind[Row]):
    """Preferences as `{"prompt_ids", "chosen_ids", "rejected_ids"}`; both answers end with the stop token.

    A row's length is that of its prompt and the longer answer. `truncation` is as in `Chats`, but `keep_end` cuts only
    the prompt, and drops a row whose answer leaves no room for a prompt.
    """

    max_length: int
    truncation: Truncation
    want = Preference
    columns: ClassVar[dict[str, Column]] = {"prompt_ids": "ids", "chosen_ids": "ids", "rejected_ids": "ids"}

    def encode(
        self, records: Sequence[Preference], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row | RowRefused]:
        """Yields the ids of prompts and answers, each encoded separately."""
        assert encoder is not None
        prompts = encoder.prompts([r.prompt for r in records])
        chosens = encoder.answers([r.chosen for r in records])
        rejecteds = encoder.answers([r.rejected for r in records])
        for record, prompt, chosen, rejected in zip(records, prompts, chosens, rejecteds, strict=True):
            refusal = encoder.refusal(record.chosen) or encoder.refusal(record.rejected)
            refused = next((part for part in (prompt, refusal, chosen, rejected) if isinstance(part, RowRefused)), None)
            if refused is not None:
                yield refused
                continue
            assert isinstance(prompt, list) and isinstance(chosen, list) and isinstance(rejected, list)
            if chosen == rejected:
                yield RowRefused("chosen and rejected are the same tokens")
                continue
            answer = max(len(chosen), len(rejected))
            room = self.max_length - answer
            if len(prompt) > room:
                head = 1 if prompt[0] == encoder.bos_id else 0
                if self.truncation != "keep_end" or room <= head:
                    yield _too_long(record, len(prompt) + answer, self.max_length, self.truncation)
                    continue
                notes["prompts whose beginning was cut to max_length"] += 1
                prompt = prompt[:head] + prompt[len(prompt) - room + head :]
            yield {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}

    def length(self, row: Row) -> int:
        """Tokens of the prompt and the longer answer."""
        return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


@dataclass(frozen=True)
class Prompts(Kind[EncodedPrompt]):
    """Prompts of at most `max_length` tokens; longer ones are dropped, because a cut prompt asks something else.

    Messages and columns are stored as JSON, so values keep their types. `facts` counts, for each column, its rows.
    """

    max_length: int
    length_key = "max_prompt_length"
    want = Prompt
    columns: ClassVar[dict[str, Column]] = {"ids": "ids", "record": "text"}

    def encode(
        self, records: Sequence[Prompt], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row | RowRefused]:
        """Yields each prompt's ids with its record."""
        assert encoder is not None
        for record, ids in zip(records, self.ids(records, encoder), strict=True):
            if isinstance(ids, RowRefused):
                yield ids
            elif len(ids) > self.max_length:
                yield TooLong(len(ids), self.length_key)
            else:
                columns = json_columns(record, notes)
                facts.update(columns.keys())
                messages = [[message.role, message.content, True, message.extra] for message in record.messages]
                origin = [record.origin.file, record.origin.row]
                yield {"ids": ids, "record": json.dumps([messages, origin, columns])}

    def ids(self, records: Sequence[Prompt], encoder: Encoder) -> list[list[int] | RowRefused]:
        """What the model reads of each."""
        return encoder.prompts([record.messages for record in records])

    def length(self, row: Row) -> int:
        """Tokens of a prompt."""
        return len(row["ids"])

    def facts(self, value: EncodedPrompt) -> Counter[str]:
        """One row of each of its columns."""
        return Counter(value.record.columns.keys())

    def read(self, row: Row) -> EncodedPrompt:
        """The record as it was read."""
        messages, origin, columns = json.loads(row["record"])
        return EncodedPrompt(row["ids"], Prompt(tuple(Message(*m) for m in messages), Origin(*origin), columns))


@dataclass(frozen=True)
class Questions(Kind[tuple[list[int], str]]):
    """The prompts of chats or preferences, without the last answer: the prompt's ids, and its last message as text.

    Every record has a row; if the template cannot express the prompt, the ids are empty.
    """

    want: type[Chat] | type[Preference]
    columns: ClassVar[dict[str, Column]] = {"ids": "ids", "text": "text"}

    def encode(
        self, records: Sequence[Chat | Preference], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row]:
        """Yields prompts of any length."""
        assert encoder is not None
        asked = [record.messages[:-1] if isinstance(record, Chat) else record.prompt for record in records]
        for messages, ids in zip(asked, encoder.prompts(asked), strict=True):
            if isinstance(ids, TemplateFailed):
                raise DataError(f"the chat template of {encoder.tokenizer.name_or_path} fails: {ids.reason}")
            yield {"ids": [] if isinstance(ids, RowRefused) else ids, "text": messages[-1].content}

    def length(self, row: Row) -> int:
        """Tokens of a prompt."""
        return len(row["ids"])

    def read(self, row: Row) -> tuple[list[int], str]:
        """(ids, text)."""
        return row["ids"], row["text"]


@dataclass(frozen=True)
class Texts(Kind[list[str]]):
    """Plain texts, not encoded: a document's text, or the texts of a conversation's messages."""

    want: type[Text] | type[Chat] | type[Prompt]
    columns: ClassVar[dict[str, Column]] = {"texts": "texts"}

    def encode(
        self, records: Sequence[Text | Chat | Prompt], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row]:
        """Yields the texts of each record."""
        for record in records:
            if isinstance(record, Text):
                yield {"texts": [record.text]}
            else:
                held = ((m.content, m.extra) if m.extra else (m.content,) for m in record.messages)
                yield {"texts": [text for texts in held for text in texts]}

    def length(self, row: Row) -> int:
        """Number of texts."""
        return len(row["texts"])

    def read(self, row: Row) -> list[str]:
        """The texts."""
        texts: list[str] = row["texts"]
        return texts


@dataclass(frozen=True)
class Choices(Kind[Question]):
    """Questions with answers to choose from, not encoded: models with different tokenizers read them."""

    want = Question
    columns: ClassVar[dict[str, Column]] = {"texts": "texts", "record": "text"}

    def encode(
        self, records: Sequence[Question], encoder: Encoder | None, notes: Counter[str], facts: Counter[str]
    ) -> Iterator[Row]:
        """Yields the question and its choices, and beside them which one is right and where the row comes from."""
        for record in records:
            rest = [record.right, [record.origin.file, record.origin.row], json_columns(record, notes)]
            yield {"texts": [record.text, *record.choices], "record": json.dumps(rest)}

    def length(self, row: Row) -> int:
        """Number of choices."""
        return len(row["texts"]) - 1

    def read(self, row: Row) -> Question:
        """The record as it was read."""
        text, *choices = row["texts"]
        right, origin, columns = json.loads(row["record"])
        return Question(text, tuple(choices), right, Origin(*origin), columns)


class Rows(Sequence[T]):
    """Rows of one kind in the order of use, read from memory-mapped files on access."""

    def __init__(
        self,
        kind: Kind[T],
        stored: "Dataset | None",
        tokens: "NDArray[np.int32]",
        lengths: "NDArray[np.int32]",
        accounting: Accounting,
        facts: dict[str, int],
        fingerprints: dict[str, str],
    ) -> None:
        self._kind = kind
        self._columns = stored
        self.tokens = tokens
        """For a stream, all rows concatenated, (tokens,), memory-mapped; otherwise empty."""
        self.lengths = lengths
        """Length of each row as its kind defines it, (N,) int32."""
        self.accounting = accounting
        """Counts of used and dropped rows of the sources."""
        self.facts = facts
        """Counts over the rows, as the kind defines them."""
        self.fingerprints = fingerprints
        """{label: sha256} of each source."""

    def __len__(self) -> int:
        return len(self.lengths)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            columns = self._stored[index]
            return [self._kind.read(row) for row in _unzipped(columns)]
        return self._kind.read(self._stored[index])

    def __iter__(self) -> Iterator[T]:
        for start in range(0, len(self), _READ_TOGETHER):
            yield from self[start : start + _READ_TOGETHER]

    def dataset(self, view: Callable[[T], Row] | None = None) -> "Dataset":
        """The rows as a `datasets.Dataset`, for upstream trainers. Its column names are the stored ones; when a row is
        read, the kind's `read` and then `view` convert it."""

        def shown(columns: dict[str, list[Any]]) -> dict[str, list[Any]]:
            rows = [self._kind.read(row) for row in _unzipped(columns)]
            return zipped([view(row) for row in rows] if view is not None else rows)  # type: ignore[arg-type]

        return self._stored.with_transform(shown)

    def stored(self, indices: "NDArray[np.int64]") -> "Dataset":
        """The stored columns of the rows at `indices`, in that order, not converted."""
        return self._stored.select(indices, keep_in_memory=True)

    def without(self, dropped: Mapping[int, str], origin: Callable[[T], Origin]) -> "Rows[T]":
        """The other rows, in the same order. The rows of `dropped` are counted with their reasons."""
        import numpy as np

        accounting = Accounting()
        accounting.merge(self.accounting)
        facts = Counter(self.facts)
        for index, reason in sorted(dropped.items()):
            row = self[index]
            accounting.drop(reason, origin(row))
            facts -= self._kind.facts(row)  # what is left with none is no longer among them
        kept = np.array([index for index in range(len(self)) if index not in dropped], dtype=np.int64)
        stored = self._stored.select(kept, keep_in_memory=True)
        return Rows(self._kind, stored, self.tokens, self.lengths[kept], accounting, dict(facts), self.fingerprints)

    def blocks(self, block: int) -> "NDArray[np.int32]":
        """The stream of documents cut into blocks: (N, block), memory-mapped.

        A document may continue in the next block. The last tokens, fewer than `block`, are left out.

        Raises:
            DataError: the documents together are shorter than one block.
        """
        blocks = len(self.tokens) // block
        if blocks == 0:
            raise DataError(
                f"{len(self)} documents make {len(self.tokens)} tokens, fewer than one block of {block}: add data, or "
                "lower the block length"
            )
        return self.tokens[: blocks * block].reshape(blocks, block)

    @property
    def _stored(self) -> "Dataset":
        assert self._columns is not None, "a stream has tokens alone"
        return self._columns


def zipped(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Converts rows (at least one) to columns."""
    return {name: [row[name] for row in rows] for name in rows[0]}


def _unzipped(columns: dict[str, list[Any]]) -> list[Row]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _too_long(record: Chat | Preference, length: int, max_length: int, truncation: Truncation) -> TooLong:
    if truncation == "error":
        raise DataError(
            f"{record.origin}: {length} tokens, and max_length is {max_length}; raise max_length, shorten the row, or "
            "set truncation to drop or keep_end"
        )
    return TooLong(length, Kind.length_key, "" if truncation == "keep_end" else ", or set truncation: keep_end")


def json_columns(record: Prompt | Question | Preference, notes: Counter[str]) -> dict[str, Any]:
    """The columns with JSON values; others (bytes or dates of parquet files) are left out and counted in `notes`."""
    kept = {}
    for name, value in record.columns.items():
        try:
            json.dumps(value)
        except (TypeError, ValueError):
            notes[f"column `{name}` left out: {type(value).__name__} is no JSON value"] += 1
        else:
            kept[name] = value
    return kept
