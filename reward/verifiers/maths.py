"""Mathematical answers: equal as numbers (`numeric_match`) or as formulas (`math_equal`).

Both read the same answer from a completion (maths_claim.py). `math_equal` compares it with the gold answer as text, by
its structure (maths_form.py, maths_same.py) and by computer algebra (maths_algebra.py, in a separate process).

`math_equal` tests mathematical equality: `\\boxed{17 \\cdot 24}` equals 408. To make the policy compute the value, use
`numeric_match`, which reads numbers but no formulas.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Context, Decimal
from typing import Any

from data.records import Message
from reward.verifiers.golds import Unreadable, golds, warn_unreadable
from reward.verifiers.maths_claim import claim, decimal, formula, gold_claim, last_value
from reward.verifiers.maths_process import Comparer, Pair, Verdict

log = logging.getLogger(__name__)

_CONTEXT = Context(prec=400, traps=[])
_COMPARERS: dict[int, Comparer] = {}  # by process id: a forked process must not share its parent's pipes
_CHECK_SECONDS = 5.0  # CPU time to read one gold answer

_PLAIN = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def numeric_match(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    column: str | None = None,
    tolerance: float = 0.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the answer's number equals the gold answer's, else 0; None where the row has no gold answer.

    Thousands separators, currency and percent signs, and units are ignored; `3/4` and `\\frac{3}{4}` are numbers.

    Args:
        column: holds the gold answer: a number, text with one, or a GSM8K solution (`... #### 42`); default: `answer`
            or `ground_truth`.
        tolerance: the largest difference that still counts as equal.

    A gold answer without a number scores None, and is counted in a warning.

    Raises:
        RewardError: the column is missing.

    >>> numeric_match([], ["So he has 1,250 apples.", "#### -3", "a dozen"], answer=["6 + 1244 = ... #### 1250", 3, 12])
    [1.0, 0.0, 0.0]
    >>> numeric_match([], ["about 3.14 m^2"], ground_truth=["3.14159"], tolerance=0.01)
    [1.0]
    """
    out: list[float | None] = []
    unreadable: Unreadable = {}
    for row, gold in enumerate(golds("numeric_match", len(completions), columns, column, unreadable)):
        right = None if gold is None else _gold_number(row, gold, unreadable)
        if right is None:
            out.append(None)
            continue
        given = last_value(claim(completions[row]))
        near = given is not None and _CONTEXT.abs(_CONTEXT.subtract(right, given)) <= Decimal(repr(tolerance))
        out.append(float(near))
    warn_unreadable("numeric_match", prompts, unreadable)
    return out


def numeric_match_unreadable(rows: int, columns: Mapping[str, Any], column: str | None = None, **_: Any) -> Unreadable:
    """The rows whose gold answer `numeric_match` cannot read, and why. Raises RewardError: the column is missing."""
    unreadable: Unreadable = {}
    for row, gold in enumerate(golds("numeric_match", rows, columns, column, unreadable)):
        if gold is not None:
            _gold_number(row, gold, unreadable)
    return unreadable


def _gold_number(row: int, gold: str, unreadable: Unreadable) -> Decimal | None:
    value = last_value(gold_claim(gold))
    if value is None:
        unreadable[row] = f"no single number in the gold answer {gold[-80:]!r}; `math_equal` compares other answers"
    return value


def math_equal(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    column: str | None = None,
    time_limit: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    """1 where the answer is the gold answer, however it is written, else 0; None where the row has no gold answer.

    It compares numbers, expressions, lists and sets in any order, tuples, intervals and inequalities, matrices,
    equations, ratios, times and words. 0.333333 equals 1/3. Several answers where one is right are wrong.

    Args:
        column: holds the gold answer: LaTeX, a number, or a solution that ends in `\\boxed{...}` or `#### ...`;
            default: `answer` or `ground_truth`.
        time_limit: CPU seconds for one comparison. A comparison that takes longer scores 0, and is logged.

    A gold answer that is neither a formula nor a word scores None unless the answer is the same text, and is counted in
    a warning.

    Raises:
        RewardError: the column is missing.

    >>> math_equal([], ["It is $\\\\frac{1}{2}$.", "\\\\boxed{x = 7}", "no idea"], answer=["0.5", "8", "1"])
    [1.0, 0.0, 0.0]
    """
    out: list[float | None] = [None] * len(completions)
    pairs: dict[Pair, list[int]] = {}
    unreadable: Unreadable = {}
    for row, gold in enumerate(golds("math_equal", len(completions), columns, column, unreadable)):
        if gold is not None:
            right, _ = formula(gold_claim(gold))
            given, listed = formula(claim(completions[row]))
            quick = _quick(right, given)
            if quick is None:
                pairs.setdefault(Pair(right, given, listed), []).append(row)
            else:
                out[row] = float(quick)
    late = 0
    for (pair, rows), verdict in zip(pairs.items(), _compare(pairs, time_limit), strict=True):
        late += verdict.late * len(rows)
        for row in rows:
            if verdict.gold or verdict.equal:
                out[row] = float(verdict.equal)
            else:
                unreadable[row] = _no_mathematics(pair.gold)
    if late:
        log.warning("math_equal: %d of %d comparisons were stopped after %g s and score 0", late, len(out), time_limit)
    warn_unreadable("math_equal", prompts, unreadable)
    return out


def math_equal_unreadable(rows: int, columns: Mapping[str, Any], column: str | None = None, **_: Any) -> Unreadable:
    """The rows whose gold answer `math_equal` cannot read, and why. Raises RewardError: the column is missing."""
    unreadable: Unreadable = {}
    asked: dict[Pair, list[int]] = {}
    for row, gold in enumerate(golds("math_equal", rows, columns, column, unreadable)):
        right = None if gold is None else formula(gold_claim(gold))[0]
        if right is not None and not _PLAIN.fullmatch(right):
            asked.setdefault(Pair(right, None), []).append(row)
    for (pair, places), verdict in zip(asked.items(), _compare(asked, _CHECK_SECONDS), strict=True):
        if not verdict.gold:
            unreadable |= dict.fromkeys(places, _no_mathematics(pair.gold))
    return unreadable


def _compare(pairs: Iterable[Pair], seconds: float) -> list[Verdict]:
    return _COMPARERS.setdefault(os.getpid(), Comparer()).compare(pairs, seconds)


def _no_mathematics(gold: str) -> str:
    return f"the gold answer {gold[-80:]!r} is neither a formula nor a word; correct it, or use `exact_match`"


def _quick(right: str, given: str) -> bool | None:
    """Whether two plain numbers are equal; None if computer algebra must decide."""
    if not _PLAIN.fullmatch(right):
        return None
    if not given:
        return False
    if not _PLAIN.fullmatch(given):
        return None
    a, b = (decimal(text) for text in (right, given))
    # Decimals are compared to six places, so those that differ here may still be equal.
    return True if a == b else (None if "." in right + given else False)
