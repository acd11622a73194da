"""A decode step of the Llama family, written out: the model's own numbers in a fraction of the calls.

Legend: B rows, Hq heads of queries, H heads of keys and values, D size of a head, C channels, V vocabulary.

A decode step multiplies a few rows with every weight of the model. On a processor, half of its time goes into what
surrounds the products: Python, small operations, and rearranging each weight for the caches, which the usual product
does anew every time. Here weights are arranged once in a call of `generate` (by oneDNN, where it is there), those that
read the same input are one matrix, which has the weights of the norm in front of it in its columns, and a layer is some
twenty operations. It costs a second copy of the weights for as long as the call lasts.

Only for models of exactly the families below, made of exactly their own parts: what is wrapped (LoRA), hooked or
derived answers through its own forward pass. `rollout.forward` compares the two on a few tokens before it trusts this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rollout.attention import Decode

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_OWN = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
_COMMON = {
    "torch.nn.modules.container.ModuleList",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.sparse.Embedding",
    "transformers.activations.SiLUActivation",
}
_BY_LENGTH = ("dynamic", "longrope")  # rotations that change with the longest sequence that there is
_POSITIONS = 256  # rotations are computed for so many positions at once


def fits(model: PreTrainedModel) -> bool:
    """Whether a decode step of `model`, whose weights are all here, can be computed here."""
    if model.device.type != "cpu":
        return False
    for family in FAMILIES:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        parts = {f"{module}.{family}{part}" for part in _OWN} | _COMMON
        if all(_is_one_of(part, parts) for part in model.modules()):
            whole = _is_one_of(model, {f"{module}.{family}ForCausalLM"})
            return whole and model.model.rotary_emb.rope_type not in _BY_LENGTH
    return False


def _is_one_of(module: nn.Module, names: set[str]) -> bool:
    """Whether a module is what it is called, with that class's own forward pass and nobody who alters it.

    An engine that shards may have put a class of its own in front and hooks that gather the weights, which are here.
    """
    kind: Any = next((c for c in type(module).__mro__ if f"{c.__module__}.{c.__qualname__}" in names), None)
    if kind is None or type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(hook.__module__.startswith("torch.distributed.") for hook in hooks)


class Lean:
    """The decode step of one model with the weights that it has now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._body: Any = model.model
        config = model.config
        dtype = model.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        self._eps = torch.tensor(config.rms_norm_eps)
        self._layers = [_Layer(layer, config.num_attention_heads, dtype) for layer in self._body.layers]
        self._head = _Product([model.lm_head], dtype, self._body.norm.weight)
        self._cos = self._sin = torch.empty(0)

    def __call__(self, tokens: Tensor, positions: Tensor, this: Decode) -> Tensor:
        """tokens, positions (B,) -> logits (B, V) behind one token a row."""
        x = self._body.embed_tokens(tokens)  # (B, C)
        last = int(positions.max())
        if last >= len(self._cos):
            self._rotations(x, last // _POSITIONS * _POSITIONS + _POSITIONS)
        cos, sin = self._cos[positions], self._sin[positions]
        for number, layer in enumerate(self._layers):
            x = layer(x, cos, sin, this, number, self._eps)
        return self._head(_normed(x, self._eps))

    def _rotations(self, x: Tensor, positions: int) -> None:
        """Cosines and sines (positions, 1, D) as `x` needs them.

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
        # Each by itself, so that each is a tensor without gaps.
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
    """Linear layers that read the same input, as one: (B, in) -> (B, sum of out).

    `norm` (in,): the weights of the norm that the input comes from, which has left them out.
    """

    def __init__(self, linears: Sequence[nn.Linear], dtype: torch.dtype, norm: Tensor | None = None) -> None:
        self._dtype = dtype
        weight = torch.cat([linear.weight for linear in linears])  # (sum of out, in)
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


def _arranges(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this precision with weights that it has arranged."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
