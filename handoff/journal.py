"""An append-only file of JSON lines that loses none: metrics.jsonl, samples.jsonl, the answers of `generate`.

While the disk is full or cannot be written, lines wait in memory. The trainer calls `sync` before it commits a state
and before it publishes a stage, so all lines up to that step are on the disk. Lines lost in a kill belong to later
steps, which the resumed run writes again. A state keeps the journals' seals, so a resumed run notices a file that was
damaged or deleted: it says so and goes on with the lines that can be read, since training depends on none of them.
"""

import hashlib
import json
import logging
import os
import shutil
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
        """Adds lines. If they cannot be written they wait in memory, and the log says so once."""
        warned = bool(self._waiting)
        for line in lines:
            self._waiting += json.dumps(line, ensure_ascii=False, allow_nan=True).encode() + b"\n"
        try:
            self._write()
        except OSError as error:
            if not warned:
                why = "no room to write to it" if disk_is_full(error) else f"it cannot be written ({error.strerror})"
                _log.warning("%s: %s: its lines wait in memory", self.path, why)

    def sync(self) -> None:
        """Writes every waiting line to the disk. Raises OSError if it cannot; the lines then keep waiting."""
        if self._waiting:
            self._write()
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def seal(self) -> dict[str, Any]:
        """The size and SHA-256 of the file, for `cut`."""
        content = self.path.read_bytes() if self.path.exists() else b""
        return _seal(content)

    def cut(self, step: int | None, seal: Mapping[str, Any] | None = None) -> None:
        """Removes the lines after `step`; None: all lines.

        Lines that cannot be read are removed, too; the file as it was stays beside it as `<name>.damaged`, and the log
        names the lines.

        Args:
            seal: what `seal` returned when the lines up to `step` had been written. If the file does not begin with
                the same bytes, the log says so.
        """
        content = self.path.read_bytes() if self.path.exists() else b""
        if step is None:
            kept, unread = b"", list[int]()
        else:
            kept, unread = _up_to(content, step)
        whole = seal is None or step is None or _seal(content[: seal["bytes"]]) == dict(seal)
        if whole and not unread:
            if self.path.exists():
                # Truncating in place cannot lose the kept lines in a kill or on a full disk.
                os.truncate(self.path, len(kept))
            return
        if not self.path.exists():
            _log.warning("%s is missing; its lines up to step %s are lost, the training is not", self.path, step)
            return
        damaged = self.path.with_name(f"{self.path.name}.damaged")
        shutil.copyfile(self.path, damaged)
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        temporary.write_bytes(kept)
        temporary.replace(self.path)
        what = f"cannot be read in line {_numbers(unread)}" if unread else "is not as it was when the state was saved"
        _log.warning(
            "%s %s; what can be read of it stays, the file as it was is %s, the training goes on",
            self.path,
            what,
            damaged.name,
        )

    def end_at(self, seal: Mapping[str, Any]) -> None:
        """Removes what was logged after the file was sealed, unless it has been damaged since."""
        content = self.path.read_bytes() if self.path.exists() else b""
        if len(content) > seal["bytes"] and _seal(content[: seal["bytes"]]) == dict(seal):
            os.truncate(self.path, seal["bytes"])

    def lines(self) -> list[dict[str, Any]]:
        """The lines that can be read. The log names the others, but not a last line that a kill has torn."""
        if not self.path.exists():
            return []
        found: list[dict[str, Any]] = []
        unread: list[int] = []
        with self.path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                line = _read(raw)
                if line is not None:
                    found.append(line)
                elif raw.endswith(b"\n"):
                    unread.append(number)
        if unread:
            _log.warning("%s cannot be read in line %s; the other lines are used", self.path, _numbers(unread))
        return found

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


def _up_to(content: bytes, step: int) -> tuple[bytes, list[int]]:
    """(the lines up to `step` that can be read, numbers of the lines among them that cannot)."""
    kept: list[bytes] = []
    unread: list[int] = []
    waiting: list[int] = []  # lines that cannot be read: among those up to `step` only if such a line follows
    for number, raw in enumerate(content.splitlines(keepends=True), start=1):
        line = _read(raw)
        if line is None:
            waiting.append(number)
        elif line["step"] > step:
            break
        else:
            kept.append(raw)
            unread += waiting
            waiting = []
    return b"".join(kept), unread


def _numbers(lines: Sequence[int]) -> str:
    return ", ".join(str(number) for number in lines[:10]) + (", ..." if len(lines) > 10 else "")


def _read(raw: bytes) -> dict[str, Any] | None:
    """A line's content; None if it is torn or damaged."""
    try:
        line = json.loads(raw) if raw.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and type(line.get("step")) is int else None


def _seal(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
