"""Reads the rows of one file, without interpreting their columns.

A row is a dictionary of columns, or a string (a document). An unreadable file is an error at once, with file and line:
an incomplete download, a broken line or text that cannot be written as UTF-8 is never skipped or changed silently.

JSON lines, parquet and Arrow files are read piece by piece. A text file, a table or a JSON file is read into memory
whole: splitting into documents needs the whole text, and damage is found at once.
"""

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from data.documents import split_documents
from data.errors import DataError

Row: TypeAlias = str | dict[str, Any]

SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
"""Suffixes of readable files."""
PACKED = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
"""Suffixes that may follow them."""

ROW_COLUMNS = frozenset({"messages", "conversations", "prompt", "instruction", "question", "chosen", "text"})
"""Columns that tell a row from an object that holds a list of rows."""

_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
_DEEPEST = 100
"""Levels of lists and objects inside a row."""
_HALF = re.compile(r"\\u[dD][89a-fA-F]")
"""JSON's escape for half of a character beyond the first 65,536."""


def suffix(path: Path) -> str:
    """The suffix that says how to read the file, in lower case: `.jsonl` for `a.JSONL.gz`."""
    return Path(path.stem if packing(path) else path.name).suffix.lower()


def packing(path: Path) -> str | None:
    """How the file's name says that it is compressed: a key of PACKED."""
    last = path.suffix.lower()
    return last if last in PACKED else None


def file_rows(path: Path, name: str, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Yields (line or row number from 1, row). `name`: the file in messages; `notes`: facts for the user, added to.

    Raises:
        DataError: the file is broken, or not UTF-8.
    """
    kind = suffix(path)
    if kind == ".txt":
        return enumerate(split_documents(_whole_text(path, name)), start=1)
    if kind in (".jsonl", ".ndjson"):
        return _json_lines(_lines(path, name), name)
    if kind == ".json":
        return _json(_whole_text(path, name), name, notes)
    if kind in (".csv", ".tsv"):
        return _table(_whole_text(path, name), name, "\t" if kind == ".tsv" else ",", notes)
    return _arrow(path, name, kind)


def _open(path: Path) -> Any:
    packed = packing(path)
    if packed == ".gz":
        return gzip.open(path, "rb")
    if packed == ".bz2":
        import bz2

        return bz2.open(path, "rb")
    if packed == ".xz":
        import lzma

        return lzma.open(path, "rb")
    if packed == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return path.open("rb")


def _unreadable(path: Path, name: str, error: Exception) -> DataError:
    packed = PACKED.get(packing(path) or "")
    if packed is None:
        return DataError(f"{name}: cannot be read: {error}")
    if isinstance(error, EOFError) or "runcated" in str(error):
        return DataError(f"{name}: the {packed} file ends in the middle (half a download?); fetch it again")
    return DataError(f"{name}: not a {packed} file, or damaged ({error}); fetch it again or correct its name")


@contextmanager
def _reading(path: Path, name: str) -> Iterator[Any]:
    """The opened file; what goes wrong while it is read becomes a DataError."""
    import lzma

    try:
        with _open(path) as file:
            yield file
    except DataError:
        raise
    except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(path, name, error) from error


def _bytes(path: Path, name: str) -> bytes:
    with _reading(path, name) as file:
        content: bytes = file.read()
    return content


def _lines(path: Path, name: str) -> Iterator[bytes]:
    with _reading(path, name) as file:
        for number, line in enumerate(file):
            if number == 0:
                _check_start(line[:8], path, name)
            yield line


def _whole_text(path: Path, name: str) -> str:
    content = _bytes(path, name)
    _check_start(content[:8], path, name)
    return _text(content, name)


def _check_start(start: bytes, path: Path, name: str) -> None:
    """Refuses content that is no UTF-8 text but something else that the user can be told."""
    for magic, packed in _MAGIC.items():
        if start.startswith(magic):
            ending = next(ending for ending, known in PACKED.items() if known == packed)
            mend = "unpack it once" if packing(path) else f"add `{ending}` to its name"
            raise DataError(f"{name}: holds {packed} data{', compressed twice' if packing(path) else ''}; {mend}")
    for magic, ending in ((b"PAR1", ".parquet"), (b"ARROW1", ".arrow")):
        if start.startswith(magic):
            raise DataError(f"{name}: is no text; give it the name of what it is, `{ending}`")
    for mark, encoding in _MARKS.items():
        if start.startswith(mark):
            raise DataError(
                f"{name}: is {encoding.upper()}, not UTF-8; convert it: `iconv -f {encoding} -t utf-8 FILE`"
            )
    if 0 in start:
        raise DataError(
            f"{name}: has zero bytes at its start; it is damaged, or it is UTF-16: `iconv -f utf-16le -t utf-8 FILE`"
        )


def _text(content: bytes, name: str, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content[: error.start].count(b"\n")
        raise DataError(
            f"{name}:{line}: not UTF-8 (byte 0x{content[error.start]:02x}); convert it, e.g. "
            "`iconv -f latin1 -t utf-8 FILE`"
        ) from error


class _Twice(ValueError):
    """A key that comes twice in one object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _Twice(next(key for key, count in counts.items() if count > 1))
    return made


def _loads(text: str, name: str, first_line: int, mend: str) -> Any:
    """The value of JSON text that begins at `first_line` of the file."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{first_line + error.lineno - 1}: broken JSON at column {error.colno} ({error.msg}); {mend}"
        ) from error
    except _Twice as error:
        raise DataError(
            f"{name}:{first_line}: the key `{_shown(str(error))}` comes twice in one object; rename or remove one"
        ) from error
    except RecursionError as error:
        raise _too_deep(name, first_line) from error
    except ValueError as error:
        limit = sys.get_int_max_str_digits()
        raise DataError(f"{name}:{first_line}: a number has more than {limit} digits; write it as text") from error


def _too_deep(name: str, line: int) -> DataError:
    return DataError(f"{name}:{line}: lists or objects are nested more than {_DEEPEST} deep; flatten the row")


def _json_lines(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(lines, start=1):
        text = _text(line, name, number).strip()
        if text:
            row = _loads(text, name, number, "each line is one whole object")
            yield number, _checked(row, name, number, _is_doubtful(text))


def _json(text: str, name: str, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    """Reads a list of rows, an object that holds such a list, one row, or one row a line: many hub files named .json
    hold JSON lines."""
    if _is_json_lines(text):
        yield from _json_lines(text.encode().splitlines(), name)
        return
    first_line = 1 + text[: len(text) - len(text.lstrip())].count("\n")
    value = _loads(text.strip(), name, first_line, "mend the file")
    doubtful = _is_doubtful(text)
    for number, row in enumerate(_rows_of(value, name, notes), start=1):
        yield number, _checked(row, name, number, doubtful)


def _is_json_lines(text: str) -> bool:
    first, _, more = text.strip().partition("\n")
    if not first.startswith("{"):
        return not first.startswith("[")
    try:
        return bool(more) and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False  # an object over several lines


def _rows_of(value: Any, name: str, notes: Counter[str]) -> list[Any]:
    """The rows of a whole JSON file."""
    if isinstance(value, list):
        return value
    if ROW_COLUMNS & value.keys():
        return [value]
    lists = [key for key, part in value.items() if isinstance(part, list)]
    if len(lists) != 1:
        raise DataError(
            f"{name}: is one object with the keys {', '.join(map(_shown, value)) or '(none)'}; expected a list of "
            f"rows, or an object with one list of rows ({len(lists)} of its values are lists)"
        )
    beside = [_shown(key) for key in value if key != lists[0]]
    left = f"; left out beside it: {', '.join(f'`{key}`' for key in beside)}" if beside else ""
    notes[f"{name}: rows read under the key `{_shown(lists[0])}`{left}"] += 1
    rows: list[Any] = value[lists[0]]
    return rows


def _is_doubtful(text: str) -> bool:
    """Whether the values of JSON text have to be looked at, which takes as long as parsing them."""
    return text.count("[") + text.count("{") > _DEEPEST or _HALF.search(text) is not None


def _checked(row: Any, name: str, number: int, doubtful: bool) -> Row:
    """The row, if it is one that can be used."""
    if not isinstance(row, (dict, str)):
        raise DataError(
            f"{name}:{number}: a row is {type(row).__name__}; expected an object of columns, or a string (a document)"
        )
    if doubtful:
        _check_values(row, name, number)
    return row


def _check_values(row: Row, name: str, number: int) -> None:
    """Refuses text that is not Unicode, and nesting that later code could not follow."""
    waiting: list[tuple[Any, str, int]] = [(row, "", 0)]
    while waiting:
        value, place, depth = waiting.pop()
        if depth > _DEEPEST:
            raise _too_deep(name, number)
        if isinstance(value, dict):
            for key, part in value.items():
                inner = f"{place}.{key}" if place else key
                waiting += [(key, f"{inner} (the key)", depth + 1), (part, inner, depth + 1)]
        elif isinstance(value, list):
            waiting += [(part, f"{place}[{i}]", depth + 1) for i, part in enumerate(value)]
        elif isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise DataError(
                    f"{name}:{number}: `{_shown(place) or 'the text'}` holds half a character "
                    f"({_shown(value[error.start])} at position {error.start}); text was cut inside an emoji or "
                    "decoded wrongly: mend it, or remove the row"
                ) from error


def _shown(text: str) -> str:
    """Text of a file for a message: short, and without half characters, which cannot be printed."""
    return text[:80].encode(errors="backslashreplace").decode()


def _table(text: str, name: str, delimiter: str, notes: Counter[str]) -> Iterator[tuple[int, Row]]:
    # The csv module limits a field's size to detect unbalanced quotes; long documents exceed that limit.
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows = (row for row in reader if row)
    try:
        header = next(rows, [])
        _check_header(header, name, delimiter)
        unnamed = [i for i, column in enumerate(header) if not column.strip()]
        for i in unnamed:
            notes[f"{name}: column {i + 1} left out: it has no name (an index?)"] += 1
        for number, row in enumerate(rows, start=1):
            if len(row) != len(header):
                verb = "more" if len(row) > len(header) else "fewer"
                raise DataError(
                    f"{name}:{number}: the row that ends at line {reader.line_num} has {verb} fields than the header "
                    f"({', '.join(header)}); quote fields that hold commas or line breaks"
                )
            yield number, {column: field for i, (column, field) in enumerate(zip(header, row)) if i not in unnamed}
    except csv.Error as error:
        raise DataError(f"{name}: broken CSV near line {reader.line_num} ({error}); check its quotes") from error


def _check_header(header: list[str], name: str, delimiter: str) -> None:
    if len(header) == 1:
        for other, what in (("\t", "tabs; call it .tsv"), (";", "semicolons; write it with commas"), (",", "commas")):
            if other != delimiter and other in header[0]:
                raise DataError(f"{name}: its columns are separated by {what}")
    _check_names(header, name)


def _check_names(names: list[str], name: str) -> None:
    for column, count in Counter(names).items():
        if count > 1 and column.strip():
            places = " and ".join(str(i + 1) for i, other in enumerate(names) if other == column)
            raise DataError(f"{name}: columns {places} are both called `{column}`; rename or remove one")


def _arrow(path: Path, name: str, kind: str) -> Iterator[tuple[int, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        whole = pyarrow.py_buffer(_bytes(path, name)) if packing(path) else None
        if kind == ".parquet":
            file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(whole) if whole is not None else path)
            schema, batches = file.schema_arrow, file.iter_batches(batch_size=1024)
        else:
            source = pyarrow.BufferReader(whole) if whole is not None else pyarrow.memory_map(str(path))
            schema, batches = _arrow_batches(source)
        _check_names(schema.names, name)
        number = 0
        for batch in batches:
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except DataError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        what = "parquet" if kind == ".parquet" else "Arrow"
        raise DataError(
            f"{name}: not a whole {what} file, or not readable ({error}); fetch or write it again"
        ) from error


def _arrow_batches(source: Any) -> tuple[Any, Iterator[Any]]:
    """(schema, batches) of an Arrow file in the stream format, which `datasets` writes, or in the file format."""
    import pyarrow

    try:
        reader = pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        source.seek(0)
        opened = pyarrow.ipc.open_file(source)
        return opened.schema, (opened.get_batch(i) for i in range(opened.num_record_batches))
    return reader.schema, iter(reader)
