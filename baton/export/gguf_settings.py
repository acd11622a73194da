"""The settings and tensors of a model in the names and the order of a GGUF file.

A family of models is held if llama.cpp computes exactly what transformers computes for it. What a configuration asks
for beyond that is refused by name.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from handoff.errors import HandoffError
from handoff.window import window


@dataclass(frozen=True)
class Family:
    """How llama.cpp holds an architecture of transformers."""

    name: str
    """llama.cpp's name."""
    interleaved: bool = False
    """Whether the two halves of each head's rotated dimensions are interleaved."""
    norms_plus_one: bool = False
    """Whether the norms' weights are stored as what they are multiplied by, 1 + w."""


FAMILIES = {
    "llama": Family("llama", interleaved=True),
    "mistral": Family("llama", interleaved=True),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma3_text": Family("gemma3", norms_plus_one=True),
}
"""{`model_type` of transformers: its family}."""
_GEMMA_LOCAL_THETA = 10_000.0  # llama.cpp knows no other for gemma3's layers with a window
_GEMMA_PERIOD = 6
_YARN = {"rope_type", "rope_theta", "factor", "original_max_position_embeddings"}

Setting = int | float | str | bool


def family_of(config: Mapping[str, Any], place: str) -> Family:
    """The family of a configuration. Raises HandoffError if GGUF files of it are not written here."""
    kind = config.get("model_type")
    if kind not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise HandoffError(
            f"{place}: the architecture {kind!r} cannot be exported to GGUF ({known} can); export it to hf or vllm"
        )
    return FAMILIES[kind]


def settings(config: Mapping[str, Any], place: str) -> dict[str, Setting]:
    """{key of the file: value}. A key without a dot at its front belongs to the architecture.

    Args:
        config: the content of config.json, of the part that reads and writes text.
        place: the model, for messages.

    Raises:
        HandoffError: a setting has no form in such a file.
    """
    family = family_of(config, place)
    heads, size = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or size // heads
    found = window(config)
    context = 1 << 20 if found is None else found.tokens
    rope = _rope(config)
    keys: dict[str, Setting] = {
        "block_count": config["num_hidden_layers"],
        "embedding_length": size,
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": rope["rope_theta"],
        "vocab_size": config["vocab_size"],
    }
    if family.interleaved:
        keys["rope.dimension_count"] = head
    activation = config.get("hidden_activation") or config.get("hidden_act")
    wanted = "gelu_pytorch_tanh" if family.name == "gemma3" else "silu"
    _need(activation == wanted, place, f"hidden_act {activation!r}")
    _need(rope.get("partial_rotary_factor", 1.0) == 1.0, place, "partial_rotary_factor")
    keys |= _scaling(rope, place)
    if family.name == "gemma3":
        keys |= _gemma(config, head, place)
    elif config["model_type"] == "mistral":
        # Within the window, attention without one is the same.
        context = min(context, config.get("sliding_window") or context)
    else:
        _need(not config.get("use_sliding_window"), place, "use_sliding_window")
    return keys | {"context_length": context}


def _need(holds: bool, place: str, what: str) -> None:
    if not holds:
        raise HandoffError(
            f"{place}: config.json has {what}, which a GGUF file of this architecture cannot hold; export it to hf or "
            "vllm"
        )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary settings, of the layers that see everything."""
    rope = dict(config.get("rope_parameters") or {})
    rope = dict(rope.get("full_attention", rope))
    older = dict(config.get("rope_scaling") or {})
    older["rope_type"] = older.pop("type", None) or older.get("rope_type") or "default"
    rope = {"rope_theta": config.get("rope_theta", 10_000.0), **older, **rope}
    return {key: value for key, value in rope.items() if value is not None}


def _scaling(rope: Mapping[str, Any], place: str) -> dict[str, Setting]:
    kind = rope["rope_type"]
    if kind in ("default", "llama3"):  # the factors of llama3 are a tensor
        return {}
    _need(kind in ("linear", "yarn") and set(rope) <= _YARN, place, f"rope_parameters {dict(rope)}")
    keys: dict[str, Setting] = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "yarn":
        keys["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return keys


def _gemma(config: Mapping[str, Any], head: int, place: str) -> dict[str, Setting]:
    layers = config["num_hidden_layers"]
    kinds = config.get("layer_types") or []
    usual = ["full_attention" if (i + 1) % _GEMMA_PERIOD == 0 else "sliding_attention" for i in range(layers)]
    _need(list(kinds) == usual, place, "layer_types other than five with a window and one without")
    rope = config.get("rope_parameters") or {}
    local = rope.get("sliding_attention", {}).get("rope_theta", config.get("rope_local_base_freq", _GEMMA_LOCAL_THETA))
    _need(local == _GEMMA_LOCAL_THETA, place, f"a rope_theta of {local} in layers with a window")
    _need(math.isclose(config.get("query_pre_attn_scalar", head), head), place, "query_pre_attn_scalar ≠ head_dim")
    _need(not config.get("use_bidirectional_attention"), place, "use_bidirectional_attention")
    for key in ("final_logit_softcapping", "attn_logit_softcapping"):
        _need(config.get(key) is None, place, key)
    return {"attention.sliding_window": config["sliding_window"]}


def rope_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """How many times slower each pair of dimensions turns under `llama3`; None under every other rule.

    By the rule of Llama 3.1: slow ones by `factor`, fast ones not at all, and those between smoothly.
    """
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return None
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = rope["rope_theta"] ** (-np.arange(0, head, 2, dtype=np.float64) / head)
    lengths = 2 * np.pi / frequencies
    before = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = (before / lengths - low) / (high - low)
    between = 1 / ((1 - smooth) / rope["factor"] + smooth)
    slow, fast = lengths > before / low, lengths < before / high
    return np.where(slow, rope["factor"], np.where(fast, 1.0, between)).astype(np.float32)


def file_names(config: Mapping[str, Any], names: Iterator[str], place: str) -> dict[str, str]:
    """{name of a tensor in the model's files: its name in a GGUF file}.

    Raises:
        HandoffError: the architecture's files have no such tensor.
    """
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, MODEL_TENSORS, get_tensor_name_map

    family = family_of(config, place)
    arch = next(key for key, name in MODEL_ARCH_NAMES.items() if name == family.name)
    assert isinstance(arch, MODEL_ARCH) and arch in MODEL_TENSORS
    known = get_tensor_name_map(arch, config["num_hidden_layers"])
    found = {}
    for name in names:
        if config.get("tie_word_embeddings") and name == "lm_head.weight":
            continue
        target = known.get_name(name, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise HandoffError(f"{place}: a GGUF file of {family.name} has no place for the tensor {name}")
        found[name] = target
    return found


def stored(family: Family, config: Mapping[str, Any], name: str, values: np.ndarray) -> np.ndarray:
    """A tensor's values as the file holds them.

    Args:
        name: its name in the model's files.
        values: float32.
    """
    if family.norms_plus_one and name.endswith("norm.weight"):
        return values + 1
    turned = re.search(r"\.([qk])_proj\.(weight|bias)$", name)
    if family.interleaved and turned:
        heads = config["num_attention_heads"]
        if turned[1] == "k":
            heads = config.get("num_key_value_heads") or heads
        parts = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
        return np.ascontiguousarray(parts.swapaxes(1, 2)).reshape(values.shape)
    return values
