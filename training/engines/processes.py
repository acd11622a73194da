"""The processes of a run: how they divide work and communicate.

torch is imported inside functions, because an engine is chosen before torch is loaded.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from handoff.errors import UserError
from handoff.manifest import EngineRecord
from training.engines.launch import Request, is_main, rank, world_size

if TYPE_CHECKING:
    import torch

T = TypeVar("T")
# How long other processes wait while the main one works alone before training (hashing parents and data).
PATIENCE = timedelta(days=1)
_PATIENT_SECONDS = 15.0


@contextmanager
def _saying(seconds: float, words: str) -> Iterator[None]:
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


class Processes:
    """The part of an engine that deals with the processes of its run.

    Data ranks number the processes that read different rows. Here every process does; with sequence parallelism,
    several processes would read the same rows.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._patient: Any = None
        self._timeout = timedelta(minutes=30)

    def wait_at_most(self, seconds: float) -> None:
        """Sets after how long a collective fails whose other processes do not answer. Call it before the first one.

        Slow work (tokenizing, hashing, compiling) never happens while others wait in a collective with this limit.
        """
        self._timeout = timedelta(seconds=seconds)

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes and prints."""
        return is_main()

    @property
    def data_rank(self) -> int:
        """Number of this process among those that read different rows, from 0."""
        return rank()

    @property
    def data_world(self) -> int:
        """Number of processes that read different rows."""
        return world_size()

    @property
    def device(self) -> "torch.device":
        """The device on which this process computes."""
        import torch

        if self.request.device == "cpu":
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    def record(self) -> EngineRecord:
        """The engine's description for the manifest."""
        import torch

        request = self.request
        return EngineRecord(
            name=request.name,
            zero_stage=request.zero_stage,
            processes=request.processes,
            device=request.device,
            threads=torch.get_num_threads(),
        )

    # ---- which work this process does

    def share(self, count: int) -> range:
        """The indices of `range(count)` that this process works on; together the processes cover all."""
        return range(self.data_rank, count, self.data_world)

    def owns(self, index: int, together: int = 1) -> bool:
        """Whether this process works on piece `index`, if groups of `together` neighbours do the same work."""
        return index % (self.data_world // together) == self.data_rank // together

    def leads(self, together: int) -> bool:
        """Whether this process is the first of `together` neighbours that do the same work."""
        return self.data_rank % together == 0

    def own(self, parts: Sequence[T]) -> T:
        """This process's element of `parts`, which has one element for each data rank."""
        assert len(parts) == self.data_world
        return parts[self.data_rank]

    def passes(self, count: int) -> list[tuple[int, bool]]:
        """This process's share of `count` pieces of work that contain collectives; all shares have the same size.

        Returns (index, whether it counts) pairs. If `count` is not divisible, some processes repeat the last piece, and
        that result does not count.
        """
        rounds = -(-count // self.data_world)
        places = (turn * self.data_world + self.data_rank for turn in range(rounds))
        return [(min(place, count - 1), place < count) for place in places]

    def group(self) -> bool:
        """Whether there are other processes. The first call starts the process group, so call it after slow set-up."""
        if world_size() == 1:
            return False
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            here = self.device
            if here.type == "cuda":
                torch.cuda.set_device(here)
            with _saying(_PATIENT_SECONDS, f"waits for the other {world_size() - 1} of {world_size()} processes"):
                dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=self._timeout)
        return True

    # ---- collectives: every process calls them, in the same order

    def barrier(self) -> None:
        """Waits until every process has called it."""
        if not self.group():
            return
        import torch.distributed as dist

        here = self.device
        dist.barrier(device_ids=[here.index] if here.type == "cuda" else None)

    def from_main(self, value: T) -> T:
        """The main process's `value`, a small picklable object."""
        if not self.group():
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def on_main(self, call: Callable[[], T]) -> T:
        """Runs `call` on the main process and returns its result on all. A UserError in it is raised on all.

        `call` may be slow (hashing a large parent): the others wait in a separate group with a long timeout.
        """
        found: T | None = None
        error: UserError | None = None
        if self.is_main:
            try:
                found = call()
            except UserError as refused:
                error = refused
        if self.group():
            import torch.distributed as dist

            if self._patient is None:
                self._patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            box: list[Any] = [(found, error)]
            dist.broadcast_object_list(box, src=0, group=self._patient)
            found, error = box[0]
        if error is not None:
            error.said = not self.is_main
            raise error
        return found  # type: ignore[return-value]

    def of_all(self, value: T) -> list[T]:
        """The `value` of every process, ordered by rank; small picklable objects."""
        if not self.group():
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * world_size()
        dist.all_gather_object(found, value)
        return found

    def join(self, mine: Iterable[tuple[int, T]]) -> list[T]:
        """Gathers the (index, result) pairs of all processes; returns the results by index. Small objects only."""
        pairs = [pair for part in self.of_all(list(mine)) for pair in part]
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def sums(self, mine: Mapping[str, float]) -> dict[str, float]:
        """Sums each key's values over all processes; a process may lack a key."""
        shares = self.of_all(dict(mine))
        keys = dict.fromkeys(key for share in shares for key in share)
        return {key: sum(share.get(key, 0.0) for share in shares) for key in keys}

    def largest(self, *values: float) -> list[float]:
        """The maximum of each value over all processes, in one small collective."""
        if not self.group():
            return list(values)
        import torch
        import torch.distributed as dist

        numbers = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        found: list[float] = numbers.tolist()
        return found

    def shutdown(self) -> None:
        """Ends the process group, without waiting for other processes. Call it last in a run, also after a failure.

        Without this call, about one successful run in fifteen on gloo hung or was aborted at exit: gloo's threads need
        the interpreter lock to release tensors of the last collective, while the group's destructor holds the lock and
        waits for those threads. The pause lets them finish first.
        """
        if world_size() == 1:
            return
        import torch.distributed as dist

        if dist.is_initialized():
            time.sleep(0.2)
            dist.destroy_process_group()
