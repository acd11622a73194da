"""Confines a process before it runs untrusted code. The layers, in order, each applied where the system supports it:

`namespaces`  its own mounts (`root`), a network without interfaces, process ids, System V memory; needs root or a
              user namespace
`identity`    an unused user id (needs root), so that it owns no file of ours and can signal no process of ours
`landlock`    which files it may open
`seccomp`     which system calls it may make
limits        CPU seconds, address space, file size, open files, threads: on every system

Safety does not rest on one layer: where several cover the same action, a program has to break all of them.
"""

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Self

from reward.sandbox import landlock, root, seccomp

LAYERS = ("namespaces", "identity", "landlock", "seccomp")

_NEW_NS, _NEW_UTS, _NEW_IPC, _NEW_USER, _NEW_PID, _NEW_NET = (
    0x00020000,
    0x04000000,
    0x08000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_SUBREAPER, _SET_NO_NEW_PRIVILEGES = 1, 4, 36, 38
_CAPSET = {"x86_64": 126, "aarch64": 91}
# Two ids for each job, one for its program and one for its tests, from a range that no system gives to users.
_FIRST_ID = 0x60000000
_INSIDE_ID = 1000  # our own id as seen inside a user namespace
_THREADS = 64
_OPEN_FILES = 64


@dataclass(frozen=True)
class Limits:
    """Limits of one job; they apply to its program and to its tests separately."""

    cpu_seconds: int = 5
    """CPU time of each of the two processes, in whole seconds, as the kernel limits it."""
    wall_milliseconds: int = 20_000
    """Wall time of the whole job. Several times the CPU seconds, since more jobs run at once than there are cores."""
    memory_mb: int = 512
    """Address space, including about 30 MB for Python itself."""
    disk_mb: int = 16
    """Size of one file, and of the whole private folder."""

    FORMAT = struct.Struct("=IIII")

    def pack(self) -> bytes:
        return self.FORMAT.pack(*astuple(self))

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(raw))


def load_libc() -> ctypes.CDLL:
    """The C library already loaded in this process, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def enter_namespaces(libc: ctypes.CDLL, at: str) -> bool:
    """Moves this process into its own namespaces and root directory. Returns whether it is root outside them too.

    Raises:
        OSError: this system does not allow it.
    """
    kinds = _NEW_NS | _NEW_NET | _NEW_IPC | _NEW_UTS
    if os.geteuid() == 0 and libc.unshare(kinds) == 0:
        root.build(libc, at, root.readable())
        return True
    user, group = os.geteuid(), os.getegid()
    if libc.unshare(kinds | _NEW_USER) != 0:
        raise OSError(ctypes.get_errno(), "no namespaces for this user")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{_INSIDE_ID} {user} 1")
    Path("/proc/self/gid_map").write_text(f"{_INSIDE_ID} {group} 1")
    root.build(libc, at, root.readable())
    return False


def enter_job_namespaces(libc: ctypes.CDLL) -> None:
    """Gives a job its own mounts, and its own process ids for the processes that this one creates."""
    if libc.unshare(_NEW_NS | _NEW_PID) != 0:
        raise OSError(ctypes.get_errno(), "no namespaces for a job")


def owner_ids(job: int) -> tuple[int, int]:
    """User ids for the program and for the tests of a job. `job`: the process id of its supervisor."""
    return _FIRST_ID + 2 * job, _FIRST_ID + 2 * job + 1


def take_identity(user: int) -> None:
    """Becomes that user for good, with the group of the same number and no other."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def die_with_parent(libc: ctypes.CDLL) -> None:
    """Requests SIGKILL for this process when its parent ends. Call it after `take_identity`, which clears it."""
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def adopt_orphans(libc: ctypes.CDLL) -> None:
    """Makes this process the parent of every descendant whose own parent ends, in any session."""
    libc.prctl(_SET_SUBREAPER, 1, 0, 0, 0)


def tasks_of_this_user() -> int:
    """Processes and threads, as RLIMIT_NPROC counts them. Linux."""
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if process.stat().st_uid == os.geteuid():
                count += sum(1 for _ in (process / "task").iterdir())
        except OSError:  # it ended meanwhile
            continue
    return count


def set_limits(limits: Limits, tasks: int | None) -> None:
    """Sets the resource limits. `tasks`: limit on processes and threads of this process's user; None: no change."""
    megabyte = 1 << 20
    wanted = {
        resource.RLIMIT_FSIZE: limits.disk_mb * megabyte,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":  # macOS refuses this limit
        wanted[resource.RLIMIT_AS] = limits.memory_mb * megabyte
    if tasks is not None:
        wanted[resource.RLIMIT_NPROC] = tasks
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))
    # First a signal that names the cause, SIGXCPU, and to a process that survives it SIGKILL a second later.
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    last = limits.cpu_seconds + 1 if hard == resource.RLIM_INFINITY else min(limits.cpu_seconds + 1, hard)
    resource.setrlimit(resource.RLIMIT_CPU, (min(limits.cpu_seconds, last), last))


def confine(layers: frozenset[str], limits: Limits, user: int, tasks: int | None, folder: str) -> None:
    """Applies all layers to this process for good. It must have one thread.

    Args:
        layers: those of LAYERS that work on this system.
        user: the user id to take, if `identity` is among the layers.
        tasks: see `set_limits`.
        folder: the only folder that it may write to; becomes the working directory.

    Raises:
        OSError: a layer failed. The caller must then run nothing.
    """
    os.chdir(folder)
    set_limits(limits, _THREADS if "identity" in layers else tasks)
    if "identity" in layers:
        take_identity(user)
    if sys.platform != "linux":
        return
    libc = load_libc()
    die_with_parent(libc)
    drop_privileges(libc)
    if "landlock" in layers:
        landlock.restrict(libc, root.readable(), root.DEVICES, folder)
    if "seccomp" in layers:
        seccomp.install(libc)


def drop_privileges(libc: ctypes.CDLL) -> None:
    """Drops all capabilities, also those gained by running a file, and bars tracing by processes of the same user."""
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0 or libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    number = _CAPSET.get(platform.machine())
    if number is not None:
        header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
        if libc.syscall(number, header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")
