"""Measures how far the sampling engine and the trainer disagree about the same tokens, and corrects for it.

Legend: B answers, R longest answer; log-probabilities in nats; ρ = exp(trainer − engine), the importance ratio.

Two implementations of one model never agree to the last bit, and some differences are mistakes: top-p, another
temperature, stale weights. The loss treats the engine's samples as the policy's own, so any difference makes the update
off-policy. The metrics are named as in TRL's GRPO.
"""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from handoff.errors import GateError

DIFFERENCE_MEAN = "sampling/sampling_logp_difference/mean"
DIFFERENCE_MAX = "sampling/sampling_logp_difference/max"
RATIO_MIN = "sampling/importance_sampling_ratio/min"
RATIO_MEAN = "sampling/importance_sampling_ratio/mean"
RATIO_MAX = "sampling/importance_sampling_ratio/max"
KL = "sampling/kl"
_CLOSE = 0.05  # how far from 1 ratios may be that should be 1


@torch.no_grad()
def mismatch_metrics(engine_logp: Tensor, trainer_logp: Tensor, mask: Tensor) -> dict[str, float]:
    """|Δ log p|, ρ before any cap, and the KL divergence of the trainer's policy from the engine's, over all tokens.

    engine_logp, trainer_logp: (B, R) nats; mask: (B, R) bool, at least one token. With the engine's samples, k3,
    ρ − 1 − log ρ, is an unbiased estimate of KL(engine ‖ trainer) (Schulman 2020, "Approximating KL divergence"), and
    ρ has mean 1 as long as the engine reports the distribution that it samples from, without truncating it.
    """
    log_ratio = (trainer_logp - engine_logp)[mask].double()  # (tokens,)
    ratio = log_ratio.exp()
    return {
        DIFFERENCE_MEAN: log_ratio.abs().mean().item(),
        DIFFERENCE_MAX: log_ratio.abs().max().item(),
        RATIO_MIN: ratio.min().item(),
        RATIO_MEAN: ratio.mean().item(),
        RATIO_MAX: ratio.max().item(),
        KL: (ratio - 1 - log_ratio).mean().item(),
    }


def usual_limit(bf16: bool) -> float:
    """The limit for `check_mismatch`, in nats. `bf16`: the forward passes run in bfloat16.

    bfloat16 has 8 bits of significand, so logits between 16 and 32 are 0.125 apart, and two implementations that round
    differently disagree by some hundredths of a nat: 0.04 to 0.06 was measured on SmolLM2-135M.
    """
    return 0.15 if bf16 else 0.05


def check_mismatch(metrics: Mapping[str, float], limit: float) -> None:
    """Raises GateError with the likely causes if the mean |Δ log p| is above `limit` nats or not a number."""
    mean = metrics[DIFFERENCE_MEAN]
    if mean <= limit:
        return
    low, high = metrics[RATIO_MIN], metrics[RATIO_MAX]
    if high <= 1 + _CLOSE:
        cause = (
            "The engine finds every token likelier than the trainer does, so it truncates the distribution: "
            "top-p, top-k or min-p are on (in the server's arguments, or the model's generation_config.json)."
        )
    elif abs(metrics[RATIO_MEAN] - 1) <= _CLOSE:
        cause = (
            "The ratios average to 1, so the engine reports what it samples from, but that is another policy: stale "
            "weights, another precision (`dtype`), another temperature, or other prompts (another chat template)."
        )
    else:
        cause = (
            "The engine may not report what it samples from: log-probabilities without the temperature (the "
            "server needs `--logprobs-mode processed_logprobs`), or a penalty. Or it has stale weights, another "
            "precision (`dtype`) or another chat template."
        )
    raise GateError(
        f"engine and trainer disagree about the sampled tokens by {mean:.3g} nats on average, above the limit of "
        f"{limit:g} (ratios trainer/engine from {low:.3g} to {high:.3g}, mean {metrics[RATIO_MEAN]:.3g}). {cause}"
    )


@torch.no_grad()
def truncated_importance_weights(
    engine_logp: Tensor, trainer_logp: Tensor, mask: Tensor, cap: float, level: Literal["token", "sequence"] = "token"
) -> Tensor:
    """min(ρ, cap) of each token, or of each answer's product of ratios: (B, R); 1 where `mask` is off.

    Weights each token's loss to correct for sampling from the engine instead of the trainer's policy (Yao et al. 2025,
    "Your efficient RL framework secretly brings you off-policy RL training"). The cap bounds the variance. `sequence`
    is unbiased for whole answers but has higher variance.
    """
    log_ratio = torch.where(mask, trainer_logp - engine_logp, 0.0)  # (B, R)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 1.0)
