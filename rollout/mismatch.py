"""How far the engine that sampled and the trainer disagree about the same tokens, and what to do about it.

Legend: B answers, R longest answer; log-probabilities in nats; ρ = exp(trainer − engine), the importance ratio.

Two programs that compute one model never agree to the last bit, and some differences are mistakes: top-p, another
temperature, weights of the step before. The loss takes the engine's samples for the policy's own, so any difference
makes it the loss of another policy. The metrics have the names of TRL's GRPO.
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


@torch.no_grad()
def mismatch_metrics(engine_logp: Tensor, trainer_logp: Tensor, mask: Tensor) -> dict[str, float]:
    """|Δ log p|, ρ before any cap, and the KL divergence of the trainer's policy from the engine's, over all tokens.

    engine_logp, trainer_logp: (B, R) nats; mask: (B, R) bool, at least one token. Under samples of the engine k3,
    ρ − 1 − log ρ, is an unbiased estimate of KL(engine ‖ trainer) (Schulman 2020, "Approximating KL divergence"), and
    ρ has mean 1 as long as the engine reports the very distribution that it samples from and leaves no token out.
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


def check_mismatch(metrics: Mapping[str, float], limit: float) -> None:
    """GateError with the likely causes when the mean |Δ log p| is above `limit` nats, or is no number at all."""
    mean = metrics[DIFFERENCE_MEAN]
    if mean <= limit:
        return
    low, high = metrics[RATIO_MIN], metrics[RATIO_MAX]
    if high <= 1 + limit:
        cause = (
            "The engine finds every token likelier than the trainer does, so it leaves part of the distribution out: "
            "top-p, top-k or min-p are on (in the server's arguments, or the model's generation_config.json)."
        )
    elif abs(metrics[RATIO_MEAN] - 1) <= limit:
        cause = (
            "The ratios average to 1, so the engine samples from what it reports, and that is another policy: stale "
            "weights, another precision (`dtype`), another temperature, or other prompts (another chat template)."
        )
    else:
        cause = (
            "What the engine reports may not be what it samples from: log-probabilities without the temperature (the "
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

    The factor of a token's loss that turns the engine's samples into the trainer's policy's (Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"); the cap bounds the variance. `sequence` is
    unbiased for whole answers and has the higher variance.
    """
    log_ratio = torch.where(mask, trainer_logp - engine_logp, 0.0)  # (B, R)
    if level == "sequence":
        log_ratio = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
    return torch.where(mask, log_ratio.exp().clamp(max=cap), 1.0)
