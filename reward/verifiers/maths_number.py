"""Numbers that need no algebra: integers, decimals, fractions, mixed numbers and powers of ten, as exact fractions."""

import re
from dataclasses import dataclass
from fractions import Fraction

_MOST_DIGITS = 1000
_MOST_POWER = 400
_PLAIN = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?:(?P<whole>[0-9]+)\s*(?=\\frac|[0-9]+/)(?<=[0-9\s]))??"
    rf"(?:\\frac\s*\{{\s*(?P<sign_above>-?)(?P<above>{_PLAIN})\s*\}}\s*\{{\s*(?P<sign_below>-?)(?P<below>{_PLAIN})\s*\}}"
    rf"|(?P<upper>{_PLAIN})\s*/\s*(?P<sign_lower>-?)(?P<lower>{_PLAIN})"
    rf"|(?P<number>{_PLAIN})(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{{\s*(?P<power>[-+]?[0-9]+)\s*\}}|(?P<digit>[0-9]))"
    rf"|[eE](?P<exponent>[-+]?[0-9]+))?"
    rf"|10\s*\^\s*(?:\{{\s*(?P<ten>[-+]?[0-9]+)\s*\}}|(?P<ten_digit>[0-9])))"
)


@dataclass(frozen=True)
class Number:
    """A number. `decimals`: it was written with a decimal point, so it may be rounded."""

    value: Fraction
    decimals: bool


def number(text: str) -> Number | None:
    """The number that a text writes out; None where it is anything else, or too long.

    >>> number("-2\\\\frac{1}{3}").value, number("1.5 \\\\times 10^{3}").value, number("3 1/2").value, number("2^3")
    (Fraction(-7, 3), Fraction(1500, 1), Fraction(7, 2), None)
    """
    if len(text) > _MOST_DIGITS:
        return None
    found = _NUMBER.fullmatch(text.strip())
    if found is None:
        return None
    part = found.groupdict()
    above, below = part["above"] or part["upper"], part["below"] or part["lower"]
    if part["whole"] and "." in above + below:
        return None
    power = next((part[name] for name in ("power", "digit", "exponent", "ten", "ten_digit") if part[name]), "0")
    if abs(int(power[:8])) > _MOST_POWER or (below is not None and Fraction(below) == 0):
        return None
    value = Fraction(above) / Fraction(below) if above else Fraction(part["number"] or 1) * Fraction(10) ** int(power)
    for sign in ("sign_above", "sign_below", "sign_lower"):
        value = -value if part[sign] else value
    value += int(part["whole"] or 0)
    return Number(-value if part["sign"] == "-" else value, "." in text or part["exponent"] is not None)


def near(a: Number, b: Number) -> bool:
    """Whether two numbers are equal; to six decimal places and six digits where one has a decimal point.

    >>> near(number("0.333333"), number("1/3")), near(number("0.000001"), number("0.0000014"))
    (True, False)
    """
    if a.value == b.value:
        return True
    apart = abs(a.value - b.value)
    largest = max(abs(a.value), abs(b.value))
    return (a.decimals or b.decimals) and apart < Fraction(1, 2 * 10**6) and apart <= largest * Fraction(2, 10**6)
