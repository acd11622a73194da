"""One entry of `tasks:`: what the models are asked, how they answer, and how the answers are scored.

There are four kinds. `answers`: the models write answers to prompts. `choices`: they choose the likeliest of given
answers. `documents`: they read text. `preferences`: they, or reward models, prefer one of two answers. No torch here.
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from data.config import SourceConfig
from reward.config import RewardConfig, check_rewards
from stages.evaluate.shipped import SHIPPED
from training.recipe_text import did_you_mean
from training.strict import Strict

Answering: TypeAlias = Literal["greedy", "sampled"]
QUESTION = "{question}"
_ROWS = ("file", "hub", "stage")
FIELD = re.compile(r"\{\{\w+\}\}|\{(\w+)(?::(words|strip|capitalize))?\}")
"""A field of a prompt's form, `{name}` or `{name:words}`; doubled braces stand for themselves."""
_NAME = r"^[A-Za-z0-9_.-]+$"
_SOLUTIONS = ("answer", "reference", "ground_truth", "solution")


def _template(value: str) -> str:
    """A prompt's form. Raises ValueError if it asks nothing, or shows the right answer."""
    names = [name for name, _ in FIELD.findall(value)]
    if not any(names):
        raise ValueError("write {question} where the row's question goes, or {column} for one of its columns")
    shown = [name for name in names if name in _SOLUTIONS]
    if shown:
        raise ValueError(
            f"{{{shown[0]}}} would show the models the right answer; where it is meant as it stands, write "
            f"{{{{{shown[0]}}}}}"
        )
    return value


class ScoreConfig(RewardConfig):
    """A score, reported under its name: an entry like those of the RL stages' `reward`, plus the kind of answers."""

    on: Literal["greedy", "sampled", "both"] = "sampled"
    """The answers that are scored. `both` reports `<name>_greedy` and `<name>_sampled`. With several sampled answers to
    a prompt, its score is their mean."""
    pass_at: list[int] = Field(default_factory=list)
    """For each k, report `<name>_pass@k`: the share of prompts of which one of k sampled answers is right, that is,
    scores 1; computed without bias from all `num_generations` answers (Chen et al. 2021)."""
    majority_at: list[int] = Field(default_factory=list)
    """For each k, report `<name>_majority@k`: the score of the final answer that most of the first k sampled answers
    give (self-consistency, Wang et al. 2022); of several with as many votes, the mean."""

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        if "weight" in self.model_fields_set:
            raise ValueError("`weight` is for sums; an evaluation reports every score by itself")
        for key, counts in (("pass_at", self.pass_at), ("majority_at", self.majority_at)):
            if counts and self.on == "greedy":
                raise ValueError(f"`{key}` is for sampled answers: set `on` to sampled or both")
            if any(k < 1 for k in counts) or len(set(counts)) < len(counts):
                raise ValueError(f"`{key}` is a list of different numbers from 1")
        return self

    @property
    def metrics(self) -> dict[Answering, str]:
        """{kind of answers that are scored: name of the metric}."""
        if self.on == "both":
            return {"greedy": f"{self.name}_greedy", "sampled": f"{self.name}_sampled"}
        return {self.on: self.name}

    @property
    def of_groups(self) -> dict[str, tuple[Literal["pass", "majority"], int]]:
        """{metric over several answers to a prompt: (which, k)}."""
        passes: dict[str, tuple[Literal["pass", "majority"], int]] = {
            f"{self.name}_pass@{k}": ("pass", k) for k in self.pass_at
        }
        return passes | {f"{self.name}_majority@{k}": ("majority", k) for k in self.majority_at}


class ShotsConfig(Strict):
    """Solved examples before each question."""

    data: list[SourceConfig] = Field(min_length=1)
    """Where they come from; other rows than the task's."""
    count: int = Field(default=5, ge=1)
    """How many: the first ones."""
    by: str | None = None
    """Column: only examples with the question's value of it, such as `subject`."""


class TaskBase(Strict):
    """The keys of every task."""

    measured: ClassVar[Mapping[str, str]] = {}
    """The metrics that are measured anyway, and on what."""

    task: str | None = None
    """A shipped task (docs/tasks.md), which gives the other keys their values; those that are written here come first.
    """
    name: str = Field(pattern=_NAME)
    """Name in the tables; by default that of `task`."""
    data: list[SourceConfig] = Field(min_length=1)
    """Held-out rows."""

    def measured_on(self) -> dict[str, str]:
        """What each metric is measured on."""
        return dict(self.measured)

    def references(self) -> list[str]:
        """The reward models that the task needs."""
        return []


class Grouped(TaskBase):
    """A task whose rows have columns."""

    group_by: str | None = None
    """Column of the rows: the first metric is also reported for each of its values. By default `family`, if the rows
    have it."""


class AnswersTask(Grouped):
    """The models answer prompts, greedily and sampled, and the answers are scored."""

    measured: ClassVar[Mapping[str, str]] = {
        "stop_rate": "greedy",
        "length_tokens": "sampled",
        "kl": "sampled",
        "reference_bits_per_byte": "references",
    }

    kind: Literal["answers"]
    """`answers` is the default."""
    form: Literal["chat", "text"] = "chat"
    """`chat`: a conversation in the model's chat template. `text`: plain text that the model continues, as base models
    are evaluated; examples are separated by blank lines."""
    system: str | None = None
    """A system message before each prompt that has none; with the fields of `prompt`."""
    prompt: str = QUESTION
    """What is asked: `{question}` is the row's last user turn, `{column}` a column of the row. `{column:words}` has
    spaces for its underscores, `{column:strip}` none at its ends, and `{column:capitalize}` one capital, the first."""
    intro: str = ""
    """`form: text` only: what is read before the examples; with the same fields."""
    few_shot: ShotsConfig | None = None
    """Solved examples before each prompt: their answers are those of the rows (column `reference`)."""
    greedy: bool = True
    """Whether each prompt is answered greedily: with the likeliest token at each place."""
    num_generations: int = Field(default=1, ge=0)
    """Sampled answers to each prompt."""
    temperature: float = Field(default=1.0, gt=0)
    """Temperature of the sampled answers. KL is measured on these, the stop rate on the greedy ones."""
    top_k: int | None = Field(default=None, ge=1)
    """Sample from the k most probable tokens only; from all when absent."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    """Sample from the most probable tokens with at least this total probability only; from all when absent."""
    max_prompt_length: int = Field(default=256, ge=1)
    """Longer prompts are dropped and counted."""
    max_new_tokens: int = Field(default=64, ge=1)
    """Maximum tokens of an answer."""
    stop: list[str] = Field(default_factory=list)
    """Texts at which an answer ends, besides the model's own stop tokens: it is cut before the first of them."""
    scores: list[ScoreConfig] = Field(default_factory=list)
    """How answers are scored. Each entry is a metric; an entry whose model the run has not published is left out."""
    vote: Literal["text", "number", "formula", "choice"] = "text"
    """What `majority_at` compares. `text`: the answers without spaces at their ends. `number`, `formula`, `choice`:
    the last number, formula or letter that the answer gives."""
    wins: str | None = None
    """The metric of `scores` by which a model's answers are compared with its parent's, for the win rate."""

    @field_validator("prompt")
    @classmethod
    def _asks(cls, value: str) -> str:
        return _template(value)

    @model_validator(mode="after")
    def _keys_are_read(self) -> Self:
        check_rewards(self.scores)
        names = self.metrics
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two entries give the metric {name}: give one of them another `name:`")
            if name in self.measured:
                raise ValueError(f"{name} is measured anyway, as something else: give the entry another `name:`")
        if self.wins is not None and self.wins not in names:
            raise ValueError(f"wins: {self.wins} is no metric of `scores`; there are {', '.join(names) or 'none'}")
        if self.group_by is not None and not names:
            raise ValueError("`group_by` is not read without `scores`")
        if not self.greedy and not self.num_generations:
            raise ValueError("no answers: set `greedy` to true or `num_generations` above 0")
        for entry in self.scores:
            if "greedy" in entry.metrics and not self.greedy:
                raise ValueError(f"{entry.name} scores greedy answers, and `greedy` is false")
            if "sampled" in entry.metrics and not self.num_generations:
                raise ValueError(f"{entry.name} scores sampled answers, and `num_generations` is 0: set `on: greedy`")
            most = max([*entry.pass_at, *entry.majority_at], default=0)
            if most > self.num_generations:
                raise ValueError(f"{entry.name} needs {most} answers to a prompt: raise `num_generations` to {most}")
        voted = any(entry.majority_at for entry in self.scores)
        given = self.model_fields_set
        if not voted and "vote" in given and self.task is None:
            raise ValueError("`vote` is not read without `majority_at` in an entry of `scores`")
        unread = [key for key in ("temperature", "top_k", "top_p") if key in given and not self.num_generations]
        if unread:
            raise ValueError(f"`{unread[0]}` is not read without sampled answers: `num_generations` is 0")
        if self.form == "text" and self.system is not None:
            raise ValueError("`system` is for `form: chat`; write it into `intro`")
        if self.form == "chat" and self.intro:
            raise ValueError("`intro` is for `form: text`; write it into `system`")
        return self

    @property
    def metrics(self) -> list[str]:
        """The names of all metrics of `scores`, in the recipe's order."""
        return [name for entry in self.scores for name in [*entry.metrics.values(), *entry.of_groups]]

    def measured_on(self) -> dict[str, str]:
        """What each metric is measured on: `greedy` or `sampled` answers, or `references`."""
        found = dict(self.measured)
        if not self.num_generations:
            found["length_tokens"] = "greedy"
        if not self.greedy:
            found["stop_rate"] = "sampled"
        for entry in self.scores:
            found |= {name: kind for kind, name in entry.metrics.items()}
            found |= dict.fromkeys(entry.of_groups, "sampled")
        return found

    def references(self) -> list[str]:
        """The reward models of `scores`."""
        return list(dict.fromkeys(ref for entry in self.scores for ref in entry.references))


class ChoicesTask(Grouped):
    """Questions with answers to choose from. A model's choice is the likeliest after the question, as in
    lm-evaluation-harness: `accuracy` is the share of right ones, `accuracy_norm` that by the likelihood a character."""

    measured: ClassVar[Mapping[str, str]] = {"accuracy": "choices", "accuracy_norm": "choices"}

    kind: Literal["choices"]
    """Chooses the likeliest of the row's answers."""
    prompt: str = "Question: {question}\nAnswer:"
    """What the model reads before a choice; `{question}` is the row's question, `{choices}` its answers as lines `A.
    ...`, `{column}` a column of the row. `{column:words}` has spaces for its underscores, `{column:strip}` none at its
    ends, and `{column:capitalize}` one capital, the first. A space follows, and the choice."""
    intro: str = ""
    """What is read before all that, and before the examples; with the same fields."""
    clean: Literal["nothing", "wikihow"] = "nothing"
    """`wikihow`: take the marks of WikiHow's articles off prompt and choices, as HellaSwag needs it."""
    answer: Literal["text", "letter"] = "text"
    """What is scored: the choice's text, or its letter."""
    few_shot: ShotsConfig | None = None
    """Solved examples before each question, separated by blank lines."""

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, value: str) -> str:
        return _template(value)

    @model_validator(mode="after")
    def _letters_are_listed(self) -> Self:
        if self.answer == "letter" and "{choices}" not in self.prompt:
            raise ValueError(
                "`answer: letter` needs {choices} in `prompt`: the model has to read what the letters mean"
            )
        return self


class DocumentsTask(TaskBase):
    """The models read held-out documents."""

    measured: ClassVar[Mapping[str, str]] = {"bits_per_byte": "documents", "perplexity": "documents"}

    kind: Literal["documents"]
    """Reads text: bits a byte, and perplexity (of a token)."""
    context_length: int = Field(default=512, ge=2)
    """Tokens of a document that the model reads at once: lm-evaluation-harness's `max_length`."""


class PreferencesTask(Grouped):
    """Pairs of answers, of which one is better."""

    measured: ClassVar[Mapping[str, str]] = {"accuracy": "pairs", "likelihood": "pairs"}

    kind: Literal["preferences"]
    """Prefers the chosen or the rejected answer. `accuracy` of a model is that of its implicit reward beta * log(p /
    p_parent), as DPO defines it (Rafailov et al. 2023), where its parent is among `models`; the factor changes no
    order. `likelihood` is that of log p alone. Each entry of `scores` has a row of its own in the table."""
    max_length: int = Field(default=1024, ge=8)
    """Longer pairs (the prompt with the longer answer) are dropped and counted."""
    scores: list[RewardConfig] = Field(default_factory=list)
    """Explicit rewards whose accuracy is measured, too: reward models and functions."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        check_rewards(self.scores)
        for entry in self.scores:
            if "weight" in entry.model_fields_set:
                raise ValueError("`weight` is for sums; an evaluation reports every score by itself")
            if entry.read == "every":
                raise ValueError("`read: every` is not for pairs: their order is that of the answers' last tokens")
        return self

    def references(self) -> list[str]:
        """The reward models of `scores`."""
        return list(dict.fromkeys(ref for entry in self.scores for ref in entry.references))


TaskConfig: TypeAlias = AnswersTask | ChoicesTask | DocumentsTask | PreferencesTask


def with_defaults(raw: Any) -> Any:
    """The entry of a recipe with the values of its shipped task, and its kind, `answers` by default.

    Raises:
        ValueError: there is no such shipped task, or it is of another kind.
    """
    if not isinstance(raw, dict):
        return raw
    name = raw.get("task")
    if not isinstance(name, str):
        return {"kind": "answers", **raw}
    if name not in SHIPPED:
        raise ValueError(
            f"no shipped task {name}"
            + (did_you_mean(name, SHIPPED) or f"; there are {', '.join(SHIPPED)}")
            + " A task of your own has no key `task`, but a `name`"
        )
    shipped = SHIPPED[name]
    if raw.get("kind", shipped.kind) != shipped.kind:
        raise ValueError(f"the shipped task {name} is of kind {shipped.kind}; leave `kind` out")
    data = raw.get("data")
    if isinstance(data, list):
        data = [
            {**shipped.source, **one} if isinstance(one, dict) and one.get("source") in _ROWS else one for one in data
        ]
    keys = {"name": name, "kind": shipped.kind, **shipped.keys, **raw}
    return keys if data is None else {**keys, "data": data}
