"""What the KL estimators estimate: their exact means and gradients over a small vocabulary, each token enumerated."""

import math

import pytest
import torch
from torch import Tensor

from stages.ppo import loss as losses

V = 13


@pytest.fixture
def two_policies() -> tuple[Tensor, Tensor, Tensor]:
    """Logits of π, and log-probabilities of π and π_ref, over V tokens."""
    g = torch.Generator().manual_seed(1)
    logits = torch.randn(V, generator=g, dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.randn(V, generator=g, dtype=torch.float64), -1)
    return logits, torch.log_softmax(logits, -1), ref


def test_k1_and_k3_have_the_exact_kl_as_their_mean_and_k2_and_k3_are_never_negative(two_policies):
    _, logp, ref = two_policies
    p = logp.exp().detach()
    exact = (p * (logp - ref)).sum().item()
    means = {name: (p * f(logp, ref)).sum().item() for name, f in losses.KL_ESTIMATORS.items()}
    assert means["k1"] == pytest.approx(exact, rel=1e-12) and means["k3"] == pytest.approx(exact, rel=1e-12)
    assert abs(means["k2"] / exact - 1) > 0.01
    for name in ("k2", "k3"):
        assert (losses.KL_ESTIMATORS[name](logp, ref) >= 0).all()
        assert (losses.KL_ESTIMATORS[name](logp, logp) == 0).all()
    assert (losses.kl_k1(logp, ref) < 0).any()


def test_k3_varies_less_than_k1_near_the_reference(two_policies):
    _, logp, ref = two_policies
    near = torch.log_softmax(logp + 0.1 * ref, -1)
    p = near.exp()
    deviation = {
        name: ((p * f(near, logp) ** 2).sum() - (p * f(near, logp)).sum() ** 2).sqrt().item()
        for name, f in losses.KL_ESTIMATORS.items()
    }
    assert deviation["k3"] < 0.2 * deviation["k1"]


def test_gradients_of_the_kl_estimators_in_a_loss(two_policies):
    """E_π of the sampled tokens' gradient: k2's is the KL's, k1's is nothing, k3's is that of KL(π_ref ‖ π)."""
    logits, logp, ref = two_policies
    p = logp.exp().detach()

    def gradient(number: Tensor) -> Tensor:
        return torch.autograd.grad(number, logits, retain_graph=True)[0]

    kl = gradient((logp.exp() * (logp - ref)).sum())
    backward_kl = gradient((ref.exp() * (ref - logp)).sum())
    assert torch.allclose(gradient((p * losses.kl_k2(logp, ref)).sum()), kl, atol=1e-12)
    assert torch.allclose(
        gradient((p * losses.kl_k1(logp, ref)).sum()), torch.zeros(V, dtype=torch.float64), atol=1e-12
    )
    assert torch.allclose(gradient((p * losses.kl_k3(logp, ref)).sum()), backward_kl, atol=1e-12)
    assert not torch.allclose(kl, backward_kl, atol=1e-3)


def test_k1_in_the_reward_has_the_gradient_of_the_kl(two_policies):
    """−Σ p · sg(k1) log p, which is what the policy gradient makes of a reward of −k1, descends the KL."""
    logits, logp, ref = two_policies
    p = logp.exp().detach()
    reward = -losses.kl_k1(logp, ref).detach()
    (found,) = torch.autograd.grad(-(p * reward * logp).sum(), logits, retain_graph=True)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), logits)
    assert torch.allclose(found, exact, atol=1e-12)


def test_kl_estimators_keep_their_digits_where_the_policies_hardly_differ():
    """k3 by way of expm1: exp(x) − 1 − x would have none left in single precision."""
    logp = torch.full((1, 1), -2.0)
    ref = logp + 1e-3
    exact = math.expm1((ref - logp).item()) - (ref - logp).item()
    assert losses.kl_k3(logp, ref).item() == pytest.approx(exact, rel=2e-3)


def test_adaptive_coefficient_moves_towards_the_target_and_is_bounded():
    assert losses.adapt_kl_coef(0.1, kl=12.0, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 1.02)
    assert losses.adapt_kl_coef(0.1, kl=0.0, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 0.98)
    assert losses.adapt_kl_coef(0.1, kl=6.6, target=6.0, horizon=100, samples=10) == pytest.approx(0.1 * 1.01)
    assert losses.adapt_kl_coef(0.1, kl=6.0, target=6.0, horizon=100, samples=10) == 0.1
