"""The folder of the runs: whether it can be written, and keeps what Baton's saved states rely on."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from baton.doctor.finding import Finding, fault, ok, warning
from handoff.errors import HandoffError
from handoff.files import check_writable, existing_ancestor, free_bytes, fsync_path, human_bytes
from handoff.lock import RunLock

_STORAGE, _CLOCK, _DISK = "storage", "clock", "disk"
_APART, _FAR_APART = 5.0, 60.0  # seconds
_LITTLE = 5 * 2**30
_LOCAL = frozenset({"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "f2fs", "vfat"})
"""File systems that one machine alone has."""
_YEARS = 20


def check_storage(folder: Path, machines: int) -> list[Finding]:
    """Checks the folder of the runs. Everything that is written for it is removed again.

    Args:
        folder: of the run, or of all runs; need not exist.
        machines: how many of them use it together.
    """
    try:
        check_writable(folder)
        parent = existing_ancestor(folder)
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=parent) as name:
            wrong = [*filter(None, (tried(Path(name)) for tried in (_renames, _syncs, _locks)))]
            clock = _check_clock(Path(name))
    except HandoffError as error:
        return [fault(_STORAGE, str(error)), _check_year(time.time())]
    except OSError as error:
        return [
            fault(_STORAGE, f"{parent}: cannot be written ({error.strerror}): mend that, or set another output_root")
        ]
    found = [fault(_STORAGE, f"{parent}: {words}; set an output_root on another disk") for words in wrong]
    kind, inode = _file_system(parent), parent.stat().st_ino
    where = f"{parent.resolve()} ({kind})"
    if machines > 1 and kind in _LOCAL:
        found.append(
            warning(_STORAGE, f"{where} is a disk of this machine, and {machines} machines have to share the folder: "
                    "set an output_root on a file system that all of them mount")
        )  # fmt: skip
    elif machines > 1:
        found.append(
            ok(_STORAGE, f"{where} renames, syncs and locks; it has number {inode}, and has to on every machine")
        )
    elif not found:
        found.append(ok(_STORAGE, f"{where} renames, syncs and locks"))
    return [*found, clock, _check_disk(parent)]


def _tried(words: str) -> Callable[[Callable[[Path], None]], Callable[[Path], str | None]]:
    """Turns a trial into one that returns what is wrong, or None. `words`: what fails."""

    def wrapped(trial: Callable[[Path], None]) -> Callable[[Path], str | None]:
        def run(folder: Path) -> str | None:
            try:
                trial(folder)
            except OSError as error:
                return f"{words} ({error.strerror})"
            except HandoffError as error:
                return str(error)
            return None

        return run

    return wrapped


@_tried("a folder cannot be renamed, or a file replaced, in one step")
def _renames(folder: Path) -> None:
    (folder / "one").mkdir()
    (folder / "one" / "file").write_text("one", encoding="ascii")
    (folder / "one").rename(folder / "two")
    (folder / "new").write_text("new", encoding="ascii")
    (folder / "new").replace(folder / "two" / "file")
    if (folder / "two" / "file").read_text(encoding="ascii") != "new":
        raise OSError(0, "the old file is still there")


@_tried("what was written cannot be forced onto the disk")
def _syncs(folder: Path) -> None:
    (folder / "synced").write_text("synced", encoding="ascii")
    fsync_path(folder / "synced")
    fsync_path(folder)


@_tried("a folder cannot be locked")
def _locks(folder: Path) -> None:
    with RunLock(folder / "locked", "baton doctor"):
        try:
            RunLock(folder / "locked", "baton doctor").acquire().release()
        except HandoffError:  # it is in use, as it should be
            return
    raise HandoffError("its locks keep nobody out: two runs could write to one folder; mount it with flock")


def _check_clock(folder: Path) -> Finding:
    """Compares this machine's clock with the one that stamps the folder's files; on a shared one it is a server's."""
    before = time.time()
    stamped = folder / "stamped"
    stamped.touch()
    after, stamp = time.time(), stamped.stat().st_mtime
    apart = max(before - stamp, stamp - after, 0.0)
    if apart <= _APART:
        return _check_year(after)
    words = (
        f"the clock of this machine and the one that stamps files in {folder.parent} are {apart:.0f} s apart, and "
        "Baton tells by the stamps which files are new and which processes live: set the clock by NTP on both"
    )
    return fault(_CLOCK, words) if apart > _FAR_APART else warning(_CLOCK, words)


def _check_year(now: float) -> Finding:
    """A clock that is earlier than this program's own files, or decades later, is wrong."""
    written = Path(__file__).stat().st_mtime
    shown = time.strftime("%Y-%m-%d %H:%M", time.localtime(now))
    if now < written - _FAR_APART or now > written + _YEARS * 365 * 86400:
        return fault(_CLOCK, f"it is {shown} by this machine's clock, which cannot be: set it, for example by NTP")
    return ok(_CLOCK, f"{shown}, and files get the same time")


def _check_disk(folder: Path) -> Finding:
    free = free_bytes(folder)
    if free < _LITTLE:
        return warning(
            _DISK,
            f"{human_bytes(free)} free in {folder.resolve()}: free some, or set an output_root on another disk "
            "(`baton plan RECIPE` says how much a recipe takes)",
        )
    return ok(_DISK, f"{human_bytes(free)} free")


def _file_system(folder: Path) -> str:
    """The kind of the file system on which a folder is."""
    resolved = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    known = [place for place in mounts if resolved.is_relative_to(place)]
    return mounts[max(known, key=lambda place: len(place.parts))] if known else os.name
