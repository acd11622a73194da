"""Metrics of DPO on held-out pairs, as pure functions of log-probabilities. The training loss itself is TRL's."""

from collections.abc import Mapping
from typing import Literal

import numpy as np

LossType = Literal["sigmoid", "ipo", "hinge"]

# Nats per token of the chosen answers, relative to the reference: each token is 1.6 times less likely.
_COLLAPSE = -0.5
_LONGER = 1.5
_FEWER_STOPS = 0.05


def pair_metrics(
    logps: Mapping[str, np.ndarray],
    beta: float,
    loss_type: LossType = "sigmoid",
    label_smoothing: float = 0.0,
    sft_weight: float = 0.0,
) -> dict[str, float]:
    """Held-out metrics under TRL's names; `loss` is the loss that is trained.

    Args:
        logps: (N,) each: `chosen`, `rejected`, `ref_chosen`, `ref_rejected` (sums of nats over the answer's tokens),
            `chosen_tokens`, `rejected_tokens`.
        beta: coefficient of the implied reward beta * (log pi - log pi_ref), Rafailov et al. 2023, eq. 5. The sigmoid
            loss is eq. 7; it is ln 2 when policy and reference are equal.
        loss_type, label_smoothing, sft_weight: as in the recipe.
    """
    chosen_ratio, rejected_ratio = logps["chosen"] - logps["ref_chosen"], logps["rejected"] - logps["ref_rejected"]
    chosen, rejected = beta * chosen_ratio, beta * rejected_ratio
    match loss_type:
        case "sigmoid":
            losses = np.logaddexp(0, rejected - chosen)
            if label_smoothing:  # Chowdhury et al. 2024, eq. 12
                swapped = np.logaddexp(0, chosen - rejected)
                losses = ((1 - label_smoothing) * losses - label_smoothing * swapped) / (1 - 2 * label_smoothing)
        case "hinge":
            losses = np.maximum(0, 1 - (chosen - rejected))
        case "ipo":  # Azar et al. 2023, eq. 17, with ratios per token, as TRL computes them
            per_token = chosen_ratio / logps["chosen_tokens"] - rejected_ratio / logps["rejected_tokens"]
            losses = (per_token - 1 / (2 * beta)) ** 2
    loss = losses.mean()
    if sft_weight:
        loss = loss - sft_weight * logps["chosen"].sum() / logps["chosen_tokens"].sum()
    return {
        "loss": float(loss),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "logps/chosen": float(logps["chosen"].mean()),
        "logps/rejected": float(logps["rejected"].mean()),
        "chosen_logratio_per_token": float(chosen.sum() / beta / logps["chosen_tokens"].sum()),
    }


def alarms(before: Mapping[str, float], after: Mapping[str, float]) -> list[str]:
    """Warnings about known failures of DPO, each with a remedy, from the logged metrics before and after training."""
    found = []
    drift = after["eval_chosen_logratio_per_token"]
    if drift < _COLLAPSE:
        found.append(
            f"chosen answers lost {-drift:.2f} nats a token: the model pushes both answers down. Raise beta, lower the "
            "learning rate, train less, or add sft_weight (0.1 to 1)"
        )
    if "eval_stop_rate" in after:
        was, now = before["eval_answer_tokens"], after["eval_answer_tokens"]
        if now > _LONGER * was:
            found.append(
                f"answers grew from {was:.0f} to {now:.0f} tokens: length may be what was learned. "
                "Compare the lengths of chosen and rejected answers in the data"
            )
        was, now = before["eval_stop_rate"], after["eval_stop_rate"]
        if now < was - _FEWER_STOPS:
            found.append(
                f"fewer answers stop ({was:.2f} before, {now:.2f} now): train less, or look "
                "for chosen answers that are cut off"
            )
    return found
