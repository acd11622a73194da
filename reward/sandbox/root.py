"""Builds a private root directory that holds Python's standard library, its shared libraries, and nothing else.

It is built once, on a small tmpfs in the server's own mount namespace. After pivot_root, no path leads to the host's
tree. The root is read-only; each job mounts its own tmpfs, of limited size, on SCRATCH. The mounts are not visible
outside the namespace, and vanish with its last process. See mount_namespaces(7).
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOATIME = 1, 2, 4, 8, 32, 1024
_BIND, _RECURSIVE, _PRIVATE, _RELATIME = 4096, 16384, 1 << 18, 1 << 21
_STATVFS_RELATIME = 4096  # the only kept flag whose number in statvfs(3) differs
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SCRATCH = "/scratch"  # not /tmp itself, since Python may be installed below it
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def readable() -> list[str]:
    """The paths that Python needs to import its standard library and load its extensions; parents first."""
    base = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}"]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    standard = [str(Path(os.__file__).parent), *(path for path in sys.path if path)]
    return sorted({*base, *system, *standard}, key=len)


def build(libc: ctypes.CDLL, at: str, paths: Iterable[str]) -> None:
    """Builds the root on the empty folder `at` and moves this process, which must be alone in a new namespace, into it.

    Raises:
        OSError: a mount was refused.
    """
    _mount(libc, "none", "/", None, _PRIVATE | _RECURSIVE)
    _mount(libc, "none", at, "tmpfs", _NOSUID | _NODEV, "size=1m,mode=755")
    Path(at + SCRATCH).mkdir()
    for path in (*paths, *DEVICES):
        _bind(libc, Path(path), Path(at + path))
    if not Path(at, "tmp").exists():
        Path(at, "tmp").symlink_to(SCRATCH)  # for programs that write there
    os.chdir(at)
    if libc.syscall(_PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        raise OSError(ctypes.get_errno(), "pivot_root")
    if libc.umount2(b".", _DETACH) != 0:
        raise OSError(ctypes.get_errno(), "umount of the old root")
    os.chdir("/")
    _mount(libc, "none", "/", None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV)


def scratch(libc: ctypes.CDLL, megabytes: int, owner: int) -> None:
    """Mounts one job's private folder, with limits on its size and number of files. It vanishes with the job."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    _mount(libc, "none", SCRATCH, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)


def _bind(libc: ctypes.CDLL, path: Path, to: Path) -> None:
    if not path.exists() or os.path.lexists(to):
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        # A link such as /lib -> usr/lib is copied; its target is bound under its own name.
        to.symlink_to(path.readlink())
        return
    if path.is_dir():
        to.mkdir()
    else:
        to.touch()
    _mount(libc, str(path), str(to), None, _BIND | _RECURSIVE)
    if str(path) in DEVICES:
        return
    # In a user namespace, a mount must keep the flags that it has.
    have = os.statvfs(to).f_flag
    keep = have & (_NOSUID | _NODEV | _NOEXEC | _NOATIME) | (_RELATIME if have & _STATVFS_RELATIME else 0)
    _mount(libc, "none", str(to), None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | keep)


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    coded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    if libc.mount(coded[0], coded[1], coded[2], ctypes.c_ulong(flags), coded[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount of {target}")
