"""The gate of an evaluation: what its models must reach in its tasks, and whether they do. No torch here.

    gate:
      tasks:
        - {task: gsm8k, model: ppo, min: 0.3}
        - {task: arc_easy, no_worse_than: parent}

A condition without a model is for every model. One on a model that the run has not published is left out, and said.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from handoff.refused import Verdict
from stages.evaluate.tasks import AnswersTask, TaskConfig
from training.gates import Bound, Gate, check_order
from training.recipe_text import did_you_mean
from training.strict import Strict

LOWER = frozenset({"bits_per_byte", "perplexity", "reference_bits_per_byte"})
"""Metrics of which less is better."""
NEITHER = frozenset({"length_tokens", "kl"})
"""Metrics of which neither more nor less is better."""


class TaskGate(Strict):
    """One condition on one task."""

    task: str
    """Name of the task."""
    metric: str = ""
    """A metric of the task; by default its first score, or what its kind measures: accuracy, or bits a byte."""
    model: str | None = None
    """One of `models`; by default the condition is for each of them."""
    min: float | None = None
    """The least that the metric may be."""
    max: float | None = None
    """The most that the metric may be."""
    no_worse_than: Literal["parent"] | None = None
    """The 95 % interval of the paired difference from the model's parent must not lie on the worse side of 0."""

    @model_validator(mode="after")
    def _demands_something(self) -> Self:
        bounded = self.min is not None or self.max is not None
        if bounded == (self.no_worse_than is not None):
            raise ValueError("give either `min`, `max` or both, or `no_worse_than`")
        check_order(self.min, self.max)
        return self


class EvaluationGate(Gate):
    """Conditions under which an evaluation is published."""

    tasks: list[TaskGate] = Field(default_factory=list)
    """Conditions on tasks."""


def first_metric(task: TaskConfig) -> str | None:
    """The metric that a condition means that names none."""
    if isinstance(task, AnswersTask):
        return next(iter(task.metrics), None)
    return next(iter(task.measured))


def check_tasks(gate: EvaluationGate, tasks: Sequence[TaskConfig], models: Sequence[str]) -> None:
    """Checks that what a gate asks is evaluated.

    Raises:
        ValueError: a condition names a task, a metric or a model that is not.
    """
    by_name = {task.name: task for task in tasks}
    for i, entry in enumerate(gate.tasks):
        place = f"gate.tasks.{i}"
        if entry.task not in by_name:
            raise ValueError(f"{place}: {entry.task} is not evaluated{_hint(entry.task, list(by_name))}")
        if entry.model is not None and entry.model not in models:
            raise ValueError(f"{place}: {entry.model} is none of `models`{_hint(entry.model, models)}")
        measured = list(by_name[entry.task].measured_on())
        metric = entry.metric or first_metric(by_name[entry.task])
        if metric is None:
            raise ValueError(f"{place}: {entry.task} has no `scores`; name a metric of {', '.join(measured)}")
        if metric not in measured:
            raise ValueError(f"{place}: {entry.task} does not measure {metric}{_hint(metric, measured)}")
        if entry.no_worse_than and metric in NEITHER:
            raise ValueError(f"{place}: neither more nor less {metric} is worse; give `min` or `max`")


def _hint(name: str, known: Sequence[str]) -> str:
    return did_you_mean(name, known) or f"; there are {', '.join(known)}"


def judged(
    gate: EvaluationGate, tasks: Sequence[TaskConfig], called: Mapping[str, str], results: Mapping[str, Any]
) -> list[Verdict]:
    """Whether each condition is met by each model that was evaluated.

    Args:
        called: {entry of `models` that was evaluated: its name in the results}.
        results: as in results.json.
    """
    by_name = {task.name: task for task in tasks}
    verdicts: list[Verdict] = []
    for entry in gate.tasks:
        models = list(called.values()) if entry.model is None else [called[m] for m in [entry.model] if m in called]
        verdicts += _of_entry(entry, by_name[entry.task], models, results)
    return verdicts


def _of_entry(
    entry: TaskGate, task: TaskConfig, models: Sequence[str], results: Mapping[str, Any]
) -> Iterator[Verdict]:
    found = results["tasks"][entry.task]
    metric = entry.metric or first_metric(task)
    assert metric is not None
    for model in models:
        if entry.no_worse_than is None:
            passed, said, value = _bounded(Bound(min=entry.min, max=entry.max), found["metrics"][model].get(metric))
        elif model in found["changes"]:
            passed, said, value = _no_worse(metric, found["changes"][model])
        elif entry.model is not None:
            passed, said, value = False, "was not compared with its parent; the gate demands no worse than parent", None
        else:
            continue  # a first model has no parent
        words = f"{entry.task}, {model}: {metric} {said}"
        yield Verdict(task=entry.task, model=model, metric=metric, passed=passed, said=words, value=value)


def _bounded(bound: Bound, estimate: Mapping[str, Any] | None) -> tuple[bool, str, float | None]:
    if estimate is None:
        return False, f"was not measured; the gate demands {bound.words()}", None
    value = estimate["value"]
    return bound.holds(value), f"is {_told(estimate)}; the gate demands {bound.words()}", value


def _no_worse(metric: str, change: Mapping[str, Any]) -> tuple[bool, str, float | None]:
    moved = change["metrics"].get(metric)
    demand = f"the gate demands no worse than {change['over']}, its parent"
    if moved is None:
        return False, f"was not compared with {change['over']}; {demand}", None
    worse = moved["low"] > 0 if metric in LOWER else moved["high"] < 0
    return not worse, f"differs by {_told(moved, '+')} from that of {change['over']}; {demand}", moved["value"]


def _told(estimate: Mapping[str, Any], sign: str = "") -> str:
    value, low, high = (f"{estimate[key]:{sign}.3g}" for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def left_out(gate: EvaluationGate, models: Sequence[str]) -> list[str]:
    """The models of conditions that the run has not published."""
    named = [entry.model for entry in gate.tasks if entry.model is not None]
    return [model for model in dict.fromkeys(named) if model not in models]
