"""Attention of short rows gives what torch's own gives, gradients included."""

import pytest
import torch
from torch.nn import functional as F

from rollout import short
from rollout.attention import Ragged

CPU = torch.device("cpu")
BFLOAT16 = short.pays(1, torch.bfloat16, CPU)
ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = [
    torch.float32,
    pytest.param(
        torch.bfloat16, marks=pytest.mark.skipif(not BFLOAT16, reason="this processor has no products in bfloat16")
    ),
]


def inputs(count, heads, kv_heads, dtype, size=16):
    g = torch.Generator().manual_seed(count)
    made = (torch.randn(count, n, size, generator=g).to(dtype) for n in (heads, kv_heads, kv_heads))
    return [x.requires_grad_() for x in made]


def by_torch(leaves, lengths, window, scaling):
    """The same in float64, row by row."""
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    out = []
    for row in zip(*(x.split(lengths) for x in doubles), strict=True):
        length = len(row[0])
        mask = torch.ones(length, length, dtype=torch.bool).tril_()
        if window is not None:
            mask.triu_(1 - window)
        q, k, v = (x.transpose(0, 1)[None] for x in row)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return doubles, torch.cat(out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[1], [13, 1, 9], [64, 64]])
def test_values_and_gradients_are_those_of_exact_attention(lengths, heads, kv_heads, window, dtype):
    leaves, longest = inputs(sum(lengths), heads, kv_heads, dtype), max(lengths)
    exact_leaves, exact = by_torch(leaves, lengths, window, 0.3)
    mask = torch.ones(longest, longest, dtype=torch.bool).tril_()
    if window is not None:
        mask.triu_(1 - window)
    place = torch.cat([torch.arange(n) + i * longest for i, n in enumerate(lengths)])
    found = short.attention(*leaves, place, mask, 0.3)
    assert found.shape == exact.shape and found.dtype == dtype
    weights = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    pairs = zip(
        (found, *torch.autograd.grad(found, leaves, weights.to(dtype))),
        (exact, *torch.autograd.grad(exact, exact_leaves, weights)),
        strict=True,
    )
    for ours, theirs in pairs:
        assert (ours.double() - theirs).norm() <= ALLOWED[dtype] * theirs.norm() + 1e-6


def test_the_choice_follows_length_precision_and_device():
    assert short.pays(64, torch.float32, CPU)
    assert not short.pays(512, torch.float32, CPU)
    assert not short.pays(513, torch.bfloat16, CPU)
    assert not short.pays(8, torch.float64, CPU)
    assert not short.pays(8, torch.float32, torch.device("cuda"))


@pytest.mark.parametrize("length", [60, 120])
def test_rows_beside_one_another_are_the_same_on_both_sides_of_the_limit(length):
    """60 tokens are computed here, 120 by torch: each row as if it were alone."""
    lengths = [length, 7, length // 2]
    place = torch.cat([torch.arange(n) + i * length for i, n in enumerate(lengths)])
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, sum(lengths), 4, 16, generator=g).transpose(1, 2) for _ in range(3))
    found = Ragged(3, length, place, [None]).attend(0, q, k, v, 0.25, None)[0]  # (T, heads, D)
    start = 0
    for n in lengths:
        rows = (x[:, :, start : start + n].double() for x in (q, k, v))
        alone = F.scaled_dot_product_attention(*rows, is_causal=True, scale=0.25)[0].transpose(0, 1)
        torch.testing.assert_close(found[start : start + n].double(), alone, rtol=1e-5, atol=1e-5)
        start += n
