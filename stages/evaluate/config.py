"""The section of a recipe that the evaluation stage reads."""

from typing import Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from data.config import SourceConfig
from reward.config import RewardConfig, check_rewards
from training.config import REHEARSED_ANSWER, ModelArguments, StageConfig, Strict
from training.declaration import COMPARED, Declaration, HeldModel
from training.work import Batch, Rollout, Work

DECLARATION = Declaration(
    "evaluation",
    targets=("eval",),
    publishes="evaluation",
    headline=(("models", "models compared"), ("prompts", "prompts")),
    methods={"sft": "evaluate", "dpo": "evaluate", "grpo": "evaluate", "rlhf": "evaluate"},
    missing="no evaluation, so no intervals, win rates or answers side by side",
)

Answering: TypeAlias = Literal["greedy", "sampled"]
MEASURED: dict[str, str] = {
    "stop_rate": "greedy",
    "length_tokens": "sampled",
    "kl": "sampled",
    "bits_per_byte": "documents",
    "reference_bits_per_byte": "references",
}
"""Metrics that are measured where there is something to measure, and on what: the kind of answers, the documents, or
the answers that the rows themselves have."""


class ScoreConfig(RewardConfig):
    """A score, reported under its name: an entry like those of the RL stages' `reward`, plus the kind of answers."""

    on: Literal["greedy", "sampled", "both"] = "sampled"
    """The answers that are scored. `both` reports `<name>_greedy` and `<name>_sampled`."""

    @model_validator(mode="after")
    def _has_no_weight(self) -> Self:
        if "weight" in self.model_fields_set:
            raise ValueError("`weight` is for sums; an evaluation reports every score by itself")
        return self

    @property
    def metrics(self) -> dict[Answering, str]:
        """{kind of answers that are scored: name of the metric}."""
        if self.on == "both":
            return {"greedy": f"{self.name}_greedy", "sampled": f"{self.name}_sampled"}
        return {self.on: self.name}


class ChoiceConfig(Strict):
    """One set of questions with answers to choose from, reported as `<name>` and `<name>_norm`."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Name of the metric."""
    data: list[SourceConfig] = Field(min_length=1)
    """Rows with a question, its choices and the right one, as ARC, MMLU, OpenBookQA and HellaSwag have them."""
    prompt: str = "Question: {question}\nAnswer:"
    """What the model reads before a choice; `{question}` is the row's question. A space follows, and the choice."""

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, value: str) -> str:
        if value.count("{question}") != 1:
            raise ValueError("write {question} once, where the row's question goes")
        return value

    @property
    def metrics(self) -> tuple[str, str]:
        """Names of the two accuracies."""
        return self.name, f"{self.name}_norm"


class Config(StageConfig):
    """Evaluates all `models` on the same prompts; those that the run has not published are reported and left out."""

    without_effect: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    refused = dict.fromkeys(("reward",), "scores are a list: `scores: [{model: NAME, reencode: true}]`")

    models: list[str] = Field(min_length=1)
    """Sections of this recipe, checkpoint directories, or model ids of the hub, in the order of the table."""
    data: list[SourceConfig] = Field(min_length=1)
    """Held-out prompts."""
    text: list[SourceConfig] = Field(default_factory=list)
    """Held-out documents, for bits per byte."""
    multiple_choice: list[ChoiceConfig] = Field(default_factory=list)
    """Questions with answers to choose from. A model's choice is the likeliest after the question, as in
    lm-evaluation-harness: `<name>` is the share of right ones, `<name>_norm` that by the likelihood a character."""
    scores: list[ScoreConfig] = Field(default_factory=list)
    """How answers are scored. Each entry is a metric; an entry whose model the run has not published is left out."""
    wins: str | None = None
    """The metric of `scores` by which a model's answers are compared with its parent's, for the win rate."""
    group_by: str | None = None
    """Column of the prompts. The first metric of `scores` is also reported for each of its values. By default `family`,
    if the prompts have it."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longer prompts are dropped and counted."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of an answer."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled answers. KL is measured on these, the stop rate on the greedy ones."""
    context_length: int = Field(default=512, ge=2)
    """Tokens of a document that the model reads at once for bits per byte: lm-evaluation-harness's `max_length`."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded or scored at once by one process."""
    samples: int = Field(default=12, ge=0)
    """Number of prompts whose answers appear in the report."""
    model_args: ModelArguments = Field(default_factory=ModelArguments)
    """How the weights are loaded."""

    @model_validator(mode="after")
    def _names_are_metrics(self) -> Self:
        check_rewards(self.scores)
        names = self.metrics
        every = [*names, *(metric for entry in self.multiple_choice for metric in entry.metrics)]
        for name in every:
            if every.count(name) > 1:
                raise ValueError(f"two entries give the metric {name}: give one of them another `name:`")
            if name in MEASURED:
                raise ValueError(f"{name} is measured anyway, as something else: give the entry another `name:`")
        if self.wins is not None and self.wins not in names:
            raise ValueError(f"wins: {self.wins} is no metric of `scores`; there are {', '.join(names) or 'none'}")
        if self.group_by is not None and not names:
            raise ValueError("`group_by` is not read without `scores`")
        return self

    def measured_on(self) -> dict[str, str]:
        """What each metric is measured on: `greedy` or `sampled` answers, `documents`, `references`, or `choices`."""
        scores = {name: kind for entry in self.scores for kind, name in entry.metrics.items()}
        return MEASURED | scores | {name: "choices" for entry in self.multiple_choice for name in entry.metrics}

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: short answers."""
        answer = min(self.max_new_tokens, REHEARSED_ANSWER)
        return {**super().rehearsal(processes), "max_new_tokens": answer, "batch_size": min(self.batch_size, 8)}

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics of `scores`, in the recipe's order."""
        return [name for entry in self.scores for name in entry.metrics.values()]


def parents(config: Config) -> dict[str, str]:
    """No parent is required; the stage evaluates the models that exist."""
    return {}


def soft_parents(config: Config) -> dict[str, str]:
    """Role -> reference of models that are used if they exist: `models:` and `reward:`, each with its reference."""
    models = {f"{COMPARED}{ref}": ref for ref in config.models}
    return models | {f"reward:{ref}": ref for entry in config.scores for ref in entry.references}


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory; policies are loaded one at a time."""
    scorers = dict.fromkeys(ref for entry in config.scores for ref in entry.references)
    policies = [HeldModel("policy", name, note="one at a time", in_turn=True) for name in config.models]
    return [*policies, *(HeldModel("reward", ref) for ref in scorers)]


def work(config: Config) -> Work:
    """What the section computes at once."""
    rows = config.batch_size
    length = max(config.max_prompt_length + config.max_new_tokens, config.context_length if config.text else 0)
    answers = Rollout(rows, config.max_prompt_length, config.max_new_tokens)
    batch = Batch(rows, length, scored=config.max_new_tokens, head="actions")
    return Work(None, batch, answers, looks=2, measure_key="batch_size")
