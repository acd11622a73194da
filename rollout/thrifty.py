"""Norms and gated layers of the Llama family that keep less for their gradients, on a processor.

Legend: T tokens, C channels, I inner size.

Written in small operations, as the models' own are, a norm keeps two tensors (T, C) until the backward pass, and a
gated layer three (T, I). One and two suffice: what is left out is computed again, which takes less time than it took to
write and read it. The numbers are the same to the last bits.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn import functional as F

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def enable(model: nn.Module) -> None:
    """From now on the parts of `model` that are known compute so; it is for models on a processor."""
    for module in model.modules():
        forward = _forward_of(module)
        if forward is not None and "forward" not in vars(module):
            module.forward = MethodType(forward, module)


def disable(model: nn.Module) -> None:
    """Undoes `enable`."""
    for module in model.modules():
        if enabled(module):
            del module.forward


def enabled(module: nn.Module) -> bool:
    """Whether this very module has been changed by `enable`."""
    own = vars(module).get("forward")
    return isinstance(own, MethodType) and own.__func__ in (_norm, _gated)


def _forward_of(module: nn.Module) -> Callable[[Any, Tensor], Tensor] | None:
    kind = type(module)
    for family in FAMILIES:
        if kind.__module__ == f"transformers.models.{family.lower()}.modeling_{family.lower()}":
            if kind.__name__ == f"{family}RMSNorm":
                return _norm
            if kind.__name__ == f"{family}MLP" and type(module.act_fn).__name__ == "SiLUActivation":
                return _gated
    return None


def _norm(module: Any, x: Tensor) -> Tensor:
    return _Norm.apply(x, module.weight, module.variance_epsilon)


def _gated(module: Any, x: Tensor) -> Tensor:
    return module.down_proj(_Gated.apply(module.gate_proj(x), module.up_proj(x)))


class _Norm(torch.autograd.Function):
    """w ⊙ x / √(mean(x²) + ε) in float32, with n = x / √… : dw = Σ g ⊙ n, dx = (wg − n · mean(wg ⊙ n)) / √…."""

    @staticmethod
    def forward(ctx: FunctionCtx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x (..., C), weight (C,) -> (..., C)."""
        wide = x.float()
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).to(x.dtype) * weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        n, g = x.float() * scale, gradient.float()
        dw = (g * n).flatten(0, -2).sum(0).to(weight.dtype)
        g = g * weight
        g = g.addcmul_(n, torch.linalg.vecdot(g, n).unsqueeze(-1), value=-1 / x.shape[-1]).mul_(scale)
        return g.to(x.dtype), dw, None


class _Gated(torch.autograd.Function):
    """SiLU(a) ⊙ b: da = g ⊙ b ⊙ SiLU'(a), db = g ⊙ SiLU(a) (SwiGLU, Shazeer 2020, arXiv:2002.05202)."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, b: Tensor) -> Tensor:
        """a, b (..., I) -> (..., I)."""
        ctx.save_for_backward(a, b)
        return F.silu(a).mul_(b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        a, b = ctx.saved_tensors
        return torch.ops.aten.silu_backward(gradient * b, a), F.silu(a).mul_(gradient)
