"""Reads raw rows from files and from the hub, without interpreting their columns.

A row is a dictionary of columns, or a string (a document). An unreadable file is an error at once, with file and line:
an incomplete download or a broken line is never skipped silently.

JSON lines, parquet and data sets of the hub are read piece by piece. A text file, CSV file or JSON array is read into
memory whole, one file at a time: splitting into documents needs the whole text, and damage is found at once.
"""

import csv
import fnmatch
import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

from data.config import FileSource, HubSource, StageSource
from data.documents import split_documents
from data.errors import DataError
from data.records import Origin

Row: TypeAlias = str | dict[str, Any]

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet")
"""Suffixes of readable files; each may be followed by `.gz`."""


def read_rows(source: FileSource | HubSource | StageSource, root: Path | None) -> Iterator[tuple[Row, Origin]]:
    """Yields all rows of a source in the source's order, each with its origin.

    Raises:
        DataError: no file, or a file that is empty, broken or not UTF-8; the message names file and line.
    """
    if isinstance(source, HubSource):
        yield from _hub_rows(source)
        return
    for path in source_files(source, root):
        # A stage's rows get an origin that does not depend on where the run's directory is.
        name = f"stage:{source.name}/{path.name}" if isinstance(source, StageSource) else _display(path, root)
        empty = True
        for place, row in _file_rows(path, name):
            empty = False
            yield row, Origin(name, place)
        if empty:
            raise DataError(f"{name}: is empty; remove it, exclude it, or put its rows back")


def source_files(source: FileSource | StageSource, root: Path | None) -> list[Path]:
    """The files that a source names, sorted by path, without excluded ones; for a stage's rows, all their files.

    Raises:
        DataError: no such file, folder or match; or a pattern in `exclude` matches nothing (a misspelt name would let
            a held-out file into training).
    """
    if isinstance(source, StageSource):
        return sorted(path for path in source.folder.iterdir() if path.is_file())
    base = root if root is not None else Path()
    place = base / source.path
    where = f"`path: {source.path}`" + (f" under data_root {root}" if root is not None else "")
    if place.is_file():
        files = [place]
    elif place.is_dir():
        files = [p for p in sorted(place.rglob("*")) if p.is_file() and _suffix(p) in SUFFIXES and p.name[0] != "."]
    else:
        top = Path(place.anchor) if Path(source.path).is_absolute() else base
        files = sorted(p for p in top.glob(str(place.relative_to(top))) if p.is_file())
    if not files:
        raise DataError(
            f"{where}: {'no file that can be read' if place.is_dir() else 'no such file'} "
            f"(looked at {place.absolute()}). Correct the path or data_root; docs/real.md says how to put the folder "
            "of recipes/real.yaml together"
        )
    for pattern in source.exclude:
        if not any(fnmatch.fnmatch(p.name, pattern) for p in files):
            raise DataError(f"{where}: `exclude: {pattern}` matches none of its {len(files)} files; correct the name")
    kept = [p for p in files if not any(fnmatch.fnmatch(p.name, pattern) for pattern in source.exclude)]
    if not kept:
        raise DataError(f"{where}: `exclude` leaves none of its {len(files)} files")
    for path in kept:
        if _suffix(path) not in SUFFIXES:
            raise DataError(f"{_display(path, root)}: not one of {', '.join(SUFFIXES)} (each also with .gz)")
    return kept


def _suffix(path: Path) -> str:
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix


def _display(path: Path, root: Path | None) -> str:
    """The path for messages: relative to data_root if it is inside."""
    return str(path.relative_to(root)) if root is not None and path.is_relative_to(root) else str(path)


def _file_rows(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    """Yields (line or row number from 1, row)."""
    kind = _suffix(path)
    if kind == ".txt":
        return enumerate(split_documents(_text(_bytes(path, name), name)), start=1)
    if kind == ".jsonl":
        return _json_lines(_lines(path, name), name)
    if kind == ".json":
        return _json(_bytes(path, name), name)
    if kind == ".csv":
        return _csv(_text(_bytes(path, name), name), name)
    return _parquet(path, name)


def _open(path: Path) -> Any:
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _unreadable(name: str, error: Exception) -> DataError:
    if isinstance(error, EOFError):
        return DataError(f"{name}: the gzip file ends in the middle (half a download?); fetch it again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return DataError(f"{name}: not a gzip file, or damaged ({error}); fetch it again or correct its name")
    return DataError(f"{name}: cannot be read: {error}")


def _bytes(path: Path, name: str) -> bytes:
    try:
        with _open(path) as file:
            content: bytes = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error
    return content


def _lines(path: Path, name: str) -> Iterator[bytes]:
    try:
        with _open(path) as file:
            yield from file
    except (OSError, EOFError, zlib.error) as error:
        raise _unreadable(name, error) from error


def _text(content: bytes, name: str, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise DataError(
            f"{name}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert it, e.g. "
            "`iconv -f latin1 -t utf-8 FILE`"
        ) from error


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        text = _text(line, name, number).strip()
        if not text:
            continue
        try:
            row = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{name}:{number}: broken JSON at column {error.colno} ({error.msg}); each line is one whole object"
            ) from error
        yield number, _checked(row, name, number)


def _json(content: bytes, name: str) -> Iterator[tuple[int, Row]]:
    """Reads an array of rows, or one row a line: many hub files named .json hold JSON lines."""
    text = _text(content, name)
    if not text.lstrip().startswith("["):
        yield from _json_lines(content.splitlines(), name)
        return
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{error.lineno}: broken JSON at column {error.colno} ({error.msg}); mend the file"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield number, _checked(row, name, number)


def _checked(row: Any, name: str, number: int) -> Row:
    if not isinstance(row, (dict, str)):
        raise DataError(
            f"{name}:{number}: a row is {type(row).__name__}; expected an object of columns, or a string (a document)"
        )
    return row


def _csv(text: str, name: str) -> Iterator[tuple[int, Row]]:
    # The csv module limits a field's size to detect unbalanced quotes; long documents exceed that limit.
    csv.field_size_limit(2**31 - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), restkey="", strict=True)
    try:
        for number, row in enumerate(reader, start=1):
            if "" in row or None in row.values():
                verb = "more" if "" in row else "fewer"
                raise DataError(
                    f"{name}:{number}: the row that ends at line {reader.line_num} has {verb} fields than the header "
                    f"({', '.join(reader.fieldnames or [])}); quote fields that hold commas or line breaks"
                )
            yield number, row
    except csv.Error as error:
        raise DataError(f"{name}: broken CSV near line {reader.line_num} ({error}); check its quotes") from error


def _parquet(path: Path, name: str) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    compressed = path.name.lower().endswith(".gz")
    try:
        file = pyarrow.parquet.ParquetFile(io.BytesIO(_bytes(path, name)) if compressed else path)
        number = 0
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name}: not a whole parquet file ({error}); fetch it again") from error


def _hub_rows(source: HubSource) -> Iterator[tuple[Row, Origin]]:
    import datasets

    name = f"hub:{source.name}" + (f"/{source.subset}" if source.subset else "") + f"[{source.hub_split}]"
    try:
        rows = datasets.load_dataset(source.name, source.subset, split=source.hub_split, revision=source.revision)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot be loaded: {error}. Check name, subset, hub_split and revision; without a network it must "
            "be in the cache of an earlier run; for one that asks for consent, log in with `hf auth login`"
        ) from error
    for number, row in enumerate(rows, start=1):
        yield row, Origin(name, number)
