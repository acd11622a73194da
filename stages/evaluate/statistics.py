"""95 % intervals: Wilson's for proportions, bootstrap intervals for means, ratios of sums and paired differences."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from data.sampling import uniform
from training.measure import wilson

_RESAMPLES = 2000
_POWER = 2.8
"""Standard errors of the smallest difference that is found four times out of five: 1.96 for a two-sided test at 5 %,
and 0.84, the 80 % quantile of the normal distribution."""


class Estimate(TypedDict):
    """A mean, its 95 % interval, and the number of items `n`."""

    value: float
    low: float
    high: float
    n: int


class Difference(Estimate):
    """A mean of differences, item by item."""

    detectable: float
    """The smallest true difference that so many items show four times out of five."""


@dataclass(frozen=True)
class Items:
    """A metric of one model, item by item: prompt, question, document or reference answer."""

    values: Sequence[float | None]
    """None for an item without a value."""
    sizes: Sequence[int] | None = None
    """For a metric that is the ratio of two sums, such as bits per byte: each item's part of the lower one."""
    exponent: bool = False
    """Whether the metric is e to that ratio, as perplexity is."""

    def known(self) -> list[int]:
        """The items that have a value."""
        return [i for i, value in enumerate(self.values) if value is not None]

    def of(self, items: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Values and sizes of these items, both (n,). The size of an item of a mean is 1."""
        values = np.array([self.values[i] for i in items], dtype=np.float64)
        sizes = (
            np.ones(len(items)) if self.sizes is None else np.array([self.sizes[i] for i in items], dtype=np.float64)
        )
        return values, sizes


def proportion(values: Sequence[bool]) -> Estimate:
    """Share of true values, with the interval of Wilson 1927 (never empty, never outside [0, 1])."""
    n = len(values)
    share = sum(values) / n
    low, high = wilson(sum(values), n)
    return Estimate(value=share, low=max(0.0, min(share, low)), high=min(1.0, max(share, high)), n=n)


def estimate(items: Items, seed: int, *, binary: bool) -> Estimate | None:
    """The mean over the items that have a value, as a proportion if all values are 0 or 1 (`binary`), else with a
    bootstrap interval. None if no item has a value."""
    known = items.known()
    if not known:
        return None
    values, sizes = items.of(known)
    if binary:
        return proportion([value == 1 for value in values])
    return _ratio(values, sizes, seed, exponent=items.exponent)


def mean(values: Sequence[float], seed: int) -> Estimate:
    """Mean with a percentile bootstrap interval."""
    return _ratio(np.asarray(values, dtype=np.float64), np.ones(len(values)), seed)


def difference(after: Items, before: Items, seed: int) -> Difference | None:
    """`after` − `before` over the items that have a value in both, paired: every resample draws the same items of both.

    None if no item has.
    """
    both = sorted({*after.known()} & {*before.known()})
    if not both:
        return None
    (new, sizes), (old, others) = after.of(both), before.of(both)
    picks = _picks(len(both), seed)
    scaled = np.exp if after.exponent else np.asarray
    drawn = scaled(_ratios(new, sizes, picks)) - scaled(_ratios(old, others, picks))
    low, high = np.quantile(drawn, [0.025, 0.975])
    value = float(scaled(new.sum() / sizes.sum()) - scaled(old.sum() / others.sum()))
    return Difference(
        value=value, low=float(low), high=float(high), n=len(both), detectable=_POWER * float(drawn.std())
    )


def _ratio(values: np.ndarray, sizes: np.ndarray, seed: int, *, exponent: bool = False) -> Estimate:
    """Σ values / Σ sizes, or e to it, with a percentile bootstrap interval (Efron 1979), resampled with keyed random
    numbers."""
    low, high = np.quantile(_ratios(values, sizes, _picks(len(values), seed)), [0.025, 0.975])
    ends = (float(values.sum() / sizes.sum()), float(low), float(high))
    value, low, high = (math.exp(end) for end in ends) if exponent else ends
    return Estimate(value=value, low=low, high=high, n=len(values))


def _picks(n: int, seed: int) -> np.ndarray:
    """The items of each resample, (resamples, n)."""
    return (uniform((_RESAMPLES, n), seed, "bootstrap") * n).astype(np.int64)


def _ratios(values: np.ndarray, sizes: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """Σ values / Σ sizes of each resample, (resamples,)."""
    found: np.ndarray = values[picks].sum(-1) / sizes[picks].sum(-1)
    return found
