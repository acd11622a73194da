"""Counts held-out rows that are also training rows. A number measured on such rows says little about new ones."""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from data.errors import DataError
from data.rows import Rows

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_SHARED = 2 / 3
"""Largest share of held-out rows that may also be training rows. Rows occur twice in many data sets: greetings, short
questions. The share is said; above it, the numbers are mostly of training rows."""
MOST_SHARED_BY_GATE = 0.2
"""The same, where the numbers decide whether a model is published."""
_TOGETHER = 1000


def shared_rows(train: Rows[Any], held_out: Rows[Any]) -> int:
    """Number of rows of `held_out` with the same content as a row of `train`: the same tokens, or the same texts."""
    import numpy as np

    lengths = set(held_out.lengths.tolist())
    there = dict.fromkeys(_contents(held_out, np.arange(len(held_out))), False)
    # A row of another length has another content, so most rows are not read.
    for content in _contents(train, np.flatnonzero(np.isin(train.lengths, list(lengths)))):
        if content in there:
            there[content] = True
    return sum(there[content] for content in _contents(held_out, np.arange(len(held_out))))


def check_held_out(train: Rows[Any], held_out: Rows[Any], most: float, section: str) -> str:
    """What to tell the user about rows that are in both; empty if there are none.

    Raises:
        DataError: more than the share `most` of the held-out rows are training rows. `section` names it.
    """
    shared = shared_rows(train, held_out)
    if shared > most * len(held_out):
        raise DataError(
            f"{section}.eval_data: {shared} of {len(held_out)} held-out rows are also training rows (`data`), and at "
            f"most {most:.0%} may be: what is measured on them says little about new rows. Name other rows, or hold "
            "some out: `holdout: 0.05` with `split: train` under `data` and `split: validation` under `eval_data`"
        )
    return f"{shared} of {len(held_out)} held-out rows are also training rows" if shared else ""


def _contents(rows: Rows[Any], indices: "NDArray[np.int64]") -> Iterator[bytes | tuple[Any, ...]]:
    """The content of each row at `indices`, as something to compare."""
    import numpy as np

    if rows.tokens.size or not rows.lengths.any():  # a stream
        ends = np.cumsum(rows.lengths, dtype=np.int64)
        for end, length in zip(ends[indices].tolist(), rows.lengths[indices].tolist(), strict=True):
            yield rows.tokens[end - length : end].tobytes()
        return
    for start in range(0, len(indices), _TOGETHER):
        table = rows.stored(indices[start : start + _TOGETHER]).with_format("arrow")[:]
        compared = [field.name for field in table.schema if _compared(field.type)]
        yield from zip(*(_cells(table.column(name)) for name in compared), strict=True)


def _compared(kind: Any) -> bool:
    """Whether a column is content: lists of tokens or of texts. The others say where a row comes from, or are masks."""
    import pyarrow

    return pyarrow.types.is_list(kind) and not pyarrow.types.is_boolean(kind.value_type)


def _cells(column: Any) -> Iterable[Any]:
    """The cells of a list column: bytes of tokens, or tuples of texts."""
    import pyarrow

    joined = column.combine_chunks()
    if pyarrow.types.is_string(joined.type.value_type):
        return map(tuple, joined.to_pylist())
    values, offsets = joined.values.to_numpy(), joined.offsets.to_numpy()
    return [values[a:b].tobytes() for a, b in pairwise(offsets)]
