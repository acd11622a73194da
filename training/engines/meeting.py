"""How processes wait for one that works alone, however long that takes, without a collective.

A collective fails when another process does not answer within `train.ddp_timeout` seconds, so nobody may stand in one
while the main process hashes a parent or encodes data. Here the processes leave notes in the store through which they
also find each other (torch's TCPStore), and look for those of others. A process that ends says so in a note; one that
was killed is missed because its sign of life, a number that it changes every few seconds, stays the same.

torch is imported inside functions, because an engine is chosen before torch is loaded.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from itertools import count
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from training.engines.launch import is_main, rank, say_error, world_size
from training.engines.lost import NoAnswer

T = TypeVar("T")
_START = timedelta(minutes=30)
"""How long processes wait for one that has not been started."""
_PATIENT_SECONDS = 15.0
"""After how long a process says for whom it waits."""
_BEAT = 2.0
"""Seconds between two signs of life."""
_SILENT_AT_LEAST, _SILENT_AT_MOST = 5 * _BEAT, 150 * _BEAT
"""Seconds without one after which a process counts as lost. A library may keep the interpreter busy for a while."""
_FIRST_LOOK, _LAST_LOOK = 0.005, 0.25
"""Seconds between two looks for a note, at first and at last."""
_AFTER_AN_END = 3.0
"""Seconds that a process leaves to one that ended, so that a launcher sees that one's end first."""
_FAREWELL = 10.0
"""How long the main process keeps the store for others that are about to end."""
_generations = count()


@contextmanager
def saying(seconds: float, words: str) -> Iterator[None]:
    """Says, unless the body ends within `seconds`, for what this process waits."""
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    remedy = "if nothing else was started, unset WORLD_SIZE, RANK and LOCAL_RANK"
    timer = threading.Timer(seconds, lambda: print(f"  {words} at {place}; {remedy}", file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@cache
def _store() -> Any:
    """This process's connection to the store of its launch, which stays until the process ends."""
    from torch.distributed.rendezvous import rendezvous

    with saying(_PATIENT_SECONDS, f"waits for the other {world_size() - 1} of {world_size()} processes"):
        store, _, _ = next(rendezvous("env://", timeout=_START))
    return store


def _start() -> str:
    """Which start of this launch it is, if the store outlasts one: the agent of a machine keeps it and counts.

    The agents of several machines count each for itself, so that the numbers may differ; there each start has a new
    store (`elastic.OWN_STORE`).
    """
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if _kept_by_an_agent() else "0"


def _kept_by_an_agent() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class Meeting:
    """The notes of the processes of one run. Every process makes one, and calls its methods in the same order."""

    def __init__(self, timeout: timedelta) -> None:
        """`timeout`: of the collectives. A process that is lost is not waited for much longer."""
        from torch.distributed.distributed_c10d import PrefixStore

        # A process may have several runs, one after the other.
        self._name = f"{_start()}/{next(_generations)}"
        self._notes: Any = PrefixStore(f"meeting/{self._name}", _store())
        self._silent = min(max(timeout.total_seconds(), _SILENT_AT_LEAST), _SILENT_AT_MOST)
        self._turn = 0
        self._ended = self._hangs = False
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="meeting", daemon=True)
        self._thread.start()

    def store_for_group(self, timeout: timedelta) -> Any:
        """A store for a process group of this run."""
        from torch.distributed.distributed_c10d import PrefixStore

        store = _store().clone()
        store.set_timeout(timeout)
        return PrefixStore(f"group/{self._name}", store)

    # ---- waiting

    def tell(self, note: bytes) -> None:
        """On the main process: gives the others the note for which they wait by `hear`."""
        self._turn += 1
        key = str(self._turn)
        self._ask(lambda: self._notes.set(key, note))

    def hear(self) -> bytes:
        """On the others: waits for the main process's note.

        Raises:
            NoAnswer: the main process has ended.
        """
        self._turn += 1
        key = str(self._turn)
        self._wait_for(0, key)

        def taken() -> bytes:
            note: bytes = self._notes.get(key)
            if self._notes.add(f"{key}/taken", 1) == world_size() - 1:  # everybody has it
                self._notes.delete_key(key)
                self._notes.delete_key(f"{key}/taken")
            return note

        return self._ask(taken)

    def together(self) -> None:
        """Waits until every process has called it.

        Raises:
            NoAnswer: one of them has ended.
        """
        key = f"{self._turn}/here"
        if is_main():
            for other in range(1, world_size()):
                self._wait_for(other, f"{key}/{other}")
                self._ask(lambda place=f"{key}/{other}": self._notes.delete_key(place))  # type: ignore[misc]
            self.tell(b"")
        else:
            self._ask(lambda: self._notes.set(f"{key}/{rank()}", b""))
            self.hear()

    def _wait_for(self, other: int, key: str) -> None:
        """Waits for a note of the process `other`."""

        def look() -> tuple[str | None, str | None, bool]:
            # In this order: whoever ends leaves its note before it says so.
            return self._read(f"gone/{other}"), self._read(f"alive/{other}"), self._notes.check([key])

        begun = heard = time.monotonic()
        pause, said = _FIRST_LOOK, False
        alive: str | None = None
        while True:
            gone, sign, there = self._ask(look)
            if there:
                return
            now = time.monotonic()
            if gone is not None:
                time.sleep(_AFTER_AN_END)
                raise NoAnswer(f"process {other} has ended{gone}")
            if sign != alive:
                alive, heard = sign, now
            elif now - heard > self._silent:
                raise NoAnswer(f"process {other} has shown no sign of life for {self._silent:.0f} s")
            if not said and now - begun > _PATIENT_SECONDS:
                said = True
                say_error(f"  waits for process {other}, which may hash or encode files that are large")
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)

    # ---- the end

    def leave(self, why: str) -> None:
        """Tells those who wait for this process that it has ended, and why."""
        if self._ended or self._hangs:
            return
        self._ended = True
        with suppress(Exception):  # the store may have gone with the main process
            self._ask(lambda: self._notes.set(f"gone/{rank()}", why), _FAREWELL)

    def close(self) -> None:
        """Leaves, and ends the connection. The main process stays until the others have left, if it has the store."""
        failed = self._ended or self._hangs
        self.leave("")
        if is_main() and not failed and not _kept_by_an_agent():
            others = [f"gone/{other}" for other in range(1, world_size())]
            end = time.monotonic() + _FAREWELL
            with suppress(Exception):
                while not self._ask(lambda: self._notes.check(others)) and time.monotonic() < end:
                    time.sleep(_FIRST_LOOK)
        self._calls.put(None)
        self._thread.join(timeout=1)  # it may hang where the network is cut

    # ---- the store is used by one thread, because a call of it cannot be interrupted, and hangs if the network is cut

    def _read(self, key: str) -> str | None:
        return self._notes.get(key).decode() if self._notes.check([key]) else None

    def _ask(self, call: Callable[[], T], seconds: float | None = None) -> T:
        seconds = self._silent if seconds is None else seconds
        answer: Future[T] = Future()
        self._calls.put((call, answer))
        try:
            return answer.result(seconds)
        except TimeoutError:
            self._hangs = True
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise NoAnswer(f"{place}, where they meet, has not answered for {seconds:.0f} s") from None

    def _serve(self) -> None:
        due = 0.0
        for sign in count():
            with suppress(Exception):  # the next call says what is wrong
                self._notes.set(f"alive/{rank()}", str(sign))
            due = time.monotonic() + _BEAT
            while (left := due - time.monotonic()) > 0:
                try:
                    asked = self._calls.get(timeout=left)
                except Empty:
                    break
                if asked is None:
                    return
                call, answer = asked
                try:
                    answer.set_result(call())
                except Exception as error:
                    answer.set_exception(error)
