"""The file that preferences of the web chat are appended to, in the form that the readers in data/ know."""

import fcntl
import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import file_rows
from data.formats import detect
from data.records import Origin
from handoff.errors import UserError
from handoff.files import fsync_path, quoted
from handoff.parent import Parent

NAME = "preferences.jsonl"


def default_file(parent: Parent) -> Path:
    """`preferences.jsonl` in the folder of the model's run; in the working directory for a model of no run."""
    return Path(NAME) if parent.manifest is None else parent.path.parent / NAME


class Preferences:
    """A file of JSON lines. Several servers may append to it at once."""

    def __init__(self, path: Path) -> None:
        """Looks whether rows can be appended, and creates nothing.

        Raises:
            UserError: they cannot, or the file holds something else.
        """
        self.path = path
        if path.suffix != ".jsonl":
            raise UserError(f"--preferences {path}: give it a name that ends in .jsonl, by which stages read its rows")
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"--preferences {path}: it is not a regular file; name another")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise UserError(f"--preferences {path}: there is no folder {path.parent}; make it") from None
        except OSError as error:
            raise UserError(f"--preferences {path}: it cannot be used ({error.strerror})") from error
        if not os.access(path if path.exists() else path.parent, os.R_OK | os.W_OK):
            raise UserError(f"--preferences {path}: no permission to read and write there; allow it or name another")
        if path.exists():
            with path.open("rb") as file:
                self._check_end(file.fileno())
            self._check_form()

    def add(self, row: Mapping[str, Any]) -> None:
        """Appends a row: whole, or not at all.

        Raises:
            OSError: it cannot be written.
            UserError: the file does not end with a whole line any more.
        """
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        with os.fdopen(os.open(self.path, flags, 0o644), "r+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = self._check_end(file.fileno())
            rest = memoryview(line)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        if size == 0:
            fsync_path(self.path.parent)

    def _check_end(self, descriptor: int) -> int:
        """The size in bytes. Raises UserError if the last line is not whole, so that a row would be glued to it."""
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            raise UserError(f"{self.path}: its last line has no end; complete the line, or remove it")
        return size

    def _check_form(self) -> None:
        """Raises UserError if the first row is of another form, in which the rows after it would be read, too."""
        name = str(self.path)
        for place, row in file_rows(self.path, name, Counter()):
            found = detect(row, False, Origin(name, place))
            if found != "preference":
                raise UserError(
                    f"{quoted(name)}:{place}: the row is no preference as the web chat writes them ({found}); name "
                    "another file in --preferences"
                )
            return
