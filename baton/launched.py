"""Runs stages under `accelerate launch`, and separates their output from the launcher's.

When a stage fails, accelerate and torch's elastic agent exit with 1 and print about forty lines after the stage's
message. `own_words` finds the message and the exit code of the process that failed first.
"""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress

import psutil

# By default torch's agent kills processes 30 s after a signal. A stage ends within its own `train.grace_seconds`.
_PATIENCE = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "3600"}
_ENCODING = {"PYTHONIOENCODING": "utf-8"}  # the runner reads the output, whatever the terminal's encoding is
_TRACEBACK = "Traceback (most recent call last):"
_LAUNCHER = "accelerate/commands/launch.py"
_AGENT = "torch/distributed/elastic/"
_CAUSE = re.compile(
    r"Root Cause.*?exitcode\s*:\s*(?P<elastic>-?\d+)"
    r"|returned non-zero exit status (?P<status>\d+)"
    r"|died with <Signals\.\w+: (?P<signal>\d+)>",
    re.DOTALL,
)


class LaunchedStage:
    """A launcher and the stage's processes that it has started."""

    def __init__(self, command: Sequence[str], descriptor: int) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
            env=_PATIENCE | os.environ | _ENCODING,
        )

    def send(self, signum: int) -> None:
        """Forwards a signal to the stage's processes.

        The launcher does not get it, since it would exit before they have saved; it notices their end by itself. Only
        if it has not started any process yet does it get the signal. SIGKILL goes to all.
        """
        if self._process.poll() is not None:
            return
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            stage = launcher.children(recursive=signum == signal.SIGKILL)
            if signum == signal.SIGKILL or not (stage or signum == signal.SIGUSR1):
                stage.insert(0, launcher)
            for process in stage:
                with suppress(psutil.NoSuchProcess):
                    process.send_signal(signum)

    def wait(self) -> int:
        """Waits for the launcher's end and returns its exit code, negative for a signal."""
        return self._process.wait()


def own_words(lines: Sequence[str], code: int) -> tuple[list[str], int]:
    """The last lines of a stage without those of its launcher, and the exit code of the process that failed first.

    Output without a launcher's traceback is returned unchanged. Of a launcher that failed by itself, its error stays.
    """
    at = [n for n, line in enumerate(lines) if line == _TRACEBACK and _is_launchers(lines[n + 1 :])]
    if not at:
        return list(lines), code
    cause = _CAUSE.search("\n".join(lines[at[-1] :]))
    if cause is not None:
        code = -int(cause["signal"]) if cause["signal"] else int(cause["elastic"] or cause["status"])
    own = [line for line in lines[: at[-1]] if _AGENT not in line]
    if cause is None:  # it started nothing: its own error is the last line of the traceback at the margin
        own += [line for line in lines[at[-1] + 1 :] if not line.startswith(" ")][-1:]
    return own, code


def _is_launchers(lines: Sequence[str]) -> bool:
    """Whether these lines begin a traceback of the launcher, which its first frames show."""
    return any(_LAUNCHER in line for line in lines[:4])
