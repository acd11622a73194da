"""Rows of prompt and completion as tensors: padded, and one behind the other without padding.

Legend: B rows, P longest prompt of the batch, R longest completion of the batch, T tokens of the batch, A of them
actions, L longest row.

A completion is everything behind a row's prompt. Its tokens are actions where the policy chose them; in a conversation
of several turns, tokens of the environment stand between them, which the model reads and nothing is computed for.

Prompts are padded on the left and completions on the right, so that every row's completion starts at the same column
and every per-token quantity is a (B, R) tensor beside one mask. The vocabulary projection is then needed for the last
R + 1 columns only. A model that can (`rollout.ragged`) reads the same rows without their padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpadded:
    """The rows of a batch one behind the other.

    ids, positions: (1, T). lengths: of each row. place (T,): where each token stands among (B · L) tokens padded on the
    right. before (A,): which of the T tokens stands before each action. where (A,): where that action stands among
    (B · R).
    """

    ids: Tensor
    positions: Tensor
    lengths: list[int]
    place: Tensor
    before: Tensor
    where: Tensor


@dataclass(frozen=True)
class PaddedBatch:
    """input_ids, attention_mask, position_ids: (B, P + R) long. completion_ids: (B, R) long. completion_mask: (B, R)
    bool, true at actions."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    unpadded: Unpadded


def pad_batch(
    prompts: Sequence[Sequence[int] | Tensor],
    completions: Sequence[Sequence[int] | Tensor],
    pad_id: int,
    device: torch.device,
    actions: Sequence[Tensor] | None = None,
) -> PaddedBatch:
    """Pads rows; every prompt and completion has at least one token.

    actions: for each completion, which of its tokens are actions, (its length,) bool; None: all are.
    """
    rows, left, right = len(prompts), max(map(len, prompts)), max(map(len, completions))
    ids = torch.full((rows, left + right), pad_id, dtype=torch.long)
    mask = torch.zeros((rows, left + right), dtype=torch.long)
    chosen = torch.zeros((rows, right), dtype=torch.bool)
    for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        assert len(prompt) and len(completion)
        begin, end = left - len(prompt), left + len(completion)
        ids[i, begin:left] = torch.as_tensor(prompt)
        ids[i, left:end] = torch.as_tensor(completion)
        mask[i, begin:end] = 1
        chosen[i, : len(completion)] = True if actions is None else actions[i]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    unpadded = _unpadded(ids, mask, positions, chosen, device)
    ids, mask, positions = ids.to(device), mask.to(device), positions.to(device)
    return PaddedBatch(ids, mask, positions, ids[:, left:], chosen.to(device), unpadded)


def _unpadded(ids: Tensor, mask: Tensor, positions: Tensor, actions: Tensor, device: torch.device) -> Unpadded:
    """Of padded rows (B, P + R) and which of their completions' tokens are actions (B, R), on the CPU."""
    here, left = mask.bool(), mask.shape[1] - actions.shape[1]
    lengths = mask.sum(-1).tolist()
    row = torch.arange(len(ids))[:, None]
    number = mask.flatten().cumsum(0).view(mask.shape) - 1  # of each token among the T
    parts = (
        ids[here][None],
        positions[here][None],
        (row * max(lengths) + positions)[here],
        (number[:, left:] - 1)[actions],
        actions.flatten().nonzero().squeeze(1),
    )
    ids, positions, place, before, where = (part.to(device) for part in parts)
    return Unpadded(ids, positions, lengths, place, before, where)
