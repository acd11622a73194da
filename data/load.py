"""Reads the `data:` list of a recipe as a stream of records of one kind, and accounts for every row.

An error at once, because the data is not what the recipe says: a missing, empty or damaged file (truncated gzip, not
UTF-8, broken JSON); a missing column; `null` or a wrong type in a column that is read; an unknown role; a format
without records of the wanted kind (documents where conversations are wanted); a source without a usable row.

Dropped and counted, because real data has such rows: empty text, empty prompt, empty answer, roles out of order, no
turn of the user, chosen equal to rejected or scored below it, chosen and rejected that answer different prompts, an
answer that repeats its prompt, a missing answer where one is wanted, a conversation labelled as bad or weighted with 0,
a GSM8K row without a final answer, a row with a key without which it means something else (data/columns.py). The
encoder also drops rows that are too long, and messages that contain a special token's text. The caller limits the share
with `Accounting.check(max_drop_fraction)`.

Repaired: a byte order mark, Windows line ends, Project Gutenberg's wrapping, an empty system message. Repaired and
counted in a note: the Alpaca instruction header inside a prompt, a prompt that is a transcript, turns after the last
answer of a conversation.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from data.accounting import Accounting
from data.calls import held, with_tools
from data.columns import lost
from data.config import Format, SourceConfig, WorldSource
from data.errors import DataError, RowRefused
from data.files import Row
from data.fingerprint import label
from data.formats import Choice, Conversation, Document, Pair, Parsed, Told, detect, parse
from data.records import Chat, Message, Origin, Preference, Prompt, Question, Record, Text
from data.sampling import shuffled
from data.sources import read_rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

R = TypeVar("R", bound=Record)

OPPOSITE = "pairs that prefer the answer which an earlier pair rejects"
OWN_REFERENCE = "rows that keep their own column `reference` in place of their answer"
CUT_TURN = "conversations whose turns after the last answer were cut"


def read(
    sources: Sequence[SourceConfig], want: type[R], root: Path | None, seed: int, accounting: Accounting
) -> Iterator[R]:
    """Yields the usable records of the sources as `want`, a kind of record, while it reads the files.

    Records come source by source, in each source's own order; `mixture_order` gives the order in which they are used.
    When the iterator has ended, `accounting` counts every row.

    Conversions: a chat becomes a prompt without its last answer, which goes to `columns["reference"]`. A pair becomes
    a prompt with the chosen answer as reference, or a chat with the chosen answer. Nothing becomes a document. A prompt
    keeps the other columns of its row in `columns`, also one of its own called `reference`.

    Mixture: all rows of the source with the largest weight are used. Every other source contributes the share
    `weight / largest weight` of its rows, those with the lowest hashes (of the row and the seed). Such a source is read
    twice: first to find these rows.

    Raises:
        DataError: see this module's docstring; the message names file, row and field.
    """
    seen: set[int] = set()
    for record in _mixed(sources, want, root, seed, accounting):
        if isinstance(record, Preference):
            _note_opposite(record, seen, accounting)
        yield record


def read_row(row: Row, format: Format, want: type[R], origin: Origin) -> R:
    """The record of one row.

    Raises:
        RowRefused: the row cannot be used. DataError: as `read`.
    """
    return _shape(parse(row, format, origin, want is not Prompt), want, origin, Accounting())


def _mixed(
    sources: Sequence[SourceConfig], want: type[R], root: Path | None, seed: int, accounting: Accounting
) -> Iterator[R]:
    """The usable records of the sources in their shares of the mixture."""
    largest = max((source.weight for source in sources), default=1.0)
    for source in sources:
        own = Accounting()
        share = source.weight / largest
        if share < 1:
            kept = _lowest((_hash(record, seed) for record in _records(source, want, root, own)), share)
            for use, record in zip(kept, _records(source, want, root, Accounting()), strict=True):
                if use:
                    yield record
            if not kept.all():
                own.put_aside("mixture weight", int((~kept).sum()))
        else:
            yield from _records(source, want, root, own)
        accounting.merge(own)


def _note_opposite(pair: Preference, seen: set[int], accounting: Accounting) -> None:
    """Counts a pair that prefers what an earlier one rejects. `seen`: a hash of each pair so far; added to."""
    if hash((pair.prompt, pair.rejected, pair.chosen)) in seen:
        accounting.notes[OPPOSITE] += 1
    seen.add(hash((pair.prompt, pair.chosen, pair.rejected)))


def mixture_order(sources: Sequence[SourceConfig], records: int, seed: int) -> "NDArray[np.int64] | None":
    """The order of use: indices (records,) into the records that `read` yielded, shuffled if there are several sources.

    None with one source: the records are used in the order in which they were read.
    """
    return shuffled(records, seed, "mixture") if len(sources) > 1 else None


def _records(source: SourceConfig, want: type[R], root: Path | None, accounting: Accounting) -> Iterator[R]:
    """The usable records of one source that are in its split, up to its limit."""
    found = 0
    split = "all" if isinstance(source, WorldSource) else source.split
    holdout = 0.0 if isinstance(source, WorldSource) else source.holdout
    for parsed, row, origin in _parsed_rows(source, want, root, accounting):
        accounting.read()
        try:
            if isinstance(parsed, RowRefused):
                raise parsed
            record = _shape(parsed, want, origin, accounting)
        except RowRefused as refusal:
            # The prompt may be missing or broken, so a hash of the whole row decides which split the row is in.
            if _in_split(json.dumps(row, sort_keys=True, default=str), holdout, split):
                accounting.drop(refusal.reason, origin, refusal.mend)
            else:
                accounting.put_aside("other split")
            continue
        if not _in_split(_holdout_key(record), holdout, split):
            accounting.put_aside("other split")
            continue
        found += 1
        yield record
        if found == source.limit:
            break
    if not found:
        raise DataError(
            f"{label(source)}: no row can be used (split {split}, holdout {holdout:g}):\n{accounting.summary()}"
        )


def _parsed_rows(
    source: SourceConfig, want: type[R], root: Path | None, accounting: Accounting
) -> Iterator[tuple[Parsed | RowRefused, object, Origin]]:
    if isinstance(source, WorldSource):
        for record in _world(source):
            yield _parsed(record), None, record.origin
        return
    formats: dict[str, Format] = {}
    ignore = frozenset(source.ignore)
    for row, origin in read_rows(source, root, accounting.notes):
        if source.rename:
            row = _renamed(row, source.rename, origin)
        if origin.file not in formats:
            formats[origin.file] = detect(row, want is Text, origin) if source.format == "auto" else source.format
            accounting.notes[f"files read as {formats[origin.file]}"] += 1
        try:
            parsed = parse(row, formats[origin.file], origin, want is not Prompt, ignore)
        except RowRefused as refusal:
            yield refusal, row, origin
            continue
        accounting.notes.update(parsed.told.notes)
        accounting.notes.update(f"{label(source)}: {what} not read" for what in parsed.told.unread)
        yield parsed, row, origin


def _renamed(row: Row, names: Mapping[str, str], origin: Origin) -> Row:
    """The row with the columns' new names. Raises DataError if it has neither the old name nor the new one."""
    if isinstance(row, str):
        raise DataError(f"{origin}: `rename` is for columns, and the row is a text")
    for old, new in names.items():
        if old not in row and new not in row:
            raise DataError(
                f"{origin}: no column `{old}` to be read as `{new}`; the row has {', '.join(row) or 'none'}. Name "
                f"the right one: `rename: {{COLUMN: {new}}}`"
            )
    return {(name if names.get(name, name) in row else names[name]): value for name, value in row.items()}


def _world(source: WorldSource) -> Iterator[Record]:
    from data import world

    generators: dict[str, Callable[[WorldSource], Iterator[Record]]] = {
        "documents": world.documents,
        "chats": world.chats,
        "preferences": world.preferences,
        "prompts": world.prompts,
    }
    return generators[source.kind](source)


def _parsed(record: Record) -> Parsed:
    """Converts a generated record to the type that a parsed row has, so that the same code handles both."""
    if isinstance(record, Text):
        return Document(record.text)
    if isinstance(record, Preference):
        return Pair(record.prompt, record.chosen, record.rejected)
    assert not isinstance(record, Question), "the world has none"
    return Conversation(record.messages, told=Told(record.columns) if isinstance(record, Prompt) else Told())


def _shape(parsed: Parsed, want: type[R], origin: Origin, accounting: Accounting) -> R:
    """Converts to a record of kind `want`. Raises RowRefused for an unusable row, DataError for an impossible kind."""
    if isinstance(parsed, Document) or want is Text:
        if not isinstance(parsed, Document) or want is not Text:
            raise DataError(f"{origin}: {_mismatch(parsed, want)}. Use other data here")
        if not parsed.text.strip():
            raise RowRefused("empty text")
        return cast(R, Text(parsed.text, origin))
    if isinstance(parsed, Choice) or want is Question:
        if not isinstance(parsed, Choice) or want is not Question:
            raise DataError(f"{origin}: {_mismatch(parsed, want)}. Use other data here")
        if not parsed.question.strip():
            raise RowRefused("empty question")
        return cast(R, Question(parsed.question, parsed.choices, parsed.right, origin, parsed.told.columns))
    if isinstance(parsed, Conversation):
        return cast(R, _from_conversation(parsed, want, origin, accounting))
    return cast(R, _from_pair(parsed, want, origin, accounting))


_HELD = {
    Document: "documents",
    Conversation: "conversations",
    Pair: "pairs of answers",
    Choice: "questions with answers to choose from",
}


def _mismatch(parsed: Parsed, want: type[R]) -> str:
    return f"holds {_HELD[type(parsed)]}; wanted are records of kind {want.__name__}"


def _from_conversation(parsed: Conversation, want: type[R], origin: Origin, accounting: Accounting) -> Record:
    messages = _without_empty_system(parsed.messages)
    if want is Chat:
        answers = [i for i, message in enumerate(messages) if message.role == "assistant" and message.trained]
        if not answers:
            said = any(message.role == "assistant" for message in messages)
            raise RowRefused("no answer is to be trained on" if said else "no answer")
        _check_turns(messages[: answers[-1] + 1])
        if answers[-1] + 1 < len(messages):
            accounting.notes[CUT_TURN] += 1
        return Chat(messages[: answers[-1] + 1], origin)
    if want is Prompt:
        _check_turns(messages)
        columns = parsed.told.columns | parsed.found
        if messages[-1].role != "assistant":
            return Prompt(messages, origin, columns)
        return Prompt(messages[:-1], origin, _with_reference(columns, messages[-1], accounting))
    raise DataError(
        f"{origin}: holds conversations with one answer; a preference needs `chosen` and `rejected`. "
        "Of rows that each have a `label`, write a good and a bad answer to the same prompt into one row"
    )


def _from_pair(parsed: Pair, want: type[R], origin: Origin, accounting: Accounting) -> Record:
    prompt = _without_empty_system(parsed.prompt)
    chosen = Message("assistant", parsed.chosen)
    _check_turns((*prompt, chosen))
    if want is Chat:
        return Chat((*prompt, chosen), origin)
    if want is Prompt:
        return Prompt(prompt, origin, _with_reference(parsed.told.columns, chosen, accounting))
    if not parsed.rejected.strip():
        raise RowRefused("empty answer")
    if parsed.chosen.strip() == parsed.rejected.strip():
        raise RowRefused("chosen and rejected are the same")
    return Preference(prompt, parsed.chosen, parsed.rejected, origin, parsed.told.columns)


def _with_reference(columns: dict[str, Any], answer: Message, accounting: Accounting) -> dict[str, Any]:
    """The columns with the row's answer as `reference`. A column of that name is the user's own, and stays."""
    if not answer.trained:
        return columns
    if answer.extra:
        raise lost(next(iter(held(answer))))
    if "reference" in columns:
        accounting.notes[OWN_REFERENCE] += 1
        return columns
    return columns | {"reference": answer.content}


def _without_empty_system(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    if not messages or messages[0].role != "system" or messages[0].content.strip():
        return messages
    return with_tools(messages[1:], held(messages[0]).get("tools", ()))


_MAY_FOLLOW = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _check_turns(messages: tuple[Message, ...]) -> None:
    """Raises RowRefused if turns have no text or do not alternate; a tool's turn may follow an assistant's."""
    if not messages:
        raise RowRefused("empty prompt")
    before = None
    for message in messages:
        if before not in _MAY_FOLLOW[message.role]:
            raise RowRefused("roles out of order")
        if not message.content.strip() and message.role != "tool" and "tool_calls" not in held(message):
            raise RowRefused("empty answer" if message.role == "assistant" else "empty prompt")
        before = message.role
    if not any(message.role == "user" for message in messages):
        raise RowRefused("no turn of the user")


def _holdout_key(record: Record) -> str:
    """The text that decides the split: the first user turn, document or question. Equal ones share a split."""
    if isinstance(record, (Text, Question)):
        return record.text
    messages = record.prompt if isinstance(record, Preference) else record.messages
    return next(message.content for message in messages if message.role == "user")


def _in_split(key: str, holdout: float, split: str) -> bool:
    if split == "all":
        return True
    place = _place("holdout", " ".join(key.split()).casefold())
    # Test rows have the lowest hashes. So they stay out of training under any other holdout at least half as large.
    actual = "train" if place >= holdout else "test" if place < holdout / 2 else "validation"
    return actual == split


def _hash(record: Record, seed: int) -> float:
    return _place(f"mixture {seed}", repr(record))


def _lowest(hashes: Iterable[float], share: float) -> "NDArray[np.bool_]":
    """Mask (N,) of the lowest `share` of the hashes, at least one."""
    import numpy as np

    places = np.fromiter(hashes, dtype=np.float64)
    kept = np.zeros(len(places), dtype=bool)
    kept[np.argsort(places, kind="stable")[: max(1, round(share * len(places)))]] = True
    return kept


def _place(purpose: str, text: str) -> float:
    """Hashes `purpose` and `text` to a number in [0, 1)."""
    digest = hashlib.sha256(f"{purpose}\n{text}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
