"""Finds the files of a source, and reads raw rows from them or from the hub, without interpreting their columns.

Every file of a folder is read, or the accounting names it as left out.
"""

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from data.config import FileSource, HubSource, StageSource
from data.errors import DataError
from data.files import PACKED, SUFFIXES, Row, file_rows, suffix
from data.records import Origin

_SAVED, _SPLITS = ("state.json", "dataset_info.json"), "dataset_dict.json"
"""What `datasets` writes beside the Arrow files of `save_to_disk`, and above the splits of several data sets."""
_HELD_OUT = re.compile(r"(?<![a-z])(test|val|valid|validation|dev|eval|heldout|holdout)(?![a-z])")
_NAMED = 5
"""Number of files that a note names."""


def read_rows(
    source: FileSource | HubSource | StageSource, root: Path | None, notes: Counter[str]
) -> Iterator[tuple[Row, Origin]]:
    """Yields all rows of a source in the source's order, each with its origin. `notes`: facts for the user, added to.

    Raises:
        DataError: no file, or a file that is empty, broken or not UTF-8; the message names file and line.
    """
    if isinstance(source, HubSource):
        yield from _hub_rows(source)
        return
    paths, left_out = _files(source, root)
    if left_out:
        notes[f"files left out, of another kind or hidden: {_listed(left_out)}"] += len(left_out)
    held_out = _held_out(paths)
    if held_out:
        notes[f"files read whose names say that they are held out (see `exclude`): {_listed(held_out)}"] += len(
            held_out
        )
    for path in paths:
        # A stage's rows get an origin that does not depend on where the run's directory is.
        name = f"stage:{source.name}/{path.name}" if isinstance(source, StageSource) else _display(path, root)
        empty = True
        for place, row in file_rows(path, name, notes):
            empty = False
            yield row, Origin(name, place)
        if empty:
            raise DataError(f"{name}: is empty; remove it, exclude it, or put its rows back")


def source_files(source: FileSource | StageSource, root: Path | None) -> list[Path]:
    """The files that a source reads, sorted by path, without excluded ones; for a stage's rows, all their files.

    Raises:
        DataError: no such file, folder or match; or a pattern in `exclude` matches nothing (a misspelt name would let
            a held-out file into training).
    """
    return _files(source, root)[0]


def _files(source: FileSource | StageSource, root: Path | None) -> tuple[list[Path], list[str]]:
    """(the files that a source reads, names of the files in its folder that are left out)."""
    if isinstance(source, StageSource):
        return sorted(path for path in source.folder.iterdir() if path.is_file()), []
    base = root if root is not None else Path()
    place = base / source.path
    where = f"`path: {source.path}`" + (f" under data_root {root}" if root is not None else "")
    try:
        folder = place.is_dir()
        if place.is_file():
            files = [place]
        elif folder:
            files = sorted(p for p in place.rglob("*") if p.is_file())
        else:
            top = Path(place.anchor) if Path(source.path).is_absolute() else base
            files = sorted(p for p in top.glob(str(place.relative_to(top))) if p.is_file())
    except (OSError, ValueError, NotImplementedError) as error:
        raise DataError(f"{where}: cannot be looked up ({error}); correct the path") from error
    for path in files:
        if not str(path).isascii():
            _check_name(path)
    if folder and place / _SPLITS in files:
        splits = sorted({p.relative_to(place).parts[0] for p in files if p.name == _SAVED[0]})
        raise DataError(
            f"{where}: holds the splits {', '.join(splits)} of a saved data set; add one of them to the path"
        )
    readable = [p for p in files if not folder or _is_readable(p, place)]
    if not readable:
        raise DataError(
            f"{where}: {'no file that can be read' if folder else 'no such file'} "
            f"(looked at {place.absolute()}). Correct the path or data_root"
        )
    for pattern in source.exclude:
        if not any(fnmatch.fnmatch(p.name, pattern) for p in files):
            raise DataError(f"{where}: `exclude: {pattern}` matches none of its {len(files)} files; correct the name")
    kept = [p for p in readable if not _is_excluded(p, source)]
    if not kept:
        raise DataError(f"{where}: `exclude` leaves none of its {len(readable)} files")
    for path in kept:
        if suffix(path) not in SUFFIXES:
            raise DataError(
                f"{_display(path, root)}: not one of {', '.join(SUFFIXES)} (each also with {', '.join(PACKED)})"
            )
    others = set(files) - set(readable)
    left_out = [str(p.relative_to(place)) for p in files if p in others and not _is_excluded(p, source)]
    return kept, [name for name in left_out if Path(name).name not in _SAVED]


def _is_readable(path: Path, folder: Path) -> bool:
    """Whether a file of a folder holds rows, by its name."""
    parts = path.relative_to(folder).parts
    if any(part.startswith(".") for part in parts):
        return False
    saved = path.name in _SAVED and any(path.parent.glob("*.arrow"))
    return suffix(path) in SUFFIXES and not saved


def _is_excluded(path: Path, source: FileSource) -> bool:
    return any(fnmatch.fnmatch(path.name, pattern) for pattern in source.exclude)


def _check_name(path: Path) -> None:
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{str(path)!a}: the file's name is not UTF-8; rename it") from error


def _held_out(paths: list[Path]) -> list[str]:
    """The files whose names say that they are held out, if there are others beside them."""
    if len(paths) < 2:
        return []
    common = os.path.commonpath([path.absolute().parent for path in paths])
    names = [str(path.absolute().relative_to(common)) for path in paths]
    marked = [name for name in names if _HELD_OUT.search(name.lower())]
    return marked if len(marked) < len(names) else []


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _display(path: Path, root: Path | None) -> str:
    """The path for messages: relative to data_root if it is inside."""
    return str(path.relative_to(root)) if root is not None and path.is_relative_to(root) else str(path)


def _hub_rows(source: HubSource) -> Iterator[tuple[Row, Origin]]:
    import datasets

    name = f"hub:{source.name}" + (f"/{source.subset}" if source.subset else "") + f"[{source.hub_split}]"
    keys = {"name": source.subset, "split": source.hub_split, "revision": source.revision}
    rows: Iterable[Any] | None = None
    if source.limit is not None and "[" not in source.hub_split:  # the rest need not be fetched
        with suppress(Exception):  # it may be in the cache, or the next attempt says what is wrong
            rows = datasets.load_dataset(source.name, **keys, streaming=True)
    try:
        if rows is None:
            rows = datasets.load_dataset(source.name, **keys)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name}: cannot be loaded: {error}. Check name, subset, hub_split and revision; without a network it must "
            "be in the cache of an earlier run; for one that asks for consent, log in with `hf auth login`"
        ) from error
    number = 0
    try:
        for number, row in enumerate(rows, start=1):
            yield row, Origin(name, number)
    except (ImportError, RuntimeError, OSError, ValueError) as error:  # pictures and sound are decoded here
        raise DataError(f"{name}: the row after {number} cannot be decoded: {error}") from error
