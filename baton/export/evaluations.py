"""What evaluations of the run have found about a model, and whether it passed their gates. Imports no torch."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handoff.errors import HandoffError
from handoff.files import read_json
from handoff.manifest import read_manifest
from handoff.parent import Parent
from handoff.refused import FAILED

_RESULTS = "results.json"


@dataclass(frozen=True)
class Measured:
    """One metric of the model in one task."""

    task: str
    metric: str
    value: float
    low: float
    high: float
    items: int


def results_of(parent: Parent, *, refused: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name of an evaluation, its results.json) of those that evaluated this very model.

    `refused`: also those whose gate failed, which are kept aside.
    """
    if parent.manifest is None:
        return
    run = parent.path.parent
    for path in sorted([*run.glob(f"*/{_RESULTS}"), *(run.glob(f"{FAILED}/*/{_RESULTS}") if refused else ())]):
        with suppress(HandoffError):
            made = read_manifest(path.parent / "stage.json")
            evaluated = made is not None and any(
                record.fingerprint == parent.fingerprint for record in made.parents.values()
            )
            found = read_json(path)
            if evaluated and isinstance(found, dict):
                yield path.parent.name, found


def measured(parent: Parent) -> list[Measured]:
    """Every metric of the model that an evaluation of its run has an interval for."""
    found = []
    for _, results in results_of(parent):
        for task, content in results.get("tasks", {}).items():
            for metric, estimate in content.get("metrics", {}).get(parent.name, {}).items():
                numbers = (estimate["value"], estimate["low"], estimate["high"])
                found.append(Measured(task, metric, *numbers, items=estimate["n"]))
    return found


def failed_gates(parent: Parent) -> list[str]:
    """The conditions of gates that the model does not meet, in sentences."""
    return [
        f"{name}: {verdict.get('said') or verdict.get('metric')}"
        for name, results in results_of(parent, refused=True)
        for verdict in results.get("gates", [])
        if not verdict["passed"] and verdict.get("model") in (None, parent.name)
    ]


def folder_of(parent: Parent) -> Path | None:
    """The run in which a stage published the model; None if no stage has."""
    return None if parent.manifest is None else parent.path.parent
