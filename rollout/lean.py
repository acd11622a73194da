"""A fast decode step for the Llama family on a CPU: the same result as the model's own, in a fraction of the calls.

Legend: B rows, Hq query heads, H key and value heads, D head size, C channels, V vocabulary.

A decode step multiplies a few rows with every weight of the model. On a CPU, half of its time goes into the work around
the products: Python, small operations, and repacking each weight for the caches, which the usual product repeats every
time. Here, each call of `generate` packs the weights once (with oneDNN, if available). Weights that read the same input
become one matrix, with the weights of the preceding norm folded into its columns, and a layer takes about twenty
operations. This needs a second copy of the weights during the call.

It applies only to models of exactly the families below, with unmodified modules, but for LoRA layers, whose updates are
added to the packed weights, and quantised ones, which are dequantised for it. A wrapped, hooked or derived model uses
its own forward pass. `rollout.forward` compares both on a few tokens before it uses this one.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rollout.attention import Decode
from rollout.halves import Half, computes_in
from rollout.positions import BY_LENGTH
from rollout.quantised import plain_weight

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_OWN = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_COMMON = {
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "transformers.activations.SiLUActivation",
    "rollout.bnb_layers.FourBitLinear",
    "rollout.bnb_layers.EightBitLinear",
    # A LoRA layer and its parts; other kinds of adapters have further parts.
    "peft.tuners.lora.layer.Linear",
    "torch.nn.modules.container.ModuleDict",
    "torch.nn.modules.container.ParameterDict",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Identity",
}
_POSITIONS = 256  # rotations are computed for this many positions at once


def fits(model: PreTrainedModel) -> bool:
    """Whether `Lean` can compute a decode step of `model`. All weights must be on this process."""
    if model.device.type != "cpu":
        return False
    for family in FAMILIES:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        parts = {f"{module}.{family}{part}" for part in _OWN} | _COMMON
        if all(_is_one_of(part, parts) for part in model.modules()):
            whole = _is_one_of(model, {f"{module}.{family}ForCausalLM"})
            return whole and model.model.rotary_emb.rope_type not in BY_LENGTH
    return False


def _is_one_of(module: nn.Module, names: set[str]) -> bool:
    """Whether a module is of one of these classes, with that class's own forward pass and no hooks that change it.

    A sharding engine may have added its own subclass, and hooks that gather the weights; these do no harm, because the
    weights are already gathered.
    """
    kind: Any = next((c for c in type(module).__mro__ if f"{c.__module__}.{c.__qualname__}" in names), None)
    own: Any = next(c for c in type(module).__mro__ if not issubclass(c, Half))  # a `Half` computes what its class does
    if kind is None or own.forward is not kind.forward or "forward" in vars(module):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(hook.__module__.startswith("torch.distributed.") for hook in hooks)


class Lean:
    """The decode step of one model with its current weights."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._body: Any = model.model
        config = model.config
        dtype = computes_in(model)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        self._eps = torch.tensor(config.rms_norm_eps)
        self._layers = [_Layer(layer, config.num_attention_heads, dtype) for layer in self._body.layers]
        self._head = _Product([model.lm_head], dtype, self._body.norm.weight)
        self._cos = self._sin = torch.empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor, this: Decode) -> Tensor:
        """tokens, positions (B,) -> logits (B, V) after one token per row."""
        x = self._body.embed_tokens(tokens)  # (B, C)
        last = int(positions.max())
        if last >= len(self._cos):
            self._rotations(x, last // _POSITIONS * _POSITIONS + _POSITIONS)
        cos, sin = self._cos[positions], self._sin[positions]
        for number, layer in enumerate(self._layers):
            x = layer(x, cos, sin, this, number, self._eps)
        return self._head(_normed(x, self._eps))

    def _rotations(self, x: Tensor, positions: int) -> None:
        """Computes cosines and sines (positions, 1, D) in the precision of `x`.

        A head is rotated as x·cos + (−x₂, x₁)·sin; with the sign in the sine, (x₂, x₁) is x shifted by half.
        """
        cos, sin = self._body.rotary_emb(x, torch.arange(positions)[None])  # (1, positions, D)
        half = cos.shape[-1] // 2
        self._cos = cos[0, :, None]
        self._sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]


class _Layer:
    def __init__(self, layer: Any, queries: int, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._size, self._queries, self._scaling = attention.head_dim, queries, attention.scaling
        keys = attention.k_proj.out_features // self._size
        self._rotated = queries + keys
        before_attention, before_mlp = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self._qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj], dtype, before_attention)
        self._head_norms: Tensor | None = None
        if "q_norm" in dict(attention.named_children()):  # Qwen3
            norms = attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)
            self._head_norms = torch.cat(norms)  # (Hq + H, D)
        self._out = _Product([attention.o_proj], dtype)
        self._gate_up = _Product([mlp.gate_proj, mlp.up_proj], dtype, before_mlp)
        self._down = _Product([mlp.down_proj], dtype)

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, this: Decode, number: int, eps: Tensor) -> Tensor:
        """x (B, C) -> (B, C)."""
        heads = self._qkv(_normed(x, eps)).unflatten(1, (-1, self._size))  # (B, Hq + 2H, D)
        turned, values = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._head_norms is not None:
            turned = self._head_norms * _normed(turned, eps).to(turned.dtype)
        kept, shifted = turned * cos, turned.roll(self._size // 2, -1)
        # Computed separately, so that each is a contiguous tensor.
        q = torch.addcmul(kept[:, : self._queries], shifted[:, : self._queries], sin)
        k = torch.addcmul(kept[:, self._queries :], shifted[:, self._queries :], sin)
        attended = this.attend(number, q[:, :, None], k[:, :, None], values[:, :, None], self._scaling, None)
        x = x + self._out(attended.flatten(1))  # attended: (B, 1, Hq, D)
        gate, up = self._gate_up(_normed(x, eps)).chunk(2, -1)
        return x + self._down(F.silu(gate) * up)


def _normed(x: Tensor, eps: Tensor) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019) without its weights, in float32. x (..., C); eps ()."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return x * torch.addcmul(eps, norm, norm, value=1 / x.shape[-1]).rsqrt_()


class _Product:
    """Linear layers that read the same input, combined into one: (B, in) -> (B, sum of out).

    `norm` (in,): the weights of the norm before it, which `_normed` leaves out and this folds in.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, norm: Tensor | None = None) -> None:
        self._dtype = dtype
        weight = torch.cat([_weight(linear) for linear in linears])  # (sum of out, in)
        if norm is not None:
            weight = weight.float() * norm
        weight = weight.to(dtype)
        biases: list[Tensor] = [linear.bias for linear in linears]
        self._bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        self._arranged = _arranges(dtype)
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._arranged else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._arranged:
            out: Tensor = torch.ops.mkldnn._linear_pointwise.default(
                x.to(self._dtype), self._weight, self._bias, "none", [], ""
            )
            return out
        return F.linear(x.to(self._dtype), self._weight, self._bias)


def _weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer, with the updates of its LoRA adapters."""
    if not isinstance(linear, LoraLayer):
        return plain_weight(linear)
    weight: Tensor = plain_weight(linear.get_base_layer())
    for name in linear.active_adapters:
        if name in linear.lora_A and not linear.disable_adapters:
            update: Tensor = linear.get_delta_weight(name)  # type: ignore[operator]
            weight = weight.float() + update
    return weight


def _arranges(dtype: torch.dtype) -> bool:
    """Whether oneDNN supports products with packed weights in this precision."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
