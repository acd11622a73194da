"""An append-only file of JSON lines that loses none: metrics.jsonl, samples.jsonl, the answers of `generate`.

While the disk is full, lines wait in memory. The trainer calls `sync` before it commits a state and before it publishes
a stage, so all lines up to that step are on the disk. Lines lost in a kill belong to later steps, which the resumed run
writes again.
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
    """The lines of `path`, each an object with a "step"; steps never decrease."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._waiting = b""

    def append(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Adds lines. If the disk is full they wait in memory, and the log says so once."""
        warned = bool(self._waiting)
        for line in lines:
            self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=True).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not disk_is_full(error):
                raise
            if not warned:
                _log.warning("no room to write to %s: its lines wait in memory", self.path)

    def sync(self) -> None:
        """Writes every waiting line to the disk. Raises OSError if there is no room; the lines then keep waiting."""
        if self._waiting:
            self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def cut(self, step: int | None) -> None:
        """Removes the lines after `step`; None: all lines."""
        if not self.path.exists():
            return
        kept = 0  # bytes
        if step is not None:
            with self.path.open("rb") as file:
                # A kill may have truncated the last line; such a line belongs to a later step.
                while (line := file.readline()).endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept += len(line)
        # Truncating in place cannot lose the kept lines in a kill or on a full disk.
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
                file.truncate(size)  # leave no partial line
                raise
        self._waiting = b""
