"""Attention of short rows on a processor, written as batched products.

Legend: B rows, Hq heads of queries, H heads of keys and values, T tokens of a row, D size of a head.

Torch's fused attention never holds all scores, which pays where rows are long. Where they are short, as prompts with
their answers mostly are, the products in one batch take half its time in float32. In bfloat16 a fifth: there the
gradient of the fused one does not use the processor's units for that precision.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

# Longest rows for which this is faster, measured with heads of 32 and of 64; scores take T² numbers a head.
_LONGEST = {torch.float32: 96, torch.bfloat16: 512}


def pays(length: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether rows of so many tokens are short enough to be computed here in `dtype`, and the device is made for it."""
    if device.type != "cpu" or length > _LONGEST.get(dtype, 0):
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """softmax(q·kᵀ · scaling) · v over what `mask` lets a token see.

    Scores and their softmax are in float32, products with values and all gradients in the inputs' precision.

    Args:
        q: (B, Hq, T, D).
        k: (B, H, T, D); Hq is a multiple of H.
        v: (B, H, T, D).
        mask: (T, T) bool, every row of it true somewhere.
        scaling: of the scores.

    Returns:
        (B, Hq, T, D).
    """
    (rows, heads), size = k.shape[:2], v.shape[-1]
    out = _Attention.apply(_flat(q, rows * heads), _flat(k, rows * heads), _flat(v, rows * heads), mask, scaling)
    return out.view(*q.shape[:3], size)


def _flat(x: Tensor, batch: int) -> Tensor:
    """(B, heads, T, D) -> (B · H, heads / H · T, D)."""
    return x.reshape(batch, -1, x.shape[-1])


class _Attention(torch.autograd.Function):
    """Keeps the probabilities in the inputs' precision, and of the scores nothing."""

    @staticmethod
    def forward(ctx: FunctionCtx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float) -> Tensor:
        """q (N, M, D) with M = Hq / H · T; k, v (N, T, D) -> (N, M, D)."""
        bias = torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf).repeat(q.shape[1] // len(mask), 1)  # (M, T)
        scores = torch.baddbmm(bias.expand(len(q), -1, -1), q.float(), k.float().transpose(1, 2), alpha=scaling)
        p = torch.softmax(scores, -1).to(v.dtype)
        ctx.save_for_backward(q, k, v, p)
        ctx.scaling = scaling  # type: ignore[attr-defined]
        return torch.bmm(p, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        """With g the output's gradient: dv = pᵀg, dp = g·vᵀ, ds = p ⊙ (dp − Σ p ⊙ dp), dq = ds·k, dk = dsᵀq."""
        q, k, v, p = ctx.saved_tensors
        dp = torch.bmm(gradient, v.transpose(1, 2))
        ds = torch._softmax_backward_data(dp, p, -1, p.dtype) * ctx.scaling
        return torch.bmm(ds, k), torch.bmm(ds.transpose(1, 2), q), torch.bmm(p.transpose(1, 2), gradient), None, None
