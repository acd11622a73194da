"""Adapters that compute with a network and are not trained, beside the one that may be trained."""

import re
import warnings

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedModel

ADAPTER = "default"
"""peft's name for the adapter that is trained."""
PARENT = "parent"
"""The name of the parent's adapter, where it is not merged into the weights."""

Pairs = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""{layer: (A, B)}, whose product is added to the layer's weight."""


def hold(module: PreTrainedModel, pairs: Pairs, name: str) -> None:
    """Adds a frozen adapter to a network of which nothing is trained from then on, unless it has a trained adapter."""
    if not pairs:
        return
    sizes = {layer: a.shape[0] for layer, (a, _) in pairs.items()}
    r = max(sizes.values())
    pattern = {re.escape(layer): size for layer, size in sizes.items() if size != r}
    config = LoraConfig(
        r=r, lora_alpha=r, rank_pattern=pattern, alpha_pattern=dict(pattern), target_modules=list(pairs)
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of another adapter
        inject_adapter_in_model(config, module, name)
        cast_adapter_dtype(module, name)
    with torch.no_grad():
        for layer, (a, b) in pairs.items():
            found = module.get_submodule(layer)
            for part, value in (("lora_A", a), ("lora_B", b)):
                found.get_submodule(f"{part}.{name}").get_parameter("weight").copy_(value)
    if ADAPTER not in vars(module)["peft_config"]:
        module.requires_grad_(False)
    activate(module)


def activate(module: PreTrainedModel) -> None:
    """Lets all adapters of a network compute together. Of them, `ADAPTER` alone is trained."""
    for part in module.modules():
        if isinstance(part, LoraLayer):
            part.set_adapter(list(part.lora_A))
            for matrices in (part.lora_A, part.lora_B):
                for name, matrix in matrices.items():
                    matrix.requires_grad_(name == ADAPTER)
