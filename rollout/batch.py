"""Rows of prompt and completion as tensors, both padded and concatenated without padding.

Legend: B rows, P longest prompt of the batch, R longest completion of the batch, T tokens of the batch, A actions of
the batch, L longest row.

A completion is everything after a row's prompt. The tokens that the policy chose are actions. In a conversation of
several turns, the environment's tokens come between them: the model reads these, but nothing is computed for them.

Prompts are padded on the left and completions on the right. So every row's completion starts at the same column, every
per-token quantity is a (B, R) tensor with the same mask, and the vocabulary projection is needed for the last R + 1
columns only. A model that supports it (`rollout.ragged`) reads the rows without padding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Unpadded:
    """The rows of a batch, concatenated without padding.

    ids, positions: (1, T). lengths: tokens of each row. place (T,): each token's index in the flattened (B, L) rows
    padded on the right. before (A,): the index among the T tokens of the token before each action. where (A,): each
    action's index in the flattened (B, R) completions.
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
    """Pads rows, and also concatenates them. Every prompt and completion has at least one token.

    actions: for each completion a (its length,) bool mask of its actions; None: all its tokens are actions.
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
    """Removes the padding of rows (B, P + R); `actions` (B, R) masks the completions' actions. Inputs on the CPU."""
    here, left = mask.bool(), mask.shape[1] - actions.shape[1]
    lengths = mask.sum(-1).tolist()
    row = torch.arange(len(ids))[:, None]
    number = mask.flatten().cumsum(0).view(mask.shape) - 1  # each token's index among the T tokens
    parts = (
        ids[here][None],
        positions[here][None],
        (row * max(lengths) + positions)[here],
        (number[:, left:] - 1)[actions],
        actions.flatten().nonzero().squeeze(1),
    )
    ids, positions, place, before, where = (part.to(device) for part in parts)
    return Unpadded(ids, positions, lengths, place, before, where)
