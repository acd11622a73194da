"""Mathematical answers: equal as numbers (`numeric_match`) or as formulas (`math_equal`).

Both read the same answer from a completion, or from its part in `<answer>` tags: a line `#### 42` or the last
`\\boxed{...}`, whichever comes last; without either, the last number (`math_equal`: the last number, or formula
between `$...$`, `\\(...\\)` or `\\[...\\]`).

`math_equal` tests mathematical equality: `\\boxed{17 \\cdot 24}` equals 408. To make the policy compute the value, use
`numeric_match`, which reads numbers but no formulas.
"""

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from typing import Any

from data.records import Message
from reward.verifiers.golds import golds, row_error
from reward.verifiers.maths_process import Comparer

log = logging.getLogger(__name__)

_CONTEXT = Context(prec=400, traps=[])  # prec in digits; without traps, nonsense gives NaN or infinity, no exception
_COMPARERS: dict[int, Comparer] = {}  # by process id: a forked process must not share its parent's pipes

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
# A minus after a digit, a letter or a bracket is an operator or a hyphen, not a sign. Digits after a letter are part of
# a name (H2O, m2), and digits after ^ are an exponent (m^2).
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+]))?(?:[$€£¥₹](?P<sign_behind>[-+])?)?"
    rf"(?<![A-Za-z0-9_^])(?<!\^\{{)(?<!\^-)(?<!\^\{{-)(?<![0-9]\.)"
    rf"(?P<digits>(?:{_DIGITS})(?:[eE][-+]?[0-9]+)?)"
    rf"(?:\s?/\s?(?P<below>[0-9]+(?:\.[0-9]+)?))?(?P<power>\s?(?:\^|\*\*[0-9({{]))?"
)
_PLAIN = re.compile(rf"[-+]?(?:{_DIGITS})")
_MARKED = re.compile(  # not a heading such as `#### 2. The second step`
    r"####[ \t]*((?:[-+]?[$€£¥₹]?[-+]?[0-9][0-9,./]*(?<![./]) ?%?)(?: [A-Za-z]\S*){0,2}?)[ \t]*\.?[ \t]*$", re.MULTILINE
)
_SMALL_FRACTION = re.compile(r"(?<![0-9])\\[dtc]?frac\s?(?:\{([0-9.]+)\}\s?\{([0-9.]+)\}|([0-9])\s?([0-9]))")
_SPACING = re.compile(r"(?<!\\)\\[!,;: ]|(?<=\\\\)\[-?[0-9.]+ ?[a-z]{2}\]|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3})")
_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_FORMULA = re.compile(  # an environment may not contain another of its kind, which keeps the search linear
    r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]"
    r"|(-?\\[dt]?frac\{[^{}]*\}\{[^{}]*\})",
    re.DOTALL,
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[a-z]{3,}")  # text between two currency signs


@dataclass(frozen=True)
class Claim:
    """The answer in a completion or in the data: a marked part of the text (`marked`), or all of it."""

    text: str
    marked: bool


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

    Raises:
        RewardError: the column is missing, or a gold answer has no number.

    >>> numeric_match([], ["So he has 1,250 apples.", "#### -3", "a dozen"], answer=["6 + 1244 = ... #### 1250", 3, 12])
    [1.0, 0.0, 0.0]
    >>> numeric_match([], ["about 3.14 m^2"], ground_truth=["3.14159"], tolerance=0.01)
    [1.0]
    """
    out: list[float | None] = []
    for row, gold in enumerate(golds("numeric_match", prompts, completions, columns, column)):
        if gold is None:
            out.append(None)
            continue
        right, given = _value(_gold_claim(gold)), _value(_claim(completions[row]))
        if right is None:
            problem = f"no number in the gold answer {gold!r}; use `math_equal` or `exact_match` for such rows"
            raise row_error("numeric_match", prompts, row, problem)
        near = given is not None and _CONTEXT.abs(_CONTEXT.subtract(right, given)) <= Decimal(repr(tolerance))
        out.append(float(near))
    return out


def math_equal(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    column: str | None = None,
    time_limit: float = 5.0,
    **columns: Any,
) -> list[float | None]:
    """1 where math-verify finds the answer equal to the gold answer, else 0; None where the row has no gold answer.

    It compares numbers, fractions, roots, polynomials, tuples, sets, intervals, matrices and equations; 0.333333 equals
    1/3.

    Args:
        column: holds the gold answer: LaTeX, a number, or a solution that ends in `\\boxed{...}` or `#### ...`;
            default: `answer` or `ground_truth`.
        time_limit: CPU seconds for one comparison. A comparison that takes longer scores 0, and is logged.

    Raises:
        RewardError: the column is missing, or a gold answer cannot be read as mathematics.

    >>> math_equal([], ["It is $\\\\frac{1}{2}$.", "\\\\boxed{x = 7}", "no idea"], answer=["0.5", "8", "1"])
    [1.0, 0.0, 0.0]
    """
    out: list[float | None] = [None] * len(completions)
    pairs: dict[tuple[str, str], list[int]] = {}
    for row, gold in enumerate(golds("math_equal", prompts, completions, columns, column)):
        if gold is not None:
            right, given = _last_formula(_gold_claim(gold)), _last_formula(_claim(completions[row]))
            quick = _quick(right, given)
            if quick is None:
                pairs.setdefault((right, given), []).append(row)
            else:
                out[row] = float(quick)
    verdicts = _COMPARERS.setdefault(os.getpid(), Comparer()).compare(pairs, time_limit)
    late = 0
    for (pair, rows), verdict in zip(pairs.items(), verdicts, strict=True):
        if not verdict.gold:
            problem = f"the gold answer {pair[0]!r} cannot be read as mathematics; correct it, or use `exact_match`"
            raise row_error("math_equal", prompts, rows[0], problem)
        late += verdict.late * len(rows)
        for row in rows:
            out[row] = float(verdict.equal)
    if late:
        log.warning("math_equal: %d of %d comparisons were stopped after %g s and score 0", late, len(out), time_limit)
    return out


def last_box(text: str) -> tuple[int, str] | None:
    """The position and the content of the last complete `\\boxed{...}`, or None.

    >>> last_box("\\\\boxed{1}, no: \\\\boxed{\\\\frac{1}{2}}, or \\\\boxed{3")
    (15, '\\\\frac{1}{2}')
    """
    found = None
    open_: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text):
        if brace.group()[-1] == "{" and brace.group() != "\\{":
            open_.append(brace)
        elif brace.group() == "}" and open_:
            start = open_.pop()
            if start.group() != "{":
                found = (start.start(), text[start.end() : brace.start()])
    return found


def _gold_claim(gold: str) -> Claim:
    """The gold answer in a row's column: the whole text, or the end of a solution."""
    box = last_box(gold)
    if "####" in gold:
        gold = gold.rpartition("####")[2]
    elif box is not None:
        gold = box[1]
    return Claim(_tidy(gold), marked=True)


def answer_part(completion: str) -> str:
    """The text between the last `<answer>` and `</answer>`; without these tags, the whole completion.

    >>> answer_part("<think>6 * 7</think><answer>42</answer>"), answer_part("42")
    ('42', '42')
    """
    before, end, _ = completion.rpartition("</answer>")
    return before.rpartition("<answer>")[2] if end and "<answer>" in before else completion


def _claim(completion: str) -> Claim:
    """The answer of a completion: the last line `#### 42` or box, else the whole text."""
    completion = answer_part(completion)
    box = last_box(completion)
    marks = list(_MARKED.finditer(completion))
    if marks and (box is None or marks[-1].start() > box[0]):
        return Claim(_tidy(marks[-1][1]), marked=True)
    return Claim(_tidy(completion), marked=False) if box is None else Claim(_tidy(box[1]), marked=True)


def _tidy(text: str) -> str:
    """The same mathematics with one notation for thousands separators, minus and dollar signs."""
    return _SPACING.sub("", text).replace("{,}", ",").replace("\\$", "$").replace("\u2212", "-")


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(text))


def _value(claim: Claim) -> Decimal | None:
    """The last number; None if there is none, or if it is the base of a power or too large."""
    numbers = _numbers(_SMALL_FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]} ", claim.text))
    if not numbers or numbers[-1]["power"]:
        return None
    number = numbers[-1]
    value = _CONTEXT.create_decimal(number["digits"].replace(",", ""))
    if number["below"]:
        value = _CONTEXT.divide(value, _CONTEXT.create_decimal(number["below"]))
    if "-" in (number["sign"], number["sign_behind"]):
        value = -value
    return value if value.is_finite() else None


def _last_formula(claim: Claim) -> str:
    """LaTeX of a marked answer as a whole, else of the last formula or number; empty if there is none."""
    if claim.marked:
        return claim.text.strip(" \n\t$")
    numbers = _numbers(claim.text)
    formulas = [m for m in _FORMULA.finditer(claim.text) if not _PROSE.search(m.group())]
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return next(part for part in formulas[-1].groups() if part is not None).strip()
    if not numbers or numbers[-1]["power"]:
        return ""
    number = numbers[-1]
    sign = "-" if "-" in (number["sign"], number["sign_behind"]) else ""
    return sign + number["digits"].replace(",", "") + (f"/{number['below']}" if number["below"] else "")


def _quick(right: str, given: str) -> bool | None:
    """Whether two plain numbers are equal; None if computer algebra must decide."""
    if not _PLAIN.fullmatch(right):
        return None
    if not given:
        return False
    if not _PLAIN.fullmatch(given):
        return None
    a, b = (_CONTEXT.create_decimal(text.replace(",", "")) for text in (right, given))
    # math-verify compares six decimal places, so decimals that differ here may still count as equal there.
    return True if a == b else (None if "." in right + given else False)
