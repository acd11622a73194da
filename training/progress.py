"""How far a stage is: a bar in its own terminal, and a small file that `baton top` reads, also from another machine.

The file, `<run>/.progress/<section>.json`, is replaced every few seconds while the stage works, and removed when it
ends. A stage that was killed leaves it, with its process id and the time at which it was last written.
"""

import json
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from handoff.errors import UserError

FOLDER = ".progress"
"""Name in the run's folder."""
EVERY = 5.0
"""Seconds between two writes of the file."""
_WINDOW = 60.0  # seconds over which the rate is measured


def progress_path(run_dir: Path, section: str) -> Path:
    """The file about a section of a run."""
    return run_dir / FOLDER / f"{section}.json"


class Pulse:
    """The file about a running stage. That it cannot be written costs the stage nothing."""

    def __init__(self, path: Path, total: int, peak: Callable[[], int]) -> None:
        """`peak`: the most memory that the process had on its device (`Engine.peak`), in bytes."""
        self._path, self._total, self._peak = path, total, peak
        self._done = 0
        self._moments: deque[tuple[float, int]] = deque()
        self._next = 0.0

    def advance(self, n: int) -> None:
        """Counts `n` steps. The first call may count those of an earlier start, so it does not enter the rate."""
        self._done += n
        now = time.monotonic()
        self._moments.append((now, self._done))
        while len(self._moments) > 2 and self._moments[1][0] < now - _WINDOW:
            self._moments.popleft()
        if now >= self._next:
            self._next = now + EVERY
            with suppress(OSError):
                self._write()

    def _write(self) -> None:
        (then, before), (now, done) = self._moments[0], self._moments[-1]
        peak = None
        with suppress(UserError):  # not every system says it
            peak = self._peak()
        content = {
            "done": self._done,
            "total": self._total,
            "rate": (done - before) / (now - then) if now > then else None,
            "memory": psutil.Process().memory_info().rss,
            "peak": peak,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "at": time.time(),
        }
        self._path.parent.mkdir(exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(content), encoding="utf-8")
        temporary.replace(self._path)

    def end(self) -> None:
        """Removes the file."""
        with suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._path.parent.rmdir()  # if it was the last one


@contextmanager
def progress(console: Console, total: int, description: str, pulse: Pulse | None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. In a terminal, a bar shows rate and time left. `pulse`: None on all but the main process."""
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    shown = pulse is not None and console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=not shown) as bar:
        task = bar.add_task(description, total=total, rate="")

        def advance(n: int = 1) -> None:
            speed = bar.tasks[0].speed if shown else None
            bar.update(task, advance=n, rate=f"{speed:.1f}/s" if speed else "")
            if pulse is not None:
                pulse.advance(n)

        try:
            yield advance
        finally:
            if pulse is not None:
                pulse.end()
