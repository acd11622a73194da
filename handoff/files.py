"""Files that must survive a kill or a power cut: atomic writes, fsync, hashes, free space.

Everything that Baton publishes or resumes from is written by this module, always in this order: write to a temporary
name, fsync the file, rename, fsync the directory. On POSIX a rename is atomic; the two fsyncs make it durable.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from handoff.errors import HandoffError

_CHUNK = 1 << 20
_MAX_JSON = 64 << 20  # bytes
_MAX_DEPTH = 100  # lists and objects inside each other
_SURROGATE = re.compile(rb"\\u[dD][89abAB]")  # may begin half of a character
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


def quoted(name: object) -> str:
    """A name or value from a file as a message quotes it: at most 1,000 characters, and what cannot be printed as
    escapes."""
    text = str(name)
    text = text if len(text) <= 1000 else f"{text[:1000]}…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def what_is_wrong_with(path: Path, folder: Path, limit: int | None = None) -> str | None:
    """Why `path` may not be read as a file of `folder`; None if it may. Nothing is opened, so that a FIFO or a device
    cannot stop the process.

    Links may lead to other places in the folder. In the hub's cache, they may lead to the blobs of the same repository.
    """
    try:
        target = Path(os.path.realpath(path, strict=True))
        status = target.stat()
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    root = Path(os.path.realpath(folder))
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(place) for place in allowed):
        return f"is a link that leaves the folder, to {quoted(target)}; put the file itself there"
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file; remove it, or put the file there"
    if limit is not None and status.st_size > limit:
        return (
            f"has {human_bytes(status.st_size)}, and such a file has at most {human_bytes(limit)}; "
            "copy or download it again"
        )
    return None


def read_regular(path: Path, limit: int) -> bytes:
    """The bytes of a regular file. Raises HandoffError, without opening it, when it is something else or larger."""
    fault = what_is_wrong_with(path, Path(os.path.realpath(path)).parent, limit)
    if fault:
        raise HandoffError(f"{quoted(path)} {fault}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise HandoffError(f"{quoted(path)} cannot be read ({error.strerror}); allow it, or copy the file") from error


def read_json(path: Path, limit: int = _MAX_JSON, *, infinity: bool = False) -> Any:
    """The content of a JSON file.

    Args:
        path: a regular file of at most `limit` bytes.
        limit: in bytes.
        infinity: accept `Infinity`, which is not JSON, but which transformers writes and reads.

    Raises:
        HandoffError: it is no such file, not UTF-8, not JSON, nested too deeply, or has a number or a character that
            cannot be stored. The message names file and place.
    """
    content = read_regular(path, limit)

    def constant(name: str) -> float:
        if infinity and name != "NaN":
            return float(name)
        raise HandoffError(f"{quoted(path)} has the number {name}, which JSON does not have; write another value")

    try:
        found = json.loads(content.decode("utf-8"), parse_constant=constant)
    except UnicodeDecodeError as error:
        raise HandoffError(f"{quoted(path)} is not UTF-8 (byte {error.start}): the file is damaged") from error
    except json.JSONDecodeError as error:
        raise HandoffError(
            f"{quoted(path)}, line {error.lineno}: not JSON ({error.msg}): the file is damaged"
        ) from error
    except RecursionError as error:
        raise _too_deep(path) from error
    except HandoffError:
        raise
    except ValueError as error:  # Python reads no integer of more than 4,300 digits
        raise HandoffError(f"{quoted(path)} has an integer with thousands of digits: the file is damaged") from error
    level, depth = [found], 0
    while level := [
        inner
        for outer in level
        for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        if isinstance(inner, dict | list)
    ]:
        depth += 1
        if depth >= _MAX_DEPTH:
            raise _too_deep(path)
    if _SURROGATE.search(content):
        try:
            json.dumps(found, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise HandoffError(
                f"{quoted(path)} has half of a character (a lone surrogate, \\ud800 to \\udfff): the file is damaged"
            ) from error
    return found


def _too_deep(path: Path) -> HandoffError:
    return HandoffError(f"{quoted(path)} has more than {_MAX_DEPTH} lists and objects inside each other: it is damaged")


def changed_files(directory: Path, expected: Mapping[str, str]) -> list[tuple[str, str]]:
    """(relative path, what happened) for each file that is missing or differs from its hash in `expected`."""
    changes = []
    for name, digest in sorted(expected.items()):
        path = directory / name
        if not os.path.lexists(path):
            changes.append((name, "is missing"))
        elif fault := what_is_wrong_with(path, directory):
            changes.append((name, fault))
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
    try:
        ancestor = existing_ancestor(path)
    except OSError as error:
        raise HandoffError(f"{path}: {error.strerror}; set another output_root") from error
    if path.is_symlink() and not path.exists():
        raise HandoffError(
            f"{path}: a link to {path.readlink()}, which is not there; make that folder or remove the link"
        )
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
            known = read_json(path) if path.is_file() else {}
            self._known = known if isinstance(known, dict) else {}
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
