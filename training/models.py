"""A model for a role, and a model on disk.

Roles: a causal language model (policy, reference), a model with one output (reward model). Weights are float32, unless
a recipe chooses otherwise for those that it trains: AdamW cannot move bfloat16 weights at the learning rates of
alignment, since the step is below their precision; where bfloat16 is wanted, autocast brings it (`train.bf16`). How
many weights a training has moved is measured (`measure.measure_change`).

What is saved is what anyone can load: safetensors, the parent's tokenizer and chat template byte for byte, and a
generation_config.json with the stop ids.
"""

import difflib
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
)

from data.encode import Encoder
from handoff.errors import HandoffError
from handoff.parent import Parent
from training.config import ModelArguments, TrainedModelArguments
from training.launch import LaunchError, requested
from training.recipe import RecipeError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
# What the pipeline itself decides about a model that is built from a recipe.
_DECIDED = (
    "vocab_size",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "dtype",
    "architectures",
    "transformers_version",
)


def choose_attention(requested: str, *, cuda: bool, bf16: bool, packages: Collection[str]) -> str:
    """Which attention kernel a model is loaded with.

    Args:
        requested: `auto`, `eager`, `sdpa` or `flash_attention_2`.
        cuda: a CUDA device is there.
        bf16: the forward pass runs in bfloat16; FlashAttention has no float32.
        packages: names of importable packages.

    Raises:
        RecipeError: FlashAttention was asked for where it cannot run.
    """
    possible = cuda and bf16 and "flash_attn" in packages
    if requested == "auto":
        return "flash_attention_2" if possible else "sdpa"
    if requested == "flash_attention_2" and not possible:
        lacking = "a CUDA GPU" if not cuda else "bf16: true" if not bf16 else "the package flash-attn"
        raise RecipeError(f"model_args.attn_implementation: flash_attention_2 needs {lacking}; use auto or sdpa")
    return requested


def attention(arguments: ModelArguments, bf16: bool) -> str:
    """`choose_attention` for this machine."""
    packages = {"flash_attn"} if find_spec("flash_attn") is not None else set()
    cuda = torch.cuda.is_available()
    return choose_attention(arguments.attn_implementation, cuda=cuda, bf16=bf16, packages=packages)


def trained_dtype(arguments: TrainedModelArguments) -> torch.dtype:
    """The precision of the weights that are trained.

    Raises:
        LaunchError: bfloat16 under an engine that trains float32 weights of its own all the same.
    """
    if arguments.dtype == "float32":
        return torch.float32
    engine = requested().name
    if engine in ("deepspeed", "fsdp2"):
        raise LaunchError(
            f"model_args.dtype: bfloat16 has no effect under {engine}, which trains float32 weights; leave it out, and "
            "set train.bf16 for bfloat16's speed"
        )
    return torch.bfloat16


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, weights are loaded whole, by this process alone.

    Once a ZeRO-3 trainer has been set up, transformers would cut them up while loading, which leaves nothing to put a
    new head into and waits for the other processes, who may not be loading anything. The engine cuts them up later.
    """
    set_up = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = set_up


# ---- from a parent


def load_encoder(parent: Parent) -> Encoder:
    """The parent's tokenizer and chat template, padding with the token that the hand-off found fit for it."""
    return Encoder.from_pretrained(parent.model_dir, parent.tokenizer.pad_id)


def load_causal_lm(
    parent: Parent,
    arguments: ModelArguments,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: bool = True,
    bf16: bool = True,
) -> PreTrainedModel:
    """A causal language model.

    Args:
        dtype: of the weights, whatever the parent's are.
        dropout: False sets every dropout to zero, whatever the configuration says.
        bf16: the forward pass will run under bfloat16 autocast where there is a GPU for it.

    Raises:
        HandoffError: the tokenizer has ids that the model has no embedding for.
    """
    with whole_weights():
        model = AutoModelForCausalLM.from_pretrained(
            parent.model_dir, dtype=dtype, attn_implementation=attention(arguments, bf16), use_safetensors=True
        )
    check_vocabulary(model, parent)
    return model if dropout else without_dropout(model)


def load_reward_model(
    parent: Parent,
    arguments: ModelArguments,
    *,
    dtype: torch.dtype = torch.float32,
    dropout: bool = True,
    bf16: bool = True,
    seed: int = 0,
) -> PreTrainedModel:
    """A model with a head of one output.

    From a reward model it comes with its head; from a causal language model the head is new, drawn from
    N(0, 1 / (H + 1)) (H hidden size) with `seed` by a generator of its own, so that nothing else decides what it is.

    Raises:
        HandoffError: the architecture has no sequence classification, or as `load_causal_lm`.
    """
    architecture = PretrainedConfig.get_config_dict(parent.model_dir)[0]["model_type"]
    if type_of_config(architecture) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise HandoffError(f"{parent.path}: transformers has no sequence classification for `{architecture}`")
    with whole_weights():
        model = AutoModelForSequenceClassification.from_pretrained(
            parent.model_dir,
            num_labels=1,
            dtype=dtype,
            attn_implementation=attention(arguments, bf16),
            use_safetensors=True,
        )
    check_vocabulary(model, parent)
    model.config.pad_token_id = parent.tokenizer.pad_id
    if parent.kind != "reward_model":
        head = model.get_submodule("score").weight  # (1, H)
        drawn = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            head.copy_(drawn / (head.shape[1] + 1) ** 0.5)
    return model if dropout else without_dropout(model)


def without_dropout(model: PreTrainedModel) -> PreTrainedModel:
    """Every dropout set to zero, in modules and where attention takes it as a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
    return model


def check_vocabulary(model: PreTrainedModel, parent: Parent) -> None:
    """Raises HandoffError, naming both sizes, when the tokenizer has more ids than the model has embeddings."""
    rows = model.get_input_embeddings().num_embeddings
    size = parent.tokenizer.vocab_size
    if size > rows:
        raise HandoffError(f"{parent.path}: the tokenizer has {size} ids, the model only {rows} embeddings")


# ---- from a recipe


def type_of_config(architecture: str) -> type[PretrainedConfig]:
    """The configuration class of a `model_type` of transformers. Raises RecipeError."""
    if architecture not in CONFIG_MAPPING:
        close = difflib.get_close_matches(architecture, list(CONFIG_MAPPING), 1)
        hint = f"; did you mean `{close[0]}`?" if close else ""
        raise RecipeError(f"model.architecture: transformers has no `{architecture}`{hint}")
    return CONFIG_MAPPING[architecture]


def model_config(keys: dict[str, Any], encoder: Encoder, context: int) -> PretrainedConfig:
    """The configuration for `model:` of a recipe: `architecture`, and fields of that architecture's configuration.

    Args:
        keys: the recipe's mapping.
        encoder: decides the vocabulary and the special ids.
        context: tokens in the longest row that the model must take.

    Raises:
        RecipeError: unknown architecture or field, a field that the pipeline decides, a value that the class refuses.
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
        config = kind(
            **given,
            vocab_size=encoder.vocab_size,
            bos_token_id=encoder.bos_id,
            eos_token_id=encoder.eos_id,
            pad_token_id=encoder.pad_id,
            dtype="float32",
        )
    except Exception as error:  # each class validates in its own way; all of it is about these keys
        raise RecipeError(f"model: {architecture} refuses these values: {error}") from error
    if "max_position_embeddings" in fields and config.max_position_embeddings < context:
        raise RecipeError(
            f"model.max_position_embeddings is {config.max_position_embeddings}, shorter than rows of {context} tokens"
        )
    return config


def build(
    config: PretrainedConfig, arguments: ModelArguments, bf16: bool, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A causal language model with random weights, drawn from torch's global generator."""
    with whole_weights():
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention(arguments, bf16))


# ---- to disk


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files as they are: loading and saving them could change what they are hashed by."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def save_model(model: PreTrainedModel, encoder: Encoder, path: Path, state_dict: dict[str, torch.Tensor]) -> None:
    """Writes a model that anyone can load, loads it, and compares every tensor.

    Args:
        model: whose configuration is written; a causal language model or a reward model.
        encoder: of the parent, whose tokenizer files go with the model.
        path: an existing directory.
        state_dict: the model's whole state, float32, gathered on this process (`runtime.full_state_dict`).
    """
    # Gathering has separated tensors that share memory; the head that repeats the embedding is written once.
    kept = {name: value.contiguous() for name, value in state_dict.items() if name not in model.all_tied_weights_keys}
    model.config.dtype = torch.float32
    model.save_pretrained(path, state_dict=kept)
    source = Path(encoder.tokenizer.name_or_path)
    copy_tokenizer(source, path)
    generation_config(source, encoder).save_pretrained(path)
    loader = AutoModelForCausalLM if model.can_generate() else AutoModelForSequenceClassification
    with whole_weights():
        saved = loader.from_pretrained(path, dtype=torch.float32, use_safetensors=True).state_dict()
    for name, value in kept.items():
        assert torch.equal(saved[name], value.cpu()), f"{name} does not come back from {path} as it was saved"


def generation_config(model_dir: Path, encoder: Encoder) -> GenerationConfig:
    """The directory's own generation settings, where it has any, with the ids that the encoder uses and stops at."""
    here = (model_dir / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(model_dir) if here else GenerationConfig()
    declared = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*encoder.stop_ids, *(i for i in declared if i is not None)})
    config.pad_token_id = encoder.pad_id
    config.bos_token_id = encoder.bos_id
    return config
