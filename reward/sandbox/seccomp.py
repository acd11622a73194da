"""Builds and installs a seccomp filter of the system calls that a confined process may make.

The filter lists the allowed calls, so it also refuses calls that future kernels add. Python and its standard library
may use files, memory, threads, clocks, pipes and polling. A process cannot open a socket that leads out of it, create,
signal or trace another process, mount, change modes or owners of files, allocate memory that no limit counts (memfd,
System V), or use io_uring. A refused call fails with EPERM (`PermissionError`), or with ENOSYS where the C library then
falls back to an older call.

The filter reads only the low halves of arguments, since the kernel reads those that it tests as ints. See seccomp(2).
"""

import ctypes
import errno
import functools
import os
import platform
import struct

# Name, number on x86_64, number on aarch64 (- for none). The kernel never changes these numbers.
_TABLE = """
read 0 63, write 1 64, readv 19 65, writev 20 66, pread64 17 67, pwrite64 18 68, preadv 295 69, pwritev 296 70,
open 2 -, openat 257 56, close 3 57, close_range 436 436, stat 4 -, fstat 5 80, lstat 6 -, newfstatat 262 79,
statx 332 291, statfs 137 43, fstatfs 138 44, lseek 8 62, access 21 -, faccessat 269 48, faccessat2 439 439,
readlink 89 -, readlinkat 267 78, getcwd 79 17, chdir 80 49, fchdir 81 50, mkdir 83 -, mkdirat 258 34, rmdir 84 -,
unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, link 86 -, linkat 265 37,
symlink 88 -, symlinkat 266 36, truncate 76 45, ftruncate 77 46, fallocate 285 47, fadvise64 221 223, fsync 74 82,
fdatasync 75 83, getdents64 217 61, dup 32 23, dup2 33 -, dup3 292 24, flock 73 32, pipe 22 -, pipe2 293 59,
sendfile 40 71, copy_file_range 326 285, umask 95 166,
mmap 9 222, munmap 11 215, mprotect 10 226, mremap 25 216, brk 12 214, madvise 28 233, mincore 27 232, msync 26 227,
select 23 -, pselect6 270 72, poll 7 -, ppoll 271 73, epoll_create 213 -, epoll_create1 291 20, epoll_ctl 233 21,
epoll_wait 232 -, epoll_pwait 281 22, epoll_pwait2 441 441, eventfd2 290 19, timerfd_create 283 85,
timerfd_settime 286 86, timerfd_gettime 287 87,
rt_sigaction 13 134, rt_sigprocmask 14 135, rt_sigreturn 15 139, rt_sigpending 127 136, rt_sigtimedwait 128 137,
rt_sigsuspend 130 133, sigaltstack 131 132, pause 34 -, restart_syscall 219 128,
nanosleep 35 101, clock_nanosleep 230 115, clock_gettime 228 113, clock_getres 229 114, gettimeofday 96 169,
time 201 -, times 100 153, getitimer 36 102, setitimer 38 103, alarm 37 -,
getrandom 318 278, uname 63 160, sysinfo 99 179, getpid 39 172, getppid 110 173, gettid 186 178, getuid 102 174,
geteuid 107 175, getgid 104 176, getegid 108 177, getgroups 115 158, getresuid 118 148, getresgid 120 150,
getpgrp 111 -, getpgid 121 155, getsid 124 156, getpriority 140 141, getrusage 98 165, getrlimit 97 163,
sched_yield 24 124, sched_getaffinity 204 123, sched_getparam 143 121, sched_getscheduler 145 120,
futex 202 98, futex_waitv 449 449, set_robust_list 273 99, get_robust_list 274 100, set_tid_address 218 96,
rseq 334 293, membarrier 324 283, exit 60 93, exit_group 231 94, wait4 61 260, waitid 247 95,
recvfrom 45 207, recvmsg 47 212, sendto 44 206, sendmsg 46 211, shutdown 48 210, getsockopt 55 209,
setsockopt 54 208, getsockname 51 204, getpeername 52 205,
clone 56 220, clone3 435 435, kill 62 129, tgkill 234 131, prctl 157 167, prlimit64 302 261,
socketpair 53 199, ioctl 16 29, fcntl 72 25
"""
# Calls whose arguments are tested, or that are refused in a special way; all other calls in the table are allowed.
_TESTED = frozenset({"clone", "clone3", "kill", "tgkill", "prctl", "prlimit64", "socketpair", "ioctl", "fcntl"})

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of the table, AUDIT_ARCH_*

_CLONE_THREAD, _CLONE_NEW = 0x00010000, 0x7E020000
# PR_SET_NAME, PR_GET_NAME, PR_GET_DUMPABLE, PR_GET_SECCOMP, and PR_SET_VMA, by which malloc names a mapping.
_PRCTL = (15, 16, 3, 21, 0x53564D41)
# TCGETS (isatty), TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX. Not FIOSETOWN: it can aim a signal.
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451)
# Descriptors, flags, locks, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Not F_SETOWN and F_SETSIG, which can aim a signal.
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032)
_AF_UNIX, _SOCK_STREAM = 1, 1

_LOAD, _JUMP_EQUAL, _JUMP_ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCHITECTURE_AT = 0, 4

_Code = list[tuple[int, int, int, int]]


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


@functools.cache
def numbers(machine: str) -> dict[str, int]:
    """The machine's numbers of the calls in the table, by name. Raises KeyError for an unknown machine."""
    column = _ARCHITECTURES[machine][0]
    rows = (entry.split() for entry in _TABLE.replace("\n", " ").split(","))
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def build(machine: str, pid: int) -> bytes:
    """The filter, as an array of struct sock_filter, for a process whose own id is `pid`."""
    number = numbers(machine)
    refuse, missing = (_RETURN, 0, 0, _ERRNO | errno.EPERM), (_RETURN, 0, 0, _ERRNO | errno.ENOSYS)
    allow = (_RETURN, 0, 0, _ALLOW)

    def equals(argument: int, values: tuple[int, ...]) -> _Code:
        """Allowed where the argument is one of these."""
        code: _Code = [(_LOAD, 0, 0, 16 + 8 * argument)]
        for value in values:
            code += [(_JUMP_EQUAL, 0, 1, value), allow]
        return [*code, refuse]

    tested: dict[str, _Code] = {
        # Only a thread in the current namespaces, never a process.
        "clone": [
            (_LOAD, 0, 0, 16),
            (_JUMP_ANY_BIT, 1, 0, _CLONE_NEW),
            (_JUMP_ANY_BIT, 1, 0, _CLONE_THREAD),
            refuse,
            allow,
        ],
        # Its flags lie in memory, which a filter cannot read; on ENOSYS the C library calls clone instead.
        "clone3": [missing],
        "kill": equals(0, (pid,)),
        "tgkill": equals(0, (pid,)),
        "prctl": equals(0, _PRCTL),
        "prlimit64": equals(0, (0, pid)),
        # Only a stream pair, which asyncio needs. A datagram socket could be connected to another process's.
        "socketpair": [
            (_LOAD, 0, 0, 16),
            (_JUMP_EQUAL, 0, 4, _AF_UNIX),
            (_LOAD, 0, 0, 24),
            (_AND, 0, 0, 0xF),
            (_JUMP_EQUAL, 0, 1, _SOCK_STREAM),
            allow,
            refuse,
        ],
        "ioctl": equals(1, _IOCTL),
        "fcntl": equals(1, _FCNTL),
    }
    code: _Code = [
        (_LOAD, 0, 0, _ARCHITECTURE_AT),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine][1]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
    ]
    for name, value in number.items():
        if name not in _TESTED:
            code += [(_JUMP_EQUAL, 0, 1, value), allow]
    for name, body in tested.items():
        code += [(_JUMP_EQUAL, 0, len(body), number[name]), *body]
    code.append(refuse)
    return b"".join(struct.pack("=HBBI", *line) for line in code)


def install(libc: ctypes.CDLL) -> None:
    """Installs the filter in this process for good. It must have set no_new_privs and have one thread.

    Raises:
        OSError: the kernel refuses the filter, or the table has no column for this machine.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(errno.ENOSYS, f"no table of system calls for {machine}")
    code = build(machine, os.getpid())
    program = _Program(len(code) // 8, code)
    if libc.prctl(22, 2, ctypes.byref(program), 0, 0) != 0:  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
        raise OSError(ctypes.get_errno(), "seccomp filter refused")
