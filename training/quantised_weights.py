"""Turns quantised weights back into plain ones."""

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rollout.quantised import QuantisedLinear
from training.engines.single import Entry
from training.linear import inside, linear_layers


@torch.no_grad()
def dequantise(module: PreTrainedModel, within: Iterable[str] | None = None) -> None:
    """Replaces quantised layers by plain ones with the weights for which the stored numbers stand, in the precision of
    the network. `within`: only those of these modules."""
    dtype, modules = module.dtype, None if within is None else list(within)
    for name, layer in linear_layers(module).items():
        if not isinstance(layer, QuantisedLinear) or (modules is not None and not inside(name, modules)):
            continue
        weight = layer.dequantised().to(dtype)
        plain: nn.Linear | Conv1D
        with torch.device("meta"):
            if layer.transposed:
                plain, weight = Conv1D(layer.out_features, layer.in_features), weight.T.contiguous()
            else:
                plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
        plain.weight = nn.Parameter(weight)
        if layer.bias is not None:
            plain.bias = layer.bias
        module.set_submodule(name, plain.train(layer.training))


def dequantised_entry(module: PreTrainedModel, name: str, entry: Entry) -> Entry:
    """The entry of a parameter by its name in the network; of a quantised one, with the whole weight as the model's
    files have it."""
    owner, _, leaf = name.rpartition(".")
    layer = module.get_submodule(owner) if leaf == "weight" else None
    if not isinstance(layer, QuantisedLinear):
        return entry
    shape = (layer.out_features, layer.in_features)
    if not layer.transposed:
        return replace(entry, dtype=torch.float32, shape=shape, whole=layer.dequantised)
    return replace(entry, dtype=torch.float32, shape=shape[::-1], whole=lambda: layer.dequantised().T.contiguous())
