"""What card.json holds, for those who write it and those who read it. Shares are in [0, 1], intervals of 95 %."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Record):
    """How often something holds among `n` pairs, with its interval."""

    value: float
    low: float
    high: float
    n: int


class LengthBucket(_Record):
    """Pairs by how long the better answer is beside the other one."""

    name: str
    """"much shorter" to "much longer"."""
    about: str
    """The same in numbers."""
    accuracy: Share | None
    """None: no such pairs."""


class CalibrationBin(_Record):
    """Pairs by how sure the model is of its choice: sigmoid of the difference of the two scores, from 0.5 to 1."""

    low: float
    high: float
    predicted: float
    """Mean confidence of the bin's pairs."""
    observed: Share
    """How often the choice was right."""


class Histogram(_Record):
    """Answers by their normalised score; a count for each pair of neighbouring edges."""

    edges: list[float]
    chosen: list[int]
    rejected: list[int]


class Probe(_Record):
    """How often the better answer scores above the same answer spoilt."""

    name: str
    """"empty", "repeated", "truncated" or "off-topic"."""
    share: Share | None
    """None: nothing to compare (all held-out answers are the same)."""
    passed: bool


class Ensemble(_Record):
    """How far reward models agree on the same held-out pairs."""

    members: list[str]
    accuracy: list[Share]
    """Of each member."""
    combined: Share
    """Accuracy of the mean of their normalised scores."""
    agreement: list[list[float]]
    """Share of pairs on which two members prefer the same answer, (members, members)."""
    mean_std: float
    """Standard deviation over the members of an answer's normalised score, mean over all answers."""


class Card(_Record):
    """What is known of a reward model, all of it from held-out pairs."""

    format_version: Literal[1] = 1
    accuracy: Share
    """How often the better answer scores higher; a tie is half."""
    margin: float
    """Mean difference of the two raw scores."""
    loss: float
    """Mean of −log sigmoid of it."""
    longer_wins: Share
    """How often the longer answer is the better one: what a model that only counts tokens gets right."""
    length_alone: float
    """The larger of `longer_wins` and its complement: length may mislead either way round."""
    over_length: float
    """Accuracy less `length_alone`."""
    by_length: list[LengthBucket]
    score_length_correlation: float
    """Pearson's, over all answers."""
    margin_length_correlation: float
    """Pearson's, of the differences of scores with those of lengths within the pairs."""
    ece: float
    """Expected calibration error."""
    calibration: list[CalibrationBin]
    scores: Histogram
    probes: list[Probe]
    ensemble: Ensemble | None
    findings: list[str]
    """What a reader should know before such a model is maximised, in words that follow its name."""
    gate: list[str]
    """What keeps it from being published, in words; empty: nothing does."""
