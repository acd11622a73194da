"""The section of a recipe that the reward model stage reads."""

from pydantic import Field

from stages.config import TrainConfig, TrainedStageConfig


class Config(TrainedStageConfig):
    """A score for prompt and answer, learned from pairs (Bradley and Terry). Dropout is off."""

    center_rewards_coefficient: float = Field(default=0.01, ge=0)
    """Weight of the squared sum of a pair's scores, which keeps their mean near zero; 0: not used."""
    group_by_length: bool = True
    """Pairs of like length share a step, so that little is padding."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    """The training; its batch sizes count pairs."""


def parents(config: Config) -> dict[str, str]:
    """Role -> reference."""
    return {"parent": config.parent}
