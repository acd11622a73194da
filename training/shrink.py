"""Tiny networks of the same architecture, for rehearsals: few and narrow layers, the same vocabulary and window.

The layers that are kept are the first of each kind that the network has: of Gemma 3 one with sliding and one with full
attention, say. All values come from the architecture's configuration class, so nothing is listed for single families.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PretrainedConfig
from transformers.utils.logging import disable_progress_bar

from handoff.errors import HandoffError
from handoff.files import remove_tree
from handoff.gate import ADAPTER_CONFIG, loaded_files, named_errors
from handoff.parent import Outline
from training.architecture import LOCAL, type_of_config

_WIDTH, _WIDER, _HEADS, _HEAD = 32, 64, 4, 8
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_SIZES: dict[str, int] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), _WIDTH),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner", "shared_intermediate_size"), _WIDER),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads"), _HEADS),
    "head_dim": _HEAD,
    # attention whose keys and values are compressed
    **{"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    # experts
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size"), 32
    ),
    **dict.fromkeys(("n_group", "topk_group"), 1),
    # recurrent layers: their heads together are twice as wide as the network
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_head_dim"), 2 * _WIDTH // 8),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups"), 1),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 8),
}
_MOST_LAYERS = 4


def shrunk(config: PretrainedConfig) -> PretrainedConfig:
    """The configuration of a tiny network of the same architecture, with plain weights."""
    keys = config.to_dict()
    keys.pop("quantization_config", None)
    made: PretrainedConfig = type(config).from_dict(_smaller(keys))
    return made


def shrunk_network(network: dict[str, Any]) -> dict[str, Any]:
    """The keys of a recipe's `model:`, with those of a tiny network laid over.

    Raises:
        RecipeError: there is no such architecture.
    """
    given = {key: value for key, value in network.items() if key != "architecture"}
    whole = type_of_config(network["architecture"])(**given).to_dict()
    small = _smaller(whole)
    return network | {key: value for key, value in small.items() if key in given or whole[key] != value}


def _smaller(keys: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json with the sizes of a tiny network; also in the configurations inside it."""
    small: dict[str, Any] = {key: _smaller(value) if key.endswith("_config") and isinstance(value, dict) else value
             for key, value in keys.items()}  # fmt: skip
    small |= {key: size for key, size in _SIZES.items() if isinstance(keys.get(key), int)}
    heads = next((keys[key] for key in ("num_attention_heads", "n_head", "n_heads") if key in keys), None)
    for key in _KV_HEADS:
        if isinstance(keys.get(key), int):
            small[key] = _HEADS if keys[key] == heads else min(2, keys[key])
    if "qk_rope_head_dim" in keys:
        small |= {key: 8 for key in ("head_dim",) if key in keys} | {"num_key_value_heads": _HEADS}
    elif "num_attention_heads" not in keys and "head_dim" in keys:  # no attention: heads of a recurrent layer
        small["head_dim"] = 2 * _WIDTH // 8
    count = next((key for key in _LAYERS if isinstance(keys.get(key), int)), None)
    if count is not None:
        small |= _fewer_layers(keys, count)
    turned = int(small.get("head_dim") or _HEAD)
    for name in ("rope_parameters", "rope_scaling"):
        if isinstance(keys.get(name), dict):
            small[name] = _narrower_rope(keys[name], turned)
    return small


def _fewer_layers(keys: dict[str, Any], count: str) -> dict[str, Any]:
    """The number of layers, and the lists with a value for each layer: the first layer of each kind, at least two."""
    layers = keys[count]
    lists = {key: value for key, value in keys.items() if isinstance(value, list) and len(value) == layers}
    kinds = [tuple(str(value[n]) for value in lists.values()) for n in range(layers)]
    kept = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:_MOST_LAYERS]
    kept += [n for n in range(layers) if n not in kept][: max(0, 2 - len(kept))]
    kept.sort()
    return {count: len(kept)} | {key: [value[n] for n in kept] for key, value in lists.items()}


def _narrower_rope(rope: dict[str, Any], head: int) -> dict[str, Any]:
    """Rotary positions with one factor for each pair of a smaller head, where there are factors of single pairs."""
    pairs = int(head * rope.get("partial_rotary_factor", 1.0)) // 2
    return {
        key: _narrower_rope(value, head)
        if isinstance(value, dict)
        else value[:pairs]
        if key in ("short_factor", "long_factor")
        else value
        for key, value in rope.items()
    }


def write_tiny(parent: Outline, folder: Path) -> PretrainedConfig:
    """Writes a tiny model of the parent's architecture with random weights, and the parent's own tokenizer, template
    and generation settings. Returns its configuration.

    Raises:
        HandoffError: transformers does not know the architecture, or cannot make a tiny network of it.
    """
    with named_errors(parent.config_dir / "config.json"):
        config = AutoConfig.from_pretrained(parent.config_dir, **LOCAL)
    scored = parent.kind == "reward_model"
    disable_progress_bar()
    try:
        small = shrunk(config)
        torch.manual_seed(0)
        kind: Any = AutoModelForSequenceClassification if scored else AutoModelForCausalLM
        model = kind.from_config(small, dtype=small.dtype or torch.float32)
        model.save_pretrained(folder)
    except Exception as error:  # each architecture raises its own errors for sizes that do not fit together
        remove_tree(folder)
        raise HandoffError(
            f"{parent.config_dir}: no tiny `{config.model_type}` can be made of it ({type(error).__name__}: {error}); "
            "make a small model of the family yourself, and name it in its place: SECTION.parent=DIRECTORY"
        ) from error
    for name, path in loaded_files(parent.model_dir).items():
        if name.endswith((".safetensors", ".safetensors.index.json")) or name in ("config.json", ADAPTER_CONFIG):
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(path.read_bytes())
    return small
