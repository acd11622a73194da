"""How a stage handles signals (docs/preemption.md).

    SIGTERM, SIGINT, SIGHUP   first: the stage finishes the step, saves a state and exits with 128 + n; if no step is
                              running, it exits at once. Second: it exits at once
    SIGUSR1                   the stage saves a state after the step and continues

Python runs a handler in the main thread, between two of its instructions. While that thread waits for another process
in a collective, it would notice neither a second signal nor the end of the grace period. So the interpreter's C code
also writes each signal's number into a pipe (`signal.set_wakeup_fd`), which a separate thread reads.
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, NoReturn

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""Signals that ask a stage to end."""
# A launcher may forward a signal that its processes also received directly (from Slurm or a terminal). Equal signals
# within this many seconds count as one request.
_SAME = 2.0
# Seconds to close files and child processes when no step is running.
_CLEAN_UP = 10.0
_CLOSE = b"\0"  # no signal has this number


class Stopped(BaseException):
    """A stage ends because of a signal. Its text is the message that the user has already seen.

    Not an Exception, so that code that tolerates failures (of rewards, of a tracker) does not catch it.
    """

    def __init__(self, signum: int, words: str, together: bool = False) -> None:
        super().__init__(words)
        self.code = 128 + signum
        """The process's exit code."""
        self.together = together
        """Whether every process of the run ends at this same point."""


class Signals:
    """A context manager that installs the handlers while a stage runs. Outside the main thread it does nothing.

    A signal that the process ignored at its start (`nohup`, a shell's background job) stays ignored.
    """

    def __init__(self, name: str, speaks: bool = True) -> None:
        """`name`: of the section, for messages. `speaks`: whether this process prints them."""
        self._speaks = speaks
        self._name = name
        self._stop = 0
        self._save = False
        self._grace: float | None = None
        self._said = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Signals":
        global _installed
        if threading.current_thread() is not threading.main_thread():
            return self
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        for signum in (*ENDING, signal.SIGUSR1):
            if signum == signal.SIGUSR1 or signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._handle)
        _installed = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _installed
        if not self._before:
            return
        self._restore()
        _installed = None
        os.write(self._write, _CLOSE)
        self._thread.join()
        os.close(self._write)
        os.close(self._read)

    def _restore(self) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(self._wakeup_before)

    def finish_steps(self, grace_seconds: float) -> None:
        """From now on, a request to stop waits for the current step, at most `grace_seconds`."""
        self._grace = grace_seconds

    def asked(self, largest: Callable[[float, float], list[float]]) -> tuple[int, bool]:
        """After a step, on every process: the signal that asks to end (0: none), and whether a save was asked for.

        One process that was asked is enough: `largest` gives the largest of each value on any process
        (`Engine.largest`). A request to save is given once.
        """
        save, self._save = self._save, False
        stop, saving = largest(self._stop, save)
        return int(stop), bool(saving)

    def stopped(self, signum: int, done: str, saved: bool) -> Stopped:
        """The exception to raise after the state after `done` ("step 17") was saved, or could not be saved."""
        state = "its state is saved, and" if saved else "the state could not be saved;"
        rest = "" if saved else " from the last one that was"
        words = f"stopped by {_called(signum)} after {done}; {state} the same command goes on{rest}"
        return Stopped(signum, self._say(words), together=True)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """The handler; it runs in the main thread."""
        if signum == signal.SIGUSR1:
            self._save = True
        elif not self._stop:  # the watching thread handles a second signal
            self._stop = signum
            if self._grace is None:
                words = f"stopped by {_called(signum)} with no step under way; the same command goes on"
                raise Stopped(signum, self._say(words))

    def _watch(self) -> None:
        """The thread: ends the process after a second signal, or after the grace period."""
        first, since = 0, 0.0
        while True:
            left = None
            if first:
                left = since + (_CLEAN_UP if self._grace is None else self._grace) - time.monotonic()
                if left <= 0:
                    self._leave(first, "" if self._grace is None else f", the step did not end in {self._grace:g} s")
            if not select.select([self._read], [], [], left)[0]:
                continue
            for signum in os.read(self._read, 64):
                if signum == _CLOSE[0]:
                    return
                if signum not in self._before or signum == signal.SIGUSR1:
                    continue
                if not first:
                    first, since = signum, time.monotonic()
                elif time.monotonic() - since > _SAME:
                    self._leave(signum, " at once")

    def _leave(self, signum: int, why: str) -> NoReturn:
        """Ends the process from the thread. The stage's helper processes notice its end, as after a SIGKILL."""
        if not self._said:
            self._say(f"stopped by {_called(signum)}{why}; the same command goes on from the last saved state")
        os._exit(128 + signum)

    def _say(self, words: str) -> str:
        """Prints at once and without buffers, because the launcher kills all processes when the first has ended."""
        line = f"{self._name}: {words}"
        self._said = True
        if self._speaks:
            os.write(2, f"{line}\n".encode())
        return line


def _called(signum: int) -> str:
    return signal.Signals(signum).name


_installed: Signals | None = None


def _release_in_child() -> None:
    """In a child made by a bare fork (a worker in a library's pool): restores the default handlers, so that its parent
    can terminate it, and stops it from writing into the parent's pipe."""
    if _installed is not None:
        _installed._restore()


os.register_at_fork(after_in_child=_release_in_child)
