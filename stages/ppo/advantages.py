"""Turns rewards of trajectories into advantages of tokens: one pure function per estimator, no model, no configuration.

Legend: N trajectories, R tokens after the prompt (right-padded), G trajectories of the same prompt, adjacent.
`mask` (N, R) bool is true at actions, the tokens that the policy chose. It is false in padding and at an environment's
tokens between two turns; every result is 0 there. A time step is an action, counted through all turns of a trajectory.

Papers: KL in the reward, Ziegler et al. 2019 (arXiv:1909.08593). GAE, Schulman et al. 2015 (arXiv:1506.02438). GRPO,
Shao et al. 2024 (arXiv:2402.03300). Without its standard deviation, Liu et al. 2025, "Dr. GRPO" (arXiv:2503.20783).
RLOO, Ahmadian et al. 2024 (arXiv:2402.14740). REINFORCE++, Hu et al. 2025 (arXiv:2501.03262). Over-long shaping and
dynamic sampling, Yu et al. 2025, DAPO (arXiv:2503.14476). Length-adaptive λ, Yue et al. 2025, VAPO (arXiv:2504.05118).
"""

import torch
from torch import Tensor

from stages.ppo.loss import masked, masked_whiten

# Added to a group's standard deviation, as in TRL, to avoid a division by 0 when all rewards of a group are equal.
_STD_EPSILON = 1e-4


def token_rewards(
    scores: Tensor, kl: Tensor | None, kl_coef: float, mask: Tensor, dense: Tensor | None = None
) -> Tensor:
    """−β·KL at every action, plus the trajectory's score at its last action (Ziegler et al., eq. 2).

    Args:
        scores: (N,), each trajectory's total score, including `dense`.
        kl: (N, R), or None when the KL is in the loss.
        kl_coef: β.
        mask: (N, R), at least one action per row.
        dense: (N, R), the part of the score that belongs to single actions: a reward model's scores of tokens, and each
            turn's reward at the turn's last action. None: there is no such part.

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
    last = last_action(mask)
    rewards[torch.arange(len(last), device=last.device), last] += at_end
    return rewards


def last_action(mask: Tensor) -> Tensor:
    """Column of each row's last action; −1 where there is none. (N, R) -> (N,)."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, columns, -1).amax(-1)


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """0 up to max_length − buffer tokens, then a linear fall to −1 at max_length (DAPO, eq. 13). (N,) -> (N,).

    lengths: number of actions of each trajectory.
    """
    over = lengths.float() - (max_length - buffer)
    return -(over / buffer).clamp(0, 1)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float | Tensor) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation: δ_t = r_t + γ V_{t+1} − V_t, A_t = δ_t + γλ A_{t+1} (GAE, eq. 11–16).

    t + 1 is the next action, in the same turn or in the policy's next one. A trajectory is one episode: after the last
    action, value and advantage are 0, whether the answer stopped or was cut off. `lam` is one number, or one for each
    trajectory (N,). Returns (advantages, returns = A + V), both (N, R).
    """
    rewards, values = masked(rewards, mask), masked(values, mask)
    advantages = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    following = torch.zeros_like(carry)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * following - values[:, t]
        carry = torch.where(mask[:, t], delta + gamma * lam * carry, carry)
        following = torch.where(mask[:, t], values[:, t], following)
        advantages[:, t] = carry
    advantages = masked(advantages, mask)
    return advantages, masked(advantages + values, mask)


def length_adaptive_lam(mask: Tensor, alpha: float) -> Tensor:
    """λ = 1 − 1/(α·length), at least 0: long trajectories carry the final reward back farther (VAPO). (N,)."""
    return (1 - 1 / (alpha * mask.sum(-1).float())).clamp(min=0)


def _groups(rewards: Tensor, group_size: int) -> Tensor:
    """Rewards minus the first reward of their group: equal rewards give exactly 0, so no rounding error is scaled up.

    (N,) -> (N / G, G).
    """
    groups = rewards.view(-1, group_size)
    return groups - groups[:, :1]


def group_relative(rewards: Tensor, group_size: int, scale: bool) -> Tensor:
    """(r − mean of the group) / deviation of the group (GRPO, section 4.1.2); without `scale` only centred (Dr. GRPO).

    The deviation is the sample standard deviation (divisor G − 1). rewards (N,), groups adjacent -> (N,).
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
    """Σ_{s≥t} γ^(s−t) r_s over actions, scaled over all actions of the batch to mean 0 and deviation 1 (REINFORCE++).

    If a prompt has several trajectories, their mean total is first subtracted at the last action of each (the paper's
    variant with a group baseline). rewards (N, R) -> (N, R).
    """
    rewards = masked(rewards, mask)
    if group_size > 1:
        totals = rewards.sum(-1).view(-1, group_size)
        baseline = totals.mean(-1, keepdim=True).expand_as(totals).reshape(-1)
        last = last_action(mask)
        rewards[torch.arange(len(last), device=last.device), last] -= baseline
    returns = torch.zeros_like(rewards)
    carry = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        carry = torch.where(mask[:, t], rewards[:, t] + gamma * carry, carry)
        returns[:, t] = carry
    return masked_whiten(returns, mask)


def over_tokens(advantages: Tensor, mask: Tensor) -> Tensor:
    """Gives every action of a trajectory the trajectory's advantage. (N,) -> (N, R)."""
    return masked(advantages[:, None].expand(mask.shape), mask)


def without_signal(scores: Tensor, group_size: int) -> Tensor:
    """True for each group whose answers all have the same score: it teaches nothing (DAPO, eq. 11). -> (N / G,)."""
    groups = scores.view(-1, group_size)
    return (groups.amax(-1) - groups.amin(-1)) < 1e-6


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R) over the mask: 1 is perfect, 0 as good as a constant, below 0 worse than one. ()."""
    residual, target = (returns - values)[mask], returns[mask]
    return 1 - residual.var(unbiased=False) / target.var(unbiased=False).clamp(min=1e-8)


def length_controlled(scores: Tensor, lengths: Tensor, slope: float, at: float) -> Tensor:
    """The estimated mean score if trajectories had `at` actions; `slope` is the score per action. ()."""
    return (scores - slope * (lengths - at)).mean()


def slope_of(scores: Tensor, lengths: Tensor) -> float:
    """Least-squares slope of score on length; 0 where all lengths are equal. (N,), (N,) -> score per token."""
    centred = lengths - lengths.mean()
    spread = (centred**2).sum()
    if spread < 1e-8:
        return 0.0
    return float((centred * (scores - scores.mean())).sum() / spread)
