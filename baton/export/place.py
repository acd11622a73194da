"""The folder of an export: built beside its final place, flushed and renamed, so that what stands there is whole."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from baton.export.record import is_export
from handoff.errors import HandoffError
from handoff.files import cannot_write, check_writable, disk_is_full, fsync_path, fsync_tree, quoted, remove_tree


def check_target(out: Path) -> None:
    """Raises HandoffError if the folder cannot be made, or holds something that is no export."""
    check_writable(out)
    if out.is_file() or out.is_symlink() or (out.is_dir() and any(out.iterdir()) and not is_export(out)):
        raise HandoffError(
            f"{quoted(out)} is there already and is no export, so that it is not replaced; give another --out"
        )


@contextmanager
def building(out: Path) -> Iterator[Path]:
    """Gives an empty folder beside `out`. At the end it takes the place of `out`; after an error nothing of it is left.

    Raises:
        HandoffError: the disk is full, or cannot be written.
    """
    check_target(out)
    written = out.parent / f".{out.name}.{os.getpid()}.tmp"
    old = out.parent / f".{out.name}.{os.getpid()}.old"
    made = [folder for folder in out.parents if not folder.exists()]
    try:
        written.mkdir(parents=True)
        yield written
        fsync_tree(written)
        if out.exists():
            out.rename(old)
        written.rename(out)
        fsync_path(out.parent)
        remove_tree(old)
    except BaseException as error:
        with suppress(OSError):
            remove_tree(written)
            if old.exists() and not out.exists():
                old.rename(out)
            for folder in made:
                folder.rmdir()
        if not (isinstance(error, Exception) and cannot_write(error)):
            raise
        why = "the disk is full" if disk_is_full(error) else f"it cannot be written ({error})"
        raise HandoffError(f"{quoted(out)}: {why}; nothing was exported, mend that and export again") from error
