"""The processes of a run: how they divide work and communicate.

torch is imported inside functions, because an engine is chosen before torch is loaded.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from handoff.errors import UserError
from handoff.manifest import EngineRecord
from training.engines.launch import Request, is_main, rank, world_size
from training.engines.meeting import Meeting

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


class Processes:
    """The part of an engine that deals with the processes of its run.

    Data ranks number the processes that read different rows. Here every process does; with sequence parallelism,
    several processes would read the same rows.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self._meeting: Meeting | None = None
        self._timeout = timedelta(minutes=30)

    def wait_at_most(self, seconds: float) -> None:
        """Sets after how long a collective fails whose other processes do not answer. Call it before the first one.

        Work that one process does alone (tokenizing, hashing, writing) may take longer: the others wait for it by
        `on_main` or `barrier`, which are no collectives and have no such limit.
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
        """Whether there are other processes. The first call starts the process group, when every process is there."""
        if world_size() == 1:
            return False
        import torch
        import torch.distributed as dist

        if not dist.is_initialized():
            self.barrier()
            here = self.device
            if here.type == "cuda":
                torch.cuda.set_device(here)
            dist.init_process_group(
                "nccl" if here.type == "cuda" else "gloo",
                store=self._met().store_for_group(self._timeout),
                rank=rank(),
                world_size=world_size(),
                timeout=self._timeout,
            )
        return True

    # ---- waiting for a process that works alone: every process calls these, in the same order

    def _met(self) -> Meeting:
        if self._meeting is None:
            self._meeting = Meeting(self._timeout)
        return self._meeting

    def barrier(self) -> None:
        """Waits until every process has called it, however long that takes.

        Raises:
            NoAnswer: a process has ended.
        """
        if world_size() > 1:
            self._met().together()

    def on_main(self, call: Callable[[], T]) -> T:
        """Runs `call` on the main process and returns its result, a small picklable object, on all. A UserError in it
        is raised on all. `call` may take as long as it likes (hashing a large parent, encoding data).

        Raises:
            NoAnswer: the main process has ended.
        """
        if world_size() == 1:
            return call()
        meeting = self._met()
        if not self.is_main:
            found, error = pickle.loads(meeting.hear())
            if error is not None:
                error.said = True
                raise error
            return found  # type: ignore[no-any-return]
        try:
            mine = call()
        except UserError as refused:
            meeting.tell(pickle.dumps((None, refused)))
            raise
        meeting.tell(pickle.dumps((mine, None)))
        return mine

    # ---- collectives: every process calls them, in the same order

    def from_main(self, value: T) -> T:
        """The main process's `value`, a small picklable object, which is there already; see `on_main`."""
        if not self.group():
            return value
        import torch.distributed as dist

        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

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

    def shutdown(self, error: BaseException | None = None) -> None:
        """Ends the process group, without waiting for other processes. Call it last in a run, also after a failure.
        Processes that wait for this one are told its `error`.

        Without this call, about one successful run in fifteen on gloo hung or was aborted at exit: gloo's threads need
        the interpreter lock to release tensors of the last collective, while the group's destructor holds the lock and
        waits for those threads. The pause lets them finish first.
        """
        if world_size() == 1:
            return
        import torch.distributed as dist

        if self._meeting is not None and error is not None:
            self._meeting.leave(f": {type(error).__name__}: {' '.join(str(error).split())[:300]}")
        if dist.is_initialized():
            time.sleep(0.2)
            dist.destroy_process_group()
        if self._meeting is not None:
            self._meeting.close()
            self._meeting = None
