"""Frozen weights that stay in half precision (bfloat16, float16) in memory, and compute as float32 ones do.

A parent is mostly published in bfloat16. A float32 copy of it has the same values in twice the memory. With weights in
bfloat16, transformers would compute everything in that precision, norms and the sums of residuals too, and other
numbers would come out than from the float32 weights that are trained. So here only the large matrices stay as they are:

- Linear layers: under autocast, which casts float32 weights to its precision anyway, they need nothing. Without
  autocast, a layer has a float32 copy of its weight while it computes. What autograd keeps of the copy for the backward
  pass is made again from the original when it is needed. The experts of a mixture always have such a copy.
- The input embedding: the rows of a batch are turned into float32 ones. The residual stream is float32 from there on.
- Everything else (norms, biases, positions, convolutions) is float32.

So such a network gives the same numbers as a float32 one, bit for bit.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

HALVES = (torch.bfloat16, torch.float16)
_CASTING = ("mamba", "mamba2", "falcon_mamba", "xlstm")
"""Families that turn hidden states into the precision of their output head."""


class Half(nn.Module):
    """The mark of a module whose matrices are in half precision and compute as float32 ones. Put before its class."""


class _Product(Half):
    """A module that multiplies with its weights: a linear layer, or the experts of a mixture."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        weights = {name: weight for name, weight in self._parameters.items() if weight is not None and _is_half(weight)}
        device = next((weight.device.type for weight in weights.values()), None)
        cast = device is not None and isinstance(self, nn.Linear | Conv1D) and torch.is_autocast_enabled(device)
        if device is None or cast:
            return super().forward(*args, **kwargs)
        return self._in_float32(weights, *args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # upstream has no types
    def _in_float32(self, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        with _replaced(self, {name: weight.float() for name, weight in weights.items()}, weights):
            return super().forward(*args, **kwargs)


class _Table(Half):
    """An input embedding."""

    weight: nn.Parameter
    padding_idx: int | None

    def forward(self, input: Tensor) -> Any:
        weight = self.weight
        if not _is_half(weight):
            return super().forward(input)
        rows = weight.index_select(0, input.flatten()).float()  # (tokens, H)
        padding = self.padding_idx
        self.padding_idx = None  # names a row of the whole table, and matters for gradients alone
        try:
            self._parameters["weight"] = rows  # type: ignore[assignment]  # a tensor does as well
            return super().forward(torch.arange(input.numel(), device=input.device).view(input.shape))
        finally:
            self._parameters["weight"] = weight
            self.padding_idx = padding


def _is_half(weight: Tensor) -> bool:
    return weight.dtype in HALVES


@contextmanager
def _replaced(module: nn.Module, copies: Mapping[str, Tensor], originals: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the module has other parameters. Autograd keeps the originals of those that are float32 copies."""
    kept = dict(module._parameters)
    places = {copies[name].untyped_storage().data_ptr(): original for name, original in originals.items()}

    def pack(tensor: Tensor) -> Any:
        original = places.get(tensor.untyped_storage().data_ptr())
        return tensor if original is None else (original, tensor.shape, tensor.stride(), tensor.storage_offset())

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        original, shape, stride, offset = packed
        again: Tensor = original.float().as_strided(shape, stride, offset)
        return again

    module._parameters.update(copies)  # type: ignore[arg-type]  # tensors do as well
    try:
        with saved_tensors_hooks(pack, unpack):
            yield
    finally:
        module._parameters.update(kept)


@cache
def _marked(kind: Any, mark: Any) -> Any:
    return type(kind.__name__, (mark, kind), {})


def keep_halves(model: PreTrainedModel, besides: str = "score") -> None:
    """Makes a model whose weights were loaded in half precision compute as a float32 one. It may be without values.

    `besides`: name of a small module that becomes float32.
    """
    table = model.get_input_embeddings()
    large = {m for name, m in model.named_modules() if name != besides and (m is table or _multiplies(m))}
    matrices = {p for module in large for p in module._parameters.values() if p is not None and p.ndim > 1}
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.dtype in HALVES and parameter not in matrices:
                if parameter not in whole:
                    whole[parameter] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
                module._parameters[name] = whole[parameter]
    for module in large:
        if any(_is_half(weight) for weight in module.parameters(recurse=False)):
            kind: Any = type(module)
            module.__class__ = _marked(kind, _Table if module is table else _Product)


@contextmanager
def seeming_float32(model: nn.Module, layers: Collection[str], *, values: bool) -> Iterator[None]:
    """Inside, the weights of these layers are float32 for whoever makes tensors in their precision: of any value and
    without memory, or with `values` as they are. Afterwards they are frozen."""
    originals: dict[nn.Module, nn.Parameter] = {}
    for name, module in model.named_modules():
        if name in layers and isinstance(module, Half):
            weight = originals[module] = module.get_parameter("weight")
            fake = weight.detach().float() if values else torch.zeros((), device=weight.device).expand(weight.shape)
            module._parameters["weight"] = nn.Parameter(fake, requires_grad=False)
    try:
        yield
    finally:
        for module, weight in originals.items():
            module._parameters["weight"] = weight
            weight.requires_grad_(False)


def can_keep_halves(config: PretrainedConfig) -> bool:
    """Whether a network of this configuration computes as a float32 one with weights in half precision."""
    return config.model_type not in _CASTING


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear | Conv1D):
        return True
    own = [p for p in module._parameters.values() if p is not None]
    experts = any(p.ndim == 3 for p in own)
    return experts and not isinstance(module, nn.Conv1d | nn.Conv2d)


def computes_in(model: PreTrainedModel) -> torch.dtype:
    """The precision of what the model computes without autocast: that of its weights, or float32."""
    if any(isinstance(module, Half) for module in model.modules()):
        return torch.float32
    dtype: torch.dtype = model.dtype
    return dtype
