"""Finds, before the first answer is sampled, the rows whose gold answers a reward cannot read.

A function that reads gold answers, schemas or tests has a check here, which needs no answer. Rows that a check names
are left out of the prompts (training/rewards.py), so that no faulty row stops a run days after its start.
"""

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from reward.config import RewardConfig
from reward.functions import RewardError

Check = Callable[..., dict[int, str]]
"""`(rows, columns, **args) -> {row: why it cannot be read}`: `rows` is their number, `columns` {name: values}."""

CHECKS = {
    "exact_match": "reward.functions:exact_match_unreadable",
    "math_equal": "reward.verifiers.maths:math_equal_unreadable",
    "numeric_match": "reward.verifiers.maths:numeric_match_unreadable",
    "multiple_choice": "reward.verifiers.text:multiple_choice_unreadable",
    "regex_extract": "reward.verifiers.extract:regex_extract_unreadable",
    "json_schema": "reward.verifiers.json_schema:json_schema_unreadable",
    "ifeval": "reward.verifiers.ifeval:ifeval_unreadable",
    "code_tests": "reward.code:code_tests_unreadable",
}
"""The check of each reward function that has one."""


def has_checks(entries: Iterable[RewardConfig]) -> bool:
    """Whether any of the rewards reads gold answers."""
    return any(entry.function in CHECKS for entry in entries)


def unreadable(
    entries: Iterable[RewardConfig], names: Iterable[str], rows: Sequence[Mapping[str, Any]]
) -> dict[int, tuple[str, str]]:
    """The rows that a reward cannot use: {row: (the reward's name, why)}.

    Args:
        names: all columns of the data.
        rows: each row's columns.

    Raises:
        RewardError: a column or argument is missing or wrong, or not a single row can be used.
    """
    found: dict[int, tuple[str, str]] = {}
    columns = {name: [row.get(name) for row in rows] for name in names}
    for entry in entries:
        if entry.function not in CHECKS:
            continue
        module, _, attribute = CHECKS[entry.function].partition(":")
        check: Check = vars(importlib.import_module(module))[attribute]
        for row, why in check(len(rows), columns, **entry.args).items():
            found.setdefault(row, (entry.name, why))
    if rows and len(found) == len(rows):
        name, why = found[0]
        raise RewardError(f"reward `{name}` can read the gold answer of no prompt; of the first: {why}")
    return found


def by_calling(
    function: Callable[..., list[float | None]], rows: int, columns: Mapping[str, Any], **args: Any
) -> dict[int, str]:
    """The check of a function that raises RewardError for a row that it cannot read: calls it with empty answers."""
    found: dict[int, str] = {}
    for row in range(rows):
        try:
            function(
                [()], [""], **{name: [values[row]] for name, values in columns.items() if name not in args}, **args
            )
        except RewardError as error:
            found[row] = str(error)
    return found
