"""One served model, and the thread in which all served models compute."""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

from baton.answering import Answering
from baton.serve.errors import Refused
from baton.serve.settings import Limits, Pooling
from handoff.parent import Parent
from rollout.live import Answer, Live

log = logging.getLogger("baton.serve")
T = TypeVar("T")


class Served(Answering):
    """A model under a name."""

    def __init__(self, parent: Parent, limits: Limits, pooling: Pooling) -> None:
        super().__init__(parent)
        self.limits, self.pooling = limits, pooling
        self.loaded = int(time.time())
        self.context = min(self.context, limits.max_length)
        self.live = Live(self.model, limits.batch_size, self.encoder.vocab_size)

    def described(self) -> dict[str, Any]:
        """Its entry in /v1/models."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.loaded,
            "owned_by": "baton",
            "max_model_len": self.context,
            "conversations": f"as text, because {self.as_text}" if self.as_text else "chat template",
            "embeddings": f"{self.pooling} hidden state of the last layer, length 1",
            "fingerprint": self.parent.fingerprint,
        }


class Worker:
    """The thread that computes. Its public methods may be called from any thread."""

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = list(served)
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake, self._ending = threading.Event(), threading.Event()
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="baton-serve", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the thread after its step, and gives the models their own attention back."""
        self._ending.set()
        self._wake.set()
        self._thread.join()
        for one in self._served:
            one.live.close()

    @property
    def alive(self) -> bool:
        """Whether the thread can answer."""
        return self._thread.is_alive() and not self._ending.is_set()

    @property
    def running(self) -> int:
        """Answers that are being decoded."""
        return sum(one.live.running for one in self._served)

    @property
    def waiting(self) -> int:
        """Answers and other work that wait."""
        return sum(one.live.waiting for one in self._served) + len(self._calls)

    def add(self, served: Served, groups: Sequence[Sequence[Answer]]) -> None:
        """Asks for answers; each group has one prompt. Raises Refused, 429 or 503."""
        self._check(served, sum(map(len, groups)))
        for group in groups:
            served.live.add(group)
        self._wake.set()

    def call(self, served: Served, functions: Sequence[Callable[[], T]]) -> "list[Future[T]]":
        """Calls functions in the thread, between its steps. Raises Refused, 429 or 503."""
        self._check(served, 1)
        futures: list[Future[T]] = [Future() for _ in functions]
        self._calls.extend(zip(functions, futures, strict=True))
        self._wake.set()
        return futures

    def wake(self) -> None:
        """Lets the thread look at answers that were cancelled."""
        self._wake.set()

    def _check(self, served: Served, count: int) -> None:
        if not self.alive:
            raise Refused(503, "the server is ending", code="unavailable", retry=5)
        limits = served.limits
        free = max(limits.batch_size - served.live.running, 0)
        if served.live.waiting + len(self._calls) + count > limits.queue + free:
            raise Refused(429, f"{limits.queue} answers wait already; ask again later", code="queue_full", retry=1)

    def _work(self) -> None:
        torch.set_num_threads(self._threads)
        while not self._ending.is_set():
            self._wake.clear()
            busy = self._call_next()
            for one in self._served:
                busy = one.live.step() or busy
            if not busy:
                self._wake.wait()

    def _call_next(self) -> bool:
        """One call at a time, so that answers go on meanwhile."""
        if not self._calls:
            return False
        function, future = self._calls.popleft()
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
        return True
