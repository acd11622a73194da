"""Copies a stage's output to the terminal and to its log.

A stage writes to one descriptor: a pseudo-terminal if the user has a terminal, so that progress bars are drawn, else a
pipe. The terminal gets the text with its colours and progress bars, but no other control characters
(`training/terminal.py`). The log gets the final text: without colours, and with only the last state of a line that was
drawn repeatedly.
"""

import codecs
import fcntl
import os
import pty
import re
import sys
import termios
import threading
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from training.terminal import drawn

TAIL = 200
"""Number of last lines to remember."""
_REDRAWN = 12
"""Number of lines that a progress display may redraw; older ones are written to the log."""
_CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|\r|\n|[^\x1b\r\n]+")
_UNFINISHED = re.compile(r"\x1b(?:\[[0-9;?]{0,16})?$")


class Pieces:
    """Converts the bytes of a stage's output, which may be cut anywhere, to text for the terminal."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._rest = ""

    def text(self, piece: bytes) -> str:
        """The text that is complete with this piece; with an empty one, which is the last, all of it."""
        text = self._rest + self._decoder.decode(piece, final=not piece)
        unfinished = _UNFINISHED.search(text) if piece else None
        self._rest = unfinished.group() if unfinished else ""
        return drawn(text[: len(text) - len(self._rest)])


class PlainText:
    """Converts the text for the terminal to what remains on the screen. Supports the cursor moves of progress bars."""

    def __init__(self, log: TextIO) -> None:
        self._log = log
        self._lines: deque[str] = deque()
        self._current = ""
        self._rewrite = False
        self.tail: deque[str] = deque(maxlen=TAIL)

    def feed(self, text: str) -> None:
        """Takes the next piece of output."""
        for part in _CONTROL.finditer(text):
            self._apply(part.group(), part.group(1), part.group(2))
        while len(self._lines) > _REDRAWN:
            self._write(self._lines.popleft())
        self._flush()

    def close(self) -> None:
        """Writes the remaining lines."""
        for line in [*self._lines, *([self._current] if self._current else [])]:
            self._write(line)
        self._lines.clear()
        self._current = ""
        self._flush()

    def _write(self, line: str) -> None:
        if line.strip():
            self.tail.append(line)
        with suppress(OSError):  # a full disk loses log lines, but an error here would block the stage on a full pipe
            self._log.write(line + "\n")

    def _flush(self) -> None:
        with suppress(OSError):
            self._log.flush()

    def _apply(self, part: str, argument: str | None, command: str | None) -> None:
        if part == "\n":
            self._lines.append(self._current.rstrip())
            self._current, self._rewrite = "", False
        elif part == "\r":
            self._rewrite = True
        elif command == "A":  # up
            for _ in range(int(argument or 1)):
                self._current = self._lines.pop() if self._lines else ""
            self._rewrite = True
        elif command == "K":  # erase the line
            self._current, self._rewrite = "", False
        elif not part.startswith("\x1b"):
            if self._rewrite:
                self._current, self._rewrite = "", False
            self._current += part


class Tee:
    """Copies a stage's output on `descriptor` to the terminal and, as plain text, to a log."""

    def __init__(self, log_path: Path, header: str) -> None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        self.log_path = log_path
        self._log = log_path.open("a", encoding="utf-8")
        self._log.write(header + "\n")
        self._text = PlainText(self._log)
        if sys.stdout.isatty():
            self._source, self.descriptor = pty.openpty()
            size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, size)
        else:
            self._source, self.descriptor = os.pipe()
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self) -> None:
        pieces = Pieces()
        piece = b"start"
        while piece:
            try:
                piece = os.read(self._source, 1 << 16)
            except OSError:  # the other end of the pseudo-terminal was closed
                piece = b""
            text = pieces.text(piece)
            self._text.feed(text)
            sys.stdout.write(text)
            sys.stdout.flush()

    def release(self) -> None:
        """Closes this process's copy of `descriptor` after the stage has its own."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    def close(self) -> list[str]:
        """Waits for the last output and returns the last lines. Output of processes that outlive the stage is lost."""
        self.release()
        self._thread.join(timeout=2.0)
        self._text.close()
        with suppress(OSError):
            self._log.close()
        return list(self._text.tail)
