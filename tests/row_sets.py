"""Records and rows for tests: everything that the sources give, in the order of use."""

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
    """All records that `read` gives, in the order of use, and where every row went."""
    accounting = Accounting()
    records = list(read(sources, want, root, seed, accounting))
    order = mixture_order(sources, len(records), seed)
    return Loaded(records if order is None else [records[i] for i in order], accounting)


def encode(kind: Kind[Any], records: Sequence[Record], encoder: Encoder | None, accounting: Accounting) -> Rows[Any]:
    """The rows of the records, written and opened; the counts are those of the index."""
    with tempfile.TemporaryDirectory() as folder:
        write_rows(Path(folder), kind, records, encoder, accounting, lambda n: None)
        return open_rows(Path(folder), kind, {})
