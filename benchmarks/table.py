"""The table that every benchmark prints, and writes with --json: a list of {"row", "ours", "peer", "unit", "ratio"}."""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict


class Row(TypedDict):
    """`ratio` is above 1 where ours is better; the median over pairs of turns, not the ratio of the medians."""

    row: str
    ours: float
    peer: float
    unit: str
    ratio: float


def in_turns(name: str, unit: str, ours: Callable[[], float], peer: Callable[[], float], turns: int = 5) -> Row:
    """Runs both `turns` times, A B A B, after one unmeasured run each. Both return a rate: more is better."""
    ours()
    peer()
    pairs = [(ours(), peer()) for _ in range(turns)]
    return Row(
        row=name,
        ours=statistics.median(a for a, _ in pairs),
        peer=statistics.median(b for _, b in pairs),
        unit=unit,
        ratio=statistics.median(a / b for a, b in pairs),
    )


def report(rows: list[Row], path: Path | None) -> None:
    """Prints the table and writes the file."""
    print(f"{'row':<24}{'ours':>12}{'peer':>12}  {'unit':<14}{'ratio':>7}")
    for row in rows:
        print(f"{row['row']:<24}{row['ours']:>12.4g}{row['peer']:>12.4g}  {row['unit']:<14}{row['ratio']:>6.2f}×")
    if path is not None:
        path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def json_path(description: str) -> Path | None:
    """The --json option."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    path: Path | None = parser.parse_args().json
    return path
