"""Compares two models of an evaluation answer by answer: where the later one became worse, the largest loss first.

It reads answers.arrow and results.json of the evaluation (stages/evaluate/answers.py). Answers are paired by task,
item, kind and sample. No torch here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Group
from rich.table import Table
from rich.text import Text

from baton.report.text import number
from handoff.errors import HandoffError, UserError
from handoff.files import read_json
from handoff.manifest import read_manifest
from handoff.refused import failed_dir, refused_sections
from stages.evaluate.answers import FILE, read
from stages.evaluate.gates import LOWER
from training.recipe_text import did_you_mean
from training.terminal import Screen, shown

RESULTS = "results.json"
_PROMPT = 1500  # characters of a prompt or an answer that the terminal shows


@dataclass(frozen=True)
class Pair:
    """Two models' answers to one item."""

    task: str
    item: int
    kind: str
    sample: int
    metric: str
    """The score by which they are compared."""
    prompt: str
    reference: str | None
    before: str | None
    after: str | None
    before_scores: dict[str, float | None]
    after_scores: dict[str, float | None]
    change: float
    """What the later answer gained in the metric; less than 0: it is worse."""

    @property
    def name(self) -> str:
        """What it is called where it is shown."""
        return f"{self.task} {self.item}" + (f", sample {self.sample}" if self.kind == "sample" else "")

    @property
    def order(self) -> tuple[Any, ...]:
        """Sorts the largest loss to the front."""
        return (self.change, self.task, self.item, self.kind, self.sample)


@dataclass(frozen=True)
class Counts:
    """How many pairs of a task are worse, better and equal."""

    task: str
    metric: str
    worse: int
    better: int
    equal: int


class Answers:
    """The answers of an evaluation."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: of the evaluation, published or refused by its gate.

        Raises:
            UserError: it has no answers, or they cannot be read.
        """
        self.folder = folder
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: has no {FILE}; run the evaluation again")
        try:
            self._table = read(folder)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{folder / FILE}: cannot be read ({error}); run the evaluation again") from error
        self._results = read_json(folder / RESULTS)

    @property
    def models(self) -> list[str]:
        """The models, in the order of the table."""
        return list(self._results["models"])

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the recipe's order."""
        return list(self._results["tasks"])

    def parents(self) -> dict[str, str]:
        """{model: its parent} of those that were compared with it."""
        tasks = self._results["tasks"].values()
        return {model: change["over"] for task in tasks for model, change in task["changes"].items()}

    def pairs(self, before: str, after: str, tasks: Sequence[str]) -> list[Pair]:
        """The pairs of two models' answers with a score in common, the largest loss first."""
        found = [pair for task in tasks for pair in self._of_task(task, before, after)]
        return sorted(found, key=lambda pair: pair.order)

    def _of_task(self, task: str, before: str, after: str) -> Iterator[Pair]:
        mine = self._table.filter(pc.equal(self._table["task"], task))
        olds = {_key(row): row for row in mine.filter(pc.equal(mine["model"], before)).to_pylist()}
        for new in mine.filter(pc.equal(mine["model"], after)).to_pylist():
            old = olds.get(_key(new))
            if old is None:
                continue
            scores = dict(old["scores"] or ()), dict(new["scores"] or ())
            metric = next((name for name in scores[1] if _both(name, *scores)), None)
            if metric is None:
                continue
            gained = scores[1][metric] - scores[0][metric]
            yield Pair(
                task=task,
                item=new["item"],
                kind=new["kind"],
                sample=new["sample"],
                metric=metric,
                prompt=_prompt(new["prompt"]),
                reference=new["reference"],
                before=old["answer"],
                after=new["answer"],
                before_scores=scores[0],
                after_scores=scores[1],
                change=-gained if metric in LOWER else gained,
            )


def _key(row: dict[str, Any]) -> tuple[int, str, int]:
    return row["item"], row["kind"], row["sample"]


def _both(name: str, *scores: dict[str, float | None]) -> bool:
    return all(one.get(name) is not None for one in scores)


def _prompt(messages: Sequence[dict[str, str]] | None) -> str:
    turns = messages or ()
    if len(turns) == 1:
        return turns[0]["content"]
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def counted(pairs: Sequence[Pair]) -> list[Counts]:
    """The counts of each task and metric."""
    found: dict[tuple[str, str], list[float]] = {}
    for pair in pairs:
        found.setdefault((pair.task, pair.metric), []).append(pair.change)
    return [
        Counts(task, metric, sum(c < 0 for c in changes), sum(c > 0 for c in changes), sum(c == 0 for c in changes))
        for (task, metric), changes in found.items()
    ]


def find_answers(run_dir: Path, section: str | None) -> Answers:
    """The answers of a run's evaluation: the published one, or the one that did not pass its gate.

    Raises:
        UserError: there is none, or there are several and `section` names none of them.
    """
    found = {}
    for name in refused_sections(run_dir):
        if (failed_dir(run_dir, name) / RESULTS).is_file():
            found[name] = failed_dir(run_dir, name)
    for path in sorted(run_dir.glob("*/stage.json")):
        try:
            manifest = read_manifest(path)
        except HandoffError:
            continue  # `baton verify` names it
        if manifest is not None and manifest.kind == "evaluation":
            found[path.parent.name] = path.parent
    if section is not None:
        if section not in found:
            raise UserError(f"{run_dir}: no evaluation {section}{did_you_mean(section, list(found)) or _among(found)}")
        return Answers(found[section])
    if len(found) != 1:
        why = "has no evaluation; `baton run` makes one" if not found else "has several evaluations"
        raise UserError(f"{run_dir}: {why}" + (f": choose one with --evaluation {_among(found)}" if found else ""))
    return Answers(next(iter(found.values())))


def _among(names: Any) -> str:
    return f"; there are {', '.join(names) or 'none'}"


def compare(
    run_dir: Path,
    before: str,
    after: str,
    *,
    task: str | None,
    worse: bool,
    limit: int,
    section: str | None,
    as_json: bool,
) -> None:
    """The command. `limit`: pairs that are shown; 0: all.

    Raises:
        UserError: there is no such evaluation, model or task.
    """
    answers = find_answers(run_dir, section)
    for model in (before, after):
        if model not in answers.models:
            hint = did_you_mean(model, answers.models) or _among(answers.models)
            raise UserError(f"{answers.folder}: no model {model}{hint}")
    if task is not None and task not in answers.tasks:
        raise UserError(f"{answers.folder}: no task {task}{did_you_mean(task, answers.tasks) or _among(answers.tasks)}")
    pairs = answers.pairs(before, after, answers.tasks if task is None else [task])
    chosen = [pair for pair in pairs if pair.change < 0] if worse else pairs
    first = chosen[:limit] if limit else chosen
    if as_json:
        for pair in first:
            print(json.dumps(vars(pair)))
        return
    screen = Screen()
    screen.print(f"{answers.folder}: {after} against {before}")
    table = Table("task", "by", "worse", "better", "equal", box=None)
    for one in counted(pairs):
        table.add_row(one.task, one.metric, str(one.worse), str(one.better), str(one.equal))
    screen.print(table)
    for pair in first:
        screen.print(_drawn(pair, before, after))
    if len(first) < len(chosen):
        screen.print(f"\n{len(chosen) - len(first)} more are left out; --limit 0 shows all")


def _drawn(pair: Pair, before: str, after: str) -> Group:
    style = "red" if pair.change < 0 else "green" if pair.change > 0 else "default"
    lines = [
        Text(""),
        Text.assemble((pair.name, "bold"), "  ", (f"{pair.metric} {number(pair.change, signed=True)}", style)),
        *_block("prompt", pair.prompt),
    ]
    if pair.reference is not None:
        lines += _block("reference", pair.reference)
    for model, text, scores in ((before, pair.before, pair.before_scores), (after, pair.after, pair.after_scores)):
        told = ", ".join(f"{metric} {number(value)}" for metric, value in scores.items())
        lines += _block(f"{model} ({told})", text)
    return Group(*lines)


def _block(label: str, text: str | None) -> list[Text]:
    cut = "–" if text is None else text if len(text) <= _PROMPT else f"{text[:_PROMPT]}…"
    return [Text(f"  {label}:", "dim"), *(Text(f"    {line}") for line in shown(cut).split("\n"))]
