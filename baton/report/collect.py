"""Reads a run's directory. Only this module of the report reads files; an unreadable file is a warning, not an error.

A stage without a manifest was started but not finished; the report shows its metrics so far.
"""

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ValidationError, model_validator

from handoff.errors import HandoffError, UserError
from handoff.files import read_json
from handoff.gate import ADAPTER_WEIGHTS
from handoff.manifest import MODEL_KINDS, Manifest
from handoff.refused import Refused, Verdict, read_refused, refused_sections
from handoff.stage import StageDir
from handoff.weights import TensorInfo, read_header, read_tensors
from stages.reward_model.schema import Card
from training.declaration import Declaration
from training.registry import Registry


class Estimate(BaseModel):
    """A mean over `n` items with its 95 % interval."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None


class WinRate(Estimate):
    """Share of prompts for which the model's answer is better than the answer of the model `over`."""

    over: str
    by: str = ""
    """The metric that decided which answer is better."""


class Grouped(BaseModel):
    """What `families` contains: the values of `metric`, one for each value of the prompts' column `column`."""

    column: str = "family"
    metric: str = "accuracy"


class Sample(BaseModel):
    """One prompt and each model's answer."""

    prompt: str
    reference: str | None = None
    answers: dict[str, str]


class Change(BaseModel):
    """A model's differences from its parent `over`, item by item."""

    over: str
    metrics: dict[str, Estimate] = {}


class TaskResults(BaseModel):
    """One task of an evaluation. Rates and accuracies are shares in [0, 1]; other scores have their own units."""

    name: str = ""
    kind: str = "answers"
    about: str = ""
    """What was measured, in a few words."""
    models: list[str]
    metrics: dict[str, dict[str, Estimate]] = {}
    families: dict[str, dict[str, Estimate]] = {}
    grouped: Grouped | None = None
    changes: dict[str, Change] = {}
    win_rates: dict[str, WinRate] = {}
    samples: list[Sample] = []


class Results(BaseModel):
    """An evaluation's results.json."""

    models: list[str]
    comparisons: int = 0
    """Number of differences from parents, each with its interval."""
    tasks: dict[str, TaskResults] = {}
    gates: list[Verdict] = []
    """The conditions of the evaluation's gate."""

    @model_validator(mode="after")
    def _names(self) -> Self:
        for name, task in self.tasks.items():
            task.name = name
        return self


@dataclass(frozen=True)
class Origin:
    """The recipe from which a stage was begun, and what was laid over it on the command line."""

    recipe: str = "<recipe>"
    """Its path, as a shell reads it; a placeholder where no file records one."""
    overrides: str = ""
    """The overrides, as a shell reads them."""

    def run(self, name: str) -> str:
        """The command that brings the section up to date."""
        return f"baton run {self.recipe}{self.overrides and f' {self.overrides}'} --to {name}"

    def make(self, target: str) -> str:
        """The make command for a target."""
        laid_over = f" SET={shlex.quote(self.overrides)}" if self.overrides else ""
        return f"make {target} RECIPE={self.recipe}{laid_over}"


@dataclass(frozen=True)
class Stage:
    """One stage's directory. `manifest` is None when the stage has not been published."""

    name: str
    manifest: Manifest | None
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    results: Results | None
    parameters: int | None
    """Total number of elements of the tensors in model/."""
    card: Card | None = None
    """A reward model's report card; it also exists if the stage's gate stopped the publication."""
    begun_as: str | None = None
    """The stage's package according to the record of its start."""
    origin: Origin = field(default_factory=Origin)
    failed: Refused | None = None
    """Its last result, if that did not pass the gate. `results` and `card` are that one's if nothing is published."""

    @property
    def package(self) -> str:
        """The stage's package; if no file names it, the stage's own name."""
        return self.manifest.stage if self.manifest else self.begun_as or self.name

    @property
    def declared(self) -> Declaration:
        """The declaration of the stage's package."""
        return Registry().declaration(self.package)

    @property
    def parents(self) -> dict[str, str]:
        """{role: name of the section or checkpoint}."""
        return {role: parent.name for role, parent in self.manifest.parents.items()} if self.manifest else {}

    def series(self, key: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of a metric, in order of step. If a step was logged twice, its last value counts."""
        found = {}
        for row in self.metrics:
            value = row.get(key)
            if isinstance(value, int | float) and math.isfinite(value):
                found[row["step"]] = float(value)
        steps = sorted(found)
        return steps, [found[step] for step in steps]

    def has(self, key: str) -> bool:
        """Whether the stage logged a finite value of that metric."""
        return bool(self.series(key)[0])


@dataclass
class RunData:
    """A run: its stages, parents before children, and messages about unreadable files."""

    path: Path
    stages: list[Stage]
    problems: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The directory's name, which is the recipe's."""
        return self.path.name

    @property
    def origin(self) -> Origin:
        """From which recipe the last of the stages was begun of which this is known."""
        return next((stage.origin for stage in reversed(self.stages) if stage.origin != Origin()), Origin())

    @property
    def published(self) -> list[Stage]:
        """The published stages."""
        return [stage for stage in self.stages if stage.manifest]

    def stage(self, name: str) -> Stage | None:
        """The stage of that name, if the run has it."""
        return next((stage for stage in self.stages if stage.name == name), None)


def read_run(run_dir: Path) -> RunData:
    """Reads every stage in `run_dir`.

    Raises:
        UserError: the directory does not exist, or has no stage.
    """
    run_dir = run_dir.resolve()
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: no such run; make it with `baton run <recipe>`")
    problems: list[str] = []
    stages = []
    for folder in sorted(path for path in run_dir.iterdir() if path.is_dir() and not path.name.startswith(".")):
        directory = StageDir(folder)
        if directory.manifest_path.exists() or directory.started_path.exists():
            stages.append(_read_stage(directory, folder.name, problems))
    there = {stage.name for stage in stages}
    for name in refused_sections(run_dir):  # a stage that saves no states leaves nothing else
        if name not in there:
            stages.append(_read_stage(StageDir(run_dir / name), name, problems))
    if not stages:
        raise UserError(f"{run_dir}: no stage has been started here; run `baton run <recipe>` first")
    return RunData(run_dir, _in_order(stages), problems)


def _read_stage(directory: StageDir, name: str, problems: list[str]) -> Stage:
    try:
        manifest = directory.manifest()
    except HandoffError as error:
        problems.append(str(error))
        manifest = None
    failed = None
    try:
        failed = read_refused(directory.path.parent, name)
    except HandoffError as error:
        problems.append(str(error))
    judged, folder = (manifest, directory.path) if manifest or not failed else (failed.manifest, failed.path)
    parameters = None
    if manifest and manifest.kind in MODEL_KINDS:
        try:  # reads headers only; tied tensors are stored once and so counted once
            parameters = sum(math.prod(tensor.shape) for tensor in _tensors(manifest, directory.model_dir))
        except (HandoffError, OSError) as error:
            problems.append(str(error))
    return Stage(
        name=name,
        manifest=manifest,
        metrics=_read_lines(directory.metrics_path, problems),
        samples=_read_lines(directory.samples_path, problems),
        results=_read_results(judged, folder / "results.json", problems),
        parameters=parameters,
        card=_read_card(folder / "card.json", problems),
        begun_as=_package_begun(directory) or (failed.manifest.stage if failed else None),
        origin=_origin(directory),
        failed=failed,
    )


def _tensors(manifest: Manifest, model_dir: Path) -> Iterable[TensorInfo]:
    """What the stage has trained: an adapter's own tensors, or those of the whole model."""
    if manifest.adapter is not None:
        return read_header(model_dir / ADAPTER_WEIGHTS).values()
    return read_tensors(model_dir).values()


def _package_begun(directory: StageDir) -> str | None:
    inputs = directory.started_inputs()
    return None if inputs is None else inputs.recipe.get("stage")


def _origin(directory: StageDir) -> Origin:
    with suppress(HandoffError, OSError):
        match directory.origin():
            case {"recipe": str(recipe), "overrides": [*overrides]}:
                path = Path(recipe)
                here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
                return Origin(shlex.quote(str(here)), shlex.join(map(str, overrides)))
    return Origin()


def _read_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file that have a step. A message in `problems` counts the other lines."""
    if not path.exists():
        return []
    rows, broken = [], []
    # Not splitlines(): a model's text may contain other line separators, which JSON does not escape.
    text = path.read_text(encoding="utf-8", errors="replace")
    for index, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and isinstance(row.get("step"), int | float):
            rows.append(row)
        else:
            broken.append(index)
    if broken:
        problems.append(
            f"{path.parent.name}/{path.name}: {len(broken)} of {len(broken) + len(rows)} lines cannot be read "
            f"(the first is line {broken[0]}); they are left out here"
        )
    return rows


def _read_card(path: Path, problems: list[str]) -> Card | None:
    """The report card of a reward model's stage, if there is one."""
    if not path.exists():
        return None
    try:
        return Card.model_validate(read_json(path))
    except ValidationError as error:
        problems.append(_unreadable(path, error, "run the stage again"))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {error}; run the stage again")
    return None


def _read_results(manifest: Manifest | None, path: Path, problems: list[str]) -> Results | None:
    """The results of a published evaluation; None for every other stage."""
    if manifest is None or manifest.kind != "evaluation":
        return None
    try:
        return Results.model_validate(read_json(path))
    except ValidationError as error:
        problems.append(_unreadable(path, error, "run the evaluation again"))
    except (OSError, ValueError) as error:
        problems.append(f"{path}: {error}; run the evaluation again")
    return None


def _unreadable(path: Path, error: ValidationError, remedy: str) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return f"{path}: {place}: {first['msg']}; {remedy}"


def _in_order(stages: Sequence[Stage]) -> list[Stage]:
    """The stages with parents before children, otherwise in order of publication, unpublished ones last."""
    waiting = sorted(stages, key=lambda s: (s.manifest is None, s.manifest.created if s.manifest else "", s.name))
    ordered: list[Stage] = []
    while waiting:
        left = {stage.name for stage in waiting}
        ready = next((s for s in waiting if not left & (set(s.parents.values()) - {s.name})), waiting[0])
        waiting.remove(ready)
        ordered.append(ready)
    return ordered
