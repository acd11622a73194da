"""The section of a recipe that the generation stage reads."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from data.config import SourceConfig
from reward.config import RewardConfig, check_rewards
from training.config import REHEARSED_ANSWER, ModelArguments, StageConfig
from training.declaration import Declaration, HeldModel
from training.work import Rollout, Work

DECLARATION = Declaration(
    "sampled answers",
    targets=("generate",),
    publishes="dataset",
    journal="answers.jsonl",
    headline=(("rows", "rows"), ("kept/score", "score of the rows"), ("stop_rate", "of answers stop")),
)


class Config(StageConfig):
    """Sampled answers to prompts, with scores, as rows for other sections: `data: [{source: stage, name: ...}]`."""

    published: ClassVar[Sequence[str]] = (
        "rows",
        "answers",
        "stop_rate",
        "length_tokens",
        "score",
        "scores/*",
        "kept/*",
        "dropped/*",
    )
    publishes_rows: ClassVar[bool] = True
    without_effect: ClassVar[frozenset[str]] = frozenset({"batch_size"})

    parent: str
    """The model that answers."""
    chat_template: str | None = None
    """Which of the parent's chat templates to use, by name, where its tokenizer has several; by default the one named
    `default`."""
    data: list[SourceConfig] = Field(min_length=1)
    """Prompts."""
    num_generations: int = Field(default=4, ge=1)
    """Number of answers to each prompt."""
    scores: list[RewardConfig] = Field(default_factory=list)
    """How answers are scored: entries like those of the RL stages' `reward`, summed by weight."""
    keep: Literal["all", "best"] = "all"
    """`best`: keep each prompt's answer with the highest score, the first one of a tie (rejection sampling)."""
    min_score: float | None = None
    """Answers with a lower score are left out and counted."""
    unfinished: Literal["drop", "keep"] = "drop"
    """Answers that reached `max_new_tokens` without a stop token: left out and counted, or kept with `stopped: false`.
    A model that is tuned on such answers learns to stop in mid-sentence."""
    temperature: float = Field(default=1.0, ge=0)
    """Sampling temperature; 0: greedy, with one answer per prompt."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most probable tokens only; from all when absent."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the most probable tokens with at least this total probability only; from all when absent."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Maximum tokens of a prompt; longer prompts are dropped and counted."""
    max_drop_fraction: float = Field(default=0.5, ge=0, le=1)
    """The stage refuses to start if more than this share of the prompts was dropped."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of an answer."""
    batch_size: int = Field(default=64, ge=1)
    """Answers decoded at once by one process."""
    model_args: ModelArguments = Field(default_factory=ModelArguments)
    """How the weights are loaded."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        check_rewards(self.scores)
        if not self.scores:
            if self.keep == "best":
                raise ValueError("`keep: best` chooses by score: name what the answers are scored by under `scores`")
            if self.min_score is not None:
                raise ValueError("`min_score` is not read without `scores`")
        if self.temperature == 0:
            if self.num_generations > 1:
                raise ValueError("temperature 0 gives the same answer every time: set num_generations to 1")
            if self.top_k is not None or self.top_p is not None:
                raise ValueError("top_k and top_p are not read where temperature is 0")
        return self

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: short answers, all of which are kept, since random weights never stop."""
        return {
            **super().rehearsal(processes),
            "num_generations": min(self.num_generations, 2),
            "max_new_tokens": min(self.max_new_tokens, REHEARSED_ANSWER),
            "batch_size": min(self.batch_size, 8),
            "unfinished": "keep",
            **({"min_score": None} if self.min_score is not None else {}),
        }


def parents(config: Config) -> dict[str, str]:
    """Role -> reference. A reward model's role is `reward:` and its reference."""
    return {"parent": config.parent, **{f"reward:{ref}": ref for entry in config.scores for ref in entry.references}}


def models(config: Config) -> list[HeldModel]:
    """The model that answers, and the reward models."""
    scorers = dict.fromkeys(ref for entry in config.scores for ref in entry.references)
    return [HeldModel("policy", config.parent), *(HeldModel("reward", ref) for ref in scorers)]


def work(config: Config) -> Work:
    """What the section computes at once."""
    answers = Rollout(config.batch_size, config.max_prompt_length, config.max_new_tokens, config.num_generations)
    return Work(None, None, answers, looks=config.num_generations, measure_key="batch_size")
