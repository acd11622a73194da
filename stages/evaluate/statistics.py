"""95 % intervals: Wilson's for proportions, bootstrap intervals for means."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from data.sampling import uniform
from training.measure import wilson

_RESAMPLES = 2000


class Estimate(TypedDict):
    """A mean, its 95 % interval, and the number of items `n`."""

    value: float
    low: float
    high: float
    n: int


def proportion(values: Sequence[bool]) -> Estimate:
    """Share of true values, with the interval of Wilson 1927 (never empty, never outside [0, 1])."""
    n = len(values)
    share = sum(values) / n
    low, high = wilson(sum(values), n)
    return Estimate(value=share, low=max(0.0, min(share, low)), high=min(1.0, max(share, high)), n=n)


def estimate(values: Sequence[float | None], seed: int, *, binary: bool) -> Estimate | None:
    """The mean of the values that are not None, as a proportion if all scores are 0 or 1 (`binary`), else with a
    bootstrap interval. None if all values are None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return proportion([value == 1 for value in known]) if binary else mean(known, seed)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """Mean with a percentile bootstrap interval (Efron 1979), resampled with keyed random numbers."""
    data = np.asarray(values, dtype=np.float64)
    picks = (uniform((_RESAMPLES, len(data)), seed, "bootstrap") * len(data)).astype(np.int64)
    means = data[picks].mean(-1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Estimate(value=float(data.mean()), low=float(low), high=float(high), n=len(data))
