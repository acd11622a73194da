"""The section of a recipe that the DPO stage reads."""

from typing import Literal, Self

from pydantic import Field, model_validator

from training.config import TrainConfig, TrainedStageConfig
from training.declaration import (
    LOSS,
    STOP_RATE,
    TOKEN_ACCURACY,
    TRAINER_LINE,
    Chart,
    Declaration,
    HeldModel,
    held_out,
    pair_charts,
)

DECLARATION = Declaration(
    "preference tuning",
    targets=("dpo",),
    compared=TRAINER_LINE,
    answers="aligned",
    headline=(("eval_rewards/accuracies", "of held-out pairs right"), ("eval_stop_rate", "of answers stop")),
    charts=(
        LOSS,
        TOKEN_ACCURACY,
        STOP_RATE,
        *pair_charts("rewards/accuracies", "rewards/margins"),
        Chart(
            "drift of chosen answers",
            (held_out("eval_chosen_logratio_per_token"),),
            "nats per token; far below 0 is collapse",
        ),
    ),
    missing="no DPO to compare with",
)


class Config(TrainedStageConfig):
    """Preference optimisation without a reward model; the parent is the reference. Dropout is off."""

    beta: float = Field(default=0.1, gt=0)
    """Strength of the pull to the reference: the implied reward is beta times the log-ratio."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """DPO (Rafailov et al. 2023), IPO (Azar et al. 2023) or SLiC's hinge."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Share of pairs that are believed to be the wrong way round (`sigmoid` only; the unbiased loss of robust DPO,
    Chowdhury et al. 2024)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of the plain log-likelihood of chosen answers, which keeps it from falling."""
    eval_answers: int = Field(default=32, ge=0)
    """Held-out prompts that are answered greedily before and after, for lengths and the rate of answers that stop."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of such an answer, at most."""
    group_by_length: bool = True
    """Pairs of like length share a step, so that little is padding."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training; its batch sizes count pairs."""

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing is for loss_type sigmoid")
        return self


def parents(config: Config) -> dict[str, str]:
    """Role -> reference."""
    return {"parent": config.parent}


def models(config: Config) -> list[HeldModel]:
    """What the section holds in memory. The policy is its own reference: it reads all pairs before it is trained."""
    return [HeldModel("policy", config.parent, trained=True)]
