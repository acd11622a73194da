"""The linear layers of a network, by their names without adapters."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rollout.quantised import QuantisedLinear

HEAD = "score"


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """{name: layer}, in the network's order; the matrices of adapters are not among them."""
    return {
        name.removesuffix(".base_layer"): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D) and ".lora_" not in name
    }


def inner_layers(module: PreTrainedModel) -> dict[str, nn.Module]:
    """`linear_layers` without heads, and without those whose weights are read by others."""
    # A fused kernel of Mamba reads this weight itself, past the layer's own forward pass.
    mixers = [dict(part.named_children()) for part in module.modules()]
    fused = [parts["out_proj"] for parts in mixers if {"conv1d", "out_proj"} <= parts.keys()]
    outside = [module.get_output_embeddings(), dict(module.named_children()).get(HEAD), *fused]
    return {
        name: layer for name, layer in linear_layers(module).items() if not any(layer is other for other in outside)
    }


def matrix(layer: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    if isinstance(layer, Conv1D):
        return layer.nf, layer.nx
    assert isinstance(layer, nn.Linear)
    return layer.out_features, layer.in_features


def is_transposed(layer: nn.Module) -> bool:
    """Whether the model's files have the weight as (in, out)."""
    return isinstance(layer, Conv1D) or (isinstance(layer, QuantisedLinear) and layer.transposed)


def ends_with(name: str, end: str) -> bool:
    """Whether a name ends with these parts.

    >>> ends_with("model.layers.0.mlp", "mlp"), ends_with("model.layers.10", "0")
    (True, False)
    """
    return name == end or name.endswith(f".{end}")


def inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module or parameter is one of these modules or inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in modules)
