"""The losses of the policy-gradient family: against independent numpy from the papers, and against their properties."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rollout.logprobs import token_logprobs
from stages.ppo import loss as losses
from stages.ppo import train as loop
from stages.ppo.actor_critic import micro_batches
from stages.ppo.config import PPOTrainConfig
from tests import numpy_policy_gradient as papers
from tests.numpy_policy_gradient import ragged

V = 13
LOW, HIGH, UPPER, DUAL = 0.2, 0.2, 0.28, 1.7
POISONS = [math.nan, math.inf, -math.inf, 1e30]
NORMALISERS = ("token", "sequence", "constant")
# name -> (ours, the papers'), both of (logp, old_logp, advantages) and ours of the mask, too.
POLICY = {
    "clip": (
        lambda x, old, a, mask: losses.clip_loss(x, old, a, mask, LOW, HIGH),
        lambda x, old, a, _: papers.ppo_clip(x, old, a, LOW, HIGH),
    ),
    "clip_higher": (
        lambda x, old, a, mask: losses.clip_loss(x, old, a, mask, LOW, UPPER),
        lambda x, old, a, _: papers.ppo_clip(x, old, a, LOW, UPPER),
    ),
    "dual_clip": (
        lambda x, old, a, mask: losses.dual_clip_loss(x, old, a, mask, LOW, HIGH, DUAL),
        lambda x, old, a, _: papers.dual_clip(x, old, a, LOW, HIGH, DUAL),
    ),
    "gspo": (
        lambda x, old, a, mask: losses.sequence_ratio_loss(x, old, a, mask, LOW, HIGH),
        lambda x, old, a, _: papers.gspo(x, old, a, LOW, HIGH),
    ),
    "cispo": (
        lambda x, old, a, mask: losses.clipped_weight_loss(x, old, a, mask, UPPER),
        lambda x, old, a, frozen: papers.cispo(x, frozen, old, a, UPPER),
    ),
}
KL = {"k1": papers.k1, "k2": papers.k2, "k3": papers.k3}


class Batch:
    """Random answers of random lengths as padded float64 tensors (N, R), with a mask, and as lists of numbers."""

    def __init__(self, lengths: list[int], seed: int, width: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.lengths = lengths
        self.longest = max(lengths)
        shape = (len(lengths), max(self.longest, width))
        self.mask = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
        noise = {name: rng.normal(size=shape) for name in ("old", "ref", "advantages", "values", "returns", "moved")}
        logp = -rng.gamma(1.0, 2.0, shape)
        self.arrays = {
            "logp": logp,
            "old": logp + 0.4 * noise["old"],
            "ref": logp + 0.6 * noise["ref"],
            "advantages": noise["advantages"],
            "values": noise["values"],
            "old_values": noise["values"] + 0.5 * noise["moved"],
            "returns": noise["returns"],
        }

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.arrays[name])

    def rows(self, name: str) -> papers.Tokens:
        return ragged(self.arrays[name], self.lengths)

    def number(self, tokens: Tensor, normaliser: str) -> Tensor:
        """The minibatch's loss, as the loop makes it of the tokens'."""
        total = losses.total(tokens, self.mask, normaliser)
        return total / losses.count(self.lengths, normaliser, self.longest)


@st.composite
def batches(draw) -> Batch:
    lengths = draw(st.lists(st.integers(1, 9), min_size=1, max_size=7))
    return Batch(lengths, draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 11)))


def random_cases(examples: int):
    """Runs a test on that many random batches, the same ones each time."""

    def decorate(test):
        return settings(max_examples=examples, deadline=None, derandomize=True, database=None)(given(batches())(test))

    return decorate


@pytest.fixture
def batch() -> Batch:
    return Batch([9, 1, 4, 7, 2, 9, 5], seed=0)


def same(ours: Tensor, theirs: papers.Batch, lengths: list[int], tolerance: float = 1e-9) -> None:
    """Equal on the answers, and zero behind them."""
    found = ours.detach().numpy()
    for row, expected, length in zip(found, theirs, lengths, strict=True):
        np.testing.assert_allclose(row[:length], expected, rtol=tolerance, atol=tolerance)
        assert not row[length:].any()


# ---- against the papers


@pytest.mark.parametrize("name", POLICY)
@random_cases(60)
def test_policy_loss_is_the_papers(name, batch):
    ours, theirs = POLICY[name]
    names = ("logp", "old", "advantages")
    found, sums = ours(*(batch[n] for n in names), batch.mask)
    expected = theirs(*(batch.rows(n) for n in names), batch.rows("logp"))
    same(found, expected, batch.lengths)
    for normaliser in NORMALISERS:
        number = papers.one_number(expected, normaliser, batch.longest)
        assert batch.number(found, normaliser).item() == pytest.approx(number, rel=1e-9, abs=1e-9)
    per_token = papers.for_every_token(lambda x, y: x - y, batch.rows("logp"), batch.rows("old"))
    ratios = papers.for_every_token(math.exp, per_token)
    if name == "gspo":
        ratios = [[math.exp(math.fsum(row) / len(row))] * len(row) for row in per_token]
    flat = [(r, a, x) for row in zip(ratios, batch.rows("advantages"), expected) for r, a, x in zip(*row)]
    assert sums["ratio"].item() == pytest.approx(math.fsum(r for r, _, _ in flat), rel=1e-9)
    assert sums["approxkl"].item() == pytest.approx(math.fsum(0.5 * x * x for row in per_token for x in row), rel=1e-9)
    if name == "cispo":  # as TRL counts: good tokens whose weight is bounded
        assert sums["clipfrac"] == sum(r > 1 + UPPER and a > 0 for r, a, _ in flat)
    else:
        assert sums["clipfrac"] == sum(abs(x + r * a) > 1e-12 for r, a, x in flat)


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("normaliser", NORMALISERS)
@random_cases(6)
def test_policy_gradient_is_the_papers_by_finite_differences(name, normaliser, batch):
    """Of the other implementation, so that loss and gradient are both held against it; sg(·) of CISPO stays fixed."""
    ours, theirs = POLICY[name]
    x = batch["logp"].requires_grad_()
    batch.number(ours(x, batch["old"], batch["advantages"], batch.mask)[0], normaliser).backward()
    old, advantages, frozen = (batch.rows(n) for n in ("old", "advantages", "logp"))
    expected = papers.numerical_gradient(
        lambda rows: papers.one_number(theirs(rows, old, advantages, frozen), normaliser, batch.longest),
        batch.rows("logp"),
    )
    same(x.grad, expected, batch.lengths, 1e-6)


@random_cases(60)
def test_value_loss_is_clipped_around_the_old_value(batch):
    found, sums = losses.value_loss(batch["values"], batch["old_values"], batch["returns"], batch.mask, 0.3)
    values, old, returns = (batch.rows(n) for n in ("values", "old_values", "returns"))
    same(found, papers.value_clip(values, old, returns, 0.3), batch.lengths)
    plain = papers.value_clip(values, old, returns, math.inf)
    raised = [a > b for x, y in zip(papers.value_clip(values, old, returns, 0.3), plain) for a, b in zip(x, y)]
    assert sums["clipfrac"].item() == sum(raised)


@pytest.mark.parametrize("name", KL)
@random_cases(60)
def test_kl_estimator_is_schulmans(name, batch):
    found = losses.masked(losses.KL_ESTIMATORS[name](batch["logp"], batch["ref"]), batch.mask)
    same(found, papers.for_every_token(KL[name], batch.rows("logp"), batch.rows("ref")), batch.lengths)


@random_cases(60)
def test_whitening_is_its_definition(batch):
    for shift in (True, False):
        found = losses.masked_whiten(batch["advantages"], batch.mask, shift)
        same(found, papers.whiten(batch.rows("advantages"), shift), batch.lengths, 1e-6)


@pytest.mark.parametrize("name", POLICY)
def test_single_precision_keeps_five_digits(name, batch):
    ours, theirs = POLICY[name]
    names = ("logp", "old", "advantages")
    found, _ = ours(*(batch[n].float() for n in names), batch.mask)
    assert found.dtype == torch.float32
    same(found, theirs(*(batch.rows(n) for n in names), batch.rows("logp")), batch.lengths, 1e-5)


# ---- gradients against finite differences of the same function


@pytest.mark.parametrize("name", [name for name in POLICY if name != "cispo"])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_gradcheck_of_policy_losses(name, normaliser, batch):
    def loss(x: Tensor) -> Tensor:
        return losses.total(
            POLICY[name][0](x, batch["old"], batch["advantages"], batch.mask)[0], batch.mask, normaliser
        )

    assert torch.autograd.gradcheck(loss, batch["logp"].requires_grad_(), eps=1e-7)


def test_gradcheck_of_value_loss_and_kl_estimators(batch):
    values, logp = batch["values"].requires_grad_(), batch["logp"].requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: losses.value_loss(x, batch["old_values"], batch["returns"], batch.mask, 0.3)[0], values, eps=1e-7
    )
    for estimator in losses.KL_ESTIMATORS.values():
        assert torch.autograd.gradcheck(
            lambda x, f=estimator: losses.total(f(x, batch["ref"]), batch.mask, "sequence"), logp, eps=1e-7
        )


def test_log_probabilities_and_entropy_are_of_the_tempered_distribution_and_so_are_their_gradients():
    g = torch.Generator().manual_seed(2)
    logits = torch.randn(7, 9, V, generator=g)
    tokens = torch.randint(V, (7, 9), generator=g)
    for temperature in (0.7, 1.0):
        x = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(x, tokens, temperature, entropy_gradient=True)
        p = torch.softmax(logits / temperature, -1)
        assert torch.allclose(logp, p.gather(-1, tokens[..., None]).squeeze(-1).log(), atol=1e-6)
        assert torch.allclose(entropy, -(p * p.log()).sum(-1), atol=1e-6)
        # ∂ log p_k / ∂ z_j = (1{j = k} − p_j) / T and ∂H / ∂z_j = −p_j (log p_j + H) / T.
        (of_logp,) = torch.autograd.grad(logp.sum(), x, retain_graph=True)
        one_hot = torch.nn.functional.one_hot(tokens, V)
        assert torch.allclose(of_logp, (one_hot - p) / temperature, atol=1e-6)
        (of_entropy,) = torch.autograd.grad(entropy.sum(), x)
        assert torch.allclose(of_entropy, -p * (p.log() + entropy.detach()[..., None]) / temperature, atol=1e-6)
    _, reported = token_logprobs(logits.requires_grad_(), tokens, 1.0)
    assert not reported.requires_grad


# ---- padding, micro-batches, counts


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_what_stands_in_padding_changes_neither_loss_nor_gradient(batch, poison, normaliser):
    mask = batch.mask

    def everything(tensors: dict[str, Tensor]) -> list[Tensor]:
        logp, values = tensors["logp"].clone().requires_grad_(), tensors["values"].clone().requires_grad_()
        white = losses.masked_whiten(tensors["advantages"], mask)
        out = [white, losses.masked_mean(tensors["returns"], mask)]
        for ours, _ in POLICY.values():
            tokens, sums = ours(logp, tensors["old"], tensors["advantages"], mask)
            number = losses.total(tokens, mask, normaliser)
            out += [tokens.detach(), number, *torch.autograd.grad(number, logp), *sums.values()]
        tokens, sums = losses.value_loss(values, tensors["old_values"], tensors["returns"], mask, 0.3)
        number = losses.total(tokens, mask, normaliser)
        return [*out, tokens.detach(), number, *torch.autograd.grad(number, values), *sums.values()]

    clean = {name: batch[name] for name in batch.arrays}
    dirty = {name: torch.where(mask, value, poison) for name, value in clean.items()}
    for one, other in zip(everything(clean), everything(dirty), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("poison", [*POISONS, -200.0])
@pytest.mark.parametrize(
    "settings_",
    [
        {"kl_in": "loss", "entropy_coef": 0.1},
        {"kl_in": "loss", "kl_estimator": "k2", "policy_loss": "gspo", "loss_normaliser": "sequence"},
        {
            "kl_in": "loss",
            "policy_loss": "cispo",
            "cliprange_high": 1.0,
            "importance_sampling": "token",
            "loss_normaliser": "constant",
        },
        {"policy_loss": "dual_clip", "entropy_coef": 0.1},
    ],
)
def test_what_stands_in_padding_does_not_reach_the_loops_loss(batch, poison, settings_):
    """All its terms together, in single precision; −200 is what a model may well think of a padding token."""
    t = PPOTrainConfig(**settings_)
    clean = {name: batch[name].float() for name in batch.arrays}
    behind = {name: torch.where(batch.mask, value, 0.0) for name, value in clean.items()}
    weights = torch.where(batch.mask, 0.9, 1.0) if t.importance_sampling != "none" else None

    def run(fill: float) -> list[Tensor]:
        x = [torch.where(batch.mask, clean[n], fill).requires_grad_() for n in ("logp", "advantages", "values")]
        names = ("old", "ref", "advantages", "old_values", "returns")
        targets = loop.Targets(batch.mask, *(behind[name] for name in names), weights)
        tokens, sums = loop._loss(t, tuple(x), targets, 0.1, False)
        number = losses.total(tokens, batch.mask, t.loss_normaliser)
        gradients = torch.autograd.grad(number, x, allow_unused=True)
        return [number, *(g for g in gradients if g is not None), *sums.values()]

    for one, other in zip(run(0.0), run(poison), strict=True):
        assert torch.equal(one, other) and one.isfinite().all()


@pytest.mark.parametrize("name", POLICY)
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_sums_over_micro_batches_equal_the_whole(name, normaliser, batch):
    """Cut anywhere, each part no wider than its own longest answer, a row without trained tokens among them."""
    mask = batch.mask.clone()
    mask[2] = False
    lengths = mask.sum(-1).tolist()
    divisor = losses.count(lengths, normaliser, batch.longest)

    def run(rows: list[int], width: int) -> tuple[Tensor, Tensor]:
        x = batch["logp"].requires_grad_()
        tokens, _ = POLICY[name][0](
            x[rows, :width], batch["old"][rows, :width], batch["advantages"][rows, :width], mask[rows, :width]
        )
        number = losses.total(tokens, mask[rows, :width], normaliser) / divisor
        number.backward()
        return number.detach(), x.grad

    whole, gradient = run(list(range(7)), 9)
    parts = [run([1, 4], 2), run([2], 4), run([6, 0, 3], 9), run([5], 9)]
    assert torch.allclose(sum(number for number, _ in parts), whole, rtol=1e-12)
    assert torch.allclose(sum(grad for _, grad in parts), gradient, rtol=1e-12)
    assert whole != 0


def test_counts():
    assert [losses.count([3, 0, 2], n, 10) for n in NORMALISERS] == [5, 2, 20]
    assert [losses.count([0, 0], n, 10) for n in NORMALISERS] == [1, 1, 1]


def test_normalisers_agree_on_answers_of_the_longest_length_and_weigh_others_as_they_say():
    full = Batch([6, 6, 6], seed=1)
    numbers = [full.number(full["advantages"], n).item() for n in NORMALISERS]
    assert numbers[1:] == pytest.approx(numbers[:1] * 2)
    uneven = Batch([6, 2], seed=1)
    ones = torch.ones(2, 6)
    weights = {}
    for normaliser in NORMALISERS:
        x = ones.clone().requires_grad_()
        uneven.number(x, normaliser).backward()
        weights[normaliser] = [x.grad[0, 0].item(), x.grad[1, 0].item()]
    assert weights == {
        "token": pytest.approx([1 / 8, 1 / 8]),
        "sequence": pytest.approx([1 / 12, 1 / 4]),
        "constant": pytest.approx([1 / 12, 1 / 12]),
    }


# ---- what each loss promises


@pytest.mark.parametrize("name", POLICY)
def test_first_step_ratio_is_one_and_its_gradient_is_the_policy_gradient(name, batch):
    advantages = batch["advantages"]
    if name == "gspo":  # one ratio an answer: the plain gradient for one advantage an answer
        advantages = advantages[:, :1].expand(-1, 9)
    logp = batch["logp"].requires_grad_()
    tokens, sums = POLICY[name][0](logp, batch["logp"], advantages, batch.mask)
    losses.total(tokens, batch.mask, "token").backward()
    assert (sums["ratio"], sums["clipfrac"], sums["approxkl"]) == (sum(batch.lengths), 0, 0)
    assert torch.allclose(logp.grad, torch.where(batch.mask, -advantages, 0.0), rtol=1e-12)


def one_token(loss, ratio: float, advantage: float) -> tuple[float, float, float]:
    """Loss, gradient by log π, and whether it counts as clipped, of a single token."""
    logp = torch.tensor([[math.log(ratio) - 1]], dtype=torch.float64, requires_grad=True)
    old = torch.full_like(logp, -1, requires_grad=False)
    tokens, sums = loss(logp, old, torch.full_like(old, advantage), torch.ones(1, 1, dtype=torch.bool))
    tokens.sum().backward()
    return tokens.item(), logp.grad.item(), sums["clipfrac"].item()


def test_clipping_takes_the_gradient_only_from_tokens_that_have_gone_far_enough():
    clip = POLICY["clip"][0]
    assert one_token(clip, 1.5, 2.0) == (pytest.approx(-2.4), 0, 1)  # better and already likelier: no more
    assert one_token(clip, 0.5, -2.0) == (pytest.approx(1.6), 0, 1)  # worse and already unlikelier: no more
    assert one_token(clip, 0.5, 2.0) == (pytest.approx(-1.0), pytest.approx(-1.0), 0)  # went the wrong way: is led back
    assert one_token(clip, 1.5, -2.0) == (pytest.approx(3.0), pytest.approx(3.0), 0)
    assert one_token(clip, 1.1, 2.0) == (pytest.approx(-2.2), pytest.approx(-2.2), 0)
    higher = POLICY["clip_higher"][0]
    assert one_token(higher, 1.25, 2.0) == (pytest.approx(-2.5), pytest.approx(-2.5), 0)  # what clip would not let pass
    assert one_token(higher, 1.3, 2.0) == (pytest.approx(-2.56), 0, 1)
    assert one_token(higher, 0.75, -2.0) == (pytest.approx(1.6), 0, 1)  # the lower bound has not moved


@random_cases(40)
def test_dual_clip_bounds_bad_tokens_and_leaves_good_ones(batch):
    far, a = batch["logp"] + 3 * batch["advantages"].abs(), batch["advantages"]
    clipped, few = losses.clip_loss(far, batch["old"], a, batch.mask, LOW, HIGH)
    dual, more = losses.dual_clip_loss(far, batch["old"], a, batch.mask, LOW, HIGH, DUAL)
    bad = batch.mask & (a < 0)
    assert (dual[bad] <= -DUAL * a[bad] * (1 + 1e-12)).all()
    assert torch.equal(dual[~bad], clipped[~bad])
    assert (dual <= clipped).all()
    assert more["clipfrac"] - few["clipfrac"] == (dual < clipped).sum()
    unbounded, _ = losses.dual_clip_loss(far, batch["old"], a, batch.mask, LOW, HIGH, 1e12)
    assert torch.equal(unbounded, clipped)


def test_dual_clip_takes_the_gradient_at_its_bound():
    dual = POLICY["dual_clip"][0]
    assert one_token(dual, 1.6, -2.0) == (pytest.approx(3.2), pytest.approx(3.2), 0)
    assert one_token(dual, 1.8, -2.0) == (pytest.approx(3.4), 0, 1)
    assert one_token(dual, 1e6, -2.0) == (pytest.approx(3.4), 0, 1)
    assert one_token(dual, 0.5, -2.0) == (pytest.approx(1.6), 0, 1)
    assert one_token(dual, 1.8, 2.0) == (pytest.approx(-2.4), 0, 1)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    cispo = POLICY["cispo"][0]
    assert one_token(cispo, 5.0, 2.0)[1:] == (pytest.approx(-(1 + UPPER) * 2), 1)
    assert one_token(cispo, 5.0, -2.0)[1] == pytest.approx((1 + UPPER) * 2)
    assert one_token(cispo, 1.2, 2.0)[1:] == (pytest.approx(-2.4), 0)
    assert one_token(cispo, 0.01, 2.0)[1:] == (pytest.approx(-0.02), 0)  # no lower bound
    assert one_token(POLICY["clip"][0], 5.0, 2.0)[1] == 0


def test_gspo_ratio_does_not_depend_on_length():
    """An answer said twice over has the same ratio, loss and clipping at each token as said once."""
    once = Batch([3, 5, 2], seed=3)
    advantages = once["advantages"][:, :1]
    twice = [torch.zeros(3, 10, dtype=torch.float64) for _ in range(2)]
    mask = torch.arange(10)[None] < torch.tensor([[6], [10], [4]])
    for i, n in enumerate(once.lengths):
        for wide, name in zip(twice, ("logp", "old")):
            wide[i, : 2 * n] = once[name][i, :n].repeat(2)
    short, a = losses.sequence_ratio_loss(once["logp"], once["old"], advantages.expand(3, 5), once.mask, LOW, HIGH)
    long, b = losses.sequence_ratio_loss(*twice, advantages.expand(3, 10), mask, LOW, HIGH)
    assert torch.allclose(long[:, 0], short[:, 0], rtol=1e-12)
    assert b["ratio"].item() == pytest.approx(2 * a["ratio"].item()) and b["clipfrac"] == 2 * a["clipfrac"]
    assert all(len(set(row[:n].tolist())) == 1 for row, n in zip(short, once.lengths))


def test_gspo_moves_all_tokens_of_an_answer_alike_and_none_of_a_clipped_one():
    old = torch.zeros(2, 3, dtype=torch.float64)
    logp = torch.tensor([[0.3, -0.2, 0.1], [0.9, 0.1, 0.2]], dtype=torch.float64, requires_grad=True)
    mask = torch.ones(2, 3, dtype=torch.bool)
    tokens, sums = losses.sequence_ratio_loss(logp, old, torch.ones_like(old), mask, LOW, HIGH)
    losses.total(tokens, mask, "sequence").backward()
    assert logp.grad[0].tolist() == pytest.approx([-math.exp(0.2 / 3) / 3] * 3)
    assert logp.grad[1].tolist() == [0, 0, 0]
    assert sums["clipfrac"] == 3


def test_value_loss_lets_no_gradient_through_where_the_value_has_moved_far_enough():
    value = torch.tensor([[1.5, 0.1, -1.0]], dtype=torch.float64, requires_grad=True)
    old, target = torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 3), 2.0, dtype=torch.float64)
    tokens, sums = losses.value_loss(value, old, target, torch.ones(1, 3, dtype=torch.bool), 0.2)
    tokens.sum().backward()
    assert tokens[0].tolist() == pytest.approx([0.5 * 1.8**2, 0.5 * 1.9**2, 0.5 * 3.0**2])
    assert value.grad[0].tolist() == pytest.approx([0, -1.9, -3.0])
    assert sums["clipfrac"] == 1


# ---- the rest


def test_whitening_has_mean_zero_and_deviation_one(batch):
    white = losses.masked_whiten(batch["advantages"], batch.mask)[batch.mask]
    assert white.mean().item() == pytest.approx(0, abs=1e-9)
    assert white.var(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    scaled = losses.masked_whiten(batch["advantages"], batch.mask, shift_mean=False)[batch.mask]
    assert torch.equal(scaled.sign(), batch["advantages"][batch.mask].sign())
    assert losses.masked_mean(torch.full((2, 3), math.nan), torch.zeros(2, 3, dtype=torch.bool)) == 0


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize(("world", "size"), [(1, 4), (2, 4), (4, 2), (2, 3), (2, 1), (1, 32)])
def test_micro_batches_cover_every_row_once_with_equal_counts(world, size, padded):
    lengths = [(7 * i) % 11 + 1 for i in range(40)]
    rows = list(range(0, 40, 1))[4:24]
    shares = micro_batches(lengths, rows, size, world, padded=padded)
    assert len(shares) == world
    assert sorted(r for share in shares for chunk in share for r in chunk) == rows
    assert len({len(share) for share in shares}) == 1
    chunks = [chunk for share in shares for chunk in share]
    assert all(0 < len(chunk) <= size for chunk in chunks)
    if not padded:
        tokens = [sum(lengths[row] for row in chunk) for chunk in chunks]
        assert max(tokens) - min(tokens) <= 2 * max(lengths)


def test_log_probabilities_in_pieces_are_those_of_the_whole(monkeypatch):
    logits, tokens = torch.randn(3, 5, 11), torch.randint(0, 11, (3, 5))
    with torch.no_grad():
        whole = token_logprobs(logits, tokens, 0.7)
        monkeypatch.setattr("rollout.logprobs._AT_ONCE", 25)
        pieces = token_logprobs(logits, tokens, 0.7)
    assert all(torch.equal(a, b) for a, b in zip(whole, pieces, strict=True))
