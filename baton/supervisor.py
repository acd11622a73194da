"""Starts one stage after another in processes of their own, copies their output, and forwards signals to them."""

import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Protocol

from baton.launched import own_words
from baton.output import Tee
from training.signals import ENDING


class Running(Protocol):
    """A stage that was started."""

    def send(self, signum: int) -> None:
        """Sends a signal to the stage."""

    def wait(self) -> int:
        """Waits for the stage's end and returns its exit code, negative for a signal."""


@dataclass(frozen=True)
class Start:
    """A way to start a stage: the command that a user would type, and a function that takes the output descriptor."""

    command: Sequence[str]
    begin: Callable[[int], Running]
    settled: Callable[[int], int] = int
    """Called with the stage's exit code when it has ended; gives the one that counts."""


@dataclass(frozen=True)
class Ended:
    """How a stage ended."""

    code: int
    """Its exit code; 128 + n for a signal."""
    seconds: float
    lines: list[str]
    """Its last lines."""
    tail: list[str]
    """The same without those of its launcher."""
    command: str


class Supervisor:
    """Runs stages, one at a time."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        """The requests to end that this process has received."""
        self._running: Running | None = None

    def run(self, start: Start, log_path: Path) -> Ended:
        """Starts a stage and waits for its end. Its output goes to the terminal and to the log."""
        command = shlex.join(start.command)
        tee = Tee(log_path, f"=== {datetime.now().astimezone().isoformat(timespec='seconds')}  {command}")
        begun = time.monotonic()
        self._running = start.begin(tee.descriptor)
        tee.release()
        code = self._running.wait()
        self._running = None
        lines = tee.close()
        tail, code = own_words(lines, code)
        code = start.settled(128 - code if code < 0 else code)
        return Ended(code, time.monotonic() - begun, lines, tail, command)

    def send(self, signum: int) -> None:
        """Sends a signal to the stage that runs, if one does."""
        running = self._running
        if running is not None:
            running.send(signum)

    @contextmanager
    def forwarding(self) -> Iterator[None]:
        """Inside, signals to this process are forwarded to the stage, and `run` waits for the stage to react. The
        third request to end kills the stage. A signal that was ignored at the start (`nohup`) stays ignored."""

        def forward(signum: int, frame: FrameType | None) -> None:
            if signum == signal.SIGUSR1:  # a request to save, which is ignored if no stage runs
                self.send(signum)
                return
            self.signals.append(signum)
            if self._running is None:
                sys.exit(128 + signum)
            self.send(signal.SIGKILL if len(self.signals) > 2 else signum)

        heard = [signum for signum in ENDING if signal.getsignal(signum) is not signal.SIG_IGN]
        before = {signum: signal.signal(signum, forward) for signum in (*heard, signal.SIGUSR1)}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)
