"""Several sampled answers to one prompt: pass@k and majority voting. Pure functions."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from reward.verifiers.maths_claim import claim, formula, last_value
from reward.verifiers.text import chosen_letter

Vote = Callable[[str], str | None]


def pass_at(k: int, scores: Sequence[float | None]) -> float | None:
    """The chance that one of k of these answers is right (scores 1): 1 − C(n − c, k) / C(n, k), Chen et al. 2021,
    equation 1. None if fewer than k have a score.

    >>> pass_at(1, [1.0, 0.0, 0.0, 0.0]), pass_at(2, [1.0, 0.0, 0.0, 0.0]), pass_at(2, [1.0, None])
    (0.25, 0.5, None)
    """
    known = [score for score in scores if score is not None]
    n, right = len(known), sum(score >= 1 for score in known)
    return None if n < k else 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at(k: int, texts: Sequence[str], scores: Sequence[float | None], vote: Vote) -> float | None:
    """The score of the final answer that most of the first k answers give, or the mean over those with as many votes.

    Where none of them gives a final answer, it is the mean of all. None if the winner has no score.

    >>> majority_at(3, ["7", "8", "7"], [1.0, 0.0, 1.0], str), majority_at(2, ["7", "8", "7"], [1.0, 0.0, 1.0], str)
    (1.0, 0.5)
    """
    votes = [vote(text) for text in texts[:k]]
    counts = Counter(one for one in votes if one is not None)
    most = max(counts.values(), default=0)
    winners: list[str | None] = [one for one, count in counts.items() if count == most]
    # Equal final answers have equal scores, unless a score looks at the rest of the text: so the mean.
    found = [mean_of([score for one, score in zip(votes, scores) if one == winner]) for winner in winners or [None]]
    return mean_of(found)


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _number(text: str) -> str | None:
    value = last_value(claim(text))
    return None if value is None else str((value + Decimal(0)).normalize())


def _formula(text: str) -> str | None:
    return formula(claim(text))[0] or None


def _choice(text: str) -> str | None:
    return chosen_letter(text, "ABCDEFGHIJ")


VOTES: dict[str, Vote] = {"text": str.strip, "number": _number, "formula": _formula, "choice": _choice}
"""By the value of the recipe's key `vote`: an answer's text -> its final answer, or None."""
