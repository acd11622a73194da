"""The section of a recipe that the reward model stage reads."""

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from training.config import CHANGED, TrainConfig, TrainedStageConfig, adapter_note
from training.declaration import LOSS, TRAINER_LINE, Declaration, HeldModel, pair_charts
from training.gates import Gate
from training.work import Batch, Work

DECLARATION = Declaration(
    "reward model",
    targets=("reward",),
    publishes="reward_model",
    compared=TRAINER_LINE,
    headline=(("eval_accuracy", "of held-out pairs right"), ("eval_length_alone", "by length alone")),
    charts=(LOSS, *pair_charts("accuracy", "margin")),
    methods={"rlhf": "reward"},
    missing="no reward model",
)


class CardGate(Gate):
    """Conditions on held-out pairs under which the reward model is published. A key that is absent is not checked."""

    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Minimum accuracy: share of pairs whose better answer scores higher."""
    min_accuracy_low: float | None = Field(default=None, ge=0, le=1)
    """Minimum lower end of the accuracy's 95 % interval."""
    min_over_length: float | None = Field(default=None, ge=-1, le=1)
    """Minimum difference between the accuracy and that of always choosing the longer, or always the shorter, answer."""
    max_length_correlation: float | None = Field(default=None, ge=0, le=1)
    """Maximum absolute correlation between an answer's score and its length."""
    min_probes: float | None = Field(default=None, ge=0, le=1)
    """Minimum share, for each probe, of pairs whose better answer scores higher than a spoilt copy of it."""
    max_ece: float | None = Field(default=None, ge=0, le=1)
    """Maximum expected calibration error."""


class RewardTrainConfig(TrainConfig):
    """The training of the reward model stage."""

    learning_rate: float = Field(default=1e-5, ge=0)
    """Peak learning rate; the default is that of Touvron et al. 2023 (Llama 2, section 3.2.2)."""


class Config(TrainedStageConfig):
    """A score for prompt and answer, learned from pairs (Bradley and Terry). Dropout is off."""

    published: ClassVar[Sequence[str]] = (
        "eval_loss",
        "eval_margin",
        "eval_accuracy*",
        "eval_length_a*",
        "eval_score_length_correlation",
        "eval_ece",
        "eval_over_length",
        "eval_beats_*",
        *CHANGED,
    )

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Seed of the new head and of the data order; by default the recipe's. Give each member of an ensemble another."""
    center_rewards_coefficient: float = Field(default=0.01, ge=0)
    """Weight of a loss on the squared sum of a pair's scores, which keeps the mean score near zero; 0: no such loss."""
    group_by_length: bool = True
    """Batch pairs of similar length together, to reduce padding."""
    train: RewardTrainConfig = Field(default_factory=RewardTrainConfig)
    """The training; its batch sizes count pairs."""
    gate: CardGate = Field(default_factory=CardGate)
    """What the model must reach to be published (docs/gates.md). If it does not, it is kept aside with its report card,
    what was published before stays, and the pipeline stops with exit code 3."""
    ensemble_with: list[str] = Field(default_factory=list)
    """Reward models (sections of this recipe or directories) whose agreement with this one the report card gives."""

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        for key in ("gate", "ensemble_with"):
            if key in self.model_fields_set and not self.eval_data:
                raise ValueError(f"`{key}` is measured on held-out pairs: name them under eval_data")
        if len(set(self.ensemble_with)) != len(self.ensemble_with):
            raise ValueError("`ensemble_with` names one model twice")
        return self


def parents(config: Config) -> dict[str, str]:
    """Role -> reference. The role of a model of `ensemble_with` is `ensemble:` and its reference."""
    return {"parent": config.parent, **{f"ensemble:{ref}": ref for ref in config.ensemble_with}}


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory; those of `ensemble_with` are loaded one at a time, after training."""
    others = [
        HeldModel("reward", ref, note="compared after the training", in_turn=True) for ref in config.ensemble_with
    ]
    return [
        HeldModel("reward", config.parent, trained=True, note=adapter_note(config.adapter, config.quantization)),
        *others,
    ]


def work(config: Config) -> Work:
    """What the section computes at once."""
    t = config.train
    batch = Batch(t.per_device_train_batch_size, config.max_length, sequences=2, scored=0)
    held = Batch(t.per_device_eval_batch_size, config.max_length, scored=0)
    return Work(batch, held, **t.amount())
