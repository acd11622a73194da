"""Rows of prompt and completion as tensors: padded, and one behind the other without padding.

Legend: B rows, P longest prompt of the batch, R longest completion of the batch, T tokens of the batch, C of them in
completions, L longest row.

Prompts are padded on the left and completions on the right, so that every row's completion starts at the same column
and every per-token quantity is a (B, R) tensor beside one mask. The vocabulary projection is then needed for the last
R + 1 columns only. A model that can (`rollout.ragged`) reads the same rows without their padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Unpadded:
    """The rows of a batch one behind the other.

    ids, positions: (1, T). lengths: of each row. place (T,): where each token stands among (B · L) tokens padded on the
    right. before (C,): which of the T tokens stands before each token of a completion. where (C,): where that token of
    a completion stands among (B · R).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    lengths: list[int]
    place: torch.Tensor
    before: torch.Tensor
    where: torch.Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask, position_ids: (B, P + R) long; completion_ids long, completion_mask bool: (B, R)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor
    unpadded: Unpadded


def pad_batch(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], pad_id: int, device: torch.device
) -> PaddedBatch:
    """Pads rows; every prompt and completion has at least one token."""
    rows, left, right = len(prompts), max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((rows, left + right), pad_id, dtype=torch.long)
    mask = torch.zeros((rows, left + right), dtype=torch.long)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert prompt and completion
        begin, end = left - len(prompt), left + len(completion)
        ids[i, begin:end] = torch.as_tensor([*prompt, *completion], dtype=torch.long)
        mask[i, begin:end] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    unpadded = _unpadded(ids, mask, positions, left, device)
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    return PaddedBatch(ids, mask, positions, ids[:, left:], mask[:, left:].bool(), unpadded)


def _unpadded(
    ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor, left: int, device: torch.device
) -> Unpadded:
    """Of padded rows (B, P + R), on the CPU, whose prompts have P = `left` columns."""
    here = mask.bool()
    lengths = mask.sum(-1).tolist()
    row = torch.arange(len(ids))[:, None]
    number = mask.flatten().cumsum(0).view(mask.shape) - 1  # of each token among the T
    answered = here[:, left:]
    parts = (
        ids[here][None],
        positions[here][None],
        (row * max(lengths) + positions)[here],
        (number[:, left:] - 1)[answered],
        answered.flatten().nonzero().squeeze(1),
    )
    ids, positions, place, before, where = (part.to(device) for part in parts)
    return Unpadded(ids, positions, lengths, place, before, where)


def pad_values(rows: Sequence[Sequence[float]], width: int, device: torch.device) -> torch.Tensor:
    """(N, width) fp32 from ragged rows, zeros behind each row's end."""
    out = torch.zeros((len(rows), width))
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.float32)
    return out.to(device)
