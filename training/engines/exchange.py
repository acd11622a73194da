"""Gathers tensors and trajectories of all processes on every process; each may have a different number of rows.

Processes send raw memory, without pickles: first the sizes of all columns, then every process broadcasts its part of
each column. They use gloo on CPUs, and NCCL through device memory on GPUs.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from data.encode import EncodedPrompt
from rollout.trajectory import TrajectoryBatch, reordered
from training.engines.protocol import Engine

_OF_PROMPTS = ("prompt_ids", "prompt_length")  # every process has the prompts


def join_rows(
    engine: Engine,
    columns: Mapping[str, Tensor],
    arrange: Callable[[str, Tensor], Tensor] = lambda name, rows: rows.clone(),
) -> dict[str, Tensor]:
    """Concatenates each column of all processes in the order of ranks, on the CPU. Every process calls it.

    Args:
        columns: (rows, ...) tensors on the CPU. Every process gives the same names in the same order, with the same
            types and trailing sizes; the number of rows may differ between columns and between processes, and may be 0.
        arrange: (name, the rows of all processes) -> the rows to keep, for instance in another order. It must return a
            copy, because the next column is received in the same memory.
    """
    if not engine.group():
        return {name: arrange(name, column) for name, column in columns.items()}
    import torch.distributed as dist

    device, world = engine.device, engine.data_world
    mine = torch.tensor([column.numel() * column.element_size() for column in columns.values()], device=device)
    sizes = mine.new_empty(world, len(mine))
    dist.all_gather_single(sizes.view(-1), mine)
    buffer = torch.empty(int(sizes.sum(0).max()), dtype=torch.uint8, device=device)
    joined = {}
    for (name, column), bytes_ in zip(columns.items(), sizes.T.tolist(), strict=True):
        rows = buffer[: sum(bytes_)]
        # Broadcasts take a different size from each process and, unlike all_gather on gloo, make no copies.
        for rank, part in enumerate(rows.split(bytes_)):
            if rank == engine.data_rank:
                part.copy_(column.contiguous().view(-1).view(torch.uint8))
            if len(part):
                dist.broadcast(part, src=rank)
        joined[name] = arrange(name, rows.cpu().view(column.dtype).view(-1, *column.shape[1:]))
    return joined


def join_trajectories(
    engine: Engine, share: TrajectoryBatch, prompts: Sequence[EncodedPrompt], size: int
) -> TrajectoryBatch:
    """The trajectories of all processes, sorted by row. `size`: answers to each prompt. Every process calls it."""
    own = {name: column for name, column in share.columns().items() if name not in _OF_PROMPTS}
    counts = join_rows(engine, {name: own.pop(name) for name in ("row", "length", "turn_count")})
    order, whole = counts["row"].argsort(), share.with_columns(**counts)
    columns = join_rows(engine, own, lambda name, rows: reordered(rows, whole.lengths(name), order))
    columns |= {name: column[order] for name, column in counts.items()}
    of_rows = [prompts[row // size].ids for row in columns["row"].tolist()]
    columns["prompt_ids"] = torch.from_numpy(np.fromiter(chain.from_iterable(of_rows), dtype=np.int32))
    columns["prompt_length"] = torch.tensor([len(prompt) for prompt in of_rows])
    return share.with_columns(**columns)


def join_columns(engine: Engine, columns: Mapping[str, Tensor], batch: TrajectoryBatch) -> dict[str, Tensor]:
    """Joins columns of `batch`; process r of w has computed rows r, r + w, r + 2w, ... Every process calls it."""
    world = engine.data_world
    rows = torch.cat([torch.arange(rank, len(batch), world) for rank in range(world)])
    return join_rows(engine, columns, lambda _, column: reordered(column, batch.length[rows], rows.argsort()))
