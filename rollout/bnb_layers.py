"""Linear layers with weights that bitsandbytes has quantised: to NF4 (Dettmers et al. 2023, QLoRA), or to the int8 of
LLM.int8() (Dettmers et al. 2022).

bitsandbytes quantises, stores and turns back. How a layer computes differs from its own layers in four points:

1. In training and in evaluation alike, the input is multiplied with the dequantised weights. bitsandbytes takes other
   kernels in evaluation: on CPUs with AVX-512 it rounds NF4's products to bfloat16, and int8 quantises the activations.
   The first ratio of a policy-gradient step would not be 1, and a merged model would not be the trained one.
2. Under autocast, products are computed in its precision, as those of other layers.
3. A bias stays as it is; bitsandbytes rounds it to the precision of the first input.
4. Blocks of NF4 are turned back in one row. bitsandbytes 0.50 takes wrong scales on CPUs with AVX-512 where the rows
   of a matrix are no multiple of a block.
"""

import copy
from typing import Any, Self

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rollout.quantised import QuantisedLinear


def _cast(x: Tensor) -> Tensor:
    """The input in the precision in which a product is computed."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


class FourBitLinear(QuantisedLinear, bnb.nn.Linear4bit):  # type: ignore[misc]  # a class of unknown type
    """Weights in blocks of 64 numbers with one scale each."""

    weight: Any

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, device: torch.device, *, double: bool) -> Self:
        """A layer whose weight (out, in) is quantised to NF4. `double`: quantise the scales, too."""
        layer = cls(weight.shape[1], weight.shape[0], bias=False, device="meta")
        keys: dict[str, Any] = {"requires_grad": False, "quant_type": "nf4", "compress_statistics": double}
        layer.weight = bnb.nn.Params4bit(weight.float(), **keys).to(device)
        layer.bias = bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        x = _cast(x)
        if x.device.type == "cpu":
            return _product(x, self)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        out: Tensor = bnb.matmul_4bit(x, self.weight, bias=bias, quant_state=self.weight.quant_state)
        return out

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `QuantisedLinear.dequantised`."""
        state = copy.copy(self.weight.quant_state)
        shape = state.shape
        state.dtype, state.shape = dtype, torch.Size((1, shape.numel()))
        weight: Tensor = bnb.functional.dequantize_4bit(self.weight.data, state)
        return weight.view(shape)


class EightBitLinear(QuantisedLinear, bnb.nn.Linear8bitLt):  # type: ignore[misc]  # as above
    """Weights with one scale for each output."""

    weight: Any

    @classmethod
    def of(cls, weight: Tensor, bias: nn.Parameter | None, device: torch.device) -> Self:
        """A layer whose weight (out, in) is quantised."""
        layer = cls(weight.shape[1], weight.shape[0], bias=False, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False).to(device)
        layer.bias = bias
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        return _product(_cast(x), self)

    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """As `QuantisedLinear.dequantised`."""
        weight: Tensor = self.weight.data
        scales: Tensor = self.weight.SCB
        return (weight.float() * (scales.to(weight.device, torch.float32) / 127)[:, None]).to(dtype)


class _Product(torch.autograd.Function):
    """x Wᵀ + b, which dequantises W once more in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return F.linear(x, layer.dequantised(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ ctx.layer.dequantised(gradient.dtype), None


def _product(x: Tensor, layer: QuantisedLinear) -> Tensor:
    out: Tensor = _Product.apply(x, layer)  # type: ignore[no-untyped-call]
    return out


def adopt(layer: nn.Module) -> bool:
    """Lets a layer that transformers has loaded from a quantised checkpoint compute as this module's layers do. Returns
    whether it is such a layer."""
    if isinstance(layer, bnb.nn.Linear4bit):
        layer.__class__ = FourBitLinear
    elif isinstance(layer, bnb.nn.Linear8bitLt):
        layer.__class__ = EightBitLinear
    else:
        return False
    layer.transposed = layer.source_cls is not nn.Linear
    return True
