"""Gates: what a section's result must reach to be published. No torch here.

Every section may have one, on the metrics that it publishes:

    gate: {metrics: {eval_loss: {max: 2.0}, eval_stop_rate: {min: 0.9}}}

A reward model's gate has conditions on its report card besides, and an evaluation's on its tasks.
"""

import math
from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from typing import Any, Self

from pydantic import Field, model_validator

from handoff.refused import Verdict
from training.recipe_text import did_you_mean
from training.strict import Strict


def check_order(least: float | None, most: float | None) -> None:
    """Raises ValueError if no value can be within these bounds."""
    if least is not None and most is not None and least > most:
        raise ValueError(f"no value is at least {least:g} and at most {most:g}")


class Bound(Strict):
    """The least and the most that a value may be."""

    min: float | None = None
    """The least."""
    max: float | None = None
    """The most."""

    @model_validator(mode="after")
    def _bounds_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("demands nothing: give `min`, `max` or both")
        check_order(self.min, self.max)
        return self

    def holds(self, value: float) -> bool:
        """Whether a value is within the bounds; what is not a number is not."""
        return (
            not math.isnan(value)
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
        )

    def words(self) -> str:
        """`at least 0.5 and at most 2`."""
        least = [] if self.min is None else [f"at least {self.min:g}"]
        return " and ".join([*least, *([] if self.max is None else [f"at most {self.max:g}"])])


class Gate(Strict):
    """Conditions under which a section's result is published. Without any, every result is."""

    metrics: dict[str, Bound] = Field(default_factory=dict)
    """{a metric that the section publishes: bounds, as `{min: 0.5}` or `{max: 2.0}`}."""


def check_measured(gate: Gate, published: Collection[str], *, held_out: bool) -> None:
    """Checks that the metrics of a gate are among those that a section publishes.

    Args:
        published: their names; `*` stands for any characters.
        held_out: whether there is held-out data, on which those that begin with `eval` are measured.

    Raises:
        ValueError: a metric is not.
    """
    for name in gate.metrics:
        if not any(fnmatchcase(name, pattern) for pattern in published):
            hint = did_you_mean(name, published) or f"; it publishes {', '.join(sorted(published)) or 'none'}"
            raise ValueError(f"gate.metrics: the section publishes no metric {name}{hint}")
        if name.startswith("eval") and not held_out:
            raise ValueError(f"gate.metrics: {name} is measured on held-out rows: name them under eval_data")


def judged(gate: Gate, metrics: Mapping[str, Any]) -> list[Verdict]:
    """Whether each metric of the gate is within its bounds. One that was not measured is not."""
    verdicts = []
    for name, bound in gate.metrics.items():
        value = metrics.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            said = f"{name} is {value:.4g}; the gate demands {bound.words()}"
            finite = float(value) if math.isfinite(value) else None
            verdicts.append(Verdict(metric=name, passed=bound.holds(value), said=said, value=finite))
        else:
            said = f"{name} was not measured; the gate demands {bound.words()}"
            verdicts.append(Verdict(metric=name, passed=False, said=said))
    return verdicts
