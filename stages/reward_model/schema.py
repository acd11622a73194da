"""The schema of card.json. Shares are in [0, 1]; intervals are 95 % intervals."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Share(_Record):
    """A share of `n` pairs, with its interval."""

    value: float
    low: float
    high: float
    n: int


class LengthBucket(_Record):
    """Pairs grouped by the length of the better answer relative to the worse one."""

    name: str
    """"much shorter" to "much longer"."""
    about: str
    """The range of lengths, in words."""
    accuracy: Share | None
    """None: there are no such pairs."""


class CalibrationBin(_Record):
    """Pairs grouped by the model's confidence: sigmoid of the absolute difference of the two scores, from 0.5 to 1."""

    low: float
    high: float
    predicted: float
    """Mean confidence of the bin's pairs."""
    observed: Share
    """Share of the bin's pairs in which the better answer scores higher."""


class Histogram(_Record):
    """Number of answers by normalised score; one count for each interval between two edges."""

    edges: list[float]
    chosen: list[int]
    rejected: list[int]


class Probe(_Record):
    """Share of pairs whose better answer scores higher than a spoilt copy of it."""

    name: str
    """"empty", "repeated", "truncated" or "off-topic"."""
    share: Share | None
    """None: no spoilt answers could be made (for "off-topic", when all held-out answers are the same)."""
    passed: bool


class Ensemble(_Record):
    """Agreement of several reward models on the same held-out pairs."""

    members: list[str]
    accuracy: list[Share]
    """Accuracy of each member."""
    combined: Share
    """Accuracy of the mean of their normalised scores."""
    agreement: list[list[float]]
    """Share of pairs on which two members prefer the same answer, (members, members)."""
    mean_std: float
    """Standard deviation of an answer's normalised score over the members, averaged over all answers."""


class Card(_Record):
    """Measurements of a reward model on held-out pairs."""

    format_version: Literal[1] = 1
    accuracy: Share
    """Share of pairs whose better answer scores higher; a tie counts as half."""
    margin: float
    """Mean difference of the two raw scores."""
    loss: float
    """Mean of −log sigmoid(difference of the two raw scores)."""
    longer_wins: Share
    """Share of pairs whose longer answer is the better one: the accuracy of a model that only counts tokens."""
    length_alone: float
    """The accuracy of always choosing the longer or always the shorter answer, whichever is higher."""
    over_length: float
    """Accuracy minus `length_alone`."""
    by_length: list[LengthBucket]
    score_length_correlation: float
    """Pearson correlation of score and length, over all answers."""
    margin_length_correlation: float
    """Pearson correlation of the differences of scores and of lengths, over all pairs."""
    ece: float
    """Expected calibration error."""
    calibration: list[CalibrationBin]
    scores: Histogram
    probes: list[Probe]
    ensemble: Ensemble | None
    findings: list[str]
    """Reasons not to train a policy against this model, each a phrase that follows the model's name."""
    gate: list[str]
    """Conditions of the gate that the model does not meet; empty: it may be published."""
