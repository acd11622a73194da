"""A file of JSON lines that only grows, and loses none: metrics.jsonl, samples.jsonl and the answers of `generate`.

A full disk holds lines back in memory until there is room again. `sync` is called before a state is committed and
before a stage is published, so that neither ever lacks a line of its past: what a kill takes with it is then written
again by the steps that follow the state.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from handoff.files import disk_is_full

_log = logging.getLogger(__name__)


class Journal:
    """The lines of `path`, each an object with a "step"; steps never fall."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines. Where the disk is full they wait, and the first one to wait is told in the log."""
        told = bool(self._waiting)
        for line in lines:
            self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=True).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not disk_is_full(error):
                raise
            if not told:
                _log.warning("no room to write to %s: its lines wait in memory", self.path)

    def sync(self) -> None:
        """Has every line on the disk. Raises OSError where there is no room for them; they still wait then."""
        if self._waiting:
            self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int | None) -> None:
        """Removes what is behind `step`; None: everything."""
        if not self.path.exists():
            return
        kept = 0  # bytes
        if step is not None:
            with self.path.open("rb") as file:
                # The last line may be torn by a kill; it is behind the step then.
                while (line := file.readline()).endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept += len(line)
        # In place: there is no instant at which a kill, or a full disk, would take the lines that stay.
        os.truncate(self.path, kept)

    def lines(self) -> list[dict[str, Any]]:
        """The lines that are in the file. A last line that a kill has torn is not among them."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            return [json.loads(line) for line in file if line.endswith(b"\n")]

    def _write(self) -> None:
        with self.path.open("ab", buffering=0) as file:
            size = file.tell()
            rest = memoryview(self._waiting)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(size)  # no torn line
                raise
        self._waiting = b""
