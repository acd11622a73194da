"""The sampling distribution, and the draw from it.

Legend: B rows, V vocabulary.

Sampling is by inversion: a row's uniform number for a position picks the token from the cumulative distribution. It
first sums blocks of the vocabulary, then only the entries of the block that the number falls into. The result is the
same token without a float64 pass over (B, V).
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from data.encode import Encoder

_BLOCK = 64  # vocabulary entries per block


@dataclass(frozen=True)
class SamplingSpec:
    """The distribution of completions: softmax(logits / temperature), optionally truncated and renormalised.

    `temperature` 0 is greedy. Log-probabilities are always those of this distribution (without temperature when
    greedy). `top_k` keeps the k likeliest tokens. `top_p` then keeps the likeliest tokens that together have at least
    this probability (Holtzman et al. 2020, "The curious case of neural text degeneration"). Ties are kept. A policy
    gradient that scores answers under the whole distribution must refuse a spec that is `truncated`.

    `vocab_size`: only ids below it have a token; None: all logits have one. Many models have more rows of embeddings
    than the tokenizer has ids, and an id without a token decodes to nothing. Such ids have probability 0.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...]
    pad_id: int
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    vocab_size: int | None = None

    @classmethod
    def of(cls, encoder: "Encoder", max_new_tokens: int, **more: Any) -> Self:
        """The spec for a model's encoder, whose stop ids, pad id and vocabulary it gets. `more`: the other fields."""
        return cls(max_new_tokens, tuple(encoder.stop_ids), encoder.pad_id, vocab_size=encoder.vocab_size, **more)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"max_new_tokens must be >= 1 and temperature >= 0, not {self}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be >= 1 (or None for all tokens), not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (or None for all tokens), not {self.top_p}")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise ValueError("top_k and top_p have no effect at temperature 0 (greedy); leave them out")

    @property
    def truncated(self) -> bool:
        """Whether the spec sets the probability of some tokens to 0."""
        return self.top_k is not None or (self.top_p is not None and self.top_p < 1)


@dataclass
class Completion:
    """One answer. `ids` ends with the stop token when `end` is "stop"; `logprobs` (nats) is as long as `ids`."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    end: Literal["stop", "length"] = "length"


def draw(logits: Tensor, spec: SamplingSpec, uniforms: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens (B,) and their log-probabilities (B,), fp32, nats, under exactly `spec`.

    logits (B, V); uniforms (B,) float64 in [0, 1), None when greedy. A row with logits that are not finite gets a
    log-probability that is not finite.
    """
    logits = logits[..., : spec.vocab_size].float()
    if uniforms is None:
        best, tokens = logits.max(-1, keepdim=True)
        return tokens.squeeze(-1), -(logits - best).exp_().sum(-1).log()
    if spec.temperature != 1.0:
        logits = logits / spec.temperature
    if spec.truncated:
        logits = _truncated(logits, spec)
    p = torch.softmax(logits, -1)  # (B, V)
    tokens = _inverse(p, uniforms)
    return tokens, p.gather(-1, tokens[:, None]).squeeze(-1).log()


def _inverse(p: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability is above the uniform number. p (B, V), uniforms (B,) -> (B,)."""
    lacking = -p.shape[-1] % _BLOCK
    blocks = (F.pad(p, (0, lacking)) if lacking else p).unflatten(-1, (-1, _BLOCK))  # (B, V / 64, 64)
    cdf = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    # Scaling by the last entry keeps rounding in the sum from ever picking beyond the vocabulary.
    target = uniforms[:, None] * cdf[:, -1:]
    block = _above(cdf, target)
    rows = torch.arange(len(p), device=p.device)
    below = torch.where(block > 0, cdf[rows, block - 1], 0.0)
    within = blocks[rows, block].double().cumsum(-1)  # (B, 64)
    return (block * _BLOCK + _above(within, target - below[:, None])).clamp(max=p.shape[-1] - 1)


def _above(cdf: Tensor, target: Tensor) -> Tensor:
    """The first index whose entry is above the target, at most the first that equals the last entry: (B, N), (B, 1) ->
    (B,).

    So it never picks an entry of probability 0, even if rounding has moved the target to the end, and it returns a
    valid index even if all entries are NaN.
    """
    index = torch.searchsorted(cdf, target, right=True).clamp(max=cdf.shape[-1] - 1)
    return torch.minimum(index, torch.searchsorted(cdf, cdf[:, -1:].contiguous())).squeeze(-1)


def _truncated(logits: Tensor, spec: SamplingSpec) -> Tensor:
    """The logits, with −∞ for tokens that `spec` removes."""
    if spec.top_k is not None and spec.top_k < logits.shape[-1]:
        least = logits.topk(spec.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if spec.top_p is not None and spec.top_p < 1:
        p, order = torch.softmax(logits, -1).sort(dim=-1, descending=True)
        before = p.double().cumsum(-1) - p  # total probability of all likelier tokens
        last = (before < spec.top_p).sum(-1, keepdim=True) - 1
        logits = logits.masked_fill(logits < logits.gather(-1, order.gather(-1, last)), -torch.inf)
    return logits
