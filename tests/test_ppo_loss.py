"""PPO's mathematics against independent numpy written from the papers, and against its properties."""

import numpy as np
import pytest
import torch

from rollout.logprobs import token_logprobs
from stages.ppo.actor_critic import micro_batches
from stages.ppo.loss import (
    adapt_kl_coef,
    explained_variance,
    gae,
    kl_k1,
    kl_k3,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)

B, R, V = 7, 9, 13
LENGTHS = [9, 1, 4, 7, 2, 9, 5]


@pytest.fixture
def batch():
    g = torch.Generator().manual_seed(0)
    mask = torch.arange(R)[None] < torch.tensor(LENGTHS)[:, None]
    values = {
        name: torch.randn(B, R, generator=g, dtype=torch.float64)
        for name in ("logp", "old", "ref", "values", "old_values", "returns", "adv", "rewards")
    }
    values["old"] = values["logp"] + 0.4 * values["old"]
    return mask, values


def gae_by_definition(rewards, values, lengths, gamma, lam):
    """Eq. 16 of the paper as the double sum that it is: A_t = Σ_l (γλ)^l δ_{t+l}."""
    out = np.zeros_like(rewards)
    for b, n in enumerate(lengths):
        v = np.append(values[b, :n], 0.0)
        for t in range(n):
            for step in range(n - t):
                delta = rewards[b, t + step] + gamma * v[t + step + 1] - v[t + step]
                out[b, t] += (gamma * lam) ** step * delta
    return out


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_gae_is_its_definition(batch, gamma, lam):
    mask, v = batch
    advantages, returns = gae(v["rewards"], v["values"], mask, gamma, lam)
    expected = gae_by_definition(v["rewards"].numpy(), v["values"].numpy(), LENGTHS, gamma, lam)
    np.testing.assert_allclose(advantages.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(returns.numpy(), np.where(mask, expected + v["values"].numpy(), 0), atol=1e-6)


def test_lambda_one_gives_monte_carlo_returns(batch):
    mask, v = batch
    _, returns = gae(v["rewards"], v["values"], mask, 1.0, 1.0)
    rewards = torch.where(mask, v["rewards"], 0.0)
    monte_carlo = rewards.flip(-1).cumsum(-1).flip(-1)
    assert torch.allclose(returns, torch.where(mask, monte_carlo, 0.0))


def test_policy_loss_is_equation_7(batch):
    mask, v = batch
    total, count, sums = policy_loss(v["logp"], v["old"], v["adv"], mask, 0.2)
    expected, clipped, ratios, k2 = 0.0, 0, 0.0, 0.0
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            r = np.exp(v["logp"][b, t].item() - v["old"][b, t].item())
            a = v["adv"][b, t].item()
            expected -= min(r * a, np.clip(r, 0.8, 1.2) * a)
            clipped += np.clip(r, 0.8, 1.2) * a < r * a
            ratios += r
            k2 += 0.5 * np.log(r) ** 2
    assert count == sum(LENGTHS)
    assert total.item() == pytest.approx(expected, rel=1e-6)
    assert sums["clipfrac"].item() == clipped and clipped > 0
    assert sums["ratio"].item() == pytest.approx(ratios, rel=1e-6)
    assert sums["approxkl"].item() == pytest.approx(k2, rel=1e-6)


def test_value_loss_is_clipped_around_the_old_value(batch):
    mask, v = batch
    total, count, sums = value_loss(v["values"], v["old_values"], v["returns"], mask, 0.3)
    expected, clipped = 0.0, 0
    for b, n in enumerate(LENGTHS):
        for t in range(n):
            value, old, target = (v[k][b, t].item() for k in ("values", "old_values", "returns"))
            plain, bounded = (value - target) ** 2, (np.clip(value, old - 0.3, old + 0.3) - target) ** 2
            expected += 0.5 * max(plain, bounded)
            clipped += bounded > plain
    assert (total.item(), count.item()) == (pytest.approx(expected, rel=1e-6), sum(LENGTHS))
    assert sums["clipfrac"].item() == clipped and clipped > 0


def test_gradients_against_finite_differences(batch):
    mask, v = batch
    logp = v["logp"].clone().requires_grad_()
    values = v["values"].clone().requires_grad_()
    ref = v["ref"]
    assert torch.autograd.gradcheck(lambda x: policy_loss(x, v["old"], v["adv"], mask, 0.2)[0], logp, eps=1e-7)
    assert torch.autograd.gradcheck(
        lambda x: value_loss(x, v["old_values"], v["returns"], mask, 0.3)[0], values, eps=1e-7
    )
    assert torch.autograd.gradcheck(lambda x: torch.where(mask, kl_k3(x, ref), 0.0).sum(), logp, eps=1e-7)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_what_stands_in_padding_changes_nothing(batch, poison):
    mask, v = batch

    def everything(values):
        logp = values["logp"].clone().requires_grad_()
        critic = values["values"].clone().requires_grad_()
        rewards = token_rewards(torch.arange(B, dtype=torch.float64), kl_k1(logp.detach(), values["ref"]), 0.1, mask)
        advantages, returns = gae(rewards, values["old_values"], mask, 1.0, 0.95)
        white = masked_whiten(advantages, mask)
        pg, _, sums = policy_loss(logp, values["old"], white, mask, 0.2)
        vf, _, more = value_loss(critic, values["old_values"], returns, mask, 0.2)
        (pg + vf).backward()
        return [pg.detach(), vf.detach(), logp.grad, critic.grad, rewards, white, *sums.values(), *more.values()]

    clean = everything(v)
    dirty = everything({name: torch.where(mask, value, poison) for name, value in v.items()})
    for a, b in zip(clean, dirty, strict=True):
        assert torch.equal(a, b)


def test_first_step_ratio_is_one_and_its_gradient_is_the_policy_gradient(batch):
    mask, v = batch
    logp = v["logp"].clone().requires_grad_()
    total, _, sums = policy_loss(logp, v["logp"], v["adv"], mask, 0.2)
    total.backward()
    assert sums["ratio"] == sum(LENGTHS) and sums["clipfrac"] == 0
    assert torch.allclose(logp.grad, torch.where(mask, -v["adv"], 0.0))


def test_score_lands_on_the_last_real_token(batch):
    mask, v = batch
    scores = torch.arange(1.0, B + 1)
    rewards = token_rewards(scores, None, 0.5, mask)
    for b, n in enumerate(LENGTHS):
        assert rewards[b].nonzero().flatten().tolist() == [n - 1]
        assert rewards[b, n - 1] == scores[b]
    with_kl = token_rewards(scores, kl_k1(v["logp"], v["ref"]).float(), 0.5, mask)
    kl = torch.where(mask, (v["logp"] - v["ref"]).float(), 0.0)
    assert torch.allclose(with_kl.sum(-1), scores - 0.5 * kl.sum(-1), atol=1e-5)


def test_kl_estimators_agree_with_the_exact_kl():
    """Sampled from π, k1 and k3 both have the mean KL(π ‖ π_ref), and k3 is never negative."""
    g = torch.Generator().manual_seed(1)
    p = torch.softmax(torch.randn(V, generator=g, dtype=torch.float64), -1)
    q = torch.softmax(torch.randn(V, generator=g, dtype=torch.float64), -1)
    exact = (p * (p / q).log()).sum().item()
    logp, ref = p.log(), q.log()
    assert (p * kl_k1(logp, ref)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (p * kl_k3(logp, ref)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (kl_k3(logp, ref) >= 0).all()


def test_token_logprobs_are_of_the_tempered_distribution():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(B, R, V, generator=g)
    tokens = torch.randint(V, (B, R), generator=g)
    logp, entropy = token_logprobs(logits, tokens, 0.7)
    p = torch.softmax(logits / 0.7, -1)
    assert torch.allclose(logp, p.gather(-1, tokens[..., None]).squeeze(-1).log(), atol=1e-6)
    assert torch.allclose(entropy, -(p * p.log()).sum(-1), atol=1e-6)


def test_whitening(batch):
    mask, v = batch
    white = masked_whiten(v["adv"], mask)[mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    scaled = masked_whiten(v["adv"], mask, shift_mean=False)[mask]
    assert torch.equal(scaled.sign(), v["adv"][mask].sign())


def test_adaptive_coefficient_moves_towards_the_target_and_is_bounded():
    assert adapt_kl_coef(0.1, kl=12.0, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 1.02)
    assert adapt_kl_coef(0.1, kl=0.0, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 0.98)
    assert adapt_kl_coef(0.1, kl=6.6, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 1.01)
    assert adapt_kl_coef(0.1, kl=6.0, target=6.0, horizon=100, samples=10) == 0.1


def test_explained_variance(batch):
    mask, v = batch
    assert explained_variance(v["returns"], v["returns"], mask) == 1
    constant = torch.full_like(v["returns"], v["returns"][mask].mean().item())
    assert explained_variance(constant, v["returns"], mask).item() == pytest.approx(0, abs=1e-9)
    assert explained_variance(-v["returns"], v["returns"], mask) < 0


@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (4, 2), (2, 3)])
def test_micro_batches_cover_every_row_once_with_equal_counts(world, size):
    lengths = [(7 * i) % 11 + 1 for i in range(40)]
    rows = list(range(0, 40, 1))[4:24]
    shares = [micro_batches(lengths, rows, size, rank, world) for rank in range(world)]
    assert sorted(r for share in shares for chunk in share for r in chunk) == rows
    assert len({len(share) for share in shares}) == 1
    assert all(0 < len(chunk) <= size for share in shares for chunk in share)


def test_sums_over_micro_batches_equal_the_whole(batch):
    mask, v = batch
    whole, count, _ = policy_loss(v["logp"], v["old"], v["adv"], mask, 0.2)
    parts = [policy_loss(v["logp"][s], v["old"][s], v["adv"][s], mask[s], 0.2) for s in ([0, 1], [2, 3, 4], [5, 6])]
    assert sum(p[0] for p in parts).item() == pytest.approx(whole.item(), rel=1e-12)
    assert sum(p[1] for p in parts) == count
