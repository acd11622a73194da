"""The structure of an answer: a list, a tuple or interval, a union, a ratio, an equation, words, or one value.

`read` splits a text down to values and words. What a value is worth is for maths_algebra.py; whether two structures are
the same is for maths_same.py. Reading takes text of at most LONGEST characters and does no arithmetic.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

from reward.verifiers.maths_clean import clean, quantity, trimmed

LONGEST = 2000
"""Longest answer, in characters, whose structure is read; a longer one is compared as text."""


@dataclass(frozen=True)
class Value:
    """One formula as LaTeX, with its unit (dimensions, factor) and whether it is a percentage."""

    text: str
    unit: tuple[str, Fraction] | None = None
    percent: bool = False


@dataclass(frozen=True)
class Words:
    """Text that is no formula, as it is compared: without spaces, marks and, beyond one letter, capitals."""

    text: str


@dataclass(frozen=True)
class Items:
    """A list or set, whose order does not matter."""

    items: tuple["Form", ...]


@dataclass(frozen=True)
class Row:
    """A tuple or interval with its brackets; `variable` where the text says whose interval it is."""

    left: str
    items: tuple["Form", ...]
    right: str
    variable: str = ""


@dataclass(frozen=True)
class Union:
    """A union of intervals and sets."""

    parts: tuple["Form", ...]


@dataclass(frozen=True)
class Without:
    """All real numbers except these."""

    points: tuple["Form", ...]


@dataclass(frozen=True)
class Ratio:
    """`3:2`, or a time of day: then `clock` is minutes after midnight, and `half` a or p for a.m. and p.m."""

    parts: tuple[str, ...]
    clock: int | None = None
    half: str = ""


@dataclass(frozen=True)
class Equation:
    """An equation. `name`: the left side if it only names the value on the right."""

    left: str
    right: str
    name: str
    value: "Form"


@dataclass(frozen=True)
class Named:
    """Several named values, such as `a = 2, b = 7`."""

    values: tuple[tuple[str, "Form"], ...]


@dataclass(frozen=True)
class Relation:
    """An inequality that is not an interval of one variable. `op` is < or \\le."""

    op: str
    left: str
    right: str


@dataclass(frozen=True)
class Residue:
    """A residue class: `value` modulo `modulus`."""

    value: "Form"
    modulus: str


@dataclass(frozen=True)
class Based:
    """Digits with their base."""

    digits: str
    base: str


@dataclass(frozen=True)
class Choice:
    """The letter of a multiple-choice answer, and what stands beside it."""

    letter: str
    rest: "Form | None"


Form: TypeAlias = (
    Value | Words | Items | Row | Union | Without | Ratio | Equation | Named | Relation | Residue | Based | Choice
)

_TOKEN = re.compile(r"\\begin\{|\\end\{|\\[{}]|\\[A-Za-z]+|\\.|.", re.DOTALL)
_OPENING = frozenset({"(", "[", "{", "\\{", "\\begin{"})
_CLOSING = frozenset({")", "]", "}", "\\}", "\\end{"})
_OR = re.compile(r",?\s*\\text\{\s*,?\s*or\s*\}\s*|,?\s*(?<![A-Za-z\\])or(?![A-Za-z])\s*|\\lor(?![A-Za-z])")
_AND = re.compile(r",?\s*\\text\{\s*,?\s*and\s*\}\s*|,?\s*(?<![A-Za-z\\])and(?![A-Za-z])\s*|\\land(?![A-Za-z])")
_COMMA = re.compile(r",\s*")
_SEMICOLON = re.compile(r";\s*")
_CUP = re.compile(r"\\cup(?![A-Za-z])\s*")
_ORDER = re.compile(r"<|>|\\le(?![A-Za-z])|\\ge(?![A-Za-z])")
_EQUALS = re.compile(r"=|\\approx(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])")
_CHOICE = re.compile(r"\\text\{\s*\(?([A-J])\)?[).:]?\s*\}(?!\s*[-+*/^=<>_,;])\s*:?\s*(.*)|\(?([A-J])\)?", re.DOTALL)
_BASED = re.compile(r"([0-9A-F]+)\s*_\s*\{?\s*([0-9]{1,2})\s*\}?")
_MODULUS = re.compile(
    r"(.*\S)\s*(?:\\pmod\s*(?:\{([^{}]*)\}|([0-9]))|\(?\s*\\?(?:mod|bmod|text\{\s*mod\s*\})\s*\{?([0-9a-z]+)\}?\s*\)?)"
)
_CLOCK = re.compile(
    r"(\d{1,2}):(\d{2})\s*(?:\\text\{)?\s*(?:([ap])\.?\s?m\.?|noon|midnight|o'?clock)?\s*\}?", re.IGNORECASE
)
_TO = re.compile(r"(\S+)\s*(?:\\text\{\s*to\s*\}|(?<![A-Za-z])to(?![A-Za-z]))\s*(\S+)")
_MEMBER = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?|\\[a-z]+)\s*\\in(?![A-Za-z])\s*(.+)", re.DOTALL)
_BUILDER = re.compile(r"([A-Za-z])\s*(?:\\in\s*\\mathbb\{?R\}?)?\s*(?:\\mid|\||:|\\colon)\s*(.+)", re.DOTALL)
_REALS = re.compile(
    r"\\mathbb\s*\{?R\}?|\\(?:R|Reals)|\\text\{\s*[aA]ll real(?:s| numbers)\s*\}|[aA]ll real(?:s| numbers)"
)
_MINUS_SET = re.compile(r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-|\\text\{\s*except\s*\})\s*\\\{(.+)\\\}")
_FRENCH = re.compile(r"([\[\](])([^\[\]()]*[,;][^\[\]()]*)([\[\])])")
_EMPTY = re.compile(
    r"\\emptyset|\\\{\s*\\\}|(?:\\text\{)?\s*(?:there (?:is|are) )?no (?:real )?solutions?\s*\}?", re.IGNORECASE
)
_NAME = re.compile(
    r"[^+\-*/=<>|^0-9,]{1,40}|\([A-Za-z](?:,\s*[A-Za-z]){1,4}\)|[A-Za-z]{1,3}\s*\([^()]{1,30}\)|\|[^|0-9]{1,20}\|"
)
_SUBSCRIPT = re.compile(r"_\s*(?:\{[^{}]*\}|\w)|\^\s*\{\s*-1\s*\}|'")
_TERM = r"[A-Za-z](?:_(?:\{\w+\}|\w))?"
_SUM = re.compile(rf"{_TERM}(?:\s*[-+/]?\s*{_TERM}){{0,9}}")
_PLAIN_WORD = re.compile(
    r"(?<![\\A-Za-z])(?:[A-Za-z]{4,}|[A-Z]{2,}|[A-Z][a-z]+|yes|no|odd)(?![A-Za-z])|[^\W\d_A-Za-z\u0370-\u03ff]"
)
_NOTHING = Words("")


def read(text: str) -> Form:
    """The structure of an answer in LaTeX or plain text.

    >>> read("x = 5 \\\\text{ or } x = -2")
    Items(items=(Value(text='5', unit=None, percent=False), Value(text='-2', unit=None, percent=False)))
    >>> read("2 \\\\le x < 5").left
    '['
    """
    return _read(clean(text[: LONGEST + 1])) if len(text) <= LONGEST else Words(comparable(text))


def comparable(text: str) -> str:
    """A text without white space, `\\text` and marks; capitals only matter in a single letter and in formulas.

    >>> comparable("\\\\text{No Solutions.}"), comparable("C")
    ('nosolutions', 'C')
    """
    bare = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    short = re.sub(r"[\s.'\"\\,;:!()$]+|[{}]", "", bare)
    letters = not re.search(r"[0-9\\_^=+*/<>|]", bare) and not bare.isupper()
    return short.lower() if letters and len(short) > 1 else short


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The parts between separators outside all brackets; the whole text where brackets do not match.

    >>> split("(1, 2), 3", re.compile(","))
    ['(1, 2)', ' 3']
    """
    parts, depth, start, place = [], 0, 0, 0
    while place < len(text):
        if depth == 0 and (found := separator.match(text, place)) and found.end() > place:
            parts.append(text[start:place])
            start = place = found.end()
            continue
        token = _TOKEN.match(text, place)
        assert token is not None
        depth += (token.group() in _OPENING) - (token.group() in _CLOSING)
        if depth < 0:
            return [text]
        place = token.end()
    return [text] if depth else [*parts, text[start:]]


def _read(text: str) -> Form:
    text = trimmed(text)
    if not text:
        return _NOTHING
    if found := _CHOICE.fullmatch(text):
        rest = (found[2] or "").strip()
        return Choice(found[1] or found[3], _read(rest) if rest else None)
    if _EMPTY.fullmatch(text):
        return Items(())
    if _REALS.fullmatch(text):
        return _interval("(", r"-\infty", r"\infty", ")", "")
    if found := _MINUS_SET.fullmatch(text):
        return Without(tuple(_read(part) for part in split(found[1], _COMMA)))
    if (found := _MODULUS.fullmatch(text)) and not split(text, _COMMA)[1:]:
        value = re.split(r"\\equiv(?![A-Za-z])", found[1])[-1]
        return Residue(_read(value), (found[2] or found[3] or found[4]).strip())
    if found := _MEMBER.fullmatch(text):
        return _of(_read(found[2]), found[1], text)
    if (parts := split(text, _OR))[1:] and _even(parts):
        return _joined(parts, "or")
    separator = _SEMICOLON if len(split(text, _SEMICOLON)) > 1 else _COMMA
    if (parts := split(text, separator))[1:] and all(part.strip() for part in parts):
        listed = [piece for part in parts for piece in _and(re.sub(r"^\s*(?:and|or)\s", "", part))]
        return _joined(listed, "and" if len(listed) == 2 and re.search(r",\s*and\s", text) else ",")
    if (parts := _and(text))[1:]:
        return _joined(parts, "and")
    if (parts := split(text, _CUP))[1:]:
        return Union(tuple(_bracketed(part.strip()) or _read(part) for part in parts))
    return _single(text)


def _single(text: str) -> Form:
    """The structure of a text without separators."""
    if form := _bracketed(text):
        return form
    if (sides := split(text, re.compile(r"\\ne(?![A-Za-z])\s*")))[1:]:
        return Without(tuple(_read(side) for side in sides[1:]))
    if form := _inequality(text):
        return form
    if (sides := split(text, _EQUALS))[1:]:
        return _equation(text, [trimmed(side) for side in sides])
    if _PLUS_MINUS.search(text):
        upper, lower = {"pm": "+", "mp": "-"}, {"pm": "-", "mp": "+"}
        both = (_PLUS_MINUS.sub(lambda m: upper[m[1]], text), _PLUS_MINUS.sub(lambda m: lower[m[1]], text))
        return Items(tuple(_read(one) for one in both))
    if form := _ratio(text):
        return form
    if found := _BASED.fullmatch(text):
        return Based(found[1], found[2])
    return _value(text)


def _value(text: str) -> Form:
    found = quantity(text)
    if found is None:
        return Words(comparable(text))
    rest = found.text.strip()
    if rest != text and (nested := _bracketed(rest)):
        return nested
    words = re.sub(r"\\(?:begin|end)\{[^{}]*\}|\\text\{\s*\w\s*\}|_\s*\\text\{[^{}]*\}", "", rest)
    if not rest or "\\text" in words or _PLAIN_WORD.search(words) or re.fullmatch(r"\\[lc]?dots", rest):
        return Words(comparable(text))
    return Value(rest.removeprefix("+").strip(), found.unit, found.percent)


def _and(text: str) -> list[str]:
    """The parts between "and", unless they are words behind one value (`5 apples and pears`)."""
    parts = split(text, _AND)
    return parts if parts[1:] and _even(parts) else [text]


def _even(parts: list[str]) -> bool:
    """Whether all parts say something of the same kind, with digits or formulas in each or in none."""
    solid = [
        bool(re.search(r"[0-9\\=<>]|^\s*[A-Za-z]\s*$", re.sub(r"\\text\s*\{[^{}]*\}", "", part))) for part in parts
    ]
    return all(part.strip() for part in parts) and len(set(solid)) == 1


def _joined(parts: list[str], by: str) -> Form:
    forms = [_read(part) for part in parts]
    if all(isinstance(form, Row) and form.variable for form in forms):
        if by == "or":
            return Union(tuple(forms))
        both = _intersection([form for form in forms if isinstance(form, Row)])
        if both is not None:
            return both
    if isinstance(forms[0], Without) and all(isinstance(form, Without | Value) for form in forms):
        points = [form.points if isinstance(form, Without) else (form,) for form in forms]
        return Without(tuple(point for some in points for point in some))
    if by == "or" and any(isinstance(form, Union) for form in forms):
        return Union(tuple(forms))
    named = [(form.name, form.value) for form in forms if isinstance(form, Equation) and form.name]
    if len(named) == len(forms) and len({_base(name) for name, _ in named}) == len(forms) and by != "or":
        return Named(tuple(named))
    if any(isinstance(form, Equation) and not form.name for form in forms):
        return Items(tuple(forms))
    flat: list[Form] = []
    for form in forms:
        plain = form.value if isinstance(form, Equation) else form
        flat += plain.items if isinstance(plain, Items) else (plain,)
    return Items(tuple(flat))


def _base(name: str) -> str:
    """A name without its index, so that x_1 and x_2 are two values of x."""
    return re.sub(r"_\s*\{?[0-9]\}?$", "", name)


def _intersection(rows: list[Row]) -> Row | None:
    """The interval between a lower and an upper bound of one variable."""
    if len(rows) != 2 or rows[0].variable != rows[1].variable:
        return None
    low = [row for row in rows if row.items[1] == Value(r"\infty") and row.items[0] != Value(r"-\infty")]
    high = [row for row in rows if row.items[0] == Value(r"-\infty") and row.items[1] != Value(r"\infty")]
    if len(low) != 1 or len(high) != 1:
        return None
    return Row(low[0].left, (low[0].items[0], high[0].items[1]), high[0].right, rows[0].variable)


def _bracketed(text: str) -> Form | None:
    """A tuple, interval or set whose brackets enclose the whole text."""
    if found := _FRENCH.fullmatch(text):
        left, inside, right = found.groups()
        text = f"{'(' if left in '](' else '['}{inside}{']' if right == ']' else ')'}"
        return _row(text[0], inside, text[-1])
    if text.startswith("\\{") and text.endswith("\\}") and len(split(text[2:-2], _COMMA)) >= 1:
        inside = text[2:-2].strip()
        if _unbalanced(inside):
            return None
        if found := _BUILDER.fullmatch(inside):
            return _of(_read(found[2]), found[1], text)
        parts = [_read(part) for part in split(inside, _SEMICOLON if ";" in inside else _COMMA)] if inside else []
        return Items(tuple(item for part in parts for item in (part.items if isinstance(part, Items) else (part,))))
    if text[0] in "([" and text[-1] in ")]" and not _unbalanced(text[1:-1]):
        return _row(text[0], text[1:-1], text[-1])
    return None


def _row(left: str, inside: str, right: str) -> Form | None:
    parts = split(inside, _SEMICOLON if len(split(inside, _SEMICOLON)) > 1 else _COMMA)
    if len(parts) > 1:
        return Row(left, tuple(_read(part) for part in parts), right)
    return _read(inside) if left == "(" and right == ")" and not re.search(r"[-+*/^]|\\pm", inside) else None


def _unbalanced(text: str) -> bool:
    depth = 0
    for token in _TOKEN.findall(text):
        depth += (token in _OPENING) - (token in _CLOSING)
        if depth < 0:
            return True
    return depth != 0


def _of(form: Form, variable: str, text: str) -> Form:
    """The set that the variable is in."""
    if isinstance(form, Row):
        return Row(form.left, form.items, form.right, form.variable or variable)
    return form if isinstance(form, Union | Items | Without) else Words(comparable(text))


def _inequality(text: str) -> Form | None:
    sides = [trimmed(side) for side in split(text, _ORDER)]
    signs = _ORDER.findall(text)
    if len(sides) < 2 or len(sides) != len(signs) + 1 or not all(sides):
        return None
    if signs[0] in (">", r"\ge"):
        sides.reverse()
        signs = [{">": "<", r"\ge": r"\le"}.get(sign, "") for sign in reversed(signs)]
    if not all(sign in ("<", r"\le") for sign in signs):
        return Words(comparable(text))
    shut = ["[" if sign == r"\le" else "(" for sign in signs]
    names = [
        bool(re.fullmatch(r"[A-Za-z](?:\([a-z]\))?|\\(?:theta|alpha|beta|lambda)", _SUBSCRIPT.sub("", side)))
        for side in sides
    ]
    if len(sides) == 3 and names == [False, True, False]:
        return _interval(shut[0], sides[0], sides[2], {"[": "]", "(": ")"}[shut[1]], sides[1])
    if len(sides) == 2 and names == [True, False]:
        return _interval("(", r"-\infty", sides[1], {"[": "]", "(": ")"}[shut[0]], sides[0])
    if len(sides) == 2 and names == [False, True]:
        return _interval(shut[0], sides[0], r"\infty", ")", sides[1])
    return Relation(signs[0], sides[0], sides[1]) if len(sides) == 2 else Words(comparable(text))


def _interval(left: str, low: str, high: str, right: str, variable: str) -> Row:
    return Row(left, (_value(low), _value(high)), right, variable)


def _equation(text: str, sides: list[str]) -> Form:
    signs = _EQUALS.findall(text)
    named = _NAME.fullmatch(_SUBSCRIPT.sub("", sides[0])) is not None
    if signs[-1] != "=" and sides[0] and (len(sides) > 2 or not named):
        sides = sides[:-1]  # what stands behind the sign is rounded
        if len(sides) == 1:
            return _read(sides[0])
    first, last = sides[0], sides[-1]
    if not first:
        return _read(last)
    if not last:
        return Words(comparable(text))
    if named:
        return Equation(first, last, re.sub(r"\s|\\text|[{}]", "", first), _read(last))
    if not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", first)):
        return _read(last)
    value = _read(last) if _SUM.fullmatch(first) and not re.search(r"[A-Za-z]", last) else _NOTHING
    return Equation(first, last, "", value)


def _ratio(text: str) -> Form | None:
    if found := _CLOCK.fullmatch(text):
        hours, minutes = int(found[1]), int(found[2])
        if hours < 25 and minutes < 60:
            return Ratio((found[1], found[2]), hours * 60 + minutes, (found[3] or "").lower())
    found = _TO.fullmatch(text)
    parts = [found[1], found[2]] if found else [part.strip() for part in split(text, re.compile(":"))]
    return (
        Ratio(tuple(parts))
        if 2 <= len(parts) <= 6 and all(re.fullmatch(r"[^A-Za-z=<>]*[0-9][^=<>]*|[a-z]", part) for part in parts)
        else None
    )
