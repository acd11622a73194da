"""The section of a recipe that the evaluation stage reads."""

from pydantic import Field

from data.config import SourceConfig
from training.config import ModelArguments, StageConfig
from training.declaration import Declaration, HeldModel

DECLARATION = Declaration(
    "evaluation",
    targets=("eval",),
    publishes="evaluation",
    missing="no evaluation, so no intervals, win rates or answers side by side",
)


class Config(StageConfig):
    """The same prompts for every model; those of `models` that the run has not made are left out, and said."""

    models: list[str] = Field(min_length=1)
    """Sections of this recipe, in the order of the table."""
    data: list[SourceConfig] = Field(min_length=1)
    """Held-out prompts. The embedded world's are graded; others are scored by `reward` alone."""
    text: list[SourceConfig] = Field(default_factory=list)
    """Held-out documents, for bits per byte."""
    reward: str | None = None
    """A reward-model section whose score is reported, and decides wins where nothing is graded."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longer prompts are dropped and counted."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Tokens of an answer, at most."""
    temperature: float = Field(default=1.0, gt=0)
    """Of the sampled answers, on which gold, reward, KL and wins are measured. Accuracy and stopping are greedy."""
    context_length: int = Field(default=512, ge=2)
    """Tokens that a document's token is predicted from, at most."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded or scored at once by one process."""
    samples: int = Field(default=12, ge=0)
    """Prompts whose answers are kept for the report."""
    model_args: ModelArguments = Field(default_factory=ModelArguments)
    """How the weights are loaded."""


def parents(config: Config) -> dict[str, str]:
    """None is needed: what is there is evaluated."""
    return {}


def soft_parents(config: Config) -> list[str]:
    """Sections that are looked at where they exist."""
    return [*config.models, *([config.reward] if config.reward is not None else [])]


def models(config: Config) -> list[HeldModel]:
    """What the section holds in memory, one policy at a time."""
    scorer = [] if config.reward is None else [HeldModel("reward", config.reward)]
    return [*(HeldModel("policy", name, note="one at a time") for name in config.models), *scorer]
