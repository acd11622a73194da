"""Combines the recipe's list of rewards: computes each reward, reports it separately, and sums them by weight.

A reward function receives prompts and completions, and as keywords whatever else its signature names: the recipe's
`args`, the answers' `completion_ids` and `stopped`, and columns of the prompts' data. Mistakes are found before the
first answer is sampled: the constructor refuses unknown `args`, and `check_columns` refuses missing columns.
"""

import math
import statistics
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from data.records import Message
from reward.config import RewardConfig
from reward.functions import RewardError, find
from reward.learned import LearnedReward

_SHOWN = 80  # maximum characters of an answer in an error message


@dataclass(frozen=True)
class Answers:
    """N answers to score. `columns`: for each answer, the columns of its prompt's row."""

    prompts: Sequence[tuple[Message, ...]]
    prompt_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    stopped: Sequence[bool]
    columns: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Scores:
    """The scores of N answers."""

    total: list[float]
    """Weighted sum, (N,)."""
    parts: dict[str, list[float | None]]
    """Each reward's values before weighting, (N,); None where the reward does not apply, which counts as 0."""
    dense: list[list[float]] | None
    """For rewards with `read: every`: the weighted reward of each token of each answer, as long as the answer's ids.
    `total` already includes it. None when no reward is read at every token."""
    members: dict[str, list[float]]
    """The normalised scores of each ensemble member, (N,) each, under the name `<reward>/<model>`."""
    disagreement: list[float] | None
    """Standard deviation over an ensemble's members, (N,); the largest one if there are several ensembles. None without
    an ensemble."""


class Composition:
    """Computes and sums the rewards of a recipe."""

    def __init__(self, entries: Sequence[RewardConfig], models: dict[str, LearnedReward]) -> None:
        """`models`: the loaded model for each model that the entries name.

        Raises:
            RewardError: an unknown function, or `args` that the function does not accept.
        """
        assert len({entry.name for entry in entries}) == len(entries), "the recipe refuses two rewards of one name"
        self._entries = entries
        self._functions = {entry.name: _Function(entry) for entry in entries if entry.function is not None}
        self._models = models

    def check_columns(self, columns: set[str]) -> None:
        """Checks that the data has every column that the functions need. From then on each function receives these
        columns, with None in rows that lack a value.

        Args:
            columns: the prompts' columns, over all rows.

        Raises:
            RewardError: a function needs a column that the data does not have.
        """
        for function in self._functions.values():
            function.check_columns(columns)

    def __call__(self, answers: Answers) -> Scores:
        """Scores N answers with every reward.

        Raises:
            RewardError: a function raised, or returned the wrong number of values or a value that is not a finite
                number; or a model's score is not finite.
        """
        n = len(answers.texts)
        total = [0.0] * n
        parts: dict[str, list[float | None]] = {}
        dense: list[list[float]] | None = None
        members: dict[str, list[float]] = {}
        spreads: list[list[float]] = []
        for entry in self._entries:
            values: Sequence[float | None]
            if entry.function is not None:
                values = self._functions[entry.name](answers)
            elif entry.read == "every":
                tokens = [self._models[ref].tokens(answers.prompt_ids, answers.ids) for ref in entry.references]
                own = [[_mean(row) for row in member] for member in tokens]
                shares = [[combine(entry, at) / len(row[0]) for at in zip(*row)] for row in zip(*tokens)]
                values = [sum(row) for row in shares]
                paid = [[entry.weight * share for share in row] for row in shares]
                dense = paid if dense is None else [[a + b for a, b in zip(x, y)] for x, y in zip(dense, paid)]
            else:
                own = [
                    self._models[ref](answers.prompts, answers.texts, answers.prompt_ids, answers.ids, answers.stopped)
                    for ref in entry.references
                ]
                values = [combine(entry, row) for row in zip(*own)]
            if entry.models is not None:
                members |= {f"{entry.name}/{ref}": scores for ref, scores in zip(entry.models, own, strict=True)}
                spreads.append([statistics.pstdev(row) for row in zip(*own)])
            for i, value in enumerate(values):
                total[i] += entry.weight * (value if value is not None else 0.0)
            parts[entry.name] = list(values)
        disagreement = [max(row) for row in zip(*spreads)] if spreads else None
        return Scores(total, parts, dense, members, disagreement)


def combine(entry: RewardConfig, scores: Sequence[float]) -> float:
    """Combines the scores of an ensemble's members into one score; a single model's score stays as it is.

    Coste et al. 2023 (arXiv:2310.02743), section 3.2: mean, worst case, and uncertainty-weighted. For the last, the
    paper subtracts the variance over the members; this subtracts the standard deviation, which has the score's unit.
    """
    if entry.combine == "min":
        return min(scores)
    if entry.combine == "mean_minus_std":
        return _mean(scores) - entry.std_coef * statistics.pstdev(scores)
    return _mean(scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class _Function:
    """A reward function of the recipe, called with what its signature names."""

    def __init__(self, entry: RewardConfig) -> None:
        assert entry.function is not None
        self._name, self._args = entry.name, entry.args
        self._found = find(entry.name, entry.function, entry.args)
        self._known: set[str] = set()  # the data's columns; a batch of a mixture may lack some

    def check_columns(self, columns: set[str]) -> None:
        self._known = set(columns)
        for name in self._found.columns:
            if name not in columns:
                there = f"it has {', '.join(sorted(columns))}" if columns else "it has none"
                raise RewardError(
                    f"reward `{self._name}` needs the column `{name}` in the prompts' data; {there}. Add it to the "
                    "data, or set it in the reward's `args`"
                )

    def __call__(self, answers: Answers) -> list[float | None]:
        """Calls the function and checks the values (N,) that it returns."""
        try:
            found = self._call(answers, range(len(answers.texts)))
        except (Exception, SystemExit) as error:
            raise self._raised(answers, error) from error
        if not isinstance(found, list | tuple):
            raise RewardError(
                f"reward `{self._name}` returned {_kind(found)}; it must return a list with a number or None "
                "for each answer"
            )
        if len(found) != len(answers.texts):
            raise RewardError(f"reward `{self._name}` returned {len(found)} values for {len(answers.texts)} answers")
        values: list[float | None] = []
        for row, value in enumerate(found):
            where = f"for row {row}, the answer {_shown(answers.texts[row])}"
            if value is not None and not isinstance(value, Real):
                raise RewardError(f"reward `{self._name}` returned {_kind(value)} {where}; return a number or None")
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                raise RewardError(f"reward `{self._name}` returned {number} {where}; return a finite number or None")
            values.append(number)
        return values

    def _call(self, answers: Answers, rows: Sequence[int]) -> Any:
        names = {name for row in answers.columns for name in row} | self._known
        names = (names if self._found.takes_all else names & self._found.named) - self._found.given
        # In a mixture of data sets, a column may be missing from every prompt of this batch and present in others.
        keywords: dict[str, Any] = {
            name: [answers.columns[row].get(name) for row in rows] for name in sorted(names | set(self._found.columns))
        }
        of_answers = {"completion_ids": answers.ids, "stopped": answers.stopped}
        for name, values in of_answers.items():
            if self._found.takes_all or name in self._found.named:
                keywords[name] = [values[row] for row in rows]
        keywords |= self._args
        return self._found.function(
            [answers.prompts[row] for row in rows], [answers.texts[row] for row in rows], **keywords
        )

    def _raised(self, answers: Answers, error: BaseException) -> RewardError:
        """An error that names the function, its exception, the line that raised, and the answer that caused it."""
        if isinstance(error, RewardError):  # its message already says what is wrong
            return RewardError(f"reward `{self._name}`: {error}")
        place = traceback.extract_tb(error.__traceback__)[-1]
        row = self._culprit(answers)
        on = "" if row is None else f", on row {row}, the answer {_shown(answers.texts[row])}"
        return RewardError(
            f"reward `{self._name}` raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}{on})"
        )

    def _culprit(self, answers: Answers) -> int | None:
        """The first row on which the function raises when called with that row alone; None if there is no such row."""
        for row in range(len(answers.texts)):
            try:
                self._call(answers, [row])
            except (Exception, SystemExit):
                return row
        return None


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
