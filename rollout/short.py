"""Attention of short rows on a processor, written as batched products.

Legend: B rows of at most L tokens, T tokens of all rows one behind the other, Hq heads of queries, H heads of keys and
values, D size of a head.

Torch's fused attention never holds all scores, which pays where rows are long. Where they are short, as prompts with
their answers mostly are, the products in one batch take two thirds of its time in float32. In bfloat16 a third: there
the gradient of the fused one does not use the processor's units for that precision. Until the backward pass only the
tokens' queries, keys and values are kept; padding and probabilities are made again.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Longest rows for which this is faster, measured with heads of 32 and of 64.
_LONGEST = {torch.float32: 96, torch.bfloat16: 512}


def pays(length: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of so many tokens are short enough to be computed here in `dtype`, and the device is made for it."""
    if device.type != "cpu" or length > _LONGEST.get(dtype, 0):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attention(q: Tensor, k: Tensor, v: Tensor, place: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(q·kᵀ · scaling) · v within each row, over what `mask` lets its tokens see.

    Scores and their softmax are in float32, products with values and all gradients in the inputs' precision.

    Args:
        q: (T, Hq, D).
        k: (T, H, D); Hq is a multiple of H.
        v: (T, H, D).
        place: (T,) where each token stands among the B · L of rows that are padded on the right.
        mask: (L, L) bool: may the token of this line see the one of this column. Every line is true somewhere.
        scaling: of the scores.

    Returns:
        (T, Hq, D).
    """
    return _Attention.apply(q, k, v, place, mask, scaling)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, place: Tensor, mask: Tensor, scaling: float
    ) -> Tensor:
        rows = _Rows(place, len(mask), k.shape[1])
        ctx.save_for_backward(q, k, v, mask)
        ctx.rows, ctx.scaling = rows, scaling  # type: ignore[attr-defined]
        q, k, v = (rows.beside(x) for x in (q, k, v))
        return rows.behind(torch.bmm(_probabilities(q, k, mask, scaling), v))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """With g the output's gradient: dv = pᵀg, dp = g·vᵀ, ds = p ⊙ (dp − Σ p ⊙ dp), dq = ds·k, dk = dsᵀq."""
        *leaves, mask = ctx.saved_tensors
        q, k, v, g = (ctx.rows.beside(x) for x in (*leaves, gradient))
        p = _probabilities(q, k, mask, ctx.scaling)
        ds = torch._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype).mul_(ctx.scaling)
        found = torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), g)
        return *(ctx.rows.behind(x) for x in found), None, None, None


def _probabilities(q: Tensor, k: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """q (B · H, Hq / H · L, D), k (B · H, L, D) -> (B · H, Hq / H · L, L) in their precision."""
    bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).repeat(q.shape[1] // len(mask), 1)
    scores = torch.baddbmm(bias.expand(len(q), -1, -1), q.float(), k.float().transpose(1, 2), alpha=scaling)
    return torch.softmax(scores, -1).to(q.dtype)


class _Rows:
    """Tokens one behind the other, and rows beside one another: (T, heads, D) and (B · H, heads / H · L, D)."""

    def __init__(self, place: Tensor, length: int, heads: int) -> None:
        self._place, self._length, self._heads = place, length, heads
        self._rows = int(place[-1]) // length + 1

    def beside(self, tokens: Tensor) -> Tensor:
        """Pads with zeros, which no token of a row sees."""
        padded = tokens.new_zeros(self._rows * self._length, *tokens.shape[1:]).index_copy_(0, self._place, tokens)
        padded = padded.unflatten(0, (self._rows, self._length)).transpose(1, 2)  # (B, heads, L, D)
        return padded.reshape(self._rows * self._heads, -1, tokens.shape[-1])

    def behind(self, rows: Tensor) -> Tensor:
        """The way back."""
        padded = (
            rows.view(self._rows, -1, self._length, rows.shape[-1]).transpose(1, 2).flatten(0, 1)
        )  # (B·L, heads, D)
        return padded.index_select(0, self._place)
