"""Finds a row's gold answer for the verifiers, and names the row in errors."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.records import Message
from reward.functions import RewardError

COLUMNS = ("answer", "ground_truth")
"""Columns searched for the gold answer unless the recipe names one: GSM8K's and similar, then the RLVR mixture's."""


def golds(
    function: str,
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    columns: Mapping[str, Any],
    column: str | None,
) -> list[str | None]:
    """The gold answer of each row as text; None where the row has none (an RLVR constraint is not a gold answer).

    Raises:
        RewardError: the column is missing, or holds neither text nor a number; names function, column and row.
    """
    names = COLUMNS if column is None else (column,)
    present = [name for name in names if name in columns]
    if not present:
        own = sorted(set(columns) - {"completion_ids", "stopped"})
        raise RewardError(
            f"`{function}` needs the gold answers in column {' or '.join(f'`{name}`' for name in names)}; the prompts "
            f"have {', '.join(f'`{name}`' for name in own) or 'no columns'}. Rename yours, or name it: "
            "`args: {column: ...}`"
        )
    out: list[str | None] = []
    for row in range(len(completions)):
        name, value = next(((n, columns[n][row]) for n in present if columns[n][row] is not None), (present[0], None))
        if value is None or rlvr_constraint(value) is not None:
            out.append(None)
        elif isinstance(value, str):
            out.append(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            out.append(repr(value))
        else:
            raise row_error(
                function, prompts, row, f"column `{name}` holds {value!r}; a gold answer is text or a number"
            )
    return out


def rlvr_constraint(value: Any) -> dict[str, Any] | None:
    """The RLVR mixture's ground truth for instruction following, an object or its JSON with `func_name`; else None.

    >>> rlvr_constraint('{"func_name": "validate_no_commas", "N": null}')
    {'func_name': 'validate_no_commas', 'N': None}
    >>> rlvr_constraint("42") is None
    True
    """
    if isinstance(value, str):
        if "func_name" not in value:
            return None
        try:
            value = json.loads(value)
        except ValueError:
            return None
    return value if isinstance(value, dict) and "func_name" in value else None


def row_error(function: str, prompts: Sequence[tuple[Message, ...]], row: int, problem: str) -> RewardError:
    """An error that identifies the row by its index in the batch (from 0) and the end of its prompt."""
    where = f"row {row} of the batch"
    if row < len(prompts) and prompts[row]:
        content = prompts[row][-1].content
        where += f" (prompt {content if len(content) <= 80 else '...' + content[-80:]!r})"
    return RewardError(f"`{function}`, {where}: {problem}")
