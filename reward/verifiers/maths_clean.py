"""One notation for the many ways to write the same formula, and the units and words around a value.

    clean   LaTeX or plain text in one notation: fractions, brackets, spaces, fonts, signs, repeating decimals
    grouped thousands separators removed
    quantity the value, its unit and percent sign, without words that say nothing about it

Nothing here computes; it only rewrites text.
"""

import re
from dataclasses import dataclass
from fractions import Fraction

_SIGNS = str.maketrans(
    {
        "\u2212": "-", "\u2013": "-", "\u00d7": r"\times ", "\u22c5": r"\cdot ", "\u00b7": r"\cdot ",
        "\u00b0": r"^\circ ", "\u03c0": r"\pi ", "\u2264": r"\le ", "\u2265": r"\ge ", "\u2260": r"\ne ",
        "\u221e": r"\infty ", "\u222a": r"\cup ", "\u2205": r"\emptyset ", "\u00b1": r"\pm ", "\u2208": r"\in ",
        "\u00a0": " ", "\u2009": " ", "\u202f": " ", "~": " ", "\u00bd": r"\frac{1}{2}",
    }
)  # fmt: skip
_FONT = (
    r"\\(?:mathrm|mathbf|mathit|mathsf|mathtt|textbf|textit|textrm|textsf|texttt|textnormal|text|mbox|hbox"
    r"|boldsymbol|bm)"
)
_REWRITES = [
    (re.compile(pattern), by)
    for pattern, by in (
        (r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\s*\.?", ""),
        (r",\s*\\!\s*", ","),
        (r"\\!|\\(?:displaystyle|textstyle|limits|nolimits)(?![A-Za-z])", ""),
        (r"(?<=\\\\)\s*\[-?[0-9.]+ ?[a-z]{2}\]", ""),
        (r"(?<!\\)\\[,;: ]|\\(?:quad|qquad|thinspace|enspace)(?![A-Za-z])|\\hspace\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:leqslant|leqq|leq|le)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:geqslant|geqq|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\neq?(?![A-Za-z])|!=", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(?:langle|lparen)(?![A-Za-z])", "("),
        (r"\\(?:rangle|rparen)(?![A-Za-z])", ")"),
        (r"\\lbrack(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\(?:boxed|fbox)\s*\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1"),
        (r"\\(?:mathrm|operatorname)\s*\{([eid])\}", r"\1"),
        (r"\\(?:mathbf|boldsymbol|bm|mathit|hat|vec)\s*\{([A-Za-z])\}", r"\1"),
        (r"\\underline\s*\{([^{}]*)\}|\\(?:text)?color\s*\{[a-z]+\}\s*\{([^{}]*)\}", r"\1\2"),
        (_FONT + r"\s*\{([^{}A-Za-z]*)\}", r"\1"),
        (r"\{:\}", ":"),
        (_FONT + r"\s*\{", r"\\text{"),
        (r"\A\s*\\text\{([^{}]*[0-9][^{}]*|\s*\(?[A-J]\)?(?:\s*(?:,|and|or)\s*\(?[A-J]\)?)+\s*)\}\s*\Z", r"\1"),
        (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*([0-9a-z])", r"\\frac\1{\2}"),
        (r"\\sqrt\s*([0-9a-z])", r"\\sqrt{\1}"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![\\A-Za-z])(?:infinity|inf)(?![A-Za-z])|\\text\{\s*[iI]nfinity\s*\}", r"\\infty "),
        (r"(?<![\\A-Za-z])(sqrt|sin|cos|tan|ln|log|exp)(?=\s*[({])", r"\\\1"),
        (r"\\sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<=[0-9A-Za-z)}])\*\*(?=[0-9A-Za-z({-])", "^"),
    )
]
_REPEATING = re.compile(r"([0-9]*)\.([0-9]*)\\overline\s*(?:\{([0-9]+)\}|([0-9]))")
_BRACED_COMMA = re.compile(r"(?<=[0-9])\s*\{,\}\s*(?=[0-9])")
_COMMAS = re.compile(r"(?<![0-9.,])([1-9][0-9]{0,2}(?:,[0-9]{3})+)(?![0-9]|,[0-9])")
_SPACES = re.compile(r"(?<![0-9.,])(?<![0-9] )([1-9][0-9]{0,2}(?: [0-9]{3})+)(?! ?[0-9])")
_DECIMAL_COMMA = re.compile(r"([+-]?[0-9]+),([0-9]+)(?![0-9,])([^0-9,]*)")

QUALIFIERS = frozenset(
    {"not", "no", "least", "most", "more", "less", "greater", "fewer", "over", "under", "above", "below", "except"}
    | {"between", "only", "never", "neither"}
)
"""Words that change what a value says, so that they cannot be left out."""
_TIMES = {
    "hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
}  # fmt: skip
_UNITS: dict[str, tuple[str, Fraction]] = {
    name: (dimension, Fraction(factor))
    for dimension, sizes in {
        "length": {
            "mm millimeter millimetre": "1/1000", "cm centimeter centimetre": "1/100", "m meter metre": "1",
            "km kilometer kilometre": "1000", "in inch inche": "0.0254", "ft foot feet": "0.3048",
            "yd yard": "0.9144", "mi mile": "1609.344",
        },
        "mass": {"mg milligram": "1/1000", "g gram": "1", "kg kilogram": "1000", "lb pound": "453.59237",
                 "oz ounce": "28.349523125"},
        "time": {"s sec second": "1", "min minute": "60", "h hr hour": "3600", "day": "86400", "week": "604800"},
        "month": {"month": "1", "yr year": "12"},
        "volume": {"l liter litre": "1", "ml milliliter millilitre": "1/1000", "gal gallon": "3.785411784"},
        "money": {"dollar buck": "1", "cent": "1/100"},
        "angle": {"degree deg": "1"},
    }.items()
    for names, factor in sizes.items()
    for name in names.split()
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_TEXT_TAIL = re.compile(r"(?:\s*/?\s*\\text\{[^{}]*\}(?:\s*\^\s*\{?-?[0-9]\}?)?)+$")
_WORD_TAIL = re.compile(
    r"(?:(?<=[0-9)}\]!])\s*|(?<=\\pi)\s+|(?<=[0-9)}\]!] )|(?<=\\pi ))"
    r"([A-Za-z][A-Za-z.'/-]*(?: +[A-Za-z][A-Za-z.'/-]*)*)\.?(?:\s*\^\s*\{?([0-9])\}?)?$"
)
_TEXT_HEAD = re.compile(r"\\text\{([^{}]*)\}\s*(?=\S)")
_PERCENT = re.compile(r"\s*(?:\\?%|\\text\{\s*\\?%?\s*(?:percent)?\s*\}|(?<![A-Za-z])percent)\s*$")
_DEGREES = re.compile(r"\s*\^\s*(?:\{\s*\\circ\s*\}|\\circ)\s*[CF]?\s*$")
_ORDINAL = re.compile(r"([0-9]+)\s*\^?\s*\{?\s*(?:\\text\s*\{\s*)?(?:st|nd|rd|th)\s*\}?\s*\}?")


@dataclass(frozen=True)
class Quantity:
    """A value as LaTeX; its unit as (dimensions, factor), None if unknown; whether a percent sign follows it."""

    text: str
    unit: tuple[str, Fraction] | None = None
    percent: bool = False


def clean(text: str) -> str:
    """The same formula in one notation; the words in it stay in `\\text{...}`.

    >>> clean("$\\\\left(\\\\dfrac12;\\\\, \\\\mathbf{3}\\\\right]$."), clean("0.\\\\overline{6}")
    ('(\\\\frac{1}{2};  3]', '\\\\frac{6}{9}')
    """
    dollars = "\\$" in text
    text = text.replace("\\$", "").replace("$", "").translate(_SIGNS)
    text = re.sub(r"\s{2,}", "  ", re.sub(r"[€£¥₹]", "", text))
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    text = _REPEATING.sub(_fraction, text)
    text = _BRACED_COMMA.sub(lambda m: "," if re.match(r"[0-9]{3}(?![0-9])", m.string[m.end() :]) else ".", text)
    text = trimmed(text)
    return text + r" \text{dollars}" if dollars and re.fullmatch(r"-?[0-9.,]+", text) else text


def trimmed(text: str) -> str:
    """Without white space and punctuation around it, and without braces around the whole."""
    text = text.strip().rstrip(".,;").strip()
    while text.startswith("{") and _closes(text):
        text = text[1:-1].strip()
    return text


def _closes(text: str) -> bool:
    """Whether the first brace is closed by the last character."""
    depth = 0
    for place, match in ((m.start(), m.group()) for m in re.finditer(r"\\.|[{}]", text)):
        depth += (match == "{") - (match == "}")
        if depth == 0:
            return place == len(text) - 1
    return False


def _fraction(match: re.Match[str]) -> str:
    whole, fixed, repeated = match[1] or "0", match[2], match[3] or match[4]
    below = (10 ** len(repeated) - 1) * 10 ** len(fixed)
    return rf"\frac{{{int(whole + fixed + repeated) - int(whole + fixed)}}}{{{below}}}"


def grouped(text: str) -> str:
    """Without the separators between groups of three digits.

    >>> grouped("1,250"), grouped("32 349"), grouped("1, 250"), grouped("12,34")
    ('1250', '32349', '1, 250', '12,34')
    """
    text = _COMMAS.sub(lambda m: m[1].replace(",", ""), text)
    return _SPACES.sub(lambda m: m[1].replace(" ", ""), text)


def decimal_comma(text: str) -> str | None:
    """A lone number's decimal comma as a point; None where there is none.

    >>> decimal_comma("2,5"), decimal_comma("1,2,5")
    ('2.5', None)
    """
    found = _DECIMAL_COMMA.fullmatch(text)
    return f"{found[1]}.{found[2]}{found[3]}" if found else None


def quantity(text: str) -> Quantity | None:
    """The value in a text, without its unit and other words; None where the words change what the value says.

    >>> quantity("10 \\\\text{ red apples}").text, quantity("3.2 million").text
    ('10', '(3.2) \\\\cdot 1000000')
    >>> quantity("\\\\text{at least } 3") is None
    True
    """
    unit, percent, factor = None, False, 1
    if found := _ORDINAL.fullmatch(text):
        return Quantity(found[1])
    while (head := _TEXT_HEAD.match(text)) and head.end() < len(text):
        if _qualified(head[1]) or "^" in text[head.end() - 1 : head.end() + 1]:
            return None
        text = text[head.end() :].lstrip(": ")
    if found := _DEGREES.search(text):
        return Quantity(text[: found.start()], ("angle^1", Fraction(1)))
    if found := _PERCENT.search(text):
        return Quantity(text[: found.start()], percent=True) if found.start() else None
    tail = _TEXT_TAIL.search(text)
    if tail and tail.start():
        words = re.sub(r"\\text\{([^{}]*)\}", r" \1 ", tail.group())
        text = text[: tail.start()]
    elif (plain := _WORD_TAIL.search(text)) and _is_label(plain[1]):
        words = plain[1] + (f"^{plain[2]}" if plain[2] else "")
        text = text[: plain.start()]
    else:
        return Quantity(text)
    if _qualified(words):
        return None
    first, _, rest = words.strip().lower().partition(" ")
    if first in _TIMES:
        factor, words = _TIMES[first], rest
    unit = _unit(words)
    percent = "percent" in words
    text = text.strip()
    return Quantity(text if factor == 1 else rf"({text}) \cdot {factor}", unit, percent)


def _qualified(words: str) -> bool:
    return not QUALIFIERS.isdisjoint(re.findall(r"[a-z]+", words.lower()))


def _is_label(words: str) -> bool:
    """Whether plain letters behind a value are words, not a product of variables."""
    tokens = re.findall(r"[A-Za-z]+", words)
    known = [token for token in tokens if len(token) > 1 and token.lower().rstrip("s") in _UNITS]
    return bool(known) or any(len(token) >= 4 for token in tokens) or ("/" in words and bool(_unit(words)))


def _unit(words: str) -> tuple[str, Fraction] | None:
    """Dimensions and factor of a unit such as `km/h` or `square feet`; None where a word is not known.

    >>> _unit("square meters") == _unit("m^2"), _unit("m/s") == _unit("meters per second"), _unit("red cars")
    (True, True, None)
    """
    words = re.sub(r"[{}.]", "", words.strip()).replace(" per ", "/").replace("mph", "mi/h")
    dimensions: dict[str, int] = {}
    factor, size, sign, power = Fraction(1), Fraction(1), 1, 1
    for token in re.findall(r"/|\^ *-?[0-9]|[A-Za-z]+|\S", words):
        if token == "/":
            sign = -1
        elif token in _POWERS:
            power = _POWERS[token]
        elif token == "squared" or token == "cubed" or token.startswith("^"):
            more = {"squared": 2, "cubed": 3}.get(token) or int(token[1:])
            if not dimensions or abs(more) > 9:
                return None
            kind = next(reversed(dimensions))
            dimensions[kind] += sign * (more - 1)
            factor *= size ** (sign * (more - 1))
        else:
            name = token if token in _UNITS else token.lower()
            name = name if name in _UNITS else name.removesuffix("s")
            if name not in _UNITS:
                return None
            kind, size = _UNITS[name]
            dimensions[kind] = dimensions.get(kind, 0) + sign * power
            factor *= size ** (sign * power)
            power = 1
    named = " ".join(f"{kind}^{n}" for kind, n in sorted(dimensions.items()) if n)
    return (named, factor) if named else None
