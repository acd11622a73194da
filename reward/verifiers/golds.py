"""Where verifiers find a row's right answer, and how they name the row when it cannot be used."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from data.records import Message
from reward.functions import RewardError

COLUMNS = ("answer", "ground_truth")
"""Where a right answer is looked for unless the recipe names a column: GSM8K and its like, then the RLVR mixture."""


def golds(
    function: str,
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    columns: Mapping[str, Any],
    column: str | None,
) -> list[str | None]:
    """The right answer of each row as text; None where the row has none (or an RLVR constraint, which is none).

    Raises:
        RewardError: no row has the column, or it holds neither text nor a number; names function, column and row.
    """
    names = COLUMNS if column is None else (column,)
    present = [name for name in names if name in columns]
    if not present:
        own = sorted(set(columns) - {"completion_ids", "stopped"})
        raise RewardError(
            f"`{function}` needs the right answers in column {' or '.join(f'`{name}`' for name in names)}; the prompts "
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
                function, prompts, row, f"column `{name}` holds {value!r}; a right answer is text or a number"
            )
    return out


def rlvr_constraint(value: Any) -> dict[str, Any] | None:
    """What the RLVR mixture has as the ground truth of instruction following: an object, or its JSON, with `func_name`.

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
    """An error that tells which row of the data it is: its place in the batch (from 0) and how its prompt ends."""
    where = f"row {row} of the batch"
    if row < len(prompts) and prompts[row]:
        content = prompts[row][-1].content
        where += f" (prompt {content if len(content) <= 80 else '...' + content[-80:]!r})"
    return RewardError(f"`{function}`, {where}: {problem}")
