"""Landlock: which files a confined process may reach. Needs no privileges; Linux 5.13 and newer. See landlock(7).

It restricts everything that the running kernel can: reading and writing files, TCP (ABI 4), signals to other processes
and their abstract sockets (ABI 6). Landlock does not cover stat, chmod, chown, utime and locks. `seccomp` refuses
changes of mode and owner; a confined process can still see that a file exists.
"""

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_CREATE, _ADD, _RESTRICT = 444, 445, 446  # the same on every architecture
_READ_FILE, _READ_DIR, _WRITE_FILE, _TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 14
_MAKE_CHAR, _MAKE_SOCKET, _MAKE_FIFO, _MAKE_BLOCK = 1 << 6, 1 << 9, 1 << 10, 1 << 11
_EXECUTE, _IOCTL_DEVICE = 1 << 0, 1 << 15
_RIGHTS_OF_ABI = {1: 13, 2: 14, 3: 15, 4: 15}  # how many bits of the file rights; 16 from ABI 5 on


def abi(libc: ctypes.CDLL) -> int:
    """The kernel's Landlock version; 0 where Landlock is missing or switched off."""
    return max(0, int(libc.syscall(_CREATE, None, ctypes.c_size_t(0), 1)))


def restrict(libc: ctypes.CDLL, readable: Iterable[str], devices: Iterable[str], writable: str) -> None:
    """Restricts this process for good to reading these folders and files, using these devices and writing one folder.

    Paths that do not exist are ignored. The process must have set no_new_privs.

    Raises:
        OSError: Landlock is not available.
    """
    version = abi(libc)
    handled = (1 << _RIGHTS_OF_ABI.get(version, 16)) - 1
    attributes = struct.pack("=Q", handled)
    if version >= 4:
        attributes += struct.pack("=Q", 0b11)
    if version >= 6:
        attributes += struct.pack("=Q", 0b11)
    rules = int(libc.syscall(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0))
    if rules < 0:
        raise OSError(ctypes.get_errno(), "no Landlock here")
    try:
        for path in readable:
            _add(libc, rules, path, _READ_FILE | _READ_DIR if Path(path).is_dir() else _READ_FILE)
        for path in devices:
            _add(libc, rules, path, (_READ_FILE | _WRITE_FILE | _TRUNCATE) & handled)
        not_there = _EXECUTE | _MAKE_CHAR | _MAKE_SOCKET | _MAKE_FIFO | _MAKE_BLOCK | _IOCTL_DEVICE
        _add(libc, rules, writable, handled & ~not_there)
        if libc.syscall(_RESTRICT, rules, 0) != 0:
            raise OSError(ctypes.get_errno(), "Landlock refused")
    finally:
        os.close(rules)


def _add(libc: ctypes.CDLL, rules: int, path: str, rights: int) -> None:
    try:
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    try:
        if libc.syscall(_ADD, rules, 1, struct.pack("=Qi", rights, place), 0) != 0:
            raise OSError(ctypes.get_errno(), f"Landlock refuses a rule for {path}")
    finally:
        os.close(place)
