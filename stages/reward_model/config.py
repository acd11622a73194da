"""The section of a recipe that the reward model stage reads."""

from typing import Self

from pydantic import Field, model_validator

from training.config import Strict, TrainConfig, TrainedStageConfig
from training.declaration import LOSS, TRAINER_LINE, Declaration, HeldModel, pair_charts

DECLARATION = Declaration(
    "reward model",
    targets=("reward",),
    publishes="reward_model",
    compared=TRAINER_LINE,
    headline=(("eval_accuracy", "of held-out pairs right"), ("eval_length_accuracy", "by length alone")),
    charts=(LOSS, *pair_charts("accuracy", "margin")),
    missing="no reward model",
)


class Gate(Strict):
    """What a reward model must reach on held-out pairs to be published. A key that is not given demands nothing."""

    min_accuracy: float | None = Field(default=None, ge=0, le=1)
    """Share of pairs whose better answer scores higher."""
    min_accuracy_low: float | None = Field(default=None, ge=0, le=1)
    """The lower end of that share's 95 % interval."""
    min_over_length: float | None = Field(default=None, ge=-1, le=1)
    """Accuracy less the share that length alone would get right, whichever way round."""
    max_length_correlation: float | None = Field(default=None, ge=0, le=1)
    """Correlation of an answer's score with its length, of either sign."""
    min_probes: float | None = Field(default=None, ge=0, le=1)
    """For each probe, share of pairs whose better answer scores above the same answer spoilt."""
    max_ece: float | None = Field(default=None, ge=0, le=1)
    """Expected calibration error."""


class Config(TrainedStageConfig):
    """A score for prompt and answer, learned from pairs (Bradley and Terry). Dropout is off."""

    seed: int | None = Field(default=None, ge=0, lt=2**32)
    """Of the new head and the order of the data; by default the recipe's. Members of an ensemble differ in it."""
    center_rewards_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean near zero; 0: not used."""
    group_by_length: bool = True
    """Pairs of like length share a step, so that little is padding."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training; its batch sizes count pairs."""
    gate: Gate = Field(default_factory=Gate)
    """Below it the report card is written, the model is not published, and the pipeline stops with exit code 3."""
    ensemble_with: list[str] = Field(default_factory=list)
    """Reward models whose agreement with this one the report card measures; each a section of this recipe or a
    directory."""

    @model_validator(mode="after")
    def _held_out(self) -> Self:
        for key in ("gate", "ensemble_with"):
            if key in self.model_fields_set and not self.eval_data:
                raise ValueError(f"`{key}` is measured on held-out pairs: name them under eval_data")
        if len(set(self.ensemble_with)) != len(self.ensemble_with):
            raise ValueError("`ensemble_with` names one model twice")
        return self


def parents(config: Config) -> dict[str, str]:
    """Role -> reference. That of a model to compare with is `ensemble:` and its reference."""
    return {"parent": config.parent, **{f"ensemble:{ref}": ref for ref in config.ensemble_with}}


def models(config: Config) -> list[HeldModel]:
    """What the section holds in memory; those to compare with are loaded one at a time, after the training."""
    others = [HeldModel("reward", ref, note="compared after the training") for ref in config.ensemble_with]
    return [HeldModel("reward", config.parent, trained=True), *others]
