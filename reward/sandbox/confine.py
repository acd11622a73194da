"""What a process does to itself before it runs code that is not to be trusted. In this order, each where it works:

`namespaces`  its own mounts (`root`), network without an interface, process ids, System V memory; as root, or in a
              user namespace of its own
`identity`    a user id that nobody else has (needs root): no file of ours is its, no process of ours can be signalled
`landlock`    which files may be opened; `seccomp`: which system calls may be made
limits        CPU seconds, address space, size of files, open files, threads: everywhere

No one of them is relied on alone: with all, a program has to get through each of those that stand in its way.
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
# Two ids for each job, one for its program and one for its tests, from a range that no system gives to a person.
_FIRST_ID = 0x60000000
_INSIDE_ID = 1000  # ours, as a user namespace of its own shows it
_THREADS = 64
_OPEN_FILES = 64


@dataclass(frozen=True)
class Limits:
    """What one job may use: its program, and apart from it its tests."""

    cpu_seconds: int = 5
    """Of computing, for each of the two processes. Whole seconds: the kernel counts them."""
    wall_milliseconds: int = 20_000
    """From start to end. Several times the CPU seconds: more jobs run at once than there are cores."""
    memory_mb: int = 512
    """Address space, which Python itself takes about 30 MB of."""
    disk_mb: int = 16
    """Of one file, and of the private folder."""

    FORMAT = struct.Struct("=IIII")

    def pack(self) -> bytes:
        return self.FORMAT.pack(*astuple(self))

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        return cls(*cls.FORMAT.unpack(raw))


def load_libc() -> ctypes.CDLL:
    """The C library that is in this process already, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def enter_namespaces(libc: ctypes.CDLL, at: str) -> bool:
    """Moves this process into its own namespaces and root. Says whether it is root in the system's eyes too.

    Raises:
        OSError: not here.
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
    """What each job has of its own beside: mounts, and process ids for the processes that this one makes."""
    if libc.unshare(_NEW_NS | _NEW_PID) != 0:
        raise OSError(ctypes.get_errno(), "no namespaces for a job")


def owner_ids(job: int) -> tuple[int, int]:
    """User ids for the program and for the tests of the job that is supervised by process `job`."""
    return _FIRST_ID + 2 * job, _FIRST_ID + 2 * job + 1


def take_identity(user: int) -> None:
    """Becomes that user, in no group but the one of the same number, for good."""
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def die_with_parent(libc: ctypes.CDLL) -> None:
    """SIGKILL when the process that made this one ends. To be set after the user id, which clears it."""
    libc.prctl(_SET_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def adopt_orphans(libc: ctypes.CDLL) -> None:
    """Makes this process the parent of descendants whose own parent ended, whatever session they went to."""
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
    """`tasks`: how many processes and threads the user of this process may have in all; None leaves it as it is."""
    megabyte = 1 << 20
    wanted = {
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.disk_mb * megabyte,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":  # macOS refuses it
        wanted[resource.RLIMIT_AS] = limits.memory_mb * megabyte
    if tasks is not None:
        wanted[resource.RLIMIT_NPROC] = tasks
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def confine(layers: frozenset[str], limits: Limits, user: int, tasks: int | None, folder: str) -> None:
    """Applies everything to this process, which must be one thread and stays confined until its end.

    Args:
        layers: those of LAYERS that work here.
        user: whom to become, where `identity` is among them.
        tasks: see `set_limits`.
        folder: the only one that may be written to; becomes the working directory.

    Raises:
        OSError: a layer failed. The caller must not run anything then.
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
    """No capability, none to be had by running a file, and not to be traced or read by others of the same user."""
    if libc.prctl(_SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0) != 0 or libc.prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    number = _CAPSET.get(platform.machine())
    if number is not None:
        header, none = struct.pack("=Ii", 0x20080522, 0), bytes(24)
        if libc.syscall(number, header, none) != 0:
            raise OSError(ctypes.get_errno(), "capset")
