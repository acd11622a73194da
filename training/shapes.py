"""The shape of a network, from the content of its config.json or a recipe's `model:`: what its parameters and
activations are counted from. No torch here, and no weights are read.

Legend: C hidden size, I width of the feed-forward layer, V vocabulary, Hq query heads, H key and value heads, D head
size.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

from handoff.errors import HandoffError, UserError
from handoff.files import read_json
from handoff.weights import read_tensors

# The values that a configuration class has where neither config.json nor a recipe names them.
_LLAMA: dict[str, Any] = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
_LLAMA |= {"num_attention_heads": 32, "num_key_value_heads": None, "tie_word_embeddings": False}
_QWEN = _LLAMA | {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_GEMMA: dict[str, Any] = {"vocab_size": 256000, "head_dim": 256, "tie_word_embeddings": True, "num_key_value_heads": 4}
_GEMMA |= {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8}
_OLMO = _LLAMA | {"vocab_size": 50304}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | {"intermediate_size": 14336, "num_key_value_heads": 8},
    "qwen2": _QWEN,
    "qwen3": _QWEN | {"head_dim": 128},
    "gemma": _GEMMA
    | {"hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28}
    | {"num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA | {"vocab_size": 262208},
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "phi3": _LLAMA | {"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192},
    "smollm3": _LLAMA
    | {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16}
    | {"num_key_value_heads": 4, "tie_word_embeddings": True},
    "granite": _LLAMA,
    "stablelm": _LLAMA
    | {"vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32},
    "gpt2": {"vocab_size": 50257, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
    | {"n_positions": 1024, "n_inner": None, "tie_word_embeddings": True},
    "gpt_neox": {"vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44}
    | {"num_attention_heads": 64, "tie_word_embeddings": False, "attention_bias": True},
    "opt": {"vocab_size": 50272, "hidden_size": 768, "ffn_dim": 3072, "num_hidden_layers": 12}
    | {"num_attention_heads": 12, "max_position_embeddings": 2048, "tie_word_embeddings": True, "enable_bias": True}
    | {"word_embed_proj_dim": None, "do_layer_norm_before": True},
    "mixtral": _LLAMA
    | {"intermediate_size": 14336, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": _QWEN
    | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24, "num_key_value_heads": 4}
    | {"moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1},
}
"""{model_type: {key: value}} of the families whose parameters are counted here."""
_OTHER_NAMES = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
_QK_NORM: dict[str, Literal["head", "all"]] = {
    **{"qwen3": "head", "qwen3_moe": "head", "gemma3_text": "head"},
    **{"olmo2": "all", "olmo3": "all"},
}
_NO_PARAMETER = re.compile(r"(^|\.)(lm_head|embed_out|score)\.|\.inv_freq$|\.attn\.(masked_)?bias$")
"""Names in weight files of heads, and of buffers that old versions stored."""
_BIASED = ("gpt2", "gpt_neox", "opt")


class ShapeError(UserError):
    """A network whose cost cannot be computed."""


@dataclass(frozen=True)
class Shape:
    """The sizes of one causal language model's network."""

    family: str
    """`model_type` of config.json."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    """Width of the feed-forward layer; of one expert, where there are experts."""
    tied: bool
    """Whether the output head is the embedding."""
    gated: bool = True
    """Whether the feed-forward layer has a gate."""
    norms: int = 2
    """Norms of a layer, besides those of queries and keys."""
    norm_bias: bool = False
    """LayerNorm with a bias, instead of RMSNorm."""
    final_norm: bool = True
    qk_norm: Literal["", "head", "all"] = ""
    """Norms of queries and keys: one weight for each place of a head, or of all heads."""
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    positions: int = 0
    """Rows of a table of positions that is learned."""
    embedded: int = 0
    """Width of the embeddings, where it is not the hidden size."""
    experts: int = 0
    experts_used: int = 0
    """Experts that one token goes through."""
    stored: int | None = None
    """Parameters without the output head, by the headers of the weight files; None: counted from the sizes."""

    # ---- parameters

    @property
    def embedding(self) -> int:
        """Parameters of the token embedding."""
        return self.vocab * (self.embedded or self.hidden)

    @property
    def matrices(self) -> int:
        """Parameters of the linear layers of one layer, without biases."""
        return self._attention + self._feed_forward * max(1, self.experts) + self.hidden * self.experts

    @property
    def _attention(self) -> int:
        return self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)

    @property
    def _feed_forward(self) -> int:
        return self.hidden * self.intermediate * (3 if self.gated else 2)

    @property
    def layer(self) -> int:
        """Parameters of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        norms = self.norms * self.hidden * (2 if self.norm_bias else 1)
        norms += {"": 0, "head": 2 * self.head_dim, "all": queries + keys}[self.qk_norm]
        biases = self.qkv_bias * (queries + 2 * keys) + self.out_bias * self.hidden
        biases += self.mlp_bias * (self.intermediate * (2 if self.gated else 1) + self.hidden)
        return self.matrices + norms + biases

    @property
    def body(self) -> int:
        """Parameters without the output head, as a critic or a reward model has them; their own head is small."""
        if self.stored is not None:
            return self.stored
        whole = self.layers * self.layer + self.embedding + self.positions * self.hidden
        whole += self.final_norm * self.hidden * (2 if self.norm_bias else 1)
        if self.embedded:  # projections to the hidden size and back
            whole += 2 * self.embedded * self.hidden
        return whole

    @property
    def parameters(self) -> int:
        """All parameters; a tied weight counts once."""
        return self.body + (0 if self.tied else self.embedding)

    @property
    def largest(self) -> int:
        """Parameters of the largest linear layer of a layer."""
        return self.hidden * max(self.intermediate, self.heads * self.head_dim)

    @property
    def linear(self) -> int:
        """Parameters of all linear layers and the output head: what a token is multiplied with, if no expert rests."""
        return self.layers * self.matrices + self.embedding

    @property
    def active(self) -> int:
        """As `linear`, of the experts that a token goes through alone, and without the output head."""
        idle = self._feed_forward * (self.experts - self.experts_used) if self.experts else 0
        return self.layers * (self.matrices - idle)

    def adapter(self, r: int, targets: Collection[str] | None = None) -> int:
        """Parameters of a LoRA adapter of rank r. `targets`: ends of the names of its linear layers; None: all of
        them but the head. Experts that are stored together have none."""
        sizes = [size for name, size in self._linear_layers() if targets is None or name in targets]
        return r * self.layers * sum(sizes)

    def _linear_layers(self) -> list[tuple[str, int]]:
        """(end of the name, inputs and outputs) of each linear layer of one layer."""
        hidden, wide = self.hidden, self.intermediate
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        fused = hidden + queries + 2 * keys
        out = queries + hidden
        if self.family == "gpt2":
            return [("c_attn", fused), ("c_proj", out), ("c_fc", hidden + wide), ("c_proj", wide + hidden)]
        if self.family == "gpt_neox":
            up = [("dense_h_to_4h", hidden + wide), ("dense_4h_to_h", wide + hidden)]
            return [("query_key_value", fused), ("dense", out), *up]
        if self.family == "phi3":
            feed = [("gate_up_proj", hidden + 2 * wide), ("down_proj", wide + hidden)]
            return [("qkv_proj", fused), ("o_proj", out), *feed]
        split = [("q_proj", hidden + queries), ("k_proj", hidden + keys), ("v_proj", hidden + keys)]
        if self.family == "opt":
            return [*split, ("out_proj", out), ("fc1", hidden + wide), ("fc2", wide + hidden)]
        if self.experts:
            return [*split, ("o_proj", out)]
        gated = [(name, hidden + wide) for name in ("gate_proj", "up_proj", "down_proj")]
        return [*split, ("o_proj", out), *gated]

    # ---- activations

    @property
    def attention_width(self) -> int:
        """Numbers of a token's queries, keys, values and attention output."""
        return self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def cache(self) -> int:
        """Numbers that the keys and values of one token take in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(config: Mapping[str, Any], stored: int | None = None, place: str = "model") -> Shape:
    """The shape of a configuration: the content of config.json, or a recipe's `model:` with `vocab_size` and
    `model_type`.

    Args:
        config: the keys; those that are missing have the values of the architecture's class.
        stored: the number of parameters without the output head, if the weights are at hand.
        place: names the configuration in messages.

    Raises:
        ShapeError: the family is not one whose parameters are counted here, or a size is not a positive number.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return shape_of({"tie_word_embeddings": config.get("tie_word_embeddings", True), **inner}, stored, place)
    family = str(config.get("model_type"))
    if family not in DEFAULTS:
        raise ShapeError(
            f"{place}: the cost of a `{family}` cannot be planned; the families are {', '.join(sorted(DEFAULTS))}"
        )
    keys = DEFAULTS[family] | {_OTHER_NAMES.get(key, key): value for key, value in config.items()}

    def size(name: str) -> int:
        value = keys.get(name)
        if type(value) is not int or value < 1:
            raise ShapeError(f"{place}: {name} must be a whole number above 0, not {value!r}")
        return value

    hidden, heads = size("hidden_size"), size("num_attention_heads")
    moe = family in ("mixtral", "qwen3_moe")
    biased = family in _BIASED
    bias = bool(keys.get("attention_bias", keys.get("enable_bias", family == "gpt2")))
    if moe:
        wide = size("moe_intermediate_size" if "moe_intermediate_size" in keys else "intermediate_size")
        if keys.get("mlp_only_layers") or keys.get("decoder_sparse_step", 1) != 1:
            raise ShapeError(f"{place}: a model with experts in some layers only cannot be planned")
    elif family == "gpt2":
        wide = size("n_inner") if keys.get("n_inner") else 4 * hidden
    else:
        wide = size("ffn_dim" if family == "opt" else "intermediate_size")
    positions = 0
    if family == "gpt2":
        positions = size("n_positions")
    elif family == "opt":
        positions = size("max_position_embeddings") + 2
    narrow = keys.get("word_embed_proj_dim") or hidden
    return Shape(
        family=family,
        vocab=size("vocab_size"),
        hidden=hidden,
        layers=size("num_hidden_layers"),
        heads=heads,
        kv_heads=size("num_key_value_heads") if keys.get("num_key_value_heads") else heads,
        head_dim=size("head_dim") if keys.get("head_dim") else hidden // heads,
        intermediate=wide,
        tied=bool(keys["tie_word_embeddings"]),
        gated=not biased,
        norms=4 if family in ("gemma2", "gemma3_text") else 2,
        norm_bias=biased or family == "stablelm",
        final_norm=family != "opt" or bool(keys["do_layer_norm_before"]),
        qk_norm=_QK_NORM.get(family, ""),
        qkv_bias=bias or family == "qwen2" or bool(keys.get("use_qkv_bias")),
        out_bias=bias,
        mlp_bias=bool(keys.get("mlp_bias", family in ("gpt2", "gpt_neox") or (family == "opt" and bias))),
        positions=positions,
        embedded=narrow if narrow != hidden else 0,
        experts=size("num_local_experts" if "num_local_experts" in keys else "num_experts") if moe else 0,
        experts_used=size("num_experts_per_tok") if moe else 0,
        stored=stored,
    )


def shape_in(model_dir: Path) -> Shape:
    """The shape of the model in a directory. Its parameters are counted from the headers of its weight files, if those
    are there.

    Quantised weights are counted from the sizes, since files pack several of them into one number.

    Raises:
        HandoffError: config.json is missing or no object, or a weight file is damaged.
        ShapeError: as `shape_of`.
    """
    place = model_dir / "config.json"
    config = read_json(place, infinity=True)
    if not isinstance(config, dict):
        raise HandoffError(f"{place}: must be an object of keys and values; download it again")
    stored = None
    if any(model_dir.glob("*.safetensors")) and not config.get("quantization_config"):
        tensors = read_tensors(model_dir).items()
        stored = sum(prod(info.shape) for name, info in tensors if not _NO_PARAMETER.search(name))
    return shape_of(config, stored, str(place))
