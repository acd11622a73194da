"""Files that must survive a kill or a power cut: atomic writes, fsync, hashes, free space.

Everything that Baton publishes or resumes from is written by this module, always in this order: write to a temporary
name, fsync the file, rename, fsync the directory. On POSIX a rename is atomic; the two fsyncs make it durable.
"""

import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from handoff.errors import HandoffError

_CHUNK = 1 << 20
_SETTLED = 2.0  # seconds after which a file's change time differs from that of a later change
# safetensors reports these only in an error's text.
_OF_A_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOENT,
              errno.ENOTDIR, errno.EISDIR, errno.ESTALE)  # fmt: skip


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def list_files(directory: Path) -> list[str]:
    """Relative POSIX paths of all files below `directory`, sorted; hidden ones included."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def hash_tree(directory: Path) -> dict[str, str]:
    """{relative POSIX path: SHA-256} of every file below `directory`."""
    return {name: sha256_file(directory / name) for name in list_files(directory)}


def canonical_hash(obj: Any) -> str:
    """SHA-256 of `obj` as JSON with sorted keys and no spaces, so that the order of keys does not matter."""
    text = json.dumps(obj, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fsync_path(path: Path) -> None:
    """Flush one file's bytes, or one directory's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path) -> None:
    """Flush every file below `directory`, then every directory from the leaves up, `directory` last."""
    for folder, _, names in os.walk(directory, topdown=False):
        for name in names:
            fsync_path(Path(folder) / name)
        fsync_path(Path(folder))


def write_json(path: Path, obj: Any) -> None:
    """Replace the content of `path` by `obj` as JSON, atomically: readers see the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(obj, file, indent=2, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises HandoffError, naming file and position, when it is not UTF-8 or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except UnicodeDecodeError as error:
        raise HandoffError(f"{path} is not UTF-8 (byte {error.start}): the file is damaged") from error
    except json.JSONDecodeError as error:
        raise HandoffError(f"{path}, line {error.lineno}: not JSON ({error.msg}): the file is damaged") from error


def changed_files(directory: Path, expected: Mapping[str, str]) -> list[tuple[str, str]]:
    """(relative path, what happened) for each file that is missing or differs from its hash in `expected`."""
    changes = []
    for name, digest in sorted(expected.items()):
        path = directory / name
        if not path.is_file():
            changes.append((name, "is missing"))
        elif sha256_file(path) != digest:
            changes.append((name, "was altered"))
    return changes


def remove_tree(path: Path) -> None:
    """Delete a file, or a directory with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def existing_ancestor(path: Path) -> Path:
    """`path` itself, or the nearest directory above it that exists."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def check_writable(path: Path) -> None:
    """Raises HandoffError when the directory `path` cannot be written to or created. Creates nothing."""
    ancestor = existing_ancestor(path)
    if not ancestor.is_dir():
        raise HandoffError(f"{path}: {ancestor} is a file, not a directory; move it away or set another output_root")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise HandoffError(f"{path}: no permission to write in {ancestor}; allow it or set another output_root")


def check_free_space(path: Path, need_bytes: int, what: str) -> None:
    """Raises HandoffError when the disk of `path` has less than `need_bytes` free for `what` ("two saved states")."""
    free = free_bytes(path)
    if free < need_bytes:
        raise HandoffError(
            f"{path}: {what} needs {human_bytes(need_bytes)}, but {existing_ancestor(path)} has {human_bytes(free)} "
            "free; free some space or set an output_root on another disk"
        )


def free_bytes(path: Path) -> int:
    """Free space on the disk of `path`, which need not exist yet."""
    return shutil.disk_usage(existing_ancestor(path)).free


def tree_bytes(directory: Path) -> int:
    """Total bytes of all files below `directory`; 0 if it does not exist."""
    return sum((directory / name).stat().st_size for name in list_files(directory))


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for lack of space or quota. safetensors reports this only in the error's text."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return any(os.strerror(code) in str(error) for code in (errno.ENOSPC, errno.EDQUOT))


def cannot_write(error: BaseException) -> bool:
    """Whether a file could not be written because of its disk or folder: full, read-only, broken, gone or forbidden."""
    if isinstance(error, OSError | HandoffError):
        return isinstance(error, OSError)
    return any(os.strerror(code) in str(error) for code in _OF_A_DISK)


def human_bytes(count: int) -> str:
    """1536 -> "1.5 KiB"."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


class HashCache:
    """Keeps the SHA-256 of large foreign files between commands, by path, size, inode and change time.

    Unlike the modification time, the change time cannot be set back, so a modified file is always hashed again. It has
    a coarse unit on some file systems, so the hash of a file that was changed a moment ago is not kept.
    For foreign checkpoints, data files and encoded rows; a run's published files are hashed at every verification.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        with suppress(HandoffError):  # treat a damaged cache as empty
            self._known = read_json(path) if path.is_file() else {}
        self._changed = False

    def sha256(self, path: Path) -> str:
        """As `sha256_file`, but from the cache while the file is unchanged."""
        path = path.resolve()
        stat = path.stat()
        seen = [stat.st_size, stat.st_ino, stat.st_ctime_ns]
        entry = self._known.get(str(path))
        if entry is not None and entry[:3] == seen:
            return str(entry[3])
        digest = sha256_file(path)
        if time.time() - stat.st_ctime > _SETTLED:
            self._known[str(path)] = [*seen, digest]
            self._changed = True
        return digest

    def save(self) -> None:
        """Write the cache if it has new entries. If that fails, the files are hashed again next time."""
        if self._changed:
            with suppress(OSError):
                write_json(self._path, self._known)
                self._changed = False
