"""Turns answers' rewards into tokens' advantages: one pure function per estimator, no model and no configuration.

Legend: N answers, R completion tokens (right-padded), G answers to the same prompt, which stand side by side.
`mask` (N, R) bool is true on real completion tokens; every result is 0 in padding.

Papers: KL in the reward, Ziegler et al. 2019 (arXiv:1909.08593). GAE, Schulman et al. 2015 (arXiv:1506.02438). GRPO,
Shao et al. 2024 (arXiv:2402.03300). Without its standard deviation, Liu et al. 2025, "Dr. GRPO" (arXiv:2503.20783).
RLOO, Ahmadian et al. 2024 (arXiv:2402.14740). REINFORCE++, Hu et al. 2025 (arXiv:2501.03262). Over-long shaping and
dynamic sampling, Yu et al. 2025, DAPO (arXiv:2503.14476). Length-adaptive λ, Yue et al. 2025, VAPO (arXiv:2504.05118).
"""

import torch
from torch import Tensor

from stages.ppo.loss import masked, masked_whiten

# Added to a group's standard deviation, as in TRL: a group of equal rewards then gives 0 and not a division by 0.
_STD_EPSILON = 1e-4


def token_rewards(
    scores: Tensor, kl: Tensor | None, kl_coef: float, mask: Tensor, dense: Tensor | None = None
) -> Tensor:
    """−β·KL at every token, and the answer's score added at its last real token (Ziegler et al., eq. 2).

    Args:
        scores: (N,), all of an answer's score, that of `dense` included.
        kl: (N, R), or None when the KL is in the loss.
        kl_coef: β.
        mask: (N, R).
        dense: (N, R), the part of the score that a reward model gave to single tokens, or None.

    Returns:
        (N, R), which sums to scores − β·KL in each row.
    """
    rewards = torch.zeros(mask.shape, dtype=torch.float32, device=mask.device)
    if kl is not None:
        rewards = masked(-kl_coef * kl, mask)
    at_end = scores
    if dense is not None:
        dense = masked(dense, mask)
        rewards = rewards + dense
        at_end = scores - dense.sum(-1)
    last = mask.sum(-1) - 1  # (N,), every row has a token
    rewards[torch.arange(len(last), device=last.device), last] += at_end
    return rewards


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length − buffer tokens, then falling evenly to −1 at max_length (DAPO, eq. 13). (N,) -> (N,)."""
    over = lengths.float() - (max_length - buffer)
    return -(over / buffer).clamp(0, 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (GAE, eq. 11–16).

    Answers are episodes: behind the last real token value and advantage are 0, whether it stopped or was cut off.
    `lam` is one number, or one for each answer (N,). Returns (advantages, returns = A + V), both (N, R).
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


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·length), at least 0: the longer an answer, the farther its end is credited (VAPO). (N,)."""
    return (1 - 1 / (alpha * mask.sum(-1).float())).clamp(min=0)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the first of their group, so that equal ones give exactly 0 and rounding errors are not scaled up.

    (N,) -> (N / G, G).
    """
    groups = rewards.view(-1, group_size)
    return groups - groups[:, :1]


def group_relative(rewards: Tensor, group_size: int, scale: bool) -> Tensor:
    """(r − mean of the group) / deviation of the group (GRPO, section 4.1.2); without `scale` only centred (Dr. GRPO).

    The deviation is the sample's (G − 1). rewards (N,), whole groups side by side -> (N,).
    """
    groups = _groups(rewards, group_size)
    centred = groups - groups.mean(-1, keepdim=True)
    if scale:
        centred = centred / (groups.std(-1, keepdim=True) + _STD_EPSILON)
    return centred.reshape(-1)


def leave_one_out(rewards: Tensor, group_size: int) -> Tensor:
    """r_i minus the mean reward of the group's other answers (RLOO, the estimator with k = G). (N,) -> (N,)."""
    groups = _groups(rewards, group_size)
    others = (groups.sum(-1, keepdim=True) - groups) / (group_size - 1)
    return (groups - others).reshape(-1)


def global_baseline(rewards: Tensor, mask: Tensor, gamma: float, group_size: int) -> Tensor:
    """Σ_{s≥t} γ^(s−t) r_s, scaled over all tokens of the batch to mean 0 and deviation 1 (REINFORCE++).

    Where a prompt has several answers, their mean total is first taken off each one's end (the paper's variant with
    a group baseline). rewards (N, R) -> (N, R).
    """
    rewards = masked(rewards, mask)
    if group_size > 1:
        totals = rewards.sum(-1).view(-1, group_size)
        baseline = totals.mean(-1, keepdim=True).expand_as(totals).reshape(-1)
        last = mask.sum(-1) - 1
        rewards[torch.arange(len(last), device=last.device), last] -= baseline
    returns = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carry = rewards[:, t] + gamma * carry
        returns[:, t] = carry
    return masked_whiten(returns, mask)


def over_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """Every token of an answer gets the answer's advantage. (N,) -> (N, R)."""
    return masked(advantages[:, None].expand(mask.shape), mask)


def without_signal(scores: Tensor, group_size: int) -> Tensor:
    """Groups whose answers all have the same score, from which nothing can be learned (DAPO, eq. 11). -> (N / G,)."""
    groups = scores.view(-1, group_size)
    return (groups.amax(-1) - groups.amin(-1)) < 1e-6


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the mask: 1 perfect, 0 as good as a constant, below 0 worse. ()."""
    residual, target = (returns - values)[mask], returns[mask]
    return 1 - residual.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-8)


def length_controlled(scores: Tensor, lengths: Tensor, slope: float, at: float) -> Tensor:
    """The estimated mean score if answers were `at` tokens long; `slope` is the score per token. ()."""
    return (scores - slope * (lengths - at)).mean()


def slope_of(scores: Tensor, lengths: Tensor) -> float:
    """Least-squares slope of score on length; 0 where all lengths are equal. (N,), (N,) -> score per token."""
    centred = lengths - lengths.mean()
    spread = (centred**2).sum()
    if spread < 1e-8:
        return 0.0
    return float((centred * (scores - scores.mean())).sum() / spread)
