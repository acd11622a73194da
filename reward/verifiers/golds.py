"""Finds a row's gold answer for the verifiers, and names the row in errors."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from data.records import Message
from reward.functions import RewardError, plain_text

log = logging.getLogger(__name__)

COLUMNS = ("answer", "ground_truth")
"""Columns searched for the gold answer unless the recipe names one: GSM8K's and similar, then the RLVR mixture's."""


Unreadable: TypeAlias = dict[int, str]
"""Rows whose gold answer cannot be read, and why."""


def golds(
    function: str, rows: int, columns: Mapping[str, Any], column: str | None, unreadable: Unreadable
) -> list[str | None]:
    """The gold answer of each row as text; None where the row has none (an RLVR constraint is not a gold answer).

    Args:
        unreadable: rows that hold neither text nor a number are added; they get None.

    Raises:
        RewardError: the column is missing; names function and column.
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
    for row in range(rows):
        name, value = next(((n, columns[n][row]) for n in present if columns[n][row] is not None), (present[0], None))
        text = None if value is None or rlvr_constraint(value) is not None else plain_text(value)
        if text is None and value is not None and rlvr_constraint(value) is None:
            unreadable[row] = f"column `{name}` holds {value!r:.80}; a gold answer is text or a number"
        out.append(text)
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
    return RewardError(f"`{function}`, {_where(prompts, row)}: {problem}")


def warn_unreadable(function: str, prompts: Sequence[tuple[Message, ...]], unreadable: Unreadable) -> None:
    """Warns that these rows of the batch get no score, and shows the first."""
    if unreadable:
        row = min(unreadable)
        log.warning(
            "%s: %d rows get no score, for example %s: %s",
            function,
            len(unreadable),
            _where(prompts, row),
            unreadable[row],
        )


def _where(prompts: Sequence[tuple[Message, ...]], row: int) -> str:
    where = f"row {row} of the batch"
    if row < len(prompts) and prompts[row]:
        content = prompts[row][-1].content
        where += f" (prompt {content if len(content) <= 80 else '...' + content[-80:]!r})"
    return where
