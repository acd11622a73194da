"""What a shipped task is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Shipped:
    """A task whose keys have values of their own; those of the recipe come first."""

    about: str
    """What it asks, in a few words."""
    hub: str
    """The source that its publishers give, as an entry of `data`; empty if the task is for data of many origins."""
    kind: str = "answers"
    keys: Mapping[str, Any] = field(default_factory=dict)
    """The keys of the task."""
    source: Mapping[str, Any] = field(default_factory=dict)
    """The keys of each source of its data that is a file, a data set of the hub or rows of a stage."""


GREEDY: Mapping[str, Any] = {"num_generations": 0}
"""One greedy answer to each prompt, as tasks with right answers are usually reported."""
