"""Stages in processes of their own that do not each pay for importing torch, transformers and trl.

A server process imports them once and forks for every stage. It has no threads of its own, no model, and has not
touched a GPU, so that what a fork inherits is code and nothing else. A stage runs exactly as
`python -m stages.<stage> <recipe> ...` would: the same entry point, the same exit codes.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.connection import Connection

# What the stages import; loaded by the server when it imports `baton.preload`.
_PRELOAD = "baton.preload"


class WarmStage:
    """A running stage. `exit_code` is as in `subprocess`: negative for a signal."""

    def __init__(self, stage: str, arguments: Sequence[str], descriptor: int, *, preload: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([_PRELOAD] if preload else [])
        output = Connection(os.dup(descriptor), readable=False)
        self._process = context.Process(target=_run, args=(stage, list(arguments), output))
        self._process.start()
        output.close()

    def send(self, signum: int) -> None:
        """Passes a signal on to the stage."""
        assert self._process.pid is not None
        if self._process.is_alive():
            os.kill(self._process.pid, signum)

    def wait(self) -> int:
        """Waits for the end and returns the exit code."""
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(stage: str, arguments: list[str], output: Connection) -> None:
    """In the forked process."""
    os.setsid()  # the terminal's Ctrl-C goes to the runner alone, which passes it on once
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until the stage listens, there is nothing to be saved
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    output.close()
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.reconfigure(line_buffering=True)  # the server's were made for another descriptor
    threading.Thread(target=_end_with_runner, daemon=True).start()
    try:
        import_module("training.run").main(stage, arguments)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


def _end_with_runner() -> None:
    """A runner that was killed can pass nothing on: its stage ends as if it had been asked to."""
    runner = multiprocessing.parent_process()
    assert runner is not None
    runner.join()
    os.kill(os.getpid(), signal.SIGTERM)
