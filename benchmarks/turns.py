"""Worker processes that do one piece of work per request, and both ends of the connection to them.

Two sides are measured in turns, and only one may work at a time. So each is a process that pauses between two updates,
in the middle of its training loop. There it calls `Turns.done`, which answers the last request with a line of JSON and
blocks until the next request. The peer's Python imports this file too, so it needs only the standard library.
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
    """Resident bytes of this process: `VmRSS` is the present value, `VmHWM` the peak since `forget_peak`."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {key}; memory is measured on Linux")


def forget_peak() -> int:
    """Resets `VmHWM` to the present resident bytes, and returns them."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident("VmRSS")


class Turns:
    """The worker's end. Create it after all imports and before the model; memory is counted from this point."""

    def __init__(self) -> None:
        # Keeps the libraries' output out of the answers.
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._baseline = forget_peak()
        self._asked = self._clocks()

    @staticmethod
    def _clocks() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def done(self, report: Mapping[str, Any] | None = None) -> None:
        """Called after an update: sends the answer and waits for the next request. Exits when there is none."""
        wall, cpu = (now - then for now, then in zip(self._clocks(), self._asked, strict=True))
        answer = {"wall": wall, "cpu": cpu, "peak": resident("VmHWM") - self._baseline, **(report or {})}
        self._answers.write(json.dumps(answer) + "\n")
        self._answers.flush()
        if not sys.stdin.readline():
            os._exit(0)  # there is nothing to save
        self._asked = self._clocks()


class WorkerError(RuntimeError):
    """A worker ended instead of answering; the message has the end of its output."""


class Worker:
    """The benchmark's end. The constructor waits for the first answer, after loading and a first update."""

    def __init__(self, command: Sequence[str], threads: int, log: Path, cwd: Path) -> None:
        """Starts `command` with that many threads; its output goes to the file `log`.

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
        """Requests one update. Returns its answer: `wall` and `cpu` (wall seconds, and CPU seconds of all threads),
        `peak` (bytes above the baseline), and the worker's own values.

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
        """Ends the worker, which is waiting for a request."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
