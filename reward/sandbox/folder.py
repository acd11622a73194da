"""The private folder of a job where it cannot have a file system of its own: measured, and removed, whatever is in it.

A program may leave folders nested deeper than Python recurses, paths longer than the system takes, folders without
permissions. Nothing here recurses or follows a link.
"""

import os
import secrets
import stat
from pathlib import Path

_BLOCK = 512


def exceeds(folder: Path, limit_bytes: int, limit_files: int) -> bool:
    """Whether the folder holds more; a folder that cannot be measured does."""
    used = files = 0
    waiting = [str(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    files += 1
                    used += entry.stat(follow_symlinks=False).st_blocks * _BLOCK
                    if used > limit_bytes or files > limit_files:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
        except FileNotFoundError:
            continue  # removed meanwhile
        except OSError:
            return True
    return False


def remove(folder: Path) -> None:
    """Removes the folder and everything in it: what lies in an inner folder is moved up before that is removed."""
    top = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        while names := _names(top):
            for name in names:
                _remove_entry(top, name)
    finally:
        os.close(top)
    folder.rmdir()


def _remove_entry(top: int, name: str) -> None:
    try:
        inner = _open_folder(top, name)
    except NotADirectoryError:
        os.unlink(name, dir_fd=top)
        return
    try:
        for child in _names(inner):
            try:
                os.close(_open_folder(inner, child))
            except NotADirectoryError:
                os.unlink(child, dir_fd=inner)
            else:
                os.rename(child, secrets.token_hex(16), src_dir_fd=inner, dst_dir_fd=top)
    finally:
        os.close(inner)
    os.rmdir(name, dir_fd=top)


def _names(place: int) -> list[str]:
    with os.scandir(place) as entries:
        return [entry.name for entry in entries]


def _open_folder(parent: int, name: str) -> int:
    """Raises NotADirectoryError for anything else, links included."""
    if not stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        raise NotADirectoryError(name)
    os.chmod(name, 0o700, dir_fd=parent)
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=parent)
