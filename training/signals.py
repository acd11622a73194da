"""What a stage makes of signals (docs/preemption.md).

    SIGTERM, SIGINT, SIGHUP   once: the step is finished, a state is saved, the process ends with 128 + n;
                              where no step is under way, it ends at once; twice: at once, whatever is under way
    SIGUSR1                   a state is saved after the step, and training goes on

Python runs a handler between two of its own instructions, in the main thread. While that thread waits for another
process in a collective, neither a second signal nor the end of the grace period would be noticed. So each signal's
number also goes into a pipe (`signal.set_wakeup_fd`: written by the interpreter's C code), and a thread reads it there.
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
# A launcher passes on what its processes were sent as well (by Slurm, by a terminal): within so many seconds, one
# request that came by two ways.
_SAME = 2.0
# Seconds for closing files and children where there is no step to be finished.
_CLEAN_UP = 10.0
_CLOSE = b"\0"  # no signal has this number


class Stopped(BaseException):
    """A stage ends since it was asked to. Its text is the line for the user, who has been told.

    No Exception, so that nothing that tolerates failures (of rewards, of a tracker) tolerates it.
    """

    def __init__(self, signum: int, words: str, together: bool = False) -> None:
        super().__init__(words)
        self.code = 128 + signum
        """Of the process's exit."""
        self.together = together
        """Every process of the run ends at this same point."""


class Signals:
    """The handlers, for as long as a stage runs: a context manager. In another thread than the main one it is inert.

    A signal that the process was started to ignore (`nohup`, a shell's background) stays ignored.
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
        """From here on a request to end waits for the step under way, for at most `grace_seconds`."""
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
        """To be raised once the state after `done` ("step 17") is saved, or could not be."""
        state = "its state is saved, and" if saved else "the state could not be saved;"
        rest = "" if saved else " from the last one that was"
        words = f"stopped by {_called(signum)} after {done}; {state} the same command goes on{rest}"
        return Stopped(signum, self._say(words), together=True)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """In the main thread."""
        if signum == signal.SIGUSR1:
            self._save = True
        elif not self._stop:  # a second one is the thread's affair
            self._stop = signum
            if self._grace is None:
                words = f"stopped by {_called(signum)} with no step under way; the same command goes on"
                raise Stopped(signum, self._say(words))

    def _watch(self) -> None:
        """In the thread: ends the process when it was asked to twice, or has had its time."""
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
        """Ends the process from its thread. Helpers of the stage end when it has ended, as after a SIGKILL."""
        if not self._said:
            self._say(f"stopped by {_called(signum)}{why}; the same command goes on from the last saved state")
        os._exit(128 + signum)

    def _say(self, words: str) -> str:
        """At once, and past every buffer: the launcher of several processes ends them all when the first has ended."""
        line = f"{self._name}: {words}"
        self._said = True
        if self._speaks:
            os.write(2, f"{line}\n".encode())
        return line


def _called(signum: int) -> str:
    return signal.Signals(signum).name


_installed: Signals | None = None


def _release_in_child() -> None:
    """A child made by a bare fork (a worker of a library's pool) has to end when its parent terminates it, and must not
    write into its parent's pipe."""
    if _installed is not None:
        _installed._restore()


os.register_at_fork(after_in_child=_release_in_child)
