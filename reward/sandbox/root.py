"""A root directory of its own, in which there is Python's standard library, its shared libraries, and nothing else.

Built once, in the server's own mount namespace, on a small tmpfs: the host's tree is left behind by pivot_root and
cannot be named any more. All of it is read-only; each job then mounts a tmpfs of its own, of limited size, on SCRATCH.
Nothing of this is seen outside the namespace, and it goes when the last process in it ends. See mount_namespaces(7).
"""

import ctypes
import os
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT, _NOATIME = 1, 2, 4, 8, 32, 1024
_BIND, _RECURSIVE, _PRIVATE, _RELATIME = 4096, 16384, 1 << 18, 1 << 21
_STATVFS_RELATIME = 4096  # the only one of the kept flags that statvfs(3) numbers in its own way
_DETACH = 2
_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

SCRATCH = "/scratch"  # not /tmp itself: Python may be installed below that
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")


def readable() -> list[str]:
    """What Python needs to import its standard library, and what that needs to load its extensions; parents first."""
    base = [f"{sys.base_prefix}/lib", f"{sys.base_prefix}/{sys.platlibdir}"]
    system = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache"]
    standard = [str(Path(os.__file__).parent), *(path for path in sys.path if path)]
    return sorted({*base, *system, *standard}, key=len)


def build(libc: ctypes.CDLL, at: str, paths: Iterable[str]) -> None:
    """Makes the root on the empty folder `at`, and moves this process into it. It must be alone in a new namespace.

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
    """A private folder for one job: its size and its number of files are limited, and it vanishes with the job."""
    options = f"size={megabytes}m,nr_inodes=4096,mode=700,uid={owner},gid={owner}"
    _mount(libc, "none", SCRATCH, "tmpfs", _NOSUID | _NODEV | _NOEXEC, options)


def _bind(libc: ctypes.CDLL, path: Path, to: Path) -> None:
    if not path.exists() or os.path.lexists(to):
        return
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink():
        # /lib -> usr/lib: what it leads to is bound under its own name.
        to.symlink_to(path.readlink())
        return
    if path.is_dir():
        to.mkdir()
    else:
        to.touch()
    _mount(libc, str(path), str(to), None, _BIND | _RECURSIVE)
    if str(path) in DEVICES:
        return
    # In a user namespace, flags that the mount has may not be taken off it.
    have = os.statvfs(to).f_flag
    keep = have & (_NOSUID | _NODEV | _NOEXEC | _NOATIME) | (_RELATIME if have & _STATVFS_RELATIME else 0)
    _mount(libc, "none", str(to), None, _REMOUNT | _BIND | _RDONLY | _NOSUID | _NODEV | keep)


def _mount(libc: ctypes.CDLL, source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    coded = [None if text is None else os.fsencode(text) for text in (source, target, kind, options)]
    if libc.mount(coded[0], coded[1], coded[2], ctypes.c_ulong(flags), coded[3]) != 0:
        raise OSError(ctypes.get_errno(), f"mount of {target}")
