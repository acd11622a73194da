"""Conversations of several turns in advantages and losses: by hand, against independent code, and by properties."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from rollout.mismatch import mismatch_metrics, truncated_importance_weights
from rollout.trajectory import Trajectory, TrajectoryBatch, Turn
from stages.ppo import loss as losses
from stages.ppo import train as loop
from stages.ppo.advantages import gae, last_action, token_rewards
from stages.ppo.config import PPOTrainConfig
from stages.ppo.metrics import mean
from stages.ppo.sampler import rewards_of
from tests import numpy_policy_gradient as papers
from tests.conversations import Conversations
from tests.test_ppo_loss import POLICY

CPU = torch.device("cpu")
MAX_LENGTH, BETA = 14, 0.3
ESTIMATORS = {
    "gae": {"gamma": 0.95, "lam": 0.9},
    "gae, Monte-Carlo critic": {"gamma": 1.0, "lam": 0.5, "critic_lam": 1.0, "whiten_advantages": False},
    "gae, length-adaptive": {"lam": "length_adaptive", "lam_alpha": 0.5},
    "group": {"kl_in": "loss"},
    "group, not scaled": {"kl_in": "loss", "kl_estimator": "k2", "scale_rewards": False},
    "leave_one_out": {},
    "global_baseline": {"gamma": 0.9},
}
OF_LOSSES = {
    "clip": {},
    "clip_higher": {"cliprange_high": 0.28},
    "dual_clip": {"dual_clip": 1.7},
    "gspo": {},
    "cispo": {"cliprange_high": 0.28},
}
NORMALISERS = ("token", "sequence", "constant")


def config_of(estimator: str, loss: str, normaliser: str) -> SimpleNamespace:
    """What the loop reads of a section."""
    t = PPOTrainConfig(
        **ESTIMATORS[estimator],
        **OF_LOSSES[loss],
        policy_loss=loss,
        loss_normaliser=normaliser,
        num_generations=3,
        rollout_batch_size=12,
        missing_eos_penalty=0.5,
        max_completion_length=MAX_LENGTH,
        overlong_buffer=6,
        overlong_penalty=0.7,
    )
    return SimpleNamespace(advantage=estimator.split(",")[0], train=t)


# ---- the loop's way from a batch to one number


def our_targets(config: SimpleNamespace, batch: TrajectoryBatch) -> loop.Targets:
    t = config.train
    mask, old, ref = (batch.pad(column) for column in (batch.actions, batch.old_logp, batch.ref_logp))
    kl = losses.KL_ESTIMATORS[t.estimator](old, ref) if t.kl_in == "reward" else None
    rewards = token_rewards(rewards_of(batch, t, CPU).double(), kl, BETA, mask, batch.pad(batch.token_reward))
    values = batch.pad(batch.values) if config.advantage == "gae" else None
    advantages, returns = loop._advantages(config, rewards.double(), values, mask)
    return loop.Targets(mask, old, ref, advantages, values, returns, None)


def our_number(config: SimpleNamespace, targets: loop.Targets, logp: Tensor, values: Tensor) -> Tensor:
    t = config.train
    output = logp, torch.zeros_like(logp), values if targets.values is not None else None
    tokens, _ = loop._loss(t, output, targets, BETA, False)
    divisor = losses.count(targets.mask.sum(-1).tolist(), t.loss_normaliser, t.max_completion_length)
    return losses.total(tokens, targets.mask, t.loss_normaliser) / divisor


# ---- the same in plain Python, turn by turn


def their_advantages(config: SimpleNamespace, c: Conversations) -> tuple[papers.Tokens, papers.Tokens | None]:
    """Of the actions of each conversation; and the critic's returns."""
    t = config.train
    rewards = []
    for i, trajectory in enumerate(c.trajectories):
        length = sum(turn.end - turn.start for turn in trajectory.turns if turn.actor == "policy")
        score = trajectory.score - 0.5 * (trajectory.end != "stop") + 0.7 * papers.overlong(length, MAX_LENGTH, 6)
        old, ref = c.turns("old_logp")[i], c.turns("ref_logp")[i]
        kl = [
            (p, [papers.k1(x, y) for x, y in zip(a, b, strict=True)]) for (p, a), (_, b) in zip(old, ref, strict=True)
        ]
        paid = [turn.reward for turn in trajectory.turns]
        beta = BETA if t.kl_in == "reward" else 0.0
        rewards.append(papers.rewards_in_turns(score, paid, kl, beta, c.turns("dense")[i]))
    answers = [papers.actions(conversation) for conversation in rewards]
    totals = [math.fsum(answer) for answer in answers]
    if config.advantage == "gae":
        lams = [papers.vapo_lam(len(a), t.lam_alpha) if t.lam == "length_adaptive" else t.lam for a in answers]
        found = [papers.gae_in_turns(r, v, t.gamma, lam) for r, v, lam in zip(rewards, c.turns("values"), lams)]
        advantages, returns = [a for a, _ in found], [r for _, r in found]
        if t.critic_lam is not None:
            returns = [papers.gae_in_turns(r, v, t.gamma, t.critic_lam)[1] for r, v in zip(rewards, c.turns("values"))]
        return papers.whiten(advantages) if t.whiten_advantages else advantages, returns
    if config.advantage == "global_baseline":
        return papers.reinforce_plus_plus(answers, t.gamma, t.num_generations), None
    of_answers = (
        papers.rloo(totals, 3) if config.advantage == "leave_one_out" else papers.grpo(totals, 3, t.scale_rewards)
    )
    return [[a] * len(answer) for a, answer in zip(of_answers, answers)], None


def their_number(
    config: SimpleNamespace,
    c: Conversations,
    advantages: papers.Tokens,
    returns: papers.Tokens | None,
    logp: papers.Tokens,
) -> float:
    t = config.train

    def said(name: str) -> papers.Tokens:
        return [papers.actions(conversation) for conversation in c.turns(name)]

    tokens = POLICY[t.policy_loss][1](logp, said("old_logp"), advantages, said("new_logp"))
    if t.kl_in == "loss":
        estimator = {"k2": papers.k2, "k3": papers.k3}[t.estimator]
        kl = papers.for_every_token(estimator, logp, said("ref_logp"))
        tokens = papers.for_every_token(lambda x, y: x + BETA * y, tokens, kl)
    if returns is not None:
        value = papers.value_clip(said("new_values"), said("values"), returns, t.cliprange_value)
        tokens = papers.for_every_token(lambda x, y: x + t.vf_coef * y, tokens, value)
    return papers.one_number(tokens, t.loss_normaliser, MAX_LENGTH)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("seed", range(8))
def test_advantages_and_returns_are_those_of_a_loop_over_turns(estimator, seed):
    c, config = Conversations(3, 3, seed), config_of(estimator, "clip", "token")
    targets = our_targets(config, c.batch)
    advantages, returns = their_advantages(config, c)
    np.testing.assert_allclose(targets.advantages, c.scattered(advantages), rtol=2e-5, atol=2e-5)
    assert (targets.returns is None) == (returns is None)
    if returns is not None:
        np.testing.assert_allclose(targets.returns, c.scattered(returns), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("estimator", "loss", "normaliser"), itertools.product(ESTIMATORS, OF_LOSSES, NORMALISERS))
def test_loss_and_gradient_are_those_of_a_loop_over_turns(estimator, loss, normaliser):
    config = config_of(estimator, loss, normaliser)
    for seed in (20, 21):
        c = Conversations(2, 3, seed)
        targets = our_targets(config, c.batch)
        logp = c.padded("new_logp").requires_grad_()
        number = our_number(config, targets, logp, c.padded("new_values"))
        their = their_advantages(config, c)
        said = [papers.actions(conversation) for conversation in c.turns("new_logp")]
        assert number.item() == pytest.approx(their_number(config, c, *their, said), rel=1e-4, abs=1e-5)
        if seed == 20:
            (gradient,) = torch.autograd.grad(number, logp)
            expected = papers.numerical_gradient(
                lambda rows, c=c, their=their: their_number(config, c, *their, rows), said
            )
            np.testing.assert_allclose(gradient, c.scattered(expected), rtol=1e-4, atol=1e-5)


# ---- by hand


def test_gae_by_hand_steps_over_what_the_environment_says():
    """Turns: two actions, two tokens of the environment, one action, one of the environment, one action."""
    actor = [True, True, False, False, True, False, True]
    mask = torch.tensor([[*actor, False]])
    rewards = torch.tensor([[0.0, 1.0, 7.0, 7.0, 0.0, 7.0, 2.0, 7.0]], dtype=torch.float64)
    values = torch.tensor([[0.5, 1.0, 9.0, 9.0, 2.0, 9.0, 1.0, 9.0]], dtype=torch.float64)
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    # δ, from the end: 2 − 1 = 1; 0 + 0.5·1 − 2 = −1.5; 1 + 0.5·2 − 1 = 1; 0 + 0.5·1 − 0.5 = 0. γλ = 0.25.
    # A: 1; −1.5 + 0.25·1 = −1.25; 1 + 0.25·(−1.25) = 0.6875; 0 + 0.25·0.6875 = 0.171875.
    assert advantages.tolist() == [[0.171875, 0.6875, 0, 0, -1.25, 0, 1.0, 0]]
    assert returns.tolist() == [[0.671875, 1.6875, 0, 0, 0.75, 0, 2.0, 0]]


def test_rewards_of_turns_by_hand():
    """Two turns of the policy are paid 1 and 4; the score at the end is 10, and each action has a KL of 2 at β 0.5."""
    turns = (Turn("policy", 0, 2, 1.0), Turn("environment", 2, 3), Turn("policy", 3, 4, 4.0))
    batch = TrajectoryBatch.pack([trajectory(turns)])
    assert batch.reward.tolist() == [15.0]
    assert batch.token_reward.tolist() == [0, 1, 0, 4]
    mask = batch.pad(batch.actions)
    found = token_rewards(batch.reward.float(), torch.full((1, 4), 2.0), 0.5, mask, batch.pad(batch.token_reward))
    assert found.tolist() == [[-1, 0, 0, 13]]
    assert last_action(mask).tolist() == [3]


def test_groups_by_hand():
    """Totals of two conversations with the same prompt are 1 + 2 and 5: −1 and +1 off their mean, at every action."""
    one = trajectory((Turn("policy", 0, 1, 1.0), Turn("environment", 1, 3), Turn("policy", 3, 4)), score=2.0)
    other = trajectory((Turn("policy", 0, 4),), score=5.0)
    config = SimpleNamespace(
        advantage="group",
        train=PPOTrainConfig(
            num_generations=2, rollout_batch_size=2, num_mini_batches=1, scale_rewards=False, kl_in="loss"
        ),
    )
    found = our_targets(config, TrajectoryBatch.pack([one, other]).with_columns(dense=torch.zeros(8)))
    assert found.advantages.tolist() == [[-1, 0, 0, -1], [1, 1, 1, 1]]


def trajectory(turns: tuple[Turn, ...], score: float = 10.0, numbers: Tensor | None = None) -> Trajectory:
    length = turns[-1].end
    numbers = torch.zeros(length) if numbers is None else numbers
    return Trajectory(
        row=0,
        prompt_ids=torch.tensor([3, 4], dtype=torch.int32),
        ids=torch.arange(length, dtype=torch.int32),
        turns=turns,
        end="stop",
        engine_logp=numbers,
        old_logp=numbers,
        ref_logp=2 * numbers,
        values=3 * numbers,
        score=score,
    )


# ---- properties


@pytest.mark.parametrize("poison", [math.nan, math.inf, -200.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_numbers_at_tokens_of_the_environment_change_nothing(estimator, poison):
    for loss, normaliser in zip(OF_LOSSES, itertools.cycle(NORMALISERS)):
        c, config = Conversations(2, 3, 5), config_of(estimator, loss, normaliser)

        def run(fill: float, c=c, config=config) -> list[Tensor]:
            batch = c.batch
            dirty = {
                name: torch.where(batch.actions, getattr(batch, name), fill)
                for name in ("engine_logp", "old_logp", "ref_logp", "values", "dense")
            }
            batch = batch.with_columns(**dirty)
            mask = batch.pad(batch.actions)
            targets = our_targets(config, batch)
            weights = truncated_importance_weights(
                batch.pad(batch.engine_logp), targets.old_logp, mask, 2.0, "sequence"
            )
            logp, values = (torch.where(mask, c.padded(n), fill).requires_grad_() for n in ("new_logp", "new_values"))
            number = our_number(config, targets, logp, values)
            gradients = torch.autograd.grad(number, (logp, values), allow_unused=True)
            counted = torch.tensor(
                [mean(batch.kl), *mismatch_metrics(batch.pad(batch.engine_logp), targets.old_logp, mask).values()]
            )
            found = [targets.advantages, number, weights, batch.total(batch.old_logp), counted, *gradients]
            return [tensor for tensor in found if tensor is not None]

        for clean, dirty in zip(run(0.0), run(poison), strict=True):
            assert torch.equal(clean, dirty) and clean.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_turns_with_nothing_between_them_are_one_turn(estimator):
    generator = torch.Generator().manual_seed(0)
    several, one = [], []
    for length in (4, 6, 5, 7, 3, 6):
        numbers = -torch.rand(length, generator=generator, dtype=torch.float64)
        score = float(numbers[0])
        one.append(trajectory((Turn("policy", 0, length),), score, numbers))
        cut = (Turn("policy", 0, 2), Turn("environment", 2, 2), Turn("policy", 2, 3))
        cut = cut if length == 3 else (*cut, Turn("environment", 3, 3), Turn("policy", 3, length))
        several.append(trajectory(cut, score, numbers))
    batches = [TrajectoryBatch.pack(rows) for rows in (one, several)]
    batches = [batch.with_columns(dense=0.1 * batch.old_logp) for batch in batches]
    for loss, normaliser in itertools.product(OF_LOSSES, NORMALISERS):
        config = config_of(estimator, loss, normaliser)
        numbers = []
        for batch in batches:
            targets = our_targets(config, batch)
            logp = (0.9 * targets.old_logp).requires_grad_()
            number = our_number(config, targets, logp, 0.5 * targets.old_logp)
            numbers.append(
                [number, *torch.autograd.grad(number, logp), targets.advantages, batch.kl, batch.action_count]
            )
        assert all(torch.equal(a, b) for a, b in zip(*numbers, strict=True))
