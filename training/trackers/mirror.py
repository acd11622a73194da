"""The stage's side of its trackers: starts a process for each of them, which sends the lines of metrics.jsonl, and says
what became of it. No step waits for it."""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from handoff.stage import TRACKERS, StageDir
from training.config import Tracker
from training.trackers.destinations import DESTINATIONS

GRACE = 120
"""Seconds in which a tracker's process may send its last lines after its stage has ended."""
RETRY = 600.0
"""Seconds after which a process that died is replaced."""
STOPPED = "stopped"
_LAST_WAIT = 0.5  # seconds for which a stage waits for its mirrors at the end

logger = logging.getLogger(__name__)


class Mirror:
    """One tracker. The first line starts its process, so that a stage that fails earlier leaves nothing."""

    def __init__(
        self, tracker: Tracker, stage: Path, given: dict[str, str], run_id: str, config: dict[str, Any]
    ) -> None:
        """
        Args:
            stage: the stage's folder, with metrics.jsonl.
            given: the tracker's own settings (`Destination.given`).
            run_id: of the run in the tracker, the same after a resume.
            config: the section of the recipe.
        """
        self.tracker = tracker
        self._settings = {**given, "tracker": tracker, "stage": str(stage), "run_id": run_id, "config": config}
        self._log = stage / TRACKERS / tracker / "mirror.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    def wake(self) -> None:
        """Called after a new line in metrics.jsonl. Starts the process if none is running; it finds the line itself."""
        if self._process is not None and self._process.poll() is not None:
            self._report(self._process.returncode)
            self._process = None
        if self._process is None and time.monotonic() >= self._next_start:
            self._next_start = time.monotonic() + RETRY
            try:
                self._start()
            except OSError as error:
                logger.warning("%s could not be started (%s); metrics.jsonl has everything", self.tracker, error)

    def end(self) -> None:
        """Tells the process that the stage has ended."""
        if self._process is not None:
            assert self._process.stdin is not None
            with suppress(OSError):
                self._process.stdin.close()

    def close(self, deadline: float) -> None:
        """Waits for the process until the deadline (of time.monotonic); the rest is sent in the background."""
        if self._process is None:
            return
        try:
            self._report(self._process.wait(max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            logger.warning(
                "the last lines go to %s in the background, for %d s at most; metrics.jsonl has everything",
                self.tracker,
                GRACE,
            )
        self._process = None

    def _start(self) -> None:
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.trackers"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal must reach only the stage
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
        self._process.stdin.flush()

    def _report(self, code: int) -> None:
        if code == 0:
            return
        begin = f"{self.tracker} {STOPPED}"
        said = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        last = next((line for line in reversed(said) if line.startswith(begin)), f"{begin} (exit code {code})")
        logger.warning("%s; metrics.jsonl has everything", last)


class Mirrors:
    """All trackers of a stage."""

    def __init__(self, mirrors: Sequence[Mirror]) -> None:
        self.mirrors = mirrors

    def wake(self) -> None:
        """Called after a new line in metrics.jsonl."""
        for mirror in self.mirrors:
            mirror.wake()

    def close(self) -> None:
        """Called at the end of the stage. Waits at most half a second for all of them together."""
        for mirror in self.mirrors:
            mirror.end()
        deadline = time.monotonic() + _LAST_WAIT
        for mirror in self.mirrors:
            mirror.close(deadline)


def start_mirrors(
    trackers: Sequence[Tracker], stage: StageDir, name: str, config: dict[str, Any], say: Callable[[str], None]
) -> Mirrors:
    """The mirrors of a stage. `say` gets a line for each tracker: where its lines go, or why nowhere.

    Args:
        name: of the run, for the trackers: `<run>/<stage>`.
        config: the section of the recipe.
    """
    mirrors = []
    for tracker in trackers:
        found = DESTINATIONS[tracker]("baton", name, stage.trackers_dir / tracker)
        say(f"  {found.words}")
        if found.given is not None:
            mirrors.append(Mirror(tracker, stage.path, found.given, stage.run_id(), config))
    return Mirrors(mirrors)
