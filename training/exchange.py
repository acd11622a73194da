"""Tensors from every process to every process, when each has another number of rows.

Numbers travel as they lie in memory: no pickles, one collective for the sizes and one for each column. On CPUs the
processes talk by gloo; on GPUs by NCCL, through the memory of the device.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from training import runtime


def gather_rows(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each column of all processes, one behind the other in the order of ranks, on the CPU.

    Args:
        columns: (rows, ...) tensors on the CPU. Every process gives the same names, types and trailing sizes; the
            number of rows may differ between columns and between processes, and may be 0.
    """
    if not runtime.group():
        return dict(columns)
    import torch.distributed as dist

    device, world = runtime.device(), runtime.world_size()
    mine = torch.tensor([column.numel() * column.element_size() for column in columns.values()], device=device)
    sizes = mine.new_empty(world, len(mine))
    dist.all_gather_into_tensor(sizes.view(-1), mine)
    gathered = {}
    for (name, column), bytes_ in zip(columns.items(), sizes.T.tolist(), strict=True):
        largest = max(bytes_)
        flat = column.contiguous().view(-1).view(torch.uint8)
        if len(flat) < largest or device.type != "cpu":  # a collective takes equal sizes
            flat = torch.cat([flat, flat.new_empty(largest - len(flat))]).to(device)
        all_ = torch.empty(world * largest, dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(all_, flat)
        if min(bytes_) < largest:
            all_ = torch.cat([part[:size] for part, size in zip(all_.view(world, largest), bytes_, strict=True)])
        gathered[name] = all_.cpu().view(column.dtype).view(-1, *column.shape[1:])
    return gathered
