"""The policy-gradient losses where a probability has moved very far: value and gradient stay finite."""

import math

import pytest
import torch
from torch import Tensor

from stages.ppo import loss as losses
from tests.test_ppo_loss import POLICY


@pytest.mark.parametrize("nats", [20.5, 88.0, 95.0, 1e4, math.inf])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", [*POLICY, "k3"])
def test_beyond_twenty_nats_value_and_gradient_stay_those_of_the_edge(name, sign, nats):
    """One token is far off, the other is not. exp overflows in single precision at 88.8 nats."""

    def computed(far: float) -> tuple[Tensor, Tensor]:
        x = torch.tensor([[sign * far], [0.3]], requires_grad=True)  # rows of one token, so GSPO's mean is the token's
        if name == "k3":
            values = losses.kl_k3(x, torch.zeros(2, 1))
        else:
            advantages = torch.tensor([[-1.0], [1.0]])
            values, sums = POLICY[name][0](x, torch.zeros(2, 1), advantages, torch.ones(2, 1, dtype=torch.bool))
            if name != "cispo" and math.isfinite(nats):  # CISPO's loss has log π itself as a factor
                assert all(value.isfinite() for value in sums.values())
        return values.detach(), torch.autograd.grad(values.sum(), x)[0]

    values, gradient = computed(nats)
    at_edge, _ = computed(20.0)
    near, of_near = computed(0.0)
    if name != "cispo":
        assert torch.equal(values, at_edge) and values.isfinite().all()
        assert gradient[0] == 0
    assert gradient.isfinite().all()
    assert torch.equal(gradient[1], of_near[1]) and torch.equal(values[1], near[1])


def test_within_twenty_nats_the_bound_changes_no_bit_of_value_or_gradient():
    x = torch.linspace(-20, 20, 4001, requires_grad=True)
    bounded = losses.kl_k3(x, torch.zeros(4001))
    plain = torch.expm1(-x) + x
    assert torch.equal(bounded, plain)
    assert torch.equal(torch.autograd.grad(bounded.sum(), x)[0], torch.autograd.grad(plain.sum(), x)[0])
    ratio = losses.bounded(x).exp()
    assert torch.equal(ratio, x.exp())
    assert torch.equal(torch.autograd.grad(ratio.sum(), x)[0], x.exp())
