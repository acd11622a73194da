"""The recipe's list of rewards as one: each is computed, logged apart, and summed by weight."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from data.records import Message
from reward.config import RewardConfig
from reward.functions import RewardError, find
from reward.learned import LearnedReward


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
    """`total` (N,): weighted sum. `parts`: each reward's own values before its weight, None where it had no opinion."""

    total: list[float]
    parts: dict[str, list[float | None]]


class Composition:
    """Calls every reward of a recipe."""

    def __init__(self, entries: Sequence[RewardConfig], models: dict[str, LearnedReward]) -> None:
        """`models`: the loaded model for each entry that names one. Raises RewardError for unknown functions."""
        self._functions: list[tuple[RewardConfig, Callable[..., list[float | None]] | None]] = [
            (entry, None if entry.function is None else find(entry.function)) for entry in entries
        ]
        self._models = models

    def __call__(self, answers: Answers) -> Scores:
        """Raises RewardError when a function gives the wrong number of values or one that is not finite."""
        names = sorted({name for row in answers.columns for name in row})
        columns = {name: [row.get(name) for row in answers.columns] for name in names}
        total = [0.0] * len(answers.texts)
        parts: dict[str, list[float | None]] = {}
        for entry, function in self._functions:
            values: Sequence[float | None]
            if entry.model is not None:
                values = self._models[entry.model](
                    answers.prompts, answers.texts, answers.prompt_ids, answers.ids, answers.stopped
                )
            else:
                assert function is not None
                own = {"completion_ids": answers.ids, "stopped": answers.stopped}
                values = function(answers.prompts, answers.texts, **columns, **own, **entry.args)
            if len(values) != len(total):
                raise RewardError(f"reward `{entry.name}` gave {len(values)} values for {len(total)} answers")
            for i, value in enumerate(values):
                if value is not None and not math.isfinite(value):
                    raise RewardError(f"reward `{entry.name}` gave {value} for the answer {answers.texts[i]!r}")
                total[i] += entry.weight * (value if value is not None else 0.0)
            parts[entry.name] = list(values)
        return Scores(total, parts)
