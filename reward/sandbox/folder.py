"""Measures and removes a job's private folder, on systems where the job cannot have a file system of its own.

A program may leave folders nested deeper than Python's recursion limit, paths longer than the system accepts, or
folders without permissions. So nothing here recurses or follows a link.
"""

import os
from pathlib import Path

_BLOCK = 512
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


def exceeds(folder: Path, limit_bytes: int, limit_files: int) -> bool:
    """Whether the folder exceeds a limit; true also for a folder that cannot be measured."""
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
    """Removes the folder and everything in it, by descriptors of open folders. No process may still use it."""
    here = os.open(folder, _FOLDER)
    waiting = [_clear(here)]  # for each folder on the path, its subfolders not yet removed
    while True:
        if waiting[-1]:
            name = waiting[-1][-1]
            os.chmod(name, 0o700, dir_fd=here)
            here = _moved(here, name)
            waiting.append(_clear(here))
        else:
            waiting.pop()
            if not waiting:
                break
            here = _moved(here, "..")
            os.rmdir(waiting[-1].pop(), dir_fd=here)
    os.close(here)
    folder.rmdir()


def _moved(here: int, name: str) -> int:
    there = os.open(name, _FOLDER, dir_fd=here)
    os.close(here)
    return there


def _clear(place: int) -> list[str]:
    """Removes everything but folders; returns the folders' names."""
    with os.scandir(place) as entries:
        found = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    for name, is_folder in found:
        if not is_folder:
            os.unlink(name, dir_fd=place)
    return [name for name, is_folder in found if is_folder]
