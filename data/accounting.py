"""Accounts for every row: rows in = rows used + rows dropped, by reason. No row is left out without being counted."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from data.errors import DataError
from data.records import Origin

EXAMPLES_KEPT = 3
"""Number of places that a message names for each reason."""


@dataclass
class Accounting:
    """Counts of one list of sources, from reading to encoding. At all times rows_in == rows_used + sum(dropped)."""

    rows_in: int = 0
    """Requested rows: in the chosen split, within `limit` and the mixture's weights."""
    rows_used: int = 0
    """Requested rows that have not been dropped."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Requested rows that could not be used, by reason."""
    set_aside: Counter[str] = field(default_factory=Counter)
    """Rows read but not requested (another split, the mixture's weight), by reason; not part of rows_in."""
    notes: Counter[str] = field(default_factory=Counter)
    """Other facts for the user, with counts, e.g. the detected format, columns not read, turns cut."""
    examples: dict[str, list[str]] = field(default_factory=dict)
    """The first rows dropped for each reason."""
    mends: dict[str, str] = field(default_factory=dict)
    """What the user can do about a reason, where that is not plain."""

    def read(self, rows: int = 1) -> None:
        """Counts rows as read and used, until they are dropped."""
        self.rows_in += rows
        self.rows_used += rows

    def drop(self, reason: str, origin: Origin, mend: str = "") -> None:
        """Counts a row that was read but cannot be used."""
        assert self.rows_used > 0, "dropped more rows than were read"
        self.rows_used -= 1
        self.dropped[reason] += 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_KEPT:
            places.append(str(origin))
        if mend:
            self.mends[reason] = mend

    def put_aside(self, reason: str, rows: int = 1) -> None:
        """Removes rows that were read but turn out not to be requested from the count."""
        assert self.rows_used >= rows, "set aside more rows than were read"
        self.rows_in -= rows
        self.rows_used -= rows
        self.set_aside[reason] += rows

    def merge(self, other: "Accounting") -> None:
        """Adds the counts of another list of sources."""
        self.rows_in += other.rows_in
        self.rows_used += other.rows_used
        self.dropped.update(other.dropped)
        self.set_aside.update(other.set_aside)
        self.notes.update(other.notes)
        self.mends.update(other.mends)
        for reason, places in other.examples.items():
            mine = self.examples.setdefault(reason, [])
            mine.extend(places[: EXAMPLES_KEPT - len(mine)])

    def check(self, max_drop_fraction: float) -> None:
        """Checks that not too many rows were dropped.

        Raises:
            DataError: more than this share of the rows was dropped, or none is left; names reasons and first rows.
        """
        lost = sum(self.dropped.values())
        if self.rows_used == 0:
            raise DataError(f"no row is left of {self.rows_in} that were read:\n{self._reasons()}")
        if lost > max_drop_fraction * self.rows_in:
            raise DataError(
                f"{lost} of {self.rows_in} rows were dropped, more than max_drop_fraction = {max_drop_fraction:g} "
                f"allows:\n{self._reasons()}\nCorrect the data, or raise max_drop_fraction to accept this."
            )

    def to_json(self) -> dict[str, Any]:
        """All counts, for `from_json`."""
        return dict(vars(self))

    @classmethod
    def from_json(cls, counts: dict[str, Any]) -> "Accounting":
        """What `to_json` gave, after it went through a JSON file."""
        made = cls(counts["rows_in"], counts["rows_used"], examples=counts["examples"], mends=counts["mends"])
        for name in ("dropped", "set_aside", "notes"):
            getattr(made, name).update(counts[name])
        return made

    def metrics(self) -> dict[str, int]:
        """For metrics.jsonl: `data/rows_in`, `data/rows_used`, `data/dropped/<reason>`, `data/set_aside/<reason>`."""
        counts = {"data/rows_in": self.rows_in, "data/rows_used": self.rows_used}
        counts |= {f"data/dropped/{_slug(reason)}": n for reason, n in sorted(self.dropped.items())}
        return counts | {f"data/set_aside/{_slug(reason)}": n for reason, n in sorted(self.set_aside.items())}

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = [f"{self.rows_in} rows in, {self.rows_used} used, {sum(self.dropped.values())} dropped"]
        if self.dropped:
            lines.append(self._reasons())
        lines += [f"  set aside, {reason}: {n}" for reason, n in self.set_aside.most_common()]
        lines += [f"  note: {note}" + (f" ({n} times)" if n > 1 else "") for note, n in self.notes.items()]
        return "\n".join(lines)

    def _reasons(self) -> str:
        return "\n".join(
            f"  dropped, {reason}: {n} (first at {', '.join(self.examples[reason])})"
            + (f"; {self.mends[reason]}" if reason in self.mends else "")
            for reason, n in self.dropped.most_common()
        )


def _slug(reason: str) -> str:
    """A reason as part of a metric's name: letters, digits and underscores."""
    return "_".join("".join(c if c.isalnum() else " " for c in reason.lower()).split())
