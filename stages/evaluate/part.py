"""What every kind of task has in common: it is prepared, each model answers it, and its numbers become a table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from handoff.parent import Parent
from reward.config import RewardConfig
from reward.learned import LearnedReward
from stages.evaluate import tables
from stages.evaluate.answers import Answer
from stages.evaluate.statistics import Items
from stages.evaluate.tasks import TaskConfig
from training.model import Model
from training.rewards import Scorer, load_rewards
from training.run import Run

C = TypeVar("C", bound=TaskConfig)
R = TypeVar("R", bound=RewardConfig)


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated."""

    name: str
    parent: Parent
    encoder: Encoder
    """Each model has its own: a foreign one keeps its template."""


@dataclass
class Scorers:
    """The reward models, which are loaded once for all tasks."""

    present: Mapping[str, Parent]
    """Those that the run has published, by reference."""
    learned: dict[str, LearnedReward] = field(default_factory=dict)
    frozen: list[Model] = field(default_factory=list)

    def there(self, run: Run, task: str, entries: Sequence[R]) -> list[R]:
        """The entries whose reward models have been published; the others are reported and left out."""
        found = []
        for entry in entries:
            missing = [ref for ref in entry.references if ref not in self.present]
            if missing:
                run.console.print(f"  {task}: score {entry.name} is left out, {', '.join(missing)} is not in this run")
            else:
                found.append(entry)
        return found

    def scorer(
        self, run: Run, entries: Sequence[RewardConfig], policies: Sequence[Parent], prompts: Sequence[EncodedPrompt]
    ) -> Scorer:
        """Scores by these entries. A faulty one raises its error here, before any prompt is answered."""
        present, args = self.present.__getitem__, run.config.model_args
        shared: dict[str, Any] = {"bf16": False, "learned": self.learned, "frozen": self.frozen}
        rewards = load_rewards(run.engine, entries, present, policies, prompts, args, **shared)
        return Scorer(rewards, run.engine, self.frozen)


class Part(ABC):
    """One task of an evaluation while it runs.

    A subclass's constructor reads and encodes everything and loads the rewards, so that mistakes are found before any
    model answers.
    """

    def __init__(self, run: Run, name: str, kind: str, key: str, subjects: Sequence[Subject]) -> None:
        """`key`: that of the section which names the task, for messages."""
        self.run, self.name, self.kind, self.subjects = run, name, kind, subjects
        self.place = f"{run.section.name}.{key}"
        self.batch_size: int = run.config.batch_size
        self.steps = 0
        """What one model's `measure` advances the progress by."""
        self.column, self.keys = "", list[str | None]()
        """The column that groups the items, and each item's group."""

    needs_parent = False
    """Whether `against` is called."""

    @abstractmethod
    def measure(self, subject: Subject, model: PreTrainedModel, advance: Callable[[int], None]) -> None:
        """Measures a model. Every process calls it."""

    def against(self, subject: Subject, parent: PreTrainedModel) -> None:
        """Compares a measured model with its parent, which was measured before. Every process calls it."""
        raise NotImplementedError

    def finish(self, subject: Subject) -> None:
        """Called when a model's weights are no longer in memory. Every process calls it."""
        for line in tables.unscored(f"{subject.name}: {self.name}", self.items()[subject.name]):
            self.run.console.print(f"  {line}")

    @abstractmethod
    def items(self) -> dict[str, dict[str, Items]]:
        """{model: {metric: values of all items}}."""

    @abstractmethod
    def answers(self) -> Iterable[Answer]:
        """Every answer."""

    def more(self, origins: Mapping[str, str]) -> dict[str, Any]:
        """What results.json holds besides the metrics. `origins`: {model: its parent}."""
        return {}

    def results(self, origins: Mapping[str, str]) -> dict[str, Any]:
        """The task's entry in results.json."""
        items, seed = self.items(), self.run.seed
        first = self.first_metric()
        groups = tables.groups(seed, first, self.keys, items) if first is not None else {}
        return {
            "kind": self.kind,
            "about": self.about(),
            "models": list(items),
            "on": self.measured_on(),
            "metrics": tables.metrics(seed, items),
            "changes": tables.changes(seed, origins, items),
            "families": groups,
            "grouped": {"column": self.column, "metric": first} if groups else None,
            "win_rates": {},
            "samples": [],
            **self.more(origins),
        }

    @property
    def count(self) -> int:
        """Number of items."""
        return len(self.keys)

    @abstractmethod
    def measured_on(self) -> dict[str, str]:
        """What each metric is measured on."""

    @abstractmethod
    def about(self) -> str:
        """What was measured, in a few words."""

    def first_metric(self) -> str | None:
        """The metric that is also reported by group."""
        return None


class TaskPart(Part, Generic[C]):
    """A task that an entry of `tasks` describes."""

    def __init__(self, run: Run, number: int, task: C, subjects: Sequence[Subject]) -> None:
        super().__init__(run, task.name, task.kind, f"tasks.{number}", subjects)
        self.task = task

    def measured_on(self) -> dict[str, str]:
        """As the task says."""
        return self.task.measured_on()
