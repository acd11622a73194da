"""Loads models whose frozen weights are in four or eight bits.

Weights are quantised while they are loaded: one layer at a time is in memory in float32. Each is quantised from its
float32 value, whatever the precision of the other weights, so a base has the same quantised weights wherever it is
loaded.
"""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from handoff.errors import HandoffError
from handoff.manifest import QuantizationRecord
from handoff.parent import Parent
from training.linear import ends_with, inner_layers, inside, linear_layers
from training.parent_weights import ParentWeights, without_values
from training.recipe import RecipeError
from training.recipe_text import did_you_mean

_LEAST = 0.5
"""Share of the weights outside embeddings and heads that must be in layers which can be quantised."""


@dataclass(frozen=True)
class Quantised:
    """How the weights of a model are quantised that is loaded."""

    record: QuantizationRecord | None
    """How they are quantised while they are loaded."""
    stored: bool
    """Whether the checkpoint's own files have quantised weights that stay so."""

    @property
    def held(self) -> bool:
        """Whether the loaded weights are quantised."""
        return self.stored or self.record is not None

    @classmethod
    def of(
        cls, parent: Parent, config: PretrainedConfig, asked: QuantizationRecord | None, *, trained: bool
    ) -> "Quantised":
        """What follows from the parent and the recipe.

        Args:
            parent: the parent.
            config: its configuration.
            asked: what the recipe says, if it says anything.
            trained: whether all its weights are to be trained.

        Raises:
            HandoffError: the two do not fit together, the files are quantised and their weights are to be trained, or
                bitsandbytes is not installed.
        """
        content = config.to_dict().get("quantization_config")
        method = str(content.get("quant_method")) if content else None
        record, stored = asked, method == "bitsandbytes"
        if method is not None and asked is not None:
            raise HandoffError(
                f"{parent.path}: its weights are quantised already ({method}); "
                + ("leave `quantization` out" if stored else "name the model from which it was made")
            )
        if stored and trained:
            raise HandoffError(
                f"{parent.path}: its weights are quantised ({method}), so they can only be frozen: train an adapter "
                "(`adapter: {}`), or name the model from which it was made"
            )
        known = parent.quantization
        if known is not None and asked not in (None, known):
            raise HandoffError(
                f"{parent.path}: it is an adapter over weights that are quantised as {_words(known)}, and this section "
                f"says {_words(asked)}; write the same, or leave `quantization` and `quantization_args` out"
            )
        record = record or known
        if (stored or record is not None) and importlib.util.find_spec("bitsandbytes") is None:
            raise HandoffError(f"{parent.path}: quantised weights need a package: pip install 'baton-align[quant]'")
        return cls(record, stored)


def _words(record: QuantizationRecord | None) -> str:
    assert record is not None
    words = record.method + (" with double quantisation" if record.double_quant else "")
    return words + (f" but for {', '.join(record.skipped)}" if record.skipped else "")


def quantisable(module: PreTrainedModel, record: QuantizationRecord, trained: Iterable[str]) -> list[str]:
    """Names of the layers that are quantised, in the network's order: all linear ones but heads, layers that the
    architecture keeps in float32, and those of `trained`.

    Args:
        module: the network, perhaps without values.
        record: how it is quantised.
        trained: names of modules that are trained as a whole.

    Raises:
        RecipeError: a name fits no layer, or most weights of this architecture are not in linear layers.
    """
    layers = inner_layers(module)
    for end in record.skipped:
        if not any(ends_with(name, end) for name in layers):
            ends = {name.rpartition(".")[2] for name in layers}
            raise RecipeError(
                f"quantization_args.llm_int8_skip_modules: no linear layer's name ends with {end}"
                + did_you_mean(end, ends)
            )
    tied = {name.removesuffix(".weight") for pair in module.all_tied_weights_keys.items() for name in pair}
    kept = module._keep_in_fp32_modules or ()
    possible = [
        name
        for name in layers
        if name not in tied and not inside(name, trained) and not any(ends_with(name, end) for end in kept)
    ]
    _check_share(module, possible)
    return [name for name in possible if not any(ends_with(name, end) for end in record.skipped)]


def _check_share(module: PreTrainedModel, layers: Sequence[str]) -> None:
    """Raises RecipeError if most of the weights outside embeddings and head are not those of `layers`."""
    outside = [part for part in module.modules() if isinstance(part, nn.Embedding)]
    if (head := module.get_output_embeddings()) is not None:
        outside.append(head)
    excluded = {id(parameter) for part in outside for parameter in part.parameters()}
    sizes = {name: p.numel() for name, p in module.named_parameters() if id(p) not in excluded}
    rest = {name: size for name, size in sizes.items() if name.removesuffix(".weight") not in layers}
    share = 1 - sum(rest.values()) / sum(sizes.values())
    if share < _LEAST:
        raise RecipeError(
            f"quantization: bitsandbytes quantises linear layers alone, which hold {share:.0%} of the inner weights of "
            f"{type(module).__name__}; the others, such as {max(rest, key=lambda name: rest[name])}, would stay as "
            "they are. Leave quantization out"
        )


def quantised_twin(
    skeleton: PreTrainedModel,
    source: ParentWeights,
    loader: Any,
    record: QuantizationRecord,
    whole: Iterable[str],
    device: torch.device,
    without: str | None,
) -> PreTrainedModel:
    """A network with the values of a base, whose linear layers are quantised.

    Args:
        skeleton: the base's model on torch's meta device.
        source: its weights, float32.
        loader: transformers' class that builds such a model.
        record: how to quantise.
        whole: names of modules that are not quantised.
        device: where the quantised weights are.
        without: beginning of the names of parameters that the base does not have.

    Raises:
        RecipeError: as `quantisable`.
        HandoffError: the files lack a tensor.
    """
    layers = quantisable(skeleton, record, whole)
    module = without_values(skeleton, loader)
    fill_quantised(module, source, record, layers, device, without)
    return module


@torch.no_grad()
def fill_quantised(
    module: PreTrainedModel,
    read: Callable[[str], torch.Tensor],
    record: QuantizationRecord,
    layers: Iterable[str],
    device: torch.device,
    without: str | None,
) -> None:
    """Gives a network its values, one tensor at a time; the weights of `layers` are quantised at once.

    Args:
        module: a network whose parameters have memory, but no values (`parent_weights.without_values`).
        read: gives a parameter or buffer of the base by its name, float32.
        record: how to quantise.
        layers: `quantisable`.
        device: where the quantised weights are.
        without: beginning of the names of parameters that the base does not have.
    """
    from rollout.bnb_layers import EightBitLinear, FourBitLinear

    chosen = set(layers)
    kept = module.state_dict().keys()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        layer = name.removesuffix(".weight")
        if name not in kept or (without is not None and name.startswith(without)):
            continue
        if layer not in chosen or layer == name:
            tensor.copy_(read(name))
            continue
        plain = module.get_submodule(layer)
        weight, transposed = read(name).float(), isinstance(plain, Conv1D)
        weight = (weight.T if transposed else weight).contiguous()
        bias: Any = plain.bias
        quantised: FourBitLinear | EightBitLinear
        if record.method == "nf4":
            quantised = FourBitLinear.of(weight, bias, device, double=record.double_quant)
        else:
            quantised = EightBitLinear.of(weight, bias, device)
        quantised.transposed = transposed
        module.set_submodule(layer, quantised.train(plain.training))
    module.requires_grad_(False)


def adopt_stored(module: PreTrainedModel, dtype: torch.dtype) -> None:
    """Makes a network that transformers has loaded from quantised files one of this project's: its layers compute as
    all quantised layers here, and it bears no marks by which transformers would save or train it in another way.

    `dtype`: precision of the other weights, which transformers leaves in that of the files.
    """
    from rollout.bnb_layers import adopt

    packed = set()
    for layer in linear_layers(module).values():
        if adopt(layer):
            packed.add(layer.get_parameter("weight"))
    for mark in ("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        vars(module).pop(mark, None)
    vars(module).pop("_weight_conversions", None)
    for config in {id(config): config for config in (module.config, module.config.get_text_config())}.values():
        vars(config).pop("quantization_config", None)
        vars(config).pop("_is_quantized", None)
    for parameter in module.requires_grad_(False).parameters():
        if parameter not in packed:
            parameter.data = parameter.data.to(dtype)
