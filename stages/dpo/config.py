"""The section of a recipe that the DPO stage reads."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from training.config import CHANGED, REHEARSED_ANSWER, TrainConfig, TrainedStageConfig, adapter_note
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
from training.work import Batch, Rollout, Work

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
    methods={"dpo": "dpo"},
    learns="pairs",
    missing="no DPO to compare with",
)


class DPOTrainConfig(TrainConfig):
    """The training of the DPO stage."""

    learning_rate: float = Field(default=1e-6, ge=0)
    """Peak learning rate; the default is that of Rafailov et al. 2023, and TRL's."""


class Config(TrainedStageConfig):
    """Preference optimisation without a reward model; the parent is the reference. Dropout is off."""

    published: ClassVar[Sequence[str]] = (
        "eval_loss",
        "eval_rewards/*",
        "eval_logps/*",
        "eval_chosen_logratio_per_token",
        "eval_stop_rate",
        "eval_answer_tokens",
        *CHANGED,
    )

    beta: float = Field(default=0.1, gt=0)
    """β: the implied reward is β times the log-ratio to the reference; a larger β keeps the policy closer to it."""
    loss_type: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """DPO (Rafailov et al. 2023), IPO (Azar et al. 2023) or SLiC's hinge."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)
    """Assumed share of pairs whose labels are swapped (`sigmoid` only; the unbiased loss of robust DPO, Chowdhury et
    al. 2024)."""
    sft_weight: float = Field(default=0.0, ge=0)
    """Weight of an added log-likelihood loss on chosen answers, which keeps their probability from falling."""
    eval_answers: int = Field(default=32, ge=0)
    """Number of held-out prompts answered greedily in each evaluation, to measure answer length and stop rate."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of such an answer."""
    group_by_length: bool = True
    """Batch pairs of similar length together, to reduce padding."""
    train: DPOTrainConfig = Field(default_factory=DPOTrainConfig)
    """The training; its batch sizes count pairs."""

    @model_validator(mode="after")
    def _smoothing(self) -> Self:
        if self.label_smoothing > 0 and self.loss_type != "sigmoid":
            raise ValueError("label_smoothing is for loss_type sigmoid")
        return self

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: few, short answers, and few pairs, all of which the reference reads."""
        pairs = {f"data.{row}.limit": min(16, one.limit or 16) for row, one in enumerate(self.data)}
        answers = {
            "eval_answers": min(self.eval_answers, 2),
            "max_new_tokens": min(self.max_new_tokens, REHEARSED_ANSWER),
        }
        return {**super().rehearsal(processes), **answers, **pairs}


def parents(config: Config) -> dict[str, str]:
    """Role -> reference."""
    return {"parent": config.parent}


def models(config: Config) -> list[HeldModel]:
    """Models held in memory. There is no separate reference: its log-probabilities are computed before training."""
    return [HeldModel("policy", config.parent, trained=True, note=adapter_note(config.adapter, config.quantization))]


def work(config: Config) -> Work:
    """What the section computes at once. The reference reads every pair before the training."""
    t, answers = config.train, None
    if config.eval_data and config.eval_answers:
        rows = min(t.per_device_eval_batch_size, config.eval_answers)
        answers = Rollout(rows, config.max_length, config.max_new_tokens)
    held = Batch(t.per_device_eval_batch_size, config.max_length, sequences=2)
    batch = Batch(t.per_device_train_batch_size, config.max_length, sequences=2)
    return Work(batch, held, answers, looks=1, **t.amount())
