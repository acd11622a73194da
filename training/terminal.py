"""What reaches the terminal: the text of models and servers without its control characters, and streams that keep.

Text that others wrote (a model's answer, a server's error, a file's name) may hold characters that a terminal obeys:
escape sequences, C1 controls, and controls of the direction of text. They are shown as `\\x1b`, never sent. `shown`
does that to one text; `Screen` to everything that it prints; and the streams that `prepare` sets up to whatever else
is written, such as a library's warnings, except for the few sequences with which progress bars are drawn.

No torch here.
"""

import errno
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

# C0 but tab and newline, DEL, C1, directions, separators of lines, and halves of characters that no encoding has.
_CONTROLS = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
_DRAWING = r"\x1b\[(?:[0-9;]{0,16}[mAK]|\?25[hl])|\r"
_WIDE = 10_000  # columns for a table where there is no terminal: no line is broken
_CONTROL = re.compile(_CONTROLS)
_CONTROL_OR_DRAWING = re.compile(f"(?P<drawing>{_DRAWING})|{_CONTROLS}")


def shown(text: str) -> str:
    r"""The text with every control character but tab and newline replaced by its escape.

    >>> print(shown("a\x1b[31mb\u202ec"))
    a\x1b[31mb\u202ec
    """
    return _CONTROL.sub(_escape, text)


def drawn(text: str) -> str:
    """As `shown`, but colours and the cursor moves of progress bars are kept."""
    return _CONTROL_OR_DRAWING.sub(lambda found: found.group() if found["drawing"] else _escape(found), text)


def _escape(found: re.Match[str]) -> str:
    return found.group().encode("unicode_escape").decode()


class Screen(Console):
    """A rich Console for text of others: no markup, no emoji codes, no line breaks of its own, nothing obeyed."""

    def __init__(self, *, stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(
            stderr=stderr, quiet=quiet, file=file, soft_wrap=True, markup=False, emoji=False, highlight=False
        )
        if not self.is_terminal:
            self.width = _WIDE

    def print(self, *objects: Any, **options: Any) -> None:
        """As `Console.print`. rich removes some control characters from a string; here they are shown first."""
        super().print(*(shown(one) if isinstance(one, str) else one for one in objects), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """As `Console.render`, which everything passes through that is printed, also inside tables."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(shown(segment.text), segment.style)


class _Output(io.FileIO):
    """A descriptor to write to. If its reader has gone (`| head`, a closed terminal), the rest is thrown away, since a
    pipeline must go on; so it is if the disk is full, which `lost` reports."""

    lost: str | None = None

    def write(self, data: Any) -> int:
        """As `FileIO.write`."""
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                self.lost = os.strerror(error.errno or errno.EIO)
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return memoryview(data).nbytes


class _Stream(io.TextIOWrapper):
    """Text output that neither obeys the control characters of others nor fails on a character that the terminal's
    encoding lacks: both become escapes."""

    def write(self, text: str) -> int:
        """As `TextIOWrapper.write`."""
        super().write(drawn(text))
        return len(text)


class _Formatter(logging.Formatter):
    """Of the log's lines, which quote servers and models."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(super().format(record))


def prepare(encoding: str | None = None) -> None:
    """Sets up this program's standard streams, its log and its tracebacks. A program calls it first.

    A descriptor that the caller closed (`>&-`) becomes /dev/null: the next file that is opened would get its number.
    Streams that a caller in Python has replaced stay.

    Args:
        encoding: of standard output and error, if not the one that Python chose for the terminal.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one
    if sys.stdout is sys.__stdout__:
        sys.stdout = _opened(1, sys.stdout, encoding)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _opened(2, sys.stderr, encoding)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    # When it is imported, it says which kernels it lacks, none of which is used here.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    sys.excepthook = _print_traceback


def _opened(descriptor: int, before: Any, encoding: str | None) -> _Stream:
    if isinstance(before, io.TextIOWrapper):
        with suppress(OSError):  # its descriptor has become another file since
            before.reconfigure(errors="backslashreplace")  # for whoever kept it
        encoding = encoding or before.encoding
    buffer = io.BufferedWriter(_Output(descriptor, "wb", closefd=False))
    return _Stream(buffer, encoding=encoding or "utf-8", errors="backslashreplace", line_buffering=True)


def lost() -> str | None:
    """Why standard output could not be written; None if it could, or if its reader ended first."""
    if not isinstance(sys.stdout, _Stream):
        return None
    sys.stdout.flush()
    raw = sys.stdout.buffer.raw  # type: ignore[attr-defined]
    assert isinstance(raw, _Output)
    return raw.lost


def same_reader() -> bool:
    """Whether standard output and standard error end in the same place, so that one is enough to say something."""
    with suppress(OSError, ValueError, AttributeError):
        out, err = os.fstat(sys.stdout.fileno()), os.fstat(sys.stderr.fileno())
        return (out.st_dev, out.st_ino, out.st_rdev) == (err.st_dev, err.st_ino, err.st_rdev)
    return False


def _print_traceback(kind: type[BaseException], value: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    print(shown("".join(traceback.format_exception(kind, value, trace))), end="", file=sys.stderr)
