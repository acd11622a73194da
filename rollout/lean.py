"""A decode step of the Llama family, written out: the model's own numbers in a fraction of the calls.

Legend: B rows, Hq heads of queries, H heads of keys and values, D size of a head, C channels, V vocabulary.

A decode step multiplies a few rows with every weight of the model. On a processor, half of its time goes into what
surrounds the products: Python, small operations, and rearranging each weight for the caches, which the usual product
does anew every time. Here weights are arranged once in a call of `generate` (by oneDNN, where it is there), those that
read the same input are one matrix, and a layer is some twenty operations. It costs a second copy of the weights for as
long as the call lasts.

Only for models of exactly the families below, made of exactly their own parts: what is wrapped (LoRA), hooked or
derived answers through its own forward pass. `rollout.forward` compares the two on a few tokens before it trusts this.
"""

from collections.abc import Sequence

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


def fits(model: PreTrainedModel) -> bool:
    """Whether a decode step of `model`, whose weights are all here, can be computed here."""
    if model.device.type != "cpu":
        return False
    for family in FAMILIES:
        module = f"transformers.models.{family.lower()}.modeling_{family.lower()}"
        parts = {f"{module}.{family}{part}" for part in _OWN} | _COMMON
        if all(_is_one_of(part, parts) for part in model.modules()):
            return _is_one_of(model, {f"{module}.{family}ForCausalLM"})
    return False


def _is_one_of(module: nn.Module, names: set[str]) -> bool:
    """Whether a module is what it is called, with that class's own forward pass and nobody who alters it.

    An engine that shards may have put a class of its own in front and hooks that gather the weights, which are here.
    """
    kind = next((c for c in type(module).__mro__ if f"{c.__module__}.{c.__qualname__}" in names), None)
    if kind is None or type(module).forward is not kind.forward or "forward" in vars(module):
        return False
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return all(hook.__module__.startswith("torch.distributed.") for hook in hooks)


class Lean:
    """The decode step of one model with the weights that it has now."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._body, config = model.model, model.config
        dtype = model.dtype
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        self._eps: float = config.rms_norm_eps
        self._layers = [_Layer(layer, config.num_attention_heads, dtype) for layer in self._body.layers]
        self._head = _Product([model.lm_head], dtype)

    def __call__(self, tokens: Tensor, positions: Tensor, this: Decode) -> Tensor:
        """tokens, positions (B,) -> logits (B, V) behind one token a row."""
        x = self._body.embed_tokens(tokens)  # (B, C)
        cos, sin = self._body.rotary_emb(x, positions[None])  # (1, B, D)
        half = cos.shape[-1] // 2
        # A head is rotated as x·cos + (−x₂, x₁)·sin; with the sign in the sine, (x₂, x₁) is x shifted by half.
        cos = cos[0, :, None]  # (B, 1, D)
        sin = torch.cat((-sin[0, :, :half], sin[0, :, half:]), -1)[:, None]
        for number, layer in enumerate(self._layers):
            x = layer(x, cos, sin, this, number, self._eps)
        return self._head(_normed(x, self._body.norm.weight, self._eps))


class _Layer:
    def __init__(self, layer: nn.Module, queries: int, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self._size, self._queries, self._scaling = attention.head_dim, queries, attention.scaling
        keys = attention.k_proj.out_features // self._size
        self._rotated = queries + keys
        self._qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj], dtype)
        self._head_norms: Tensor | None = None
        if "q_norm" in dict(attention.named_children()):  # Qwen3
            norms = attention.q_norm.weight.expand(queries, -1), attention.k_norm.weight.expand(keys, -1)
            self._head_norms = torch.cat(norms)  # (Hq + H, D)
        self._out = _Product([attention.o_proj], dtype)
        self._gate_up = _Product([mlp.gate_proj, mlp.up_proj], dtype)
        self._down = _Product([mlp.down_proj], dtype)
        self._before_attention, self._before_mlp = layer.input_layernorm.weight, layer.post_attention_layernorm.weight

    def __call__(self, x: Tensor, cos: Tensor, sin: Tensor, this: Decode, number: int, eps: float) -> Tensor:
        """x (B, C) -> (B, C)."""
        heads = self._qkv(_normed(x, self._before_attention, eps)).unflatten(1, (-1, self._size))  # (B, Hq + 2H, D)
        turned, values = heads[:, : self._rotated], heads[:, self._rotated :]
        if self._head_norms is not None:
            normed = F.rms_norm(turned.float(), (self._size,), None, eps).to(turned.dtype)
            turned = self._head_norms * normed
        turned = torch.addcmul(turned * cos, turned.roll(self._size // 2, -1), sin)
        q, k = turned[:, : self._queries, None], turned[:, self._queries :, None]
        attended = this.attend(number, q, k, values[:, :, None], self._scaling, None)  # (B, 1, Hq, D)
        x = x + self._out(attended.flatten(1))
        gate, up = self._gate_up(_normed(x, self._before_mlp, eps)).chunk(2, -1)
        return x + self._down(F.silu(gate) * up)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm (Zhang & Sennrich 2019), computed in float32. x (B, C)."""
    return weight * F.rms_norm(x.float(), weight.shape, None, eps).to(x.dtype)


class _Product:
    """Linear layers that read the same input, as one: (B, in) -> (B, sum of out)."""

    def __init__(self, linears: Sequence[nn.Module], dtype: torch.dtype) -> None:
        self._dtype = dtype
        weight = torch.cat([linear.weight for linear in linears]).to(dtype)
        biases = [linear.bias for linear in linears]
        self._bias = None if biases[0] is None else torch.cat(biases).to(dtype)
        self._arranged = _arranges(dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, None) if self._arranged else weight

    def __call__(self, x: Tensor) -> Tensor:
        if self._arranged:
            return torch.ops.mkldnn._linear_pointwise.default(
                x.to(self._dtype), self._weight, self._bias, "none", [], ""
            )
        return F.linear(x.to(self._dtype), self._weight, self._bias)


def _arranges(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of this precision with weights that it has arranged."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
