"""The recipe's list of rewards as one: each is computed, logged apart, and summed by weight.

A function gets the two things that every reward needs, prompts and completions, and by keyword whatever else its
signature names: the `args` of the recipe, `completion_ids` and `stopped` of the answers, and the prompts' own columns.
What it cannot be given is found before the first answer is sampled: `args` that it does not have when the composition
is made, columns that the data does not have in `check_columns`.
"""

import difflib
import inspect
import math
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from data.records import Message
from reward.config import RewardConfig
from reward.functions import RewardError, find
from reward.learned import LearnedReward

_OF_ANSWERS = ("completion_ids", "stopped")
_SHOWN = 80  # characters of an answer in a message


@dataclass(frozen=True)
class Answers:
    """What is to be scored, N rows. `columns` holds each prompt's own columns."""

    prompts: Sequence[tuple[Message, ...]]
    prompt_ids: Sequence[Sequence[int]]
    texts: Sequence[str]
    ids: Sequence[Sequence[int]]
    stopped: Sequence[bool]
    columns: Sequence[dict[str, Any]]


@dataclass(frozen=True)
class Scores:
    """What N answers got."""

    total: list[float]
    """Weighted sum, (N,)."""
    parts: dict[str, list[float | None]]
    """Each reward's own values before its weight, (N,); None where it had no opinion, which counts as 0."""
    dense: list[list[float]] | None
    """Where rewards are read at every token: what each token of an answer was paid by them, weighted, as long as the
    answer's ids. It is a part of `total`, not to be added to it. None without such rewards."""
    members: dict[str, list[float]]
    """The normalised scores of the members of ensembles, (N,) each, as `<reward>/<model>`."""
    disagreement: list[float] | None
    """Standard deviation over an ensemble's members, (N,); of several ensembles, the largest. None without one."""


class Composition:
    """Calls every reward of a recipe."""

    def __init__(self, entries: Sequence[RewardConfig], models: dict[str, LearnedReward]) -> None:
        """`models`: the loaded model for each reference of the entries.

        Raises:
            RewardError: an unknown function, or `args` that a function does not have.
        """
        assert len({entry.name for entry in entries}) == len(entries), "the recipe refuses two rewards of one name"
        self._entries = entries
        self._functions = {entry.name: _Function(entry) for entry in entries if entry.function is not None}
        self._models = models

    def check_columns(self, columns: set[str]) -> None:
        """Whether the functions can be given what they need; they are given these columns from then on, with None where
        a row has nothing.

        Args:
            columns: the prompts' columns, over all rows.

        Raises:
            RewardError: a function needs a column that is not among them.
        """
        for function in self._functions.values():
            function.check_columns(columns)

    def __call__(self, answers: Answers) -> Scores:
        """Scores (N,).

        Raises:
            RewardError: a function raised, gave the wrong number of values, or one that is no finite number; a model's
                score is not finite.
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
    """One score from those of an ensemble's members (of one model: its own).

    Coste et al. 2023 (arXiv:2310.02743), section 3.2: mean, worst case, and uncertainty-weighted; the last with the
    standard deviation over the members where they take the variance, so that it has the unit of a score.
    """
    if entry.combine == "min":
        return min(scores)
    if entry.combine == "mean_minus_std":
        return _mean(scores) - entry.std_coef * statistics.pstdev(scores)
    return _mean(scores)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


class _Function:
    """A reward function and what its signature says about its keyword arguments."""

    def __init__(self, entry: RewardConfig) -> None:
        assert entry.function is not None
        self._name, self._args = entry.name, entry.args
        self._function: Callable[..., Any] = find(entry.function)
        try:
            parameters = list(inspect.signature(self._function).parameters.values())
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward function `{entry.function}` is not a function that can be called") from error
        keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        self._takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
        self._given = {p.name for p in parameters[:2]}  # prompts and completions, whatever it calls them
        named = {p.name: p for p in parameters[2:] if p.kind in keyword}
        for key in self._args:
            if key not in named or key in _OF_ANSWERS:
                own = [name for name in named if name not in _OF_ANSWERS]
                close = difflib.get_close_matches(key, own, 1)
                hint = f"did you mean `{close[0]}`?" if close else f"it has {', '.join(own) or 'none'}"
                raise RewardError(f"reward `{self._name}`: `{entry.function}` has no argument `{key}`; {hint}")
        self._named = named.keys()
        self._known: set[str] = set()  # columns that the data has, whatever a batch of a mixture has of them
        self._columns = [
            name
            for name, parameter in named.items()
            if parameter.default is inspect.Parameter.empty and name not in (*_OF_ANSWERS, *self._args)
        ]

    def check_columns(self, columns: set[str]) -> None:
        self._known = set(columns)
        for name in self._columns:
            if name not in columns:
                there = f"there are {', '.join(sorted(columns))}" if columns else "the prompts have none"
                raise RewardError(
                    f"reward `{self._name}` needs the column `{name}` of the prompts; {there}. Give it in the data, or "
                    "as one of the reward's `args`"
                )

    def __call__(self, answers: Answers) -> list[float | None]:
        """Checked values (N,)."""
        try:
            found = self._call(answers, range(len(answers.texts)))
        except Exception as error:
            raise self._raised(answers, error) from error
        if not isinstance(found, list | tuple):
            raise RewardError(
                f"reward `{self._name}` gave {_kind(found)}; a reward function returns a list with a number or None "
                "for each answer"
            )
        if len(found) != len(answers.texts):
            raise RewardError(f"reward `{self._name}` gave {len(found)} values for {len(answers.texts)} answers")
        values: list[float | None] = []
        for row, value in enumerate(found):
            where = f"for row {row}, the answer {_shown(answers.texts[row])}"
            if value is not None and not isinstance(value, Real):
                raise RewardError(f"reward `{self._name}` gave {_kind(value)} {where}; give a number or None")
            number = None if value is None else float(value)
            if number is not None and not math.isfinite(number):
                raise RewardError(f"reward `{self._name}` gave {number} {where}; give a finite number, or None")
            values.append(number)
        return values

    def _call(self, answers: Answers, rows: Sequence[int]) -> Any:
        names = {name for row in answers.columns for name in row} | self._known
        names = (names if self._takes_all else names & self._named) - self._given
        # A column that no prompt of this batch has may be there in others: the data is a mixture.
        keywords: dict[str, Any] = {
            name: [answers.columns[row].get(name) for row in rows] for name in sorted(names | set(self._columns))
        }
        of_answers = {"completion_ids": answers.ids, "stopped": answers.stopped}
        for name, values in of_answers.items():
            if self._takes_all or name in self._named:
                keywords[name] = [values[row] for row in rows]
        keywords |= self._args
        return self._function([answers.prompts[row] for row in rows], [answers.texts[row] for row in rows], **keywords)

    def _raised(self, answers: Answers, error: Exception) -> RewardError:
        """What a user needs to mend a function that raised: which, what, where, and on which answer."""
        if isinstance(error, RewardError):  # it knows what is wrong and says so
            return RewardError(f"reward `{self._name}`: {error}")
        place = traceback.extract_tb(error.__traceback__)[-1]
        row = self._culprit(answers)
        on = "" if row is None else f", on row {row}, the answer {_shown(answers.texts[row])}"
        return RewardError(
            f"reward `{self._name}` raised {type(error).__name__}: {error} ({place.filename}:{place.lineno}{on})"
        )

    def _culprit(self, answers: Answers) -> int | None:
        """The first row that the function raises on by itself; None when it raises on none."""
        for row in range(len(answers.texts)):
            try:
                self._call(answers, [row])
            except Exception:
                return row
        return None


def _kind(value: Any) -> str:
    return f"{value!r}" if isinstance(value, str) else f"a value of type {type(value).__name__}"


def _shown(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…")
