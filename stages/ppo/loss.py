"""The mathematics of PPO as functions of tensors: no model, no configuration, no ranks.

Legend: B rows, R completion tokens (right-padded), `mask` (B, R) bool, true on real completion tokens.

Every loss returns (sum, count), and the caller divides once, by the count over all micro-batches and processes, so
that neither accumulation nor the number of processes changes a gradient. Masked positions are selected away with
`where`, never multiplied by zero: whatever stands in padding, NaN included, changes nothing.

Papers: PPO, Schulman et al. 2017 (arXiv:1707.06347). GAE, Schulman et al. 2015 (arXiv:1506.02438). KL in the reward and
the adaptive coefficient, Ziegler et al. 2019 (arXiv:1909.08593). k1, k3, Schulman 2020, "Approximating KL Divergence".
"""

import torch
from torch import Tensor


def masked(values: Tensor, mask: Tensor) -> Tensor:
    """Values with zero where the mask is off; gradients there are zero, too."""
    return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the mask; 0 where it is empty."""
    return masked(values, mask).sum() / mask.sum().clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """Scaled to deviation 1 over the mask, and to mean 0 if `shift_mean`; 0 in padding. (B, R) -> (B, R)."""
    mean = masked_mean(values, mask)
    variance = masked_mean((masked(values, mask) - mean) ** 2, mask)
    centred = values - mean if shift_mean else values
    return masked(centred * torch.rsqrt(variance + 1e-8), mask)


def kl_k1(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """log π/π_ref at tokens sampled from π: unbiased, may be negative; the one to put into a reward. (B, R) nats."""
    return logp - ref_logp


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """π_ref/π − 1 − log π_ref/π at tokens sampled from π: unbiased, never negative; the one to put into a loss."""
    ratio = ref_logp - logp
    return torch.expm1(ratio) - ratio


def token_rewards(scores: Tensor, kl: Tensor | None, kl_coef: float, mask: Tensor) -> Tensor:
    """−β·KL at every token, and the answer's score added at its last real token (Ziegler et al., eq. 2).

    scores (B,), kl (B, R) or None when the KL is in the loss -> (B, R).
    """
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    if kl is not None:
        rewards = masked(-kl_coef * kl, mask)
    last = mask.sum(-1) - 1  # (B,), every row has a token
    rewards[torch.arange(len(last), device=last.device), last] += scores
    return rewards


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (GAE, eq. 11–16).

    Answers are episodes: behind the last real token value and advantage are 0, whether it stopped or was cut off.
    All (B, R). Returns (advantages, returns = A + V), zero in padding.
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(carry)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carry = torch.where(mask[:, t], delta + gamma * lam * carry, torch.zeros_like(carry))
        advantages[:, t] = carry
        following = values[:, t]
    return advantages, masked(advantages + values, mask)


def policy_loss(
    logp: Tensor, old_logp: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Clipped surrogate, −min(r A, clip(r, 1 − ε, 1 + ε) A) (PPO, eq. 7).

    All (B, R). Returns (sum, count, sums of clipfrac, approxkl (k2) and ratio over the mask).
    """
    log_ratio = masked(logp - old_logp, mask)
    advantages = masked(advantages, mask)
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    with torch.no_grad():
        sums = {
            "clipfrac": masked((clipped > plain).float(), mask).sum(),
            "approxkl": 0.5 * masked(log_ratio**2, mask).sum(),
            "ratio": masked(ratio, mask).sum(),
        }
    return masked(torch.maximum(plain, clipped), mask).sum(), mask.sum(), sums


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange: float
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """½ max((V − R)², (clip(V, V_old ± ε) − R)²), the value loss that goes with PPO's clipping (openai/baselines).

    All (B, R). Returns (sum, count, sums of clipfrac over the mask).
    """
    values, old_values, returns = masked(values, mask), masked(old_values, mask), masked(returns, mask)
    bounded = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    plain, clipped = (values - returns) ** 2, (bounded - returns) ** 2
    with torch.no_grad():
        sums = {"clipfrac": masked((clipped > plain).float(), mask).sum()}
    return 0.5 * masked(torch.maximum(plain, clipped), mask).sum(), mask.sum(), sums


def adapt_kl_coef(kl_coef: float, kl: float, target: float, horizon: float, samples: int) -> float:
    """Proportional controller of the coefficient (Ziegler et al., section 2.2). kl, target: nats an answer."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * samples / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the mask: 1 perfect, 0 as good as a constant, below 0 worse."""
    residual, target = (returns - values)[mask], returns[mask]
    return 1 - residual.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-8)
