"""Rows of prompt and completion as padded tensors, so that every row's completion starts at the same column.

Legend: B rows, P longest prompt of the batch, R longest completion of the batch.

Prompts are padded on the left and completions on the right. The vocabulary projection is then needed for the last R + 1
columns only (`logits_to_keep`), and every per-token quantity is a (B, R) tensor beside one mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask, position_ids: (B, P + R) long; completion_ids long, completion_mask bool: (B, R)."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    completion_ids: torch.Tensor
    completion_mask: torch.Tensor


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
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    return PaddedBatch(ids, mask, positions, ids[:, left:], mask[:, left:].bool())


def pad_values(rows: Sequence[Sequence[float]], width: int, device: torch.device) -> torch.Tensor:
    """(N, width) fp32 from ragged rows, zeros behind each row's end."""
    out = torch.zeros((len(rows), width))
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.float32)
    return out.to(device)
