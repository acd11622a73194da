"""Rewards and advantages: against independent numpy from the papers, and against what each estimator promises."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout.mismatch import truncated_importance_weights
from stages.ppo.advantages import (
    explained_variance,
    gae,
    global_baseline,
    group_relative,
    leave_one_out,
    length_adaptive_lam,
    length_controlled,
    over_tokens,
    overlong_penalty,
    slope_of,
    token_rewards,
    without_signal,
)
from stages.ppo.loss import KL_ESTIMATORS
from stages.ppo.metrics import repetition
from tests import numpy_policy_gradient as papers
from tests.numpy_policy_gradient import ragged

POISONS = [math.nan, math.inf, -math.inf, 1e30]


class Batch:
    """Random groups of answers: padded float64 tensors (N, R) with a mask, and the same as lists of numbers."""

    def __init__(self, groups: list[list[int]], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.size = len(groups[0])
        self.lengths = [length for group in groups for length in group]
        shape = (len(self.lengths), max(self.lengths) + int(rng.integers(0, 3)))
        self.mask = torch.arange(shape[1])[None] < torch.tensor(self.lengths)[:, None]
        self.arrays = {name: rng.normal(size=shape) for name in ("rewards", "values", "kl", "dense", "logp", "ref")}
        self.scores = rng.normal(size=shape[0]) * rng.choice([0.1, 1, 30])

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name])

    def rows(self, name: str) -> papers.Tokens:
        return ragged(self.arrays[name], self.lengths)


@st.composite
def batches(draw) -> Batch:
    size = draw(st.integers(2, 5))
    group = st.lists(st.integers(1, 8), min_size=size, max_size=size)
    return Batch(draw(st.lists(group, min_size=1, max_size=4)), draw(st.integers(0, 2**32 - 1)))


def random_cases(examples: int, **extra):
    """Runs a test on that many random batches, the same ones each time."""

    def decorate(test):
        return settings(max_examples=examples, deadline=None, derandomize=True, database=None)(
            given(batch=batches(), **extra)(test)
        )

    return decorate


@pytest.fixture
def batch() -> Batch:
    return Batch([[8, 1, 4], [7, 2, 5]], seed=0)


def same(ours: Tensor, theirs: papers.Batch, lengths: list[int], tolerance: float = 1e-8) -> None:
    """Equal on the answers, and zero behind them."""
    for row, expected, length in zip(ours.numpy(), theirs, lengths, strict=True):
        np.testing.assert_allclose(row[:length], expected, rtol=tolerance, atol=tolerance)
        assert not row[length:].any()


# ---- against the papers


@random_cases(60, with_kl=st.booleans(), with_dense=st.booleans())
def test_token_rewards_are_the_papers(batch, with_kl, with_dense):
    kl, kl_rows = (batch["kl"], batch.rows("kl")) if with_kl else (None, None)
    dense, dense_rows = (batch["dense"], batch.rows("dense")) if with_dense else (None, None)
    found = token_rewards(torch.tensor(batch.scores), kl, 0.3, batch.mask, dense)
    same(found, papers.rewards_of_tokens(batch.scores, kl_rows, 0.3, batch.lengths, dense_rows), batch.lengths, 1e-5)
    spent = [0.3 * math.fsum(row) if with_kl else 0.0 for row in batch.rows("kl")]
    np.testing.assert_allclose(found.sum(-1), batch.scores - spent, rtol=1e-5, atol=1e-5)


@random_cases(80, gamma=st.sampled_from([0.9, 0.99, 1.0]), lam=st.sampled_from([0.0, 0.5, 0.95, 1.0]))
def test_gae_is_its_definition(batch, gamma, lam):
    advantages, returns = gae(batch["rewards"], batch["values"], batch.mask, gamma, lam)
    expected, targets = papers.gae(batch.rows("rewards"), batch.rows("values"), gamma, lam)
    same(advantages, expected, batch.lengths)
    same(returns, targets, batch.lengths)


@random_cases(40, alpha=st.sampled_from([0.05, 0.5, 2.0]))
def test_gae_with_a_lambda_for_each_answer(batch, alpha):
    lams = length_adaptive_lam(batch.mask, alpha)
    expected = [papers.vapo_lam(length, alpha) for length in batch.lengths]
    assert lams.tolist() == pytest.approx(expected)
    advantages, returns = gae(batch["rewards"], batch["values"], batch.mask, 0.99, lams.double())
    theirs = papers.gae(batch.rows("rewards"), batch.rows("values"), 0.99, expected)
    same(advantages, theirs[0], batch.lengths, 1e-6)
    same(returns, theirs[1], batch.lengths, 1e-6)


@random_cases(60, scale=st.booleans())
def test_group_relative_is_the_papers(batch, scale):
    found = group_relative(torch.tensor(batch.scores), batch.size, scale)
    np.testing.assert_allclose(found, papers.grpo(batch.scores, batch.size, scale), rtol=1e-9, atol=1e-9)


@random_cases(60)
def test_leave_one_out_is_the_papers(batch):
    found = leave_one_out(torch.tensor(batch.scores), batch.size)
    np.testing.assert_allclose(found, papers.rloo(batch.scores, batch.size), rtol=1e-9, atol=1e-9)


@random_cases(60, gamma=st.sampled_from([0.9, 1.0]), grouped=st.booleans())
def test_global_baseline_is_the_papers(batch, gamma, grouped):
    size = batch.size if grouped else 1
    found = global_baseline(batch["rewards"], batch.mask, gamma, size)
    same(found, papers.reinforce_plus_plus(batch.rows("rewards"), gamma, size), batch.lengths, 1e-6)


@random_cases(40, cap=st.sampled_from([0.5, 1.0, 2.0, 100.0]), level=st.sampled_from(["token", "sequence"]))
def test_importance_weights_are_the_papers(batch, cap, level):
    engine, trainer = batch["logp"], batch["ref"]
    found = truncated_importance_weights(engine, trainer, batch.mask, cap, level)
    expected = papers.truncated_importance(batch.rows("ref"), batch.rows("logp"), cap, level)
    same(found - 1, [[weight - 1 for weight in row] for row in expected], batch.lengths)  # 1 in padding
    for poison in POISONS:
        dirty = torch.where(batch.mask, engine, poison), torch.where(batch.mask, trainer, poison)
        assert torch.equal(truncated_importance_weights(*dirty, batch.mask, cap, level), found)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 50), st.data())
def test_overlong_penalty_is_the_papers(max_length, data):
    buffer = data.draw(st.integers(1, max_length))
    lengths = list(range(max_length + 3))
    found = overlong_penalty(torch.tensor(lengths), max_length, buffer)
    assert found.tolist() == pytest.approx([papers.overlong(n, max_length, buffer) for n in lengths], abs=1e-6)
    assert found[0] == 0 and found[-1] == -1
    assert (found.diff() <= 0).all()


def test_every_estimator_keeps_five_digits_in_single_precision(batch):
    rewards, values, scores = batch["rewards"].float(), batch["values"].float(), torch.tensor(batch.scores).float()
    same(
        gae(rewards, values, batch.mask, 1.0, 0.95)[0],
        papers.gae(*map(batch.rows, ("rewards", "values")), 1.0, 0.95)[0],
        batch.lengths,
        1e-5,
    )
    same(
        global_baseline(rewards, batch.mask, 1.0, 3),
        papers.reinforce_plus_plus(batch.rows("rewards"), 1.0, 3),
        batch.lengths,
        1e-5,
    )
    for scale in (True, False):
        np.testing.assert_allclose(
            group_relative(scores, 3, scale), papers.grpo(batch.scores, 3, scale), rtol=1e-5, atol=1e-5
        )
    np.testing.assert_allclose(leave_one_out(scores, 3), papers.rloo(batch.scores, 3), rtol=1e-5, atol=1e-5)


# ---- padding


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("name", ["token_rewards", "gae", "gae_adaptive", "global", "global_grouped", "variance"])
def test_what_stands_in_padding_changes_nothing(batch, name, poison):
    mask, scores = batch.mask, torch.tensor(batch.scores)

    def run(t: dict[str, Tensor]) -> list[Tensor]:
        match name:
            case "token_rewards":
                kl = KL_ESTIMATORS["k3"](t["logp"], t["ref"])
                return [token_rewards(scores, kl, 0.1, mask), token_rewards(scores, kl, 0.1, mask, t["dense"])]
            case "gae":
                return list(gae(t["rewards"], t["values"], mask, 0.99, 0.95))
            case "gae_adaptive":
                return list(gae(t["rewards"], t["values"], mask, 0.99, length_adaptive_lam(mask, 0.5)))
            case "global":
                return [global_baseline(t["rewards"], mask, 1.0, 1)]
            case "global_grouped":
                return [global_baseline(t["rewards"], mask, 0.9, 3)]
        return [explained_variance(t["values"], t["rewards"], mask)]

    clean = {key: batch[key] for key in batch.arrays}
    dirty = {key: torch.where(mask, value, poison) for key, value in clean.items()}
    for one, other in zip(run(clean), run(dirty), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


def test_no_estimator_changes_its_arguments(batch):
    given_ = {name: batch[name] for name in batch.arrays}
    kept = {name: value.clone() for name, value in given_.items()}
    scores = torch.tensor(batch.scores)
    token_rewards(scores, given_["kl"], 0.1, batch.mask, given_["dense"])
    gae(given_["rewards"], given_["values"], batch.mask, 0.9, 0.9)
    global_baseline(given_["rewards"], batch.mask, 0.9, 3)
    group_relative(scores, 3, True)
    leave_one_out(scores, 3)
    assert all(torch.equal(given_[name], kept[name]) for name in kept)
    assert scores.tolist() == batch.scores.tolist()


# ---- rewards of tokens


def test_score_lands_on_the_last_real_token(batch):
    scores = torch.arange(1.0, 7)
    rewards = token_rewards(scores, None, 0.5, batch.mask)
    for row, score, length in zip(rewards, scores, batch.lengths):
        assert row.nonzero().flatten().tolist() == [length - 1]
        assert row[length - 1] == score


def test_dense_part_stays_where_it_was_given_and_is_not_paid_twice():
    mask = torch.tensor([[True, True, True, False]])
    dense = torch.tensor([[0.5, 0.0, 0.25, 9.0]])
    assert token_rewards(torch.tensor([1.0]), None, 0.0, mask, dense).tolist() == [[0.5, 0.0, 0.5, 0.0]]
    assert token_rewards(torch.tensor([0.75]), None, 0.0, mask, dense).tolist() == [[0.5, 0.0, 0.25, 0.0]]


def test_overlong_penalty_by_hand():
    lengths = torch.tensor([1, 80, 90, 95, 100])
    assert overlong_penalty(lengths, 100, 20).tolist() == pytest.approx([0, 0, -0.5, -0.75, -1])


def test_over_tokens_gives_every_token_its_answers_number(batch):
    found = over_tokens(torch.arange(1.0, 7), batch.mask)
    same(found, [[float(i + 1)] * n for i, n in enumerate(batch.lengths)], batch.lengths)


# ---- GAE


@random_cases(30)
def test_lambda_one_is_monte_carlo_and_lambda_zero_is_one_step(batch):
    advantages, returns = gae(batch["rewards"], batch["values"], batch.mask, 0.9, 1.0)
    for i, (rewards, values) in enumerate(zip(batch.rows("rewards"), batch.rows("values"))):
        for t in range(len(rewards)):
            monte_carlo = math.fsum(0.9 ** (s - t) * rewards[s] for s in range(t, len(rewards)))
            assert returns[i, t].item() == pytest.approx(monte_carlo, abs=1e-9)
            assert advantages[i, t].item() == pytest.approx(monte_carlo - values[t], abs=1e-9)
    one_step, _ = gae(batch["rewards"], batch["values"], batch.mask, 0.9, 0.0)
    for i, (rewards, values) in enumerate(zip(batch.rows("rewards"), batch.rows("values"))):
        ahead = [*values[1:], 0.0]
        assert one_step[i, : len(rewards)].tolist() == pytest.approx(
            [r + 0.9 * n - v for r, n, v in zip(rewards, ahead, values)]
        )


def test_a_critic_that_is_right_leaves_no_advantage(batch):
    _, exact = gae(batch["rewards"], torch.zeros_like(batch["values"]), batch.mask, 0.9, 1.0)
    for lam in (0.0, 0.7, 1.0):
        advantages, returns = gae(batch["rewards"], exact, batch.mask, 0.9, lam)
        assert torch.allclose(advantages, torch.zeros_like(advantages), atol=1e-12)
        assert torch.allclose(returns, exact, atol=1e-12)


def test_length_adaptive_lambda():
    mask = torch.arange(1000)[None] < torch.tensor([[1], [20], [40], [1000]])
    assert length_adaptive_lam(mask, 0.05).tolist() == pytest.approx([0, 0, 0.5, 0.98])
    lam = length_adaptive_lam(mask, 0.05)[3].item()
    assert math.fsum(lam**t for t in range(10_000)) == pytest.approx(0.05 * 1000, rel=1e-3)  # the paper's condition


# ---- groups


@random_cases(40, shift=st.floats(-100, 100), factor=st.floats(0.5, 50))
def test_a_shift_of_all_rewards_of_a_group_changes_nothing_and_a_factor_scales(batch, shift, factor):
    scores = torch.tensor(batch.scores)
    shifts = shift * torch.arange(len(scores) // batch.size).repeat_interleave(batch.size)
    for estimator in (
        lambda r: group_relative(r, batch.size, True),
        lambda r: group_relative(r, batch.size, False),
        lambda r: leave_one_out(r, batch.size),
    ):
        assert torch.allclose(estimator(scores + shifts), estimator(scores), atol=1e-7)
    for linear in (lambda r: group_relative(r, batch.size, False), lambda r: leave_one_out(r, batch.size)):
        assert torch.allclose(linear(factor * scores), factor * linear(scores), rtol=1e-9, atol=1e-9)
    # With a deviation far above what is added to it, the scaled estimator knows no unit.
    wide = 1e4 * scores
    assert torch.allclose(
        group_relative(factor * wide, batch.size, True), group_relative(wide, batch.size, True), rtol=1e-3
    )


@random_cases(40)
def test_leave_one_out_is_centred_times_g_over_g_minus_one(batch):
    scores, g = torch.tensor(batch.scores), batch.size
    assert torch.allclose(leave_one_out(scores, g), group_relative(scores, g, False) * g / (g - 1), atol=1e-9)
    for advantages in (leave_one_out(scores, g), group_relative(scores, g, True)):
        assert torch.allclose(
            advantages.view(-1, g).sum(-1), torch.zeros(len(scores) // g, dtype=torch.float64), atol=1e-8
        )


def test_scaled_group_has_deviation_one():
    scores = torch.tensor([1.0, 2.0, 4.0, -300.0, 20.0, 100.0], dtype=torch.float64)
    assert group_relative(scores, 3, True).view(2, 3).std(-1).tolist() == pytest.approx([1, 1], abs=1e-3)


@pytest.mark.parametrize("size", range(2, 10))
def test_a_group_of_equal_rewards_gives_exactly_nothing(size):
    """In single precision, too, where the mean of equal numbers need not be that number."""
    rewards = torch.tensor([0.1, -7.3, 1234.567, 1e-6, 1 / 3]).repeat_interleave(size)
    for scale in (True, False):
        assert (group_relative(rewards, size, scale) == 0).all()
    assert (leave_one_out(rewards, size) == 0).all()


def test_groups_do_not_see_each_other():
    scores = torch.tensor([1.0, 3.0, 10.0, 50.0])
    other = torch.tensor([1.0, 3.0, -4.0, 7.0])
    for estimator in (
        group_relative(scores, 2, True) - group_relative(other, 2, True),
        leave_one_out(scores, 2) - leave_one_out(other, 2),
    ):
        assert (estimator[:2] == 0).all() and (estimator[2:] != 0).any()


@random_cases(40, grouped=st.booleans())
def test_global_baseline_has_mean_zero_and_deviation_one_over_all_tokens(batch, grouped):
    advantages = global_baseline(batch["rewards"], batch.mask, 1.0, batch.size if grouped else 1)[batch.mask]
    assert advantages.mean().item() == pytest.approx(0, abs=1e-9)
    if len(advantages) > 1:
        assert advantages.std(unbiased=False).item() == pytest.approx(1, abs=1e-4)


def test_global_baseline_with_groups_knows_no_level_of_a_group():
    batch = Batch([[3, 3], [3, 3]], seed=4)
    scores = torch.tensor([1.0, 2.0, 5.0, 7.0], dtype=torch.float64)
    rewards = token_rewards(scores, None, 0.0, batch.mask)
    shifted = token_rewards(scores + torch.tensor([0.0, 0.0, 40.0, 40.0]), None, 0.0, batch.mask)
    assert torch.allclose(
        global_baseline(rewards, batch.mask, 1.0, 2), global_baseline(shifted, batch.mask, 1.0, 2), atol=1e-6
    )
    assert not torch.allclose(
        global_baseline(rewards, batch.mask, 1.0, 1), global_baseline(shifted, batch.mask, 1.0, 1)
    )


# ---- what the estimators estimate: a bandit with two arms, every outcome enumerated


@pytest.mark.parametrize("size", [2, 3, 5])
def test_leave_one_out_is_an_unbiased_policy_gradient(size):
    """E[mean A_i ∇ log π(a_i)] over all draws of a group is ∇E[r]; with the group's mean, (G − 1)/G of it."""
    theta, rewards = 0.4, torch.tensor([0.3, 2.0], dtype=torch.float64)
    p = 1 / (1 + math.exp(-theta))  # of arm 1
    score = [-p, 1 - p]  # ∂ log π(arm) / ∂ θ
    exact = p * (1 - p) * (rewards[1] - rewards[0]).item()  # ∂ E[r] / ∂ θ
    expectation = {"leave_one_out": 0.0, "group": 0.0, "scaled": 0.0}
    for arms in itertools.product((0, 1), repeat=size):
        probability = math.prod(p if arm else 1 - p for arm in arms)
        drawn = rewards[list(arms)]
        for name, advantages in (
            ("leave_one_out", leave_one_out(drawn, size)),
            ("group", group_relative(drawn, size, False)),
            ("scaled", group_relative(drawn, size, True)),
        ):
            gradient = sum(a * score[arm] for a, arm in zip(advantages.tolist(), arms)) / size
            expectation[name] += probability * gradient
    assert expectation["leave_one_out"] == pytest.approx(exact, rel=1e-12)
    assert expectation["group"] == pytest.approx(exact * (size - 1) / size, rel=1e-12)
    assert expectation["scaled"] > 0 and abs(expectation["scaled"] / exact - 1) > 0.05


# ---- signal, variance, length, repetition


def test_without_signal():
    scores = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.1, 0.1, 0.1 + 1e-7])
    assert without_signal(scores, 3).tolist() == [True, False, True]


@random_cases(40)
def test_groups_without_signal_are_those_without_advantage(batch):
    scores = torch.tensor(batch.scores).round(decimals=-1)
    silent = leave_one_out(scores, batch.size).view(-1, batch.size).abs().amax(-1) < 1e-6
    assert torch.equal(without_signal(scores, batch.size), silent)


def test_explained_variance(batch):
    returns = batch["rewards"]
    assert explained_variance(returns, returns, batch.mask) == 1
    constant = torch.full_like(returns, returns[batch.mask].mean().item())
    assert explained_variance(constant, returns, batch.mask).item() == pytest.approx(0, abs=1e-9)
    assert explained_variance(-returns, returns, batch.mask) < 0


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(-5, 5)), min_size=2, max_size=20))
def test_slope_is_that_of_least_squares(pairs):
    lengths, scores = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs))
    if len(set(lengths.tolist())) == 1:
        assert slope_of(scores, lengths) == 0
        return
    assert slope_of(scores, lengths) == pytest.approx(np.polyfit(lengths.numpy(), scores.numpy(), 1)[0], abs=1e-9)


def test_length_controlled_score_is_what_the_line_says_at_that_length():
    lengths = torch.tensor([10.0, 20.0, 60.0], dtype=torch.float64)
    scores = 3 + 0.05 * lengths
    slope = slope_of(scores, lengths)
    assert slope == pytest.approx(0.05)
    assert length_controlled(scores, lengths, slope, 12.0).item() == pytest.approx(3.6)
    assert length_controlled(scores, lengths, 0.0, 12.0) == scores.mean()
    assert length_controlled(scores, lengths, slope, lengths.mean().item()).item() == pytest.approx(
        scores.mean().item()
    )
    longer = 2 * lengths  # the same line, further along it: nothing was gained but length
    later = length_controlled(3 + 0.05 * longer, longer, slope, 12.0)
    assert later.item() == pytest.approx(3.6)


def test_repetition():
    assert repetition([1, 2, 1, 2, 1, 2], n=2) == 0.6
    assert repetition(list(range(30))) == 0
    assert repetition([7] * 12) == pytest.approx(8 / 9)
    assert repetition([1, 2, 3]) == repetition([]) == 0
    assert repetition([1, 2, 3, 4]) == 0


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_repetition_counts_grams_that_were_there_before(ids, n):
    seen: list[list[int]] = []
    again = 0
    for start in range(len(ids) - n + 1):
        again += ids[start : start + n] in seen
        seen.append(ids[start : start + n])
    assert repetition(ids, n) == pytest.approx(again / len(seen) if seen else 0)
    assert repetition([9 - i for i in ids], n) == repetition(ids, n)  # which tokens they are does not matter
