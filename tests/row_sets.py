"""Loads all records and rows of sources for tests, in the order of use."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.accounting import Accounting
from data.config import SourceConfig
from data.encode import Encoder
from data.load import mixture_order, read
from data.records import Record
from data.rows import Kind, Rows
from data.shards import open_rows, write_rows


@dataclass
class Loaded:
    records: list[Any]
    accounting: Accounting


def load(sources: Sequence[SourceConfig], want: type[Record], root: Path | None, seed: int) -> Loaded:
    """All records that `read` yields, in the order of use, and the accounting of all rows."""
    accounting = Accounting()
    records = list(read(sources, want, root, seed, accounting))
    order = mixture_order(sources, len(records), seed)
    return Loaded(records if order is None else [records[i] for i in order], accounting)


def encode(kind: Kind[Any], records: Sequence[Record], encoder: Encoder | None, accounting: Accounting) -> Rows[Any]:
    """Writes the records' rows to disk and opens them; the counts come from the written index."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), kind, records, encoder, accounting, lambda n: None)
        return open_rows(Path(folder), kind, {})
