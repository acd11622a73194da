"""Runs stages in separate processes that share one import of torch, transformers and trl.

A server process imports them once and forks for every stage. It has no other threads, no model, and has not used a GPU,
so that a fork inherits only code. A stage runs exactly as with `python -m stages.<stage> <recipe> ...`: the same entry
point, the same exit codes.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection

from training.signals import ENDING
from training.terminal import prepare

# Modules that the server loads: one that keeps signals from it, and one that imports everything the stages need.
_SERVER, _PRELOAD = "baton.server", "baton.preload"


class WarmStage:
    """A running stage. `exit_code` is as in `subprocess`: negative for a signal."""

    def __init__(self, stage: str, arguments: Sequence[str], descriptor: int, *, preload: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_SERVER, *([_PRELOAD] if preload else [])])
        output = Connection(os.dup(descriptor), readable=False)
        self._process = context.Process(target=_run, args=(stage, list(arguments), output))
        self._process.start()
        output.close()

    def send(self, signum: int) -> None:
        """Forwards a signal to the stage."""
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, signum)

    def wait(self) -> int:
        """Waits for the stage's end and returns its exit code."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(stage: str, arguments: list[str], output: Connection) -> None:
    """Runs the stage in the forked process."""
    os.setsid()  # Ctrl-C reaches only the runner, which forwards it once
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the stage installs its handler, there is nothing to save
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # the server blocks them
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    prepare(encoding="utf-8")  # the runner reads this, whatever the terminal's encoding is
    threading.Thread(target=_end_with_runner, daemon=True).start()
    try:
        import_module("training.run").main(stage, arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end_with_runner() -> None:
    """Stops this stage as a signal would, if its runner is killed and so cannot forward signals."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.kill(os.getpid(), signal.SIGTERM)
