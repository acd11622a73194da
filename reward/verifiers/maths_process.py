"""The trainer's side of maths_worker.py. It starts the worker process when first needed, and again when it dies.

math-verify's own time limit is a signal, which only a main thread may set and which cannot interrupt arithmetic on huge
integers. A separate process has its own main thread, and can be killed. It is a plain subprocess, which does not fork
torch's threads, does not import `__main__` again, and works in daemonic processes.
"""

import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from reward.functions import RewardError

START_SECONDS = 120.0
"""Wall time limit for the process to import sympy."""
WALL_FACTOR = 20.0
"""Wall time limit for a comparison, as a multiple of its CPU limit; only a stopped process reaches it."""


@dataclass(frozen=True)
class Pair:
    """A gold answer and an answer to compare with it; None only asks whether the gold answer is understood."""

    gold: str
    answer: str | None
    listed: str = ""
    """The parts that the completion marked one by one, joined by commas."""


@dataclass(frozen=True)
class Verdict:
    """The result of one comparison: whether the gold answer was understood, both are equal, and a limit stopped it."""

    gold: bool
    equal: bool
    late: bool


class Comparer:
    """Asks the process whether answers are equal. Threads take turns; a forked process needs a Comparer of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""

    def compare(self, pairs: Iterable[Pair], seconds: float) -> list[Verdict]:
        """One verdict for each pair.

        Args:
            seconds: CPU time for each pair.

        Raises:
            RewardError: the process cannot be started.
        """
        with self._lock:
            return [self._ask(pair, seconds) for pair in pairs]

    def close(self) -> None:
        """Ends the process. It starts again when needed."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._rest = b""

    def _ask(self, pair: Pair, seconds: float) -> Verdict:
        process = self._running()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps({**asdict(pair), "seconds": seconds}).encode() + b"\n")
            process.stdin.flush()
            line = self._line(process, seconds * WALL_FACTOR)
        except BrokenPipeError:
            line = None
        if line is None:
            # The kernel killed it for its CPU time, or the wall time is over. Assume that the gold answer was
            # understood and the policy's answer was too expensive, since people wrote the gold answers.
            self.close()
            return Verdict(gold=True, equal=False, late=True)
        return Verdict(**json.loads(line))

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self.close()
        process = subprocess.Popen(
            # -P keeps the script's folder off the import path. The hash seed is fixed since sympy's order follows it.
            [sys.executable, "-P", str(Path(__file__).with_name("maths_worker.py"))],
            env={**os.environ, "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        if self._line(process, START_SECONDS) is None:
            process.kill()
            said = process.communicate()[1].decode(errors="replace").strip()
            raise RewardError(f"the process that compares answers does not start: {said[-500:] or 'no reason given'}")
        self._process = process
        return process

    def _line(self, process: subprocess.Popen[bytes], seconds: float) -> bytes | None:
        """The next line from the process; None when it died or the wall time is over."""
        assert process.stdout is not None
        end = time.monotonic() + seconds
        waiting = select.poll()
        waiting.register(process.stdout, select.POLLIN)
        while b"\n" not in self._rest:
            ready = waiting.poll(max(0.0, end - time.monotonic()) * 1000)
            chunk = os.read(process.stdout.fileno(), 65536) if ready else b""
            if not chunk:
                return None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line
