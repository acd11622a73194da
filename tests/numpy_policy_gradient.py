"""An independent implementation of the policy-gradient family, from the papers, with loops over answers and tokens.

Tests compare `stages/ppo`, which computes on padded tensors with masks, with this. A batch is a list of answers, and an
answer a list of numbers, one per token, so there is no padding that could be wrong.

A conversation is a list of turns, and a turn says who spoke and has a number for each of its tokens. Its actions, the
tokens that the policy chose, are the answer that everything above is defined on.

Equations are numbered as in the arXiv versions named in stages/ppo/loss.py and stages/ppo/advantages.py.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Answer = Sequence[float]
Batch = Sequence[Answer]
Tokens = list[list[float]]
Conversation = Sequence[tuple[bool, Answer]]  # (whether the policy spoke, numbers)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def for_every_token(rule: Callable[..., float], *batches: Batch) -> Tokens:
    return [[rule(*values) for values in zip(*answers, strict=True)] for answers in zip(*batches, strict=True)]


# ---- policy losses, one number per token: minus the papers' objectives


def ppo_clip(logp: Batch, old: Batch, advantages: Batch, low: float, high: float) -> Tokens:
    """PPO, equation 7; with two ranges DAPO, equation 10."""

    def rule(new: float, before: float, advantage: float) -> float:
        ratio = math.exp(new) / math.exp(before)
        return -min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)

    return for_every_token(rule, logp, old, advantages)


def dual_clip(logp: Batch, old: Batch, advantages: Batch, low: float, high: float, c: float) -> Tokens:
    """Ye et al.: max(min(r A, clip(r) A), c A) where A < 0, and PPO's objective elsewhere."""

    def rule(new: float, before: float, advantage: float) -> float:
        ratio = math.exp(new) / math.exp(before)
        objective = min(ratio * advantage, clip(ratio, 1 - low, 1 + high) * advantage)
        return -(max(objective, c * advantage) if advantage < 0 else objective)

    return for_every_token(rule, logp, old, advantages)


def gspo(logp: Batch, old: Batch, advantages: Batch, low: float, high: float) -> Tokens:
    """GSPO, equations 5 and 7: s = (π(answer) / π_old(answer)) ^ (1 / length), the same at each of its tokens."""
    out = []
    for new, before, advantage in zip(logp, old, advantages, strict=True):
        ratio = (math.exp(math.fsum(new)) / math.exp(math.fsum(before))) ** (1 / len(new))
        out.append([-min(ratio * a, clip(ratio, 1 - low, 1 + high) * a) for a in advantage])
    return out


def cispo(logp: Batch, weight_logp: Batch, old: Batch, advantages: Batch, high: float) -> Tokens:
    """MiniMax-M1, equations 4 and 5, no lower bound. `weight_logp`: log π inside sg(·), which no gradient sees."""

    def rule(new: float, frozen: float, before: float, advantage: float) -> float:
        return -min(math.exp(frozen - before), 1 + high) * advantage * new

    return for_every_token(rule, logp, weight_logp, old, advantages)


def one_number(losses: Batch, normaliser: str, max_length: int) -> float:
    """DAPO, equation 12 (token); GRPO, equation 3 (sequence: mean of means); Dr. GRPO, "constant" in place of |o|."""
    if normaliser == "token":
        return math.fsum(math.fsum(answer) for answer in losses) / sum(len(answer) for answer in losses)
    if normaliser == "sequence":
        return math.fsum(math.fsum(answer) / len(answer) for answer in losses) / len(losses)
    return math.fsum(math.fsum(answer) / max_length for answer in losses) / len(losses)


# ---- critic


def value_clip(values: Batch, old: Batch, returns: Batch, cliprange: float) -> Tokens:
    def rule(value: float, before: float, target: float) -> float:
        clipped = before + clip(value - before, -cliprange, cliprange)
        return max((value - target) ** 2, (clipped - target) ** 2) / 2

    return for_every_token(rule, values, old, returns)


# ---- KL: r = π_ref/π at tokens drawn from π (Schulman 2020, with q = π and p = π_ref)


def k1(logp: float, ref: float) -> float:
    return -math.log(math.exp(ref) / math.exp(logp))


def k2(logp: float, ref: float) -> float:
    return math.log(math.exp(ref) / math.exp(logp)) ** 2 / 2


def k3(logp: float, ref: float) -> float:
    ratio = math.exp(ref) / math.exp(logp)
    return ratio - 1 - math.log(ratio)


# ---- rewards


def rewards_of_tokens(
    scores: Sequence[float], kl: Batch | None, kl_coef: float, lengths: Sequence[int], dense: Batch | None
) -> Tokens:
    """Ziegler et al., equation 2, per token; the dense part of a score is not added a second time."""
    out = []
    for i, length in enumerate(lengths):
        rewards = [0.0] * length
        rewards[-1] = scores[i]
        for t in range(length):
            if dense is not None:
                rewards[t] += dense[i][t]
                rewards[-1] -= dense[i][t]
            if kl is not None:
                rewards[t] -= kl_coef * kl[i][t]
        out.append(rewards)
    return out


def overlong(length: int, max_length: int, buffer: int) -> float:
    """DAPO, equation 13."""
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return ((max_length - buffer) - length) / buffer
    return -1.0


# ---- advantages


def gae(rewards: Batch, values: Batch, gamma: float, lam: float | Sequence[float]) -> tuple[Tokens, Tokens]:
    """Equation 16 as a plain sum: Σ_l (γλ)^l δ_{t+l}, with δ_t = r_t + γ V_{t+1} − V_t and V = 0 at the end."""
    advantages = []
    for i, (reward, value) in enumerate(zip(rewards, values, strict=True)):
        own = lam[i] if isinstance(lam, Sequence) else lam
        v = [*value, 0.0]
        delta = [reward[t] + gamma * v[t + 1] - v[t] for t in range(len(reward))]
        advantages.append(
            [
                math.fsum((gamma * own) ** step * delta[t + step] for step in range(len(delta) - t))
                for t in range(len(delta))
            ]
        )
    return advantages, for_every_token(lambda a, v: a + v, advantages, values)


def vapo_lam(length: int, alpha: float) -> float:
    """Σ_t λ^t = 1 / (1 − λ) = α · length, solved for λ; below 1 / α tokens that has no solution in [0, 1]: 0."""
    return max(0.0, 1 - 1 / (alpha * length))


def grpo(rewards: Sequence[float], group_size: int, scale: bool, epsilon: float = 1e-4) -> list[float]:
    out: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean = math.fsum(group) / group_size
        deviation = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (group_size - 1))
        out += [(r - mean) / (deviation + epsilon if scale else 1.0) for r in group]
    return out


def rloo(rewards: Sequence[float], group_size: int) -> list[float]:
    """Each answer's baseline is the mean reward of the others."""
    out: list[float] = []
    for start in range(0, len(rewards), group_size):
        group = list(rewards[start : start + group_size])
        for i, reward in enumerate(group):
            others = group[:i] + group[i + 1 :]
            out.append(reward - math.fsum(others) / len(others))
    return out


def reinforce_plus_plus(rewards: Batch, gamma: float, group_size: int) -> Tokens:
    """Discounted sums of later rewards, normalised over all tokens; with groups, minus the group's mean total."""
    totals = [math.fsum(answer) for answer in rewards]
    returns = []
    for i, answer in enumerate(rewards):
        first = i - i % group_size
        baseline = math.fsum(totals[first : first + group_size]) / group_size if group_size > 1 else 0.0
        reward = [*answer[:-1], answer[-1] - baseline]
        returns.append(
            [math.fsum(gamma ** (s - t) * reward[s] for s in range(t, len(reward))) for t in range(len(reward))]
        )
    return whiten(returns)


def whiten(batch: Batch, shift_mean: bool = True) -> Tokens:
    tokens = [x for answer in batch for x in answer]
    mean = math.fsum(tokens) / len(tokens)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in tokens) / len(tokens) + 1e-8)
    return [[(x - mean * shift_mean) / deviation for x in answer] for answer in batch]


def truncated_importance(trainer: Batch, engine: Batch, cap: float, level: str) -> Tokens:
    """min(π_trainer / π_engine, cap) at each token, or of the whole answer's probabilities at each of its tokens."""
    if level == "token":
        return for_every_token(lambda new, sampled: min(math.exp(new - sampled), cap), trainer, engine)
    return [
        [min(math.exp(math.fsum(new)) / math.exp(math.fsum(sampled)), cap)] * len(new)
        for new, sampled in zip(trainer, engine, strict=True)
    ]


# ---- conversations of several turns


def actions(conversation: Conversation) -> list[float]:
    """What an answer is in a conversation: the policy's turns, one behind the other."""
    return [number for policy, numbers in conversation if policy for number in numbers]


def rewards_in_turns(
    score: float, paid: Sequence[float], kl: Conversation, kl_coef: float, dense: Conversation | None
) -> list[tuple[bool, list[float]]]:
    """Of each action: its KL, what a reward model gave it, and at the end of turn i what the environment paid for that.

    `score` comes at the last action of all, less what `dense` has given already.
    """
    out = []
    for i, (policy, divergence) in enumerate(kl):
        rewards = [0.0] * len(divergence)
        if policy:
            rewards = [-kl_coef * number for number in divergence]
            rewards[-1] += paid[i]
            if dense is not None:
                rewards = [reward + given for reward, given in zip(rewards, dense[i][1], strict=True)]
        out.append((policy, rewards))
    last = max(i for i, (policy, _) in enumerate(out) if policy)
    out[last][1][-1] += score - (math.fsum(actions(dense)) if dense is not None else 0.0)
    return out


def gae_in_turns(
    rewards: Conversation, values: Conversation, gamma: float, lam: float
) -> tuple[list[float], list[float]]:
    """Advantages and returns of the actions. The state behind an action is the one before the next action, however much
    the environment says between them; behind the last action there is none."""
    places = [(i, t) for i, (policy, numbers) in enumerate(rewards) if policy for t in range(len(numbers))]
    advantages = [0.0] * len(places)
    for n in reversed(range(len(places))):
        i, t = places[n]
        error = rewards[i][1][t] - values[i][1][t]
        if n + 1 < len(places):
            after, then = places[n + 1]
            error += gamma * values[after][1][then] + gamma * lam * advantages[n + 1]
        advantages[n] = error
    return advantages, [a + v for a, v in zip(advantages, actions(values), strict=True)]


# ---- conversion and finite differences


def numerical_gradient(loss: Callable[[Tokens], float], at: Batch, step: float = 1e-6) -> Tokens:
    """Central differences of a function with respect to every token's value."""
    rows = [list(answer) for answer in at]
    gradient = []
    for i, answer in enumerate(rows):
        gradient.append([0.0] * len(answer))
        for t, middle in enumerate(answer):
            answer[t] = middle + step
            above = loss(rows)
            answer[t] = middle - step
            gradient[i][t] = (above - loss(rows)) / (2 * step)
            answer[t] = middle
    return gradient


def ragged(padded: np.ndarray, lengths: Sequence[int]) -> Tokens:
    """(N, R) and the lengths of its rows -> the answers."""
    return [padded[i, :length].tolist() for i, length in enumerate(lengths)]
