"""The losses of the policy-gradient family as functions of tensors: no model, no configuration, no ranks.

Legend: B rows, R tokens after the prompt (right-padded), `mask` (B, R) bool, true at the actions that are trained on:
tokens that the policy chose, in one turn or several. Counts, means and lengths below are over actions.

A policy loss gives one number per token. `total` weights and sums them by the chosen normaliser, and the caller divides
once, by `count` over all micro-batches and processes, so that gradients do not depend on accumulation or the number of
processes. Masked positions are removed with `where`, not multiplied by zero, so that values there, even NaN, have no
effect.

Papers: PPO, Schulman et al. 2017 (arXiv:1707.06347). Adaptive KL coefficient, Ziegler et al. 2019 (arXiv:1909.08593).
k1, k2, k3: Schulman 2020, "Approximating KL Divergence". Clip-higher, token normaliser: Yu et al. 2025, DAPO
(arXiv:2503.14476). Dual clip: Ye et al. 2020 (arXiv:1912.09729). GSPO: Zheng et al. 2025 (arXiv:2507.18071). CISPO:
MiniMax 2025 (arXiv:2506.13585). Sequence normaliser: Shao et al. 2024 (arXiv:2402.03300). Constant normaliser: Liu et
al. 2025, "Dr. GRPO" (arXiv:2503.20783).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Normaliser = Literal["token", "sequence", "constant"]
Sums = dict[str, Tensor]

# Bound of a log-ratio of two probabilities, in nats. exp overflows in float32 beyond 88, and its gradient is then NaN.
_MOST_NATS = 20.0


def bounded(log_ratio: Tensor) -> Tensor:
    """A log-ratio limited to ±20 nats, as in verl; beyond the limit it has no gradient."""
    return log_ratio.clamp(-_MOST_NATS, _MOST_NATS)


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values with zero where the mask is false; their gradients there are zero too."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask; 0 where it is empty."""
    return masked(values, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scaled to deviation 1 over the mask, and to mean 0 if `shift_mean`; 0 in padding. (B, R) -> (B, R)."""
    mean = masked_mean(values, mask)
    variance = masked_mean((masked(values, mask) - mean) ** 2, mask)
    centred = values - mean if shift_mean else values
    if shift_mean:  # centre again: for nearly equal values the mean's rounding error exceeds their deviation
        centred = centred - masked_mean(centred, mask)
    return masked(centred * torch.rsqrt(variance + 1e-8), mask)


# ---- how tokens become one number


def total(losses: Tensor, mask: Tensor, normaliser: Normaliser) -> Tensor:
    """Sum of the tokens' losses; under `sequence` each is divided by its row's number of actions. (B, R) -> ()."""
    losses = masked(losses, mask)
    if normaliser == "sequence":
        losses = losses / mask.sum(-1, keepdim=True).clamp(min=1)
    return losses.sum()


def count(lengths: Sequence[int], normaliser: Normaliser, max_length: int) -> int:
    """The divisor of `total`: number of actions, of rows, or of rows · `max_length`. At least 1.

    lengths: number of trained actions of each row. A row without any is not counted.
    """
    if normaliser == "token":
        return max(1, sum(lengths))
    rows = sum(length > 0 for length in lengths)
    return max(1, rows if normaliser == "sequence" else rows * max_length)


# ---- the policy


def clip_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Sums]:
    """−min(r A, clip(r, 1 − low, 1 + high) A), r = π/π_old (PPO, eq. 7; low ≠ high: DAPO, eq. 10, "clip-higher").

    All (B, R). Returns (losses (B, R), sums over the mask of clipfrac, approxkl (k2) and ratio).
    """
    log_ratio, advantages = bounded(masked(logp - old_logp, mask)), masked(advantages, mask)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), _sums(log_ratio, ratio, clipped > plain, mask)


def dual_clip_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float, dual: float
) -> tuple[Tensor, Sums]:
    """The clipped loss, limited to −dual·A for A < 0, so that a huge ratio cannot dominate a step (Ye et al., eq. 5).

    `dual` > 1 + high. All (B, R). Returns as `clip_loss`.
    """
    losses, sums = clip_loss(logp, old_logp, advantages, mask, low, high)
    bound = -dual * masked(advantages, mask)
    negative = (bound > 0) & (losses > bound)
    with torch.no_grad():
        sums["clipfrac"] = sums["clipfrac"] + masked(negative.float(), mask).sum()
    return torch.where(negative, bound, losses), sums


def sequence_ratio_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, low: float, high: float
) -> tuple[Tensor, Sums]:
    """The clipped loss with one ratio per trajectory, the geometric mean over its actions (GSPO, eq. 5–7).

    All (B, R); each action has its trajectory's loss. Returns as `clip_loss`; approxkl uses the ratios of tokens.
    """
    log_ratio, advantages = masked(logp - old_logp, mask), masked(advantages, mask)
    mean = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)  # (B, 1)
    ratio = bounded(masked(mean.expand_as(log_ratio), mask)).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - low, 1 + high)
    return torch.maximum(plain, clipped), _sums(log_ratio, ratio, clipped > plain, mask)


def clipped_weight_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, high: float
) -> tuple[Tensor, Sums]:
    """−sg(min(r, 1 + high)) A log π: clips the weight, so that every token keeps a gradient (CISPO, eq. 4–5).

    As in the paper, there is no lower bound. All (B, R). Returns as `clip_loss`.
    """
    log_ratio, advantages = bounded(masked(logp - old_logp, mask)), masked(advantages, mask)
    ratio = log_ratio.exp()
    weight = ratio.detach().clamp(max=1 + high)
    losses = -weight * advantages * masked(logp, mask)
    return losses, _sums(log_ratio, ratio, (ratio > 1 + high) & (advantages > 0), mask)


def _sums(log_ratio: Tensor, ratio: Tensor, clipped: Tensor, mask: Tensor) -> Sums:
    with torch.no_grad():
        return {
            "clipfrac": masked(clipped.float(), mask).sum(),
            "approxkl": 0.5 * masked(log_ratio**2, mask).sum(),
            "ratio": masked(ratio, mask).sum(),
        }


# ---- the critic


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Sums]:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), the clipped value loss of PPO implementations (openai/baselines).

    All (B, R). Returns (losses (B, R), sums over the mask of clipfrac).
    """
    values, old_values, returns = masked(values, mask), masked(old_values, mask), masked(returns, mask)
    bounded = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    with torch.no_grad():
        sums = {"clipfrac": masked((clipped > plain).float(), mask).sum()}
    return 0.5 * torch.maximum(plain, clipped), sums


# ---- the distance from the reference


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π/π_ref at tokens sampled from π: unbiased, may be negative; for use in the reward. (B, R) nats."""
    return logp - ref_logp


def kl_k2(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """½ (log π/π_ref)²: biased, never negative; its gradient is an unbiased estimate of the KL's. (B, R) nats."""
    return 0.5 * (logp - ref_logp) ** 2


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """π_ref/π − 1 − log π_ref/π: unbiased, never negative; GRPO's loss uses it. (B, R) nats.

    Its gradient, however, is that of KL(π_ref ‖ π).
    """
    log_ratio = bounded(ref_logp - logp)
    return torch.expm1(log_ratio) - log_ratio


KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """Proportional controller of the coefficient (after Ziegler et al., section 2.2). kl, target: nats per answer."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)
