"""Whether two answers are the same: first as text, then by their structure, at last value by value with algebra.

Each way may only say yes when the answers are certainly the same: a wrong yes is a reward for a wrong answer.
"""

import re
from collections.abc import Sequence
from typing import Protocol

from reward.verifiers import maths_form as form
from reward.verifiers.maths_clean import clean, decimal_comma, grouped
from reward.verifiers.maths_form import Form, Items, Row, Value, Words, read
from reward.verifiers.maths_number import near, number

_MOST_ITEMS = 40


class Algebra(Protocol):
    """What computes: maths_algebra.py."""

    def readable(self, text: str) -> bool:
        """Whether the text is a formula."""

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two formulas have the same value."""

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str], positive: bool) -> bool:
        """Whether the differences of two pairs of sides have a constant ratio (`positive`: above 0)."""


class Judge:
    """Compares answers, with one way to compute."""

    def __init__(self, algebra: Algebra) -> None:
        self._algebra = algebra

    def same(self, gold: str, answer: str, listed: str = "") -> bool:
        """Whether the answer is the gold answer.

        Args:
            listed: the parts that the completion marked one by one, joined by commas. They count where the gold answer
                is a list.
        """
        if not answer.strip(" \n\t$.{}"):
            return False
        if _typed(gold) == _typed(answer):
            return True
        golds, answers = readings(gold), readings(answer)
        if any(self._same(one, other) for one in golds for other in answers):
            return True
        if listed and isinstance(golds[0], Items | form.Named):
            return any(
                self._same(golds[0], other) for other in readings(listed) if isinstance(other, Items | form.Named)
            )
        return False

    def readable(self, gold: str) -> bool:
        """Whether a gold answer can be compared: as words, or as formulas that algebra reads."""
        return any(self._readable(one) for one in readings(gold))

    def _readable(self, one: Form) -> bool:
        match one:
            case Value(text=text):
                return number(text) is not None or _endless(text) != 0 or self._algebra.readable(text)
            case Words(text=text):
                return bool(re.fullmatch(r"[^\W_].*", text)) and not re.search(r"\\(?:frac|sqrt)", text)
            case Items(items=items) | form.Union(parts=items) | form.Without(points=items) | Row(items=items):
                return all(self._readable(item) for item in items)
            case form.Equation(left=left, right=right, name=name, value=value):
                if name:
                    return self._readable(value)
                return self._algebra.readable(left) and self._algebra.readable(right)
            case form.Named(values=values):
                return all(self._readable(value) for _, value in values)
            case form.Relation(left=left, right=right):
                return self._algebra.readable(left) and self._algebra.readable(right)
            case _:
                return True

    def _same(self, gold: Form, given: Form) -> bool:
        match gold, given:
            case Value(), Value():
                return self._values(gold, given)
            case Words(text=a), Words(text=b):
                return a == b and a != ""
            case form.Choice(letter=letter), form.Choice(letter=other):
                return letter == other
            case form.Choice(letter=letter, rest=None), _:
                return False
            case _, form.Choice(rest=rest) if rest is not None:
                return self._same(gold, rest)
            case form.Named(values=one), form.Named(values=other):
                found = dict(other)
                return dict(one).keys() == found.keys() and all(self._same(value, found[name]) for name, value in one)
            case form.Named(values=values), Row(items=items) | Items(items=items):
                return self._ordered([value for _, value in sorted(values)], items)
            case Row(items=items), form.Named(values=values):
                return gold.left + gold.right == "()" and self._ordered(items, [value for _, value in sorted(values)])
            case Items(items=items), form.Named(values=values):
                return self._any_order(items, [value for _, value in values])
            case form.Equation(), form.Equation():
                return self._equations(gold, given)
            case form.Equation(name=name, value=value), _ if name:
                return self._same(value, given)
            case form.Equation(), Value():
                return self._identity(gold, given.text)
            case _, form.Equation(name="", value=Words()):
                return isinstance(gold, Value) and self._identity(given, gold.text)
            case _, form.Equation(value=value):
                return self._same(gold, value)
            case Row(variable=name), form.Relation() if name:
                return self._bound(gold, given)
            case form.Relation(), Row(variable=name) if name:
                return self._bound(given, gold)
            case form.Relation(op=one, left=a, right=b), form.Relation(op=other, left=c, right=d):
                return one == other and self._algebra.proportional((a, b), (c, d), True)
            case form.Residue(), form.Residue():
                return gold.modulus == given.modulus and self._same(gold.value, given.value)
            case form.Based(), form.Based():
                return gold == given
            case form.Based(digits=digits), Value(text=text):
                return digits == text
            case form.Ratio(), form.Ratio():
                return self._ratios(gold, given)
            case form.Ratio(clock=None, parts=(a, b)), Value(text=text):
                return self._algebra_equal(rf"\frac{{{a}}}{{{b}}}", text)
            case Value(text=text), form.Ratio(clock=None, parts=(a, b)):
                return self._algebra_equal(text, rf"\frac{{{a}}}{{{b}}}") and re.search(r"frac|/", text) is not None
            case _:
                return self._sets(gold, given)

    def _sets(self, gold: Form, given: Form) -> bool:
        match gold, given:
            case Row(), Row():
                named = gold.variable and given.variable and gold.variable != given.variable
                same = (gold.left, gold.right) == (given.left, given.right) and not named
                return same and self._ordered(gold.items, given.items)
            case (Row(items=one), Items(items=other)) | (Items(items=one), Row(items=other)):
                return len(one) > 2 and self._ordered(one, other)
            case Items(items=one), Items(items=other):
                return self._any_order(one, other)
            case form.Union(parts=one), form.Union(parts=other):
                return self._any_order(one, other)
            case form.Without(points=one), form.Without(points=other):
                return self._any_order(one, other)
            case form.Without(points=points), form.Union(parts=parts):
                return self._all_but(points, parts)
            case form.Union(parts=parts), form.Without(points=points):
                return self._all_but(points, parts)
            case (Items(items=(one,)), Value()) if not isinstance(one, Items):
                return self._same(one, given)
            case (Value(), Items(items=(other,))) if not isinstance(other, Items):
                return self._same(gold, other)
            case _:
                return False

    def _all_but(self, points: Sequence[Form], parts: Sequence[Form]) -> bool:
        """Whether these intervals are all real numbers except these points."""
        rows = [
            part for part in parts if isinstance(part, Row) and part.left + part.right == "()" and len(part.items) == 2
        ]
        if len(rows) != len(parts) or len(parts) != len(points) + 1:
            return False
        low, high = Value(r"-\infty"), Value(r"\infty")
        return self._any_order([low, *points], [row.items[0] for row in rows]) and self._any_order(
            [*points, high], [row.items[1] for row in rows]
        )

    def _ordered(self, gold: Sequence[Form], given: Sequence[Form]) -> bool:
        return len(gold) == len(given) and all(self._same(a, b) for a, b in zip(gold, given, strict=True))

    def _any_order(self, gold: Sequence[Form], given: Sequence[Form]) -> bool:
        if len(gold) != len(given) or len(gold) > _MOST_ITEMS:
            return False
        left = list(given)
        for one in gold:
            place = next((i for i, other in enumerate(left) if self._same(one, other)), None)
            if place is None:
                return False
            left.pop(place)
        return True

    def _equations(self, gold: form.Equation, given: form.Equation) -> bool:
        if gold.name and gold.name == given.name:
            return self._same(gold.value, given.value)
        if gold.name and given.name and not (_has_variable(gold.right) and _has_variable(given.right)):
            return False
        return self._algebra.proportional((gold.left, gold.right), (given.left, given.right), False)

    def _identity(self, equation: form.Equation, text: str) -> bool:
        """Whether both sides of an equation are this formula: `x^2 - 1 = (x - 1)(x + 1)`."""
        return self._algebra_equal(equation.left, text) and self._algebra_equal(equation.right, text)

    def _bound(self, row: Row, relation: form.Relation) -> bool:
        """Whether an inequality says that the row's variable has this one bound."""
        low, high = row.items
        if not (isinstance(low, Value) and isinstance(high, Value)) or (_endless(low.text) == 0) == (
            _endless(high.text) == 0
        ):
            return False
        sides = (low.text, row.variable) if _endless(high.text) else (row.variable, high.text)
        shut = (row.left if _endless(high.text) else row.right) in "[]"
        return shut == (relation.op == r"\le") and self._algebra.proportional(
            sides, (relation.left, relation.right), True
        )

    def _ratios(self, gold: form.Ratio, given: form.Ratio) -> bool:
        if gold.clock is not None and given.clock is not None:
            times = [_times(one) for one in (gold, given)]
            return not times[0].isdisjoint(times[1]) if gold.half or given.half else gold.clock == given.clock
        if len(gold.parts) != len(given.parts):
            return False
        shares = [[rf"\frac{{{part}}}{{{one.parts[0]}}}" for part in one.parts[1:]] for one in (gold, given)]
        return all(self._algebra_equal(a, b) for a, b in zip(*shares, strict=True))

    def _values(self, gold: Value, given: Value) -> bool:
        if gold.unit and given.unit:
            if gold.unit[0] != given.unit[0]:
                return False
            times = given.unit[1] / gold.unit[1]
            if times != 1:
                return self._algebra_equal(
                    gold.text, rf"({given.text}) \cdot \frac{{{times.numerator}}}{{{times.denominator}}}"
                )
        if self._algebra_equal(gold.text, given.text):
            return True
        if gold.percent == given.percent:
            return False
        over = [rf"\frac{{{one.text}}}{{100}}" if one.percent else one.text for one in (gold, given)]
        return self._algebra_equal(*over)

    def _algebra_equal(self, gold: str, given: str) -> bool:
        ends = _endless(gold), _endless(given)
        if ends != (0, 0):
            return ends[0] == ends[1]
        a, b = number(gold), number(given)
        if a is not None and b is not None:
            return near(a, b)
        return re.sub(r"\s+", "", gold) == re.sub(r"\s+", "", given) or self._algebra.equal(gold, given)


def readings(text: str) -> list[Form]:
    """The structures that a text may mean, where a comma can separate thousands, items, or decimals.

    >>> [type(one).__name__ for one in readings("2,5")], [type(one).__name__ for one in readings("(1,250)")]
    (['Items', 'Value'], ['Value', 'Row'])
    """
    if len(text) > form.LONGEST:
        return [read(text)]
    bare = clean(text)
    joined = grouped(bare)
    found = [read(joined)]
    if joined != bare and re.search(r"[(\[{]", bare):
        found.append(read(bare))
    pointed = decimal_comma(joined)
    if pointed is not None:
        found.append(read(pointed))
    return found


def _typed(text: str) -> str:
    """The text as typed, without spaces that mean nothing; empty texts are never the same."""
    short = re.sub(r"(?<![0-9,])\s+|\s+(?![0-9])", "", clean(text)) if len(text) <= form.LONGEST else text.strip()
    return short or repr(text)


def _endless(text: str) -> int:
    """1 for infinity, -1 for minus infinity, 0 for everything else."""
    return {r"\infty": 1, r"+\infty": 1, r"-\infty": -1}.get(re.sub(r"\s+", "", text), 0)


def _times(one: form.Ratio) -> set[int]:
    """The minutes of the day that a time may mean."""
    assert one.clock is not None
    hour, minute = divmod(one.clock, 60)
    if not one.half:
        return {one.clock} | ({one.clock % 720, one.clock % 720 + 720} if 1 <= hour <= 12 else set())
    return {hour % 12 * 60 + minute + (720 if one.half == "p" else 0)}


def _has_variable(text: str) -> bool:
    return re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text)) is not None
