"""An advisory lock on `<directory>/.lock`, so that only one process at a time uses a directory.

The kernel holds the lock (flock); the file's presence means nothing. When the owner dies, even by SIGKILL or a power
cut, the lock is free at once, so there are no stale locks. The file's content is only for the error message.

An flock lives as long as any copy of its file descriptor, so a child process could keep it after the owner died.
Children started by exec (subprocess, multiprocessing's spawn and forkserver, accelerate's launcher) do not inherit it,
because Python opens files close-on-exec. Children made by a bare fork (data loader workers) close their copy in a hook
right after the fork, which does not release the owner's lock.

A run and each of its stages have their own locks (`<run>/.lock`, `<run>/<stage>/.lock`), so a stage may run inside a
worker of the runner that holds the run's lock. Over NFS, flock works across hosts on Linux; if a file system has no
locks, an error says so.
"""

import errno
import fcntl
import json
import logging
import os
import socket
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from handoff.errors import HandoffError

LOCK_NAME = ".lock"

_log = logging.getLogger(__name__)
_held: set[int] = set()  # descriptors of the locks that this process holds


def _close_in_child() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


class RunLock:
    """Exclusive use of a directory, for a stated purpose ("baton run", "stage sft"). Also a context manager.

    `acquire` creates the directory if it is missing. `release` leaves an empty `.lock` in it; but if the directory was
    created for the lock and holds nothing else, `release` removes both.
    """

    def __init__(self, directory: Path, purpose: str) -> None:
        self.directory = directory
        self.purpose = purpose
        self._descriptor: int | None = None
        self._created: list[Path] = []  # directories that acquire created, outermost first

    def acquire(self) -> "RunLock":
        """Takes the lock, or raises HandoffError at once, which names the owner's pid, host, purpose and start time."""
        assert self._descriptor is None, f"{self.directory} is already locked by this object"
        path = self.directory / LOCK_NAME
        while True:
            self._created = _missing(self.directory)
            try:
                self.directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise HandoffError(
                    f"{self.directory}: cannot be created ({error.strerror}); choose another output_root"
                ) from error
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            except FileNotFoundError:
                continue  # its last owner has just removed the directory
            try:
                self._lock(descriptor, path)
            except BaseException:
                os.close(descriptor)
                raise
            if _is_file_at(descriptor, path):
                break
            os.close(descriptor)  # the file was deleted between our open and our lock, so this lock protects nothing
        previous = os.pread(descriptor, 4096, 0)
        if previous:
            _log.info("%s: taking over from %s, which ended without releasing it", path, _owner(previous))
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "purpose": self.purpose,
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        _held.add(descriptor)
        self._descriptor = descriptor
        return self

    def _lock(self, descriptor: int, path: Path) -> None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(os.pread(descriptor, 4096, 0))
            raise HandoffError(
                f"{self.directory} is in use by {owner}; wait for it, stop it, or use another output_root or name"
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            raise HandoffError(
                f"{path}: this file system has no locks ({error.strerror}); mount it with flock, "
                "or set an output_root on another disk"
            ) from error

    def release(self) -> None:
        """Frees the lock, if this process holds it."""
        # In a forked child the hook has closed the descriptor, and its number may now belong to another file.
        if self._descriptor is not None and self._descriptor in _held:
            _held.remove(self._descriptor)
            os.ftruncate(self._descriptor, 0)
            if self._created and [path.name for path in self.directory.iterdir()] == [LOCK_NAME]:
                (self.directory / LOCK_NAME).unlink()
                with suppress(OSError):  # another process has put a file there meanwhile
                    for directory in reversed(self._created):
                        directory.rmdir()
            os.close(self._descriptor)
        self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


def _missing(directory: Path) -> list[Path]:
    """The directories that mkdir(parents=True) will create, outermost first."""
    directory = directory.absolute()
    return [folder for folder in reversed([directory, *directory.parents]) if not folder.exists()]


def _is_file_at(descriptor: int, path: Path) -> bool:
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)


def _owner(content: bytes) -> str:
    """A description of the owner. The file is empty between the owner's lock and its write."""
    try:
        owner = json.loads(content)
    except ValueError:
        return "a process that has just started"
    return f"process {owner['pid']} on {owner['host']} ({owner['purpose']}, since {owner['since']})"
