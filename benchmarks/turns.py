"""A worker process that does one piece of work whenever it is told to, and both ends of how it is told.

Two sides are measured in turns, and only one of them may work at a time. So each is a process that stands still between
two updates, in the middle of its own training loop: `Turns.done` is called there, answers the last request with a line
of JSON and blocks until the next. This file is read by the peer's Python too, and needs nothing but the library.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def resident(key: str) -> int:
    """Bytes of memory of this process: `VmRSS` now, or `VmHWM`, the most there were since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}; memory is measured on Linux")


def forget_peak() -> int:
    """Lets `VmHWM` start again from what is resident now, and returns that."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


class Turns:
    """The worker's end. Made once everything is imported and before there is a model: memory is counted from here."""

    def __init__(self) -> None:
        # What the libraries print must not come between the answers.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._baseline = forget_peak()
        self._asked = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def done(self, report: Mapping[str, Any] | None = None) -> None:
        """An update is done: answers, and returns when the next one is wanted. Ends the process when none is."""
        wall, cpu = (now - then for now, then in zip(self._clocks(), self._asked, strict=True))
        answer = {"wall": wall, "cpu": cpu, "peak": resident("VmHWM") - self._baseline, **(report or {})}
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        if not sys.stdin.readline():
            os._exit(0)  # nothing is to be saved
        self._asked = self._clocks()


class WorkerError(RuntimeError):
    """A worker ended instead of answering; the message has the end of what it printed."""


class Worker:
    """The benchmark's end. The first answer, after loading and a first update, is awaited when it is made."""

    def __init__(self, command: Sequence[str], threads: int, log: Path, cwd: Path) -> None:
        """Starts `command` with that many threads; what it prints goes to the file `log`.

        Raises:
            WorkerError: it ended before its first answer.
        """
        self._log, self._command = log, list(command)
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "TRL_EXPERIMENTAL_SILENCE": "1",
        }
        with log.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
                cwd=cwd,
            )
        self.last = self._answer()

    def turn(self) -> dict[str, Any]:
        """One update. -> its answer: `wall` and `cpu` (seconds of the clock, of its
        threads together), `peak` (bytes above the baseline) and what the worker adds.

        Raises:
            WorkerError: it ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        self.last = self._answer()
        return self.last

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            printed = self._log.read_text(encoding="utf-8")[-2000:]
            raise WorkerError(f"{' '.join(self._command)} ended with {code}:\n{printed}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Ends the worker, which stands still and waits for a line."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
