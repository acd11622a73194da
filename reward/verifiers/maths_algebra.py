"""Equality of formulas by computer algebra: math-verify reads LaTeX, sympy computes.

Two formulas with variables are equal when they agree, to 30 digits, at several points. Numbers are compared exactly
where both are rational, to six decimal places where one is written as a decimal, and to 30 digits else. Only
maths_worker.py imports this, in a process of its own with limits on time and memory.
"""

import functools
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy import Basic, Eq, Expr, Float, MatrixBase, Rational, Symbol
from sympy.core.function import UndefinedFunction
from sympy.core.relational import Relational

_RULE = LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    ),
)
_DIGITS = 50
_CLOSE = Rational(1, 10**30)
# Values of the variables: of both signs, near 1, so that powers stay small. The last two are for formulas that are
# real only for positive values.
_POINTS = [
    [Rational(n, 1009) for n in row]
    for row in (
        (1213, -701, 1511, -907, 613, 1733, -1319, 809),
        (-1117, 1301, -653, 1621, -1433, 719, 907, -1213),
        (743, 1409, 1171, -587, 1847, -1103, 647, 1529),
        (1327, 859, 1693, 1201, 701, 1471, 1109, 787),
        (2111, 1567, 911, 1783, 1259, 677, 2003, 1361),
    )
]


class Sympy:
    """The algebra of maths_same.Judge."""

    def readable(self, text: str) -> bool:
        """Whether the text is a formula."""
        return _read(text) is not None

    def equal(self, gold: str, answer: str) -> bool:
        """Whether two formulas have the same value."""
        a, b = _read(gold), _read(answer)
        if a is None or b is None:
            return False
        if isinstance(a, MatrixBase) or isinstance(b, MatrixBase):
            if not (isinstance(a, MatrixBase) and isinstance(b, MatrixBase) and a.shape == b.shape):
                return False
            return all(_equal(x, y) for x, y in zip(a.flat(), b.flat(), strict=True))
        return _equal(a, b)

    def proportional(self, gold: tuple[str, str], answer: tuple[str, str], positive: bool) -> bool:
        """Whether the differences of two pairs of sides have a constant ratio (`positive`: above 0)."""
        sides = [_read(side) for side in (*gold, *answer)]
        if not all(isinstance(side, Expr) for side in sides):
            return False
        a, b = sides[0] - sides[1], sides[2] - sides[3]
        names = _names(a)
        if names != _names(b) or not names:
            return False
        ratios = []
        for x, y in _values(names, a, b):
            if not _nearly(y, 0) and not _nearly(x, 0):
                ratios.append(x / y)
        if len(ratios) < 3 or not all(_nearly(ratio, ratios[0]) for ratio in ratios):
            return False
        return not positive or bool(sympy.re(ratios[0]) > 0)


@functools.lru_cache(maxsize=4096)
def _read(text: str) -> Any:
    """The formula as a sympy object; None where it is none, or a relation or set, which maths_form.py takes apart."""
    found = parse(f"\\boxed{{{text}}}", [_RULE], fallback_mode="no_fallback", parsing_timeout=None)
    one = found[0] if found else None
    if isinstance(one, Eq | Relational) or not isinstance(one, Expr | MatrixBase):
        return None
    return _unwrapped(one)


def _unwrapped(one: Any) -> Any:
    """With an unknown function of an argument as one variable, since `f(x)` has no value."""
    if isinstance(one, MatrixBase):
        return one
    functions = [part for part in one.atoms(sympy.Function) if isinstance(part.func, UndefinedFunction)]
    return one.subs({part: Symbol(str(part).replace(" ", "")) for part in functions}) if functions else one


def _names(one: Basic) -> set[str]:
    return {symbol.name for symbol in one.free_symbols}


def _equal(a: Any, b: Any) -> bool:
    names = _names(a) | _names(b)
    if names == {"i"}:  # alone it is the imaginary unit, not a variable
        a, b = (one.subs(dict.fromkeys(one.free_symbols, sympy.I)) for one in (a, b))
        names = set()
    if not names:
        return _numbers(a, b)
    if len(names) > len(_POINTS[0]):
        return bool(a == b)
    found = list(_values(names, a, b))
    return len(found) >= 3 and all(_nearly(x, y) for x, y in found)


def _values(names: set[str], *formulas: Any) -> Any:
    """The formulas' values at each point where all of them have one."""
    for point in _POINTS:
        at = dict(zip(sorted(names), point, strict=False))
        values = [_number(one.subs({symbol: at[symbol.name] for symbol in one.free_symbols})) for one in formulas]
        if all(value is not None for value in values):
            yield values


def _number(one: Any) -> Any:
    """The value to _DIGITS digits; None where there is none."""
    value = sympy.N(one.doit(), _DIGITS)
    return value if value.is_number and value.is_finite and not value.free_symbols and _is_plain(value) else None


def _is_plain(value: Any) -> bool:
    return all(part.is_Number for part in value.as_real_imag())


def _nearly(a: Any, b: Any) -> bool:
    """Whether two values agree to 30 digits."""
    return bool(abs(a - b) <= _CLOSE * max(abs(a), abs(b), _CLOSE))


def _numbers(a: Any, b: Any) -> bool:
    rounded = bool(a.atoms(Float) or b.atoms(Float))
    x, y = a.doit(), b.doit()
    if x.is_Rational and y.is_Rational:
        return bool(x == y)
    x, y = _number(x), _number(y)
    if x is None or y is None:
        return False
    if not rounded:
        return _nearly(x, y)
    apart, largest = abs(x - y), max(abs(x), abs(y))
    return bool(apart < Rational(1, 2 * 10**6) and apart <= largest * Rational(2, 10**6))
