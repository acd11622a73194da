"""95 % intervals: Wilson's for proportions, the bootstrap's for means."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from data.sampling import uniform

_Z = 1.959964  # two-sided 95 % of the normal distribution
_RESAMPLES = 2000


class Estimate(TypedDict):
    """A mean, its 95 % interval, and over how many items."""

    value: float
    low: float
    high: float
    n: int


def proportion(values: Sequence[bool]) -> Estimate:
    """Share of true values, with the interval of Wilson 1927 (never empty, never outside [0, 1])."""
    n = len(values)
    p = sum(values) / n
    centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z / (1 + _Z**2 / n) * ((p * (1 - p) / n + _Z**2 / (4 * n**2)) ** 0.5)
    return Estimate(value=p, low=max(0.0, min(p, centre - half)), high=min(1.0, max(p, centre + half)), n=n)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """Mean with the percentile bootstrap's interval (Efron 1979), resampled with keyed random numbers."""
    data = np.asarray(values, dtype=np.float64)
    picks = (uniform((_RESAMPLES, len(data)), seed, "bootstrap") * len(data)).astype(np.int64)
    means = data[picks].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(data.mean()), low=float(low), high=float(high), n=len(data))
