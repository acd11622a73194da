"""Chooses a network and how it computes: a recipe's `model:` keys, the attention kernel, dropout."""

import difflib
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from data.encode import Encoder
from handoff.errors import HandoffError
from handoff.gate import named_errors
from handoff.parent import Parent
from handoff.window import window
from training.config import ModelArguments
from training.recipe import RecipeError

LOCAL = {"trust_remote_code": False, "local_files_only": True}
"""For every call that loads with transformers: no code of a parent runs, nobody is asked, nothing is fetched."""

# Fields of a new model's configuration that the pipeline sets, so a recipe may not.
_DECIDED = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "architectures",
    "transformers_version",
)


# What loading can turn into plain weights, by the quantisation's name in config.json.
_DEQUANTISED: dict[str, Any] = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}


def network(config: PretrainedConfig, *, scored: bool) -> type[PreTrainedModel] | None:
    """The class that transformers loads for a configuration: a causal language model or, if `scored`, a sequence
    classifier. None if it has no such class."""
    mapping: Any = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING if scored else MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    classes: tuple[type[PreTrainedModel], ...] = tuple(found) if isinstance(found, list | tuple) else (found,)
    return next((kind for kind in classes if kind.__name__ in (config.architectures or ())), classes[0])


def parent_network(parent: Parent, config: PretrainedConfig, *, scored: bool) -> type[PreTrainedModel]:
    """`network`. Raises HandoffError if transformers has no such class."""
    found = network(config, scored=scored)
    if found is None:
        lacking = "sequence classification, which a reward model needs," if scored else "causal language model"
        raise HandoffError(f"{parent.path}: transformers has no {lacking} for `{config.model_type}`")
    return found


def dequantised(parent: Parent, config: PretrainedConfig) -> dict[str, Any]:
    """The argument of `from_pretrained` with which quantised weights are loaded as plain ones; empty if they are plain.

    Raises:
        HandoffError: transformers cannot turn this quantisation into plain weights.
    """
    stored = config.to_dict().get("quantization_config")
    if not stored:
        return {}
    method = str(stored.get("quant_method"))
    if method not in _DEQUANTISED:
        raise HandoffError(
            f"{parent.path}: its weights are quantised ({method}); name the model from which it was made, or turn it "
            "into plain weights once and save those in a directory"
        )
    return {"quantization_config": _DEQUANTISED[method](dequantize=True)}


def choose_attention(
    requested: str, *, cuda: bool, bf16: bool, packages: Collection[str], supported: Collection[str]
) -> str:
    """The attention kernel with which to load a model.

    Args:
        requested: `auto`, `eager`, `sdpa` or `flash_attention_2`.
        cuda: whether there is a CUDA device.
        bf16: whether the forward pass runs in bfloat16; FlashAttention does not support float32.
        packages: names of importable packages.
        supported: kernels that the architecture can use besides `eager`.

    Raises:
        RecipeError: the requested kernel cannot run, or the architecture cannot use it.
    """
    possible = cuda and bf16 and "flash_attn" in packages
    if requested == "auto":
        usable = [name for name in ("flash_attention_2", "sdpa") if name in supported]
        return next((name for name in usable if possible or name != "flash_attention_2"), "eager")
    if requested != "eager" and requested not in supported:
        raise RecipeError(f"model_args.attn_implementation: this architecture has no {requested}; use auto or eager")
    if requested == "flash_attention_2" and not possible:
        lacking = "a CUDA GPU" if not cuda else "bf16: true" if not bf16 else "the package flash-attn"
        raise RecipeError(f"model_args.attn_implementation: flash_attention_2 needs {lacking}; use auto or sdpa")
    return requested


def attention(arguments: ModelArguments, bf16: bool, kind: type[PreTrainedModel]) -> str:
    """`choose_attention` for this machine and a class of models."""
    packages = {"flash_attn"} if find_spec("flash_attn") is not None else set()
    cuda = torch.cuda.is_available()
    supported = [
        name
        for name, there in (("sdpa", kind._supports_sdpa), ("flash_attention_2", kind._supports_flash_attn))
        if there
    ]
    return choose_attention(arguments.attn_implementation, cuda=cuda, bf16=bf16, packages=packages, supported=supported)


def parent_config(parent: Parent) -> PretrainedConfig:
    """The configuration of a parent. A model that is loaded with this object takes attention and kernels from the
    arguments of `from_pretrained`, whatever config.json says.

    Raises:
        HandoffError: transformers has no such architecture, or its class rejects a value.
    """
    with named_errors(parent.weights_dir / "config.json"):
        config: PretrainedConfig = AutoConfig.from_pretrained(parent.weights_dir, **LOCAL)
    return config


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Sets every dropout of the model to zero, in modules and where attention has it as a number. Returns the model."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            vars(module)["attention_dropout"] = 0.0
    return model


def add_in_order(config: PretrainedConfig, device: torch.device) -> None:
    """Lets torch add numbers in a fixed order if the model is a mixture of experts on a CPU.

    Several experts read one token, so their gradients are added at one place. With two threads or more, torch does that
    in any order, and two equal runs would differ in their last bits.
    """
    experts = [value for key, value in config.get_text_config().to_dict().items() if "experts" in key]
    if device.type == "cpu" and any(isinstance(value, int) and value > 1 for value in experts):
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def name_experts(config: PretrainedConfig) -> None:
    """Lets TRL's loss find the number of experts where an architecture calls it `num_local_experts`."""
    own = config.get_text_config()
    if hasattr(own, "num_local_experts") and not hasattr(own, "num_experts"):
        kind = type(own)
        kind.attribute_map = {**kind.attribute_map, "num_experts": "num_local_experts"}


def type_of_config(architecture: str) -> type[PretrainedConfig]:
    """The configuration class of a `model_type` of transformers. Raises RecipeError."""
    if architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(architecture, list(CONFIG_MAPPING), 1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise RecipeError(f"model.architecture: transformers has no `{architecture}`{hint}")
    return CONFIG_MAPPING[architecture]


def model_config(keys: dict[str, Any], encoder: Encoder, context: int) -> PretrainedConfig:
    """The configuration for a recipe's `model:`, which has `architecture` and fields of that architecture's class.

    Args:
        keys: the recipe's mapping.
        encoder: gives the vocabulary size and the special ids.
        context: tokens in the longest row that the model must accept.

    Raises:
        RecipeError: unknown architecture or field, a field that the pipeline sets, a value that the class rejects, or
            fewer positions than `context`.
    """
    architecture = keys["architecture"]
    kind = type_of_config(architecture)
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(f"model.architecture: `{architecture}` is not a causal language model")
    fields = {name for name in kind.__dataclass_fields__ if not name.startswith("_")} | set(kind.attribute_map)
    given = {key: value for key, value in keys.items() if key != "architecture"}
    for key in given:
        if key in _DECIDED:
            raise RecipeError(f"model.{key}: follows from the tokenizer and the training; leave it out")
        if key not in fields:
            close = difflib.get_close_matches(key, sorted(fields), 1)
            hint = f"; did you mean `{close[0]}`?" if close else ""
            raise RecipeError(f"model.{key}: a {architecture} configuration has no such field{hint}")
    try:
        decided: dict[str, Any] = {
            "vocab_size": encoder.vocab_size,
            "bos_token_id": encoder.bos_id,
            "eos_token_id": encoder.eos_id,
            "pad_token_id": encoder.pad_id,
            "dtype": "float32",
        }
        config = kind(**given, **decided)
    except Exception as error:  # each class raises its own errors for invalid values
        raise RecipeError(f"model: {architecture} refuses these values: {error}") from error
    found = window(config.to_dict())
    if found is not None and found.tokens < context:
        raise RecipeError(f"model.{found.key} is {found.tokens}, shorter than rows of {context} tokens")
    return config
