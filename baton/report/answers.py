"""The report's tables of answers: each model beside its parent, where it became worse first.

The page has room for some of them; `baton compare` shows all. Without JavaScript they are plain tables; with it, they
can be searched.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from baton.compare import Answers, Counts, Pair, counted
from baton.report.collect import Stage
from baton.report.text import number
from handoff.errors import UserError

ROWS = 60
"""Rows of one table."""
_TEXT = 400
"""Characters of a prompt or an answer."""


@dataclass(frozen=True)
class Row:
    """One item with both answers."""

    name: str
    group: str
    """worse, better or equal."""
    prompt: str
    reference: str
    before: str
    after: str
    before_score: str
    after_score: str
    change: str


@dataclass(frozen=True)
class Table:
    """The answers of a model beside those of its parent."""

    before: str
    after: str
    counts: list[Counts]
    rows: list[Row]
    left_out: int
    """Pairs that are not on the page."""
    command: str
    """Shows all of them."""


def tables(stage: Stage, folder: Path, run_dir: Path) -> list[Table]:
    """A table for each model of an evaluation that was compared with its parent; none where answers were not kept.

    Args:
        folder: of the evaluation.
    """
    if stage.results is None:
        return []
    try:
        answers = Answers(folder)
    except UserError:
        return []
    found = []
    for after, before in answers.parents().items():
        pairs = answers.pairs(before, after, answers.tasks)
        if pairs:
            chosen = _spread(pairs)
            command = f"baton compare {run_dir} {before} {after} --evaluation {stage.name}"
            rows = [_row(pair) for pair in chosen]
            found.append(Table(before, after, counted(pairs), rows, len(pairs) - len(rows), command))
    return found


def _spread(pairs: list[Pair]) -> list[Pair]:
    """The pairs for the page: of every task an equal share, the largest losses first."""
    by_task: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_task.setdefault(pair.task, []).append(pair)
    share = max(1, ROWS // len(by_task))
    return [pair for of_task in by_task.values() for pair in of_task[:share]]


def _row(pair: Pair) -> Row:
    return Row(
        name=pair.name,
        group="worse" if pair.change < 0 else "better" if pair.change > 0 else "equal",
        prompt=_cut(pair.prompt),
        reference=_cut(pair.reference),
        before=_cut(pair.before),
        after=_cut(pair.after),
        before_score=_told(pair.before_scores),
        after_score=_told(pair.after_scores),
        change=f"{pair.metric} {number(pair.change, signed=True)}",
    )


def _cut(text: str | None) -> str:
    if text is None:
        return ""
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"


def _told(scores: Mapping[str, float | None]) -> str:
    return ", ".join(f"{name} {number(value)}" for name, value in scores.items())
