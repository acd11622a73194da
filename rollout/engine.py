"""Generation with the model that is being trained, in its own process: prompts in, tokens and log-probabilities out.

Legend: B rows, P prompt length (left-padded), V vocabulary.

Why not `model.generate`: the policy gradient needs the log-probability of each sampled token under exactly the
distribution that it was drawn from, rows must not depend on which batch or process they were decoded in, and rows
that have ended should not be computed any further.

Sampling is by inversion: the row's uniform number for a position picks the token from the cumulative distribution. The
numbers come from (seed, key of the row), not from a stream, so that a resumed or differently split run draws the same.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from data.sampling import uniform


@dataclass(frozen=True)
class SamplingSpec:
    """The distribution that completions are drawn from: softmax(logits / temperature), nothing cut off.

    `temperature` 0 is greedy. Log-probabilities are always those of this distribution (of the untempered one when
    greedy). top-k and top-p are left out on purpose: the policy gradient would score tokens under a distribution that
    they were not drawn from.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_new_tokens must be >= 1 and temperature >= 0, not {self}")


@dataclass
class Completion:
    """One answer. `ids` ends with the stop token when `end` is "stop"; `logprobs` (nats) is as long as `ids`."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "length"] = "length"


def scaled(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Logits of the sampling distribution, fp32. logits (..., V) -> (..., V). Greedy (0) leaves them as they are."""
    logits = logits.float()
    return logits / temperature if temperature not in (0.0, 1.0) else logits


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
    keys: Sequence[tuple[int | str, ...]],
    seed: int,
    batch_size: int = 64,
    advance: Callable[[int], None] | None = None,
) -> list[Completion]:
    """Completes every prompt; the result is in the order of `prompts`.

    Args:
        model: a causal language model, gathered if it is sharded; it is put into evaluation mode and back.
        prompts: token ids, each at least one token.
        spec: the sampling distribution and where to stop.
        keys: one key a prompt; (seed, key) determines the row's random numbers, whatever the batch.
        seed: of the run.
        batch_size: rows decoded at once.
        advance: called with the number of prompts that have just been finished.
    """
    assert len(keys) == len(prompts) and all(prompts)
    was_training = model.training
    model.eval()
    completions = [Completion() for _ in prompts]
    # Prompts of like length share a batch, so that little of it is padding. Longest first: memory peaks at once.
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    try:
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            noise = None
            if spec.temperature > 0:
                noise = np.stack([uniform((spec.max_new_tokens,), seed, *keys[i]) for i in rows])
            _decode(model, [prompts[i] for i in rows], spec, noise, [completions[i] for i in rows])
            if advance is not None:
                advance(len(rows))
    finally:
        model.train(was_training)
    return completions


def _decode(
    model: PreTrainedModel,
    prompts: list[Sequence[int]],
    spec: SamplingSpec,
    noise: np.ndarray | None,
    completions: list[Completion],
) -> None:
    """Fills `completions` of one batch. noise: (B, max_new_tokens) in [0, 1), or None for greedy."""
    device = model.device
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), spec.pad_id, dtype=torch.long)
    mask = torch.zeros((len(prompts), width), dtype=torch.long)
    for i, prompt in enumerate(prompts):
        ids[i, width - len(prompt) :] = torch.as_tensor(prompt, dtype=torch.long)
        mask[i, width - len(prompt) :] = 1
    ids, mask = ids.to(device), mask.to(device)  # (B, P)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)  # (B, P)
    uniforms = None if noise is None else torch.from_numpy(noise).to(device)  # (B, max_new_tokens) float64
    stops = torch.tensor(spec.stop_ids, device=device)
    cache = DynamicCache(config=model.config)
    rows = torch.arange(len(prompts), device=device)  # which completion each remaining row belongs to
    # A mask of ones says nothing, and without one the attention kernel takes its faster path.
    padded = bool((mask == 0).any())

    for step in range(spec.max_new_tokens):
        logits = model(
            input_ids=ids,
            attention_mask=mask if padded else None,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]  # (B, V)
        logp = torch.log_softmax(scaled(logits, spec.temperature), dim=-1)
        if uniforms is None:
            token = logp.argmax(-1)
        else:
            cdf = logp.double().exp().cumsum(-1)
            # Scaling by the last entry keeps rounding in the sum from ever picking beyond the vocabulary.
            token = torch.searchsorted(cdf, uniforms[rows, step, None] * cdf[:, -1:], right=True).squeeze(-1)
            token = token.clamp(max=logp.shape[-1] - 1)
        chosen = logp.gather(-1, token[:, None]).squeeze(-1)  # (B,)
        ended = torch.isin(token, stops)

        for row, t, lp, e in zip(rows.tolist(), token.tolist(), chosen.tolist(), ended.tolist(), strict=True):
            completions[row].ids.append(t)
            completions[row].logprobs.append(lp)
            if e:
                completions[row].end = "stop"

        alive = (~ended).nonzero().squeeze(-1)
        if len(alive) == 0 or step + 1 == spec.max_new_tokens:
            return
        if len(alive) < len(rows):  # rows that have ended leave the batch
            rows, token, mask, positions = rows[alive], token[alive], mask[alive], positions[alive]
            cache.batch_select_indices(alive)
        ids = token[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        positions = positions[:, -1:] + 1
