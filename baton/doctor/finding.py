"""What a check of `baton doctor` has found."""

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How much a finding matters."""

    OK = "ok"
    WARNING = "warning"
    """A training may run, and may suffer from it."""
    FAULT = "FAULT"
    """A training would fail, or would give another result than it should."""


@dataclass(frozen=True)
class Finding:
    """One sentence about one subject; of a fault or a warning, with its mend."""

    level: Level
    subject: str
    words: str


def ok(subject: str, words: str) -> Finding:
    """Nothing is wrong."""
    return Finding(Level.OK, subject, words)


def warning(subject: str, words: str) -> Finding:
    """See `Level.WARNING`."""
    return Finding(Level.WARNING, subject, words)


def fault(subject: str, words: str) -> Finding:
    """See `Level.FAULT`."""
    return Finding(Level.FAULT, subject, words)
