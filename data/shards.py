"""Rows on disk: encoded once while the sources are read, then opened by every later start that needs the same rows.

    <output_root>/.rows/<key>/    rows.arrow or tokens.bin, lengths.npy, order.npy (several sources), index.json

The key is a hash of everything that the rows depend on: the bytes of the sources and how they are read, the kind of
rows and its settings, the encoder, the seed if sources are mixed, and the code of this package. The folder is written
under another name and renamed when it is complete, so runs that write the same rows at once do not disturb each
other. index.json has the SHA-256 of each file; a folder whose files differ from it is made again.

With several processes, the main one makes the rows, hashes what belongs to them, and tells the others what it has made.
All nodes must see the same output_root.
"""

import json
import os
import shutil
import socket
import threading
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from data.accounting import Accounting
from data.config import SourceConfig
from data.encode import Encoder
from data.errors import DataError, RowRefused, TemplateFailed
from data.fingerprint import fingerprints
from data.load import mixture_order, read
from data.records import Chat, Origin, Preference, Prompt, Question, Record, Text
from data.rows import Column, Kind, Row, Rows, TooLong, zipped
from handoff.errors import HandoffError
from handoff.files import canonical_hash, fsync_path, fsync_tree, read_json, remove_tree, sha256_file, write_json

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

R = TypeVar("R", bound=Record)
T = TypeVar("T")

INDEX = "index.json"
_ROWS, _TOKENS, _LENGTHS, _ORDER = "rows.arrow", "tokens.bin", "lengths.npy", "order.npy"
_WRITING = ".writing-"
# Limits (records, characters) of a batch that is tokenized in one call; they keep memory small.
_BATCH, _CHARACTERS = 4096, 1 << 21
_BEAT = 10.0
"""Seconds between updates of the folder's modification time by the process that writes."""
_PATIENCE = 1800.0
"""Seconds without such an update after which the writer counts as dead."""
_SEEN = 120.0
"""Seconds after which a file system shows what another machine has written."""
_LOOK = 0.2
"""Seconds between two looks."""


@dataclass(frozen=True)
class StoredRows:
    """Rows that the main process has made, for the other processes."""

    folder: Path
    fingerprints: dict[str, str]
    """Of the sources (`data.fingerprint.fingerprints`)."""


OnMain = Callable[[Callable[[], StoredRows]], StoredRows]


class RowStore:
    """Makes the rows of one output_root that one run needs, and opens them."""

    def __init__(self, folder: Path, sha256: Callable[[Path], str], on_main: OnMain) -> None:
        """
        Args:
            folder: where rows are stored; created when the first rows are written.
            sha256: hashes a file; may remember the hashes of unchanged files (`HashCache.sha256`).
            on_main: calls a function on the main process of the run, and returns its result on all.
        """
        self._folder, self._sha256, self._on_main = folder.absolute(), sha256, on_main
        self._made: list[Path] = []

    def open(
        self,
        sources: Sequence[SourceConfig],
        kind: Kind[T],
        encoder: Encoder | None,
        root: Path | None,
        seed: int,
    ) -> Rows[T]:
        """Opens the rows, after the main process has encoded them if they do not exist. Every process calls it.

        Raises:
            DataError: as `data.load.read` and `Kind.encode`; or every row is too long. No files remain.
            HandoffError: the main process has made them in a folder that this one cannot see.
        """
        own: list[Rows[T]] = []

        def made() -> StoredRows:
            digests = fingerprints(sources, root, self._sha256)
            folder = self._folder / row_key(digests, sources, kind, encoder, seed)
            while not own:
                if self._is_whole(folder):
                    with suppress(FileNotFoundError):  # the process that wrote the rows has just discarded them
                        own.append(open_rows(folder, kind, digests))
                else:
                    self._write(folder, sources, kind, encoder, root, seed)
            return StoredRows(folder, digests)

        stored = self._on_main(made)
        return own[0] if own else _seen(stored, kind)

    def discard(self) -> None:
        """Removes the rows that this process wrote, so that a refused start leaves the disk unchanged."""
        for folder in self._made:
            remove_tree(folder)
        self._made = []
        with suppress(OSError):  # the folder holds other rows
            self._folder.rmdir()

    def _is_whole(self, folder: Path) -> bool:
        try:
            index = read_json(folder / INDEX)
            sealed = index.pop("seal") == canonical_hash(index)
            return sealed and all(self._sha256(folder / name) == digest for name, digest in index["files"].items())
        except (OSError, HandoffError, KeyError, TypeError):
            return False

    def _write(
        self,
        folder: Path,
        sources: Sequence[SourceConfig],
        kind: Kind[T],
        encoder: Encoder | None,
        root: Path | None,
        seed: int,
    ) -> None:
        existed = self._folder.is_dir()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._sweep()
        writing = self._folder / f"{_WRITING}{folder.name}-{socket.gethostname()}-{os.getpid()}-{uuid4().hex[:8]}"
        try:
            writing.mkdir()
            with _signs_of_life(writing):
                accounting = Accounting()
                records = read(sources, kind.want, root, seed, accounting)
                write_rows(writing, kind, records, encoder, accounting, lambda n: mixture_order(sources, n, seed))
            fsync_tree(writing)
            if self._rename(writing, folder):
                self._made.append(folder)
                fsync_path(self._folder)
        finally:
            remove_tree(writing)
            if not existed and not self._made:
                with suppress(OSError):
                    self._folder.rmdir()

    def _rename(self, written: Path, folder: Path) -> bool:
        """Gives the written rows their name. False if another run has written the same rows in the meantime."""
        for _ in range(2):
            with suppress(OSError):  # the name is taken
                written.rename(folder)
                return True
            if self._is_whole(folder):
                return False
            # Damaged rows are moved away first, so that two runs never remove files of the same folder.
            damaged = written.with_name(f"{written.name}.damaged")
            with suppress(OSError):
                folder.rename(damaged)
                remove_tree(damaged)
        return False

    def _sweep(self) -> None:
        """Removes the unfinished folders of processes that were killed."""
        for path in self._folder.glob(f"{_WRITING}*"):
            with suppress(OSError):
                if time.time() - path.stat().st_mtime > _PATIENCE:
                    shutil.rmtree(path, ignore_errors=True)


def _seen(stored: StoredRows, kind: Kind[T]) -> Rows[T]:
    """Opens what the main process has made, perhaps on another machine. Raises HandoffError if it is not there."""
    end = time.monotonic() + _SEEN
    while True:
        try:
            return open_rows(stored.folder, kind, stored.fingerprints)
        except FileNotFoundError as error:
            if time.monotonic() > end:
                raise HandoffError(
                    f"{stored.folder}: the main process has written rows there, and they are not to be seen on "
                    f"{socket.gethostname()}; all machines have to see the same output_root"
                ) from error
        time.sleep(_LOOK)


def row_key(
    digests: dict[str, str], sources: Sequence[SourceConfig], kind: Kind[Any], encoder: Encoder | None, seed: int
) -> str:
    """Name of the folder of the rows, a hash of everything that they depend on.

    Args:
        digests: `fingerprints` of the sources.
    """
    largest = max((source.weight for source in sources), default=1.0)
    settings = [
        {**source.model_dump(mode="json", exclude={"weight"}), "share": source.weight / largest} for source in sources
    ]
    return canonical_hash(
        {
            "kind": [type(kind).__name__, kind.want.__name__, {k: v for k, v in vars(kind).items() if k != "want"}],
            "sources": [list(pair) for pair in zip(digests.items(), settings, strict=True)],
            "encoder": encoder.fingerprint if encoder is not None else None,
            "seed": seed if len(sources) > 1 else None,
            "code": _code(),
        }
    )


@cache
def _code() -> dict[str, str]:
    """Hashes of this package's files, except the world's, which are part of a world source's fingerprint."""
    folder = Path(__file__).parent
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.py"))}


def write_rows(
    folder: Path,
    kind: Kind[Any],
    records: Iterable[R],
    encoder: Encoder | None,
    accounting: Accounting,
    order_of: Callable[[int], "NDArray[np.int64] | None"],
) -> None:
    """Encodes records and writes their rows into the empty directory `folder`, one batch at a time.

    Args:
        accounting: counts the records as they are read; the rows that the encoder drops are added at the end.
        order_of: given the number of records, returns their order of use; None for the order in which they come.

    Raises:
        DataError: as `kind.encode`, or no row is left and some were too long.
    """
    import numpy as np

    writer = _TokenWriter(folder) if kind.stream else _ArrowWriter(folder, kind.columns)
    lengths, places, dropped = array("i"), array("q"), _Dropped()
    notes: Counter[str] = Counter()
    facts: Counter[str] = Counter()
    count = 0
    with writer:
        for batch in _batches(records):
            rows = []
            for record, result in zip(batch, kind.encode(batch, encoder, notes, facts), strict=True):
                if isinstance(result, TemplateFailed):
                    assert encoder is not None
                    where = encoder.tokenizer.name_or_path
                    raise DataError(f"{record.origin}: the chat template of {where} fails: {result.reason}")
                if isinstance(result, RowRefused):
                    dropped.add(count, result, record.origin)
                else:
                    for row in result if isinstance(result, list) else [result]:
                        rows.append(row)
                        lengths.append(kind.length(row))
                        places.append(count)
                count += 1
            writer.add(rows)
    if not lengths and dropped.shortest:
        raise DataError(
            f"no row is left of {count}: the shortest of those too long has {dropped.shortest} tokens, and "
            f"{kind.length_key} is {kind.max_length}; {dropped.mend}"
        )
    in_order = np.array(lengths, dtype=np.int32)
    order = order_of(count)
    turn = None
    if order is not None:
        turn = np.empty(count, dtype=np.int64)
        turn[order] = np.arange(count)
        rows_in_order = np.argsort(turn[np.array(places, dtype=np.int64)], kind="stable")
        writer.arrange(rows_in_order, in_order)
        if writer.keeps_order:
            np.save(folder / _ORDER, rows_in_order)
        in_order = in_order[rows_in_order]
    np.save(folder / _LENGTHS, in_order)
    dropped.count_in(accounting, turn)
    accounting.notes.update(notes)
    hashes = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    index = {"accounting": accounting.to_json(), "facts": dict(facts), "files": hashes}
    write_json(folder / INDEX, {**index, "seal": canonical_hash(index)})


def open_rows(folder: Path, kind: Kind[T], digests: dict[str, str]) -> Rows[T]:
    """Opens the rows that `write_rows` wrote. The files are memory-mapped and may be deleted afterwards.

    Raises:
        FileNotFoundError: a file has been removed.
    """
    import numpy as np
    from datasets import Dataset

    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    lengths = np.load(folder / _LENGTHS)
    stored, tokens = None, np.empty(0, dtype=np.int32)
    if not kind.stream:
        stored = Dataset.from_file(str(folder / _ROWS))
        if _ORDER in index["files"]:
            stored = stored.select(np.load(folder / _ORDER), keep_in_memory=True)
    elif lengths.any():  # an empty file cannot be mapped
        tokens = np.memmap(folder / _TOKENS, dtype=np.int32, mode="r")
    accounting = Accounting.from_json(index["accounting"])
    return Rows(kind, stored, tokens, lengths, accounting, index["facts"], digests)


class _ArrowWriter:
    """Writes rows to a file in Arrow's stream format, which `datasets` memory-maps."""

    keeps_order = True
    """The order of use is stored in a separate file; the rows keep the order in which they were added."""

    def __init__(self, folder: Path, columns: dict[str, Column]) -> None:
        import pyarrow

        types = {
            "ids": pyarrow.list_(pyarrow.int32()),
            "flags": pyarrow.list_(pyarrow.bool_()),
            "text": pyarrow.string(),
            "texts": pyarrow.list_(pyarrow.string()),
        }
        self._schema = pyarrow.schema([(name, types[column]) for name, column in columns.items()])
        self._file = (folder / _ROWS).open("wb")
        self._stream = pyarrow.ipc.new_stream(self._file, self._schema)

    def __enter__(self) -> "_ArrowWriter":
        return self

    def __exit__(self, *error: object) -> None:
        with self._file:
            self._stream.close()

    def add(self, rows: list[Row]) -> None:
        """Writes the rows as one batch."""
        import pyarrow

        if rows:
            self._stream.write_batch(pyarrow.record_batch(zipped(rows), schema=self._schema))

    def arrange(self, order: "NDArray[np.int64]", lengths: "NDArray[np.int32]") -> None:
        """Does nothing: the order of use is stored in a separate file."""


class _TokenWriter:
    """Writes the token ids of all rows, int32, concatenated in the order of use."""

    keeps_order = False

    def __init__(self, folder: Path) -> None:
        self._path = folder / _TOKENS
        self._file = self._path.open("wb")

    def __enter__(self) -> "_TokenWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def add(self, rows: list[Row]) -> None:
        """Appends the rows' ids."""
        import numpy as np

        for row in rows:
            self._file.write(np.array(row["ids"], dtype=np.int32).tobytes())

    def arrange(self, order: "NDArray[np.int64]", lengths: "NDArray[np.int32]") -> None:
        """Sorts the rows into the order of use. `lengths`: of the rows in the order in which they were added."""
        import numpy as np

        ends = np.cumsum(lengths, dtype=np.int64)
        if not len(ends):
            return
        tokens = np.memmap(self._path, dtype=np.int32, mode="r")
        arranged = self._path.with_suffix(".arranged")
        with arranged.open("wb") as file:
            for row in order:
                file.write(tokens[ends[row] - lengths[row] : ends[row]].tobytes())
        arranged.replace(self._path)


class _Dropped:
    """The rows that the encoder dropped, in a few bytes each, collected until their order of use is known."""

    def __init__(self) -> None:
        self.shortest = 0
        """Tokens of the shortest row that was too long; 0 if there was none."""
        self.mend = ""
        """What the user can do about rows that are too long."""
        self._records, self._rows, self._reason, self._file = array("q"), array("q"), array("i"), array("i")
        self._names: dict[str, int] = {}
        self._mends: dict[str, str] = {}

    def add(self, record: int, refusal: RowRefused, origin: Origin) -> None:
        """Adds the record with the number `record`."""
        if isinstance(refusal, TooLong):
            self.shortest = min(self.shortest or refusal.tokens, refusal.tokens)
            self.mend = refusal.mend
        self._mends[refusal.reason] = refusal.mend
        self._records.append(record)
        self._rows.append(origin.row)
        self._reason.append(self._names.setdefault(refusal.reason, len(self._names)))
        self._file.append(self._names.setdefault(origin.file, len(self._names)))

    def count_in(self, accounting: Accounting, turn: "NDArray[np.int64] | None") -> None:
        """Reports the rows to `accounting` in the order of use. `turn`: each record's place in it, or None."""
        names = list(self._names)
        order: Iterable[int] = range(len(self._records))
        if turn is not None:
            order = sorted(order, key=lambda i: turn[self._records[i]])
        for i in order:
            reason, origin = names[self._reason[i]], Origin(names[self._file[i]], self._rows[i])
            accounting.drop(reason, origin, self._mends[reason])


def _batches(records: Iterable[R]) -> Iterator[list[R]]:
    batch: list[R] = []
    size = 0
    for record in records:
        batch.append(record)
        size += _characters(record)
        if len(batch) == _BATCH or size > _CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _characters(record: Record) -> int:
    match record:
        case Text():
            return len(record.text)
        case Question():
            return len(record.text) + sum(map(len, record.choices))
        case Chat() | Prompt():
            return sum(len(message.content) for message in record.messages)
        case Preference():
            answers = len(record.chosen) + len(record.rejected)
            return answers + sum(len(message.content) for message in record.prompt)


@contextmanager
def _signs_of_life(folder: Path) -> Iterator[None]:
    """Inside, updates the folder's modification time regularly, so that others see that the writer is alive."""
    done = threading.Event()

    def beat() -> None:
        while not done.wait(_BEAT):
            with suppress(OSError):
                os.utime(folder)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
