"""The section of a recipe that the evaluation stage reads."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import BeforeValidator, Field, model_validator

from data.config import SourceConfig
from reward.config import check_rewards
from stages.evaluate.gates import EvaluationGate, check_tasks
from stages.evaluate.tasks import (
    AnswersTask,
    ChoicesTask,
    DocumentsTask,
    PreferencesTask,
    TaskConfig,
    with_defaults,
)
from training.config import REHEARSED_ANSWER, ModelArguments, StageConfig
from training.declaration import COMPARED, Declaration, HeldModel
from training.work import Batch, Rollout, Work

DECLARATION = Declaration(
    "evaluation",
    targets=("eval",),
    publishes="evaluation",
    headline=(("models", "models compared"), ("items", "items")),
    methods={"sft": "evaluate", "dpo": "evaluate", "grpo": "evaluate", "rlhf": "evaluate"},
    missing="no evaluation, so no intervals, win rates or answers side by side",
)

_OF_TASKS = (
    "data",
    "scores",
    "wins",
    "group_by",
    "max_prompt_length",
    "max_new_tokens",
    "temperature",
    "context_length",
)
_PLACE = "is a key of a task: `tasks: [{name: ..., data: [...]}]`"


class Config(StageConfig):
    """Evaluates all `models` on the same tasks; those that the run has not published are reported and left out."""

    published: ClassVar[Sequence[str]] = ("models", "items")
    without_effect: ClassVar[frozenset[str]] = frozenset({"batch_size"})
    refused: ClassVar[Mapping[str, str]] = {
        "reward": "scores are a list: `tasks: [{name: ..., data: [...], scores: [{model: NAME, reencode: true}]}]`",
        **dict.fromkeys(_OF_TASKS, _PLACE),
        "text": "held-out documents are a task: `tasks: [{name: ..., kind: documents, data: [...]}]`",
        "multiple_choice": "questions are a task: `tasks: [{name: ..., kind: choices, data: [...]}]`",
    }

    models: list[str] = Field(min_length=1)
    """Sections of this recipe, checkpoint directories, or model ids of the hub, in the order of the table."""
    tasks: list[Annotated[Annotated[TaskConfig, Field(discriminator="kind")], BeforeValidator(with_defaults)]] = Field(
        default_factory=list
    )
    """What the models are evaluated on (docs/stages/evaluate.md)."""
    gate: EvaluationGate = Field(default_factory=EvaluationGate)
    """What the models must reach (docs/gates.md). If they do not, the evaluation is kept aside, the one that was
    published before stays, and the pipeline stops with exit code 3."""
    lm_eval: list[str] = Field(default_factory=list)
    """Tasks of lm-evaluation-harness, by name, which it runs on each model as it does by itself (extra `eval`)."""
    lm_eval_path: str | None = None
    """Folder with the YAML files of these tasks, relative to the working directory; without one, they are the
    harness's own, whose data it fetches from the hub. The result depends on every file below it."""
    batch_size: int = Field(default=64, ge=1)
    """Rows decoded or scored at once by one process."""
    samples: int = Field(default=12, ge=0)
    """Number of prompts of a task whose answers appear in the report."""
    model_args: ModelArguments = Field(default_factory=ModelArguments)
    """How the weights are loaded."""

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        if not self.tasks and not self.lm_eval:
            raise ValueError("nothing to evaluate: give `tasks`, or `lm_eval`")
        if self.lm_eval_path is not None and not self.lm_eval:
            raise ValueError("`lm_eval_path` is not read without `lm_eval`")
        names = [*(task.name for task in self.tasks), *self.lm_eval]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks are called {name}: give one of them another `name:`")
        # A reward model is loaded once for all tasks.
        entries = [
            entry for task in self.tasks if not isinstance(task, ChoicesTask | DocumentsTask) for entry in task.scores
        ]
        check_rewards(*([entry] for entry in entries))
        check_tasks(self.gate, self.tasks, self.models)
        return self

    def folders(self) -> list[str]:
        """The folder with the harness's tasks."""
        return [] if self.lm_eval_path is None else [self.lm_eval_path]

    def main_data(self) -> list[SourceConfig]:
        """The data of all tasks."""
        return [source for task in self.tasks for source in task.data]

    def references(self) -> list[str]:
        """The reward models of all tasks."""
        return list(dict.fromkeys(ref for task in self.tasks for ref in task.references()))

    def compared_with_parents(self) -> list[str]:
        """As `StageConfig.compared_with_parents`: those of the gate."""
        return [entry.model for entry in self.gate.tasks if entry.no_worse_than is not None and entry.model is not None]

    def rehearsal(self, processes: int) -> dict[str, Any]:
        """As `StageConfig.rehearsal`: short answers."""
        short = {
            f"tasks.{i}.max_new_tokens": min(task.max_new_tokens, REHEARSED_ANSWER)
            for i, task in enumerate(self.tasks)
            if isinstance(task, AnswersTask)
        }
        return {**super().rehearsal(processes), **short, "batch_size": min(self.batch_size, 8)}


def parents(config: Config) -> dict[str, str]:
    """No parent is required; the stage evaluates the models that exist."""
    return {}


def soft_parents(config: Config) -> dict[str, str]:
    """Role -> reference of models that are used if they exist: `models:` and `reward:`, each with its reference."""
    models = {f"{COMPARED}{ref}": ref for ref in config.models}
    return models | {f"reward:{ref}": ref for ref in config.references()}


def models(config: Config) -> list[HeldModel]:
    """Models that the section holds in memory; policies are loaded one at a time."""
    policies = [HeldModel("policy", name, note="one at a time", in_turn=True) for name in config.models]
    return [*policies, *(HeldModel("reward", ref) for ref in config.references())]


def work(config: Config) -> Work:
    """What the section computes at once."""
    rows, length, scored = config.batch_size, 2, 1
    longest = Rollout(rows, 1, 1)
    for task in config.tasks:
        if isinstance(task, AnswersTask):
            answers = Rollout(rows, task.max_prompt_length, task.max_new_tokens, max(task.num_generations, 1))
            if answers.prompt + answers.answer > longest.prompt + longest.answer:
                longest = answers
            length = max(length, answers.prompt + answers.answer)
            scored = max(scored, task.max_new_tokens)
        elif isinstance(task, DocumentsTask):
            length = max(length, task.context_length)
        elif isinstance(task, PreferencesTask):
            length, scored = max(length, task.max_length), max(scored, task.max_length)
    batch = Batch(rows, length, scored=scored, head="actions")
    return Work(None, batch, longest, looks=2, measure_key="batch_size")
