"""Finds the answer in a completion, or in a gold answer that is a whole solution.

What counts, in this order: a line `#### 42` or the last `\\boxed{...}`, whichever comes last; what follows the last
"the answer is"; the last formula or number. Boxes and formulas joined by commas, "and" or "or" are one answer: a list.
So a completion that names two answers is wrong where one is right.
"""

import re
from dataclasses import dataclass
from decimal import Context, Decimal

from reward.functions import one_form

_CONTEXT = Context(prec=400, traps=[])  # prec in digits; without traps, nonsense gives NaN or infinity, no exception

_DIGITS = (
    r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|(?<![0-9] )[0-9]{1,3}(?: [0-9]{3})+(?! ?[0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
)
# A minus after a digit, a letter or a bracket is an operator or a hyphen, not a sign. Digits after a letter are part of
# a name (H2O, m2), and digits after ^ are an exponent (m^2).
_NUMBER = re.compile(
    rf"(?:(?<![\w)\]}}])(?P<sign>[-+]))?(?:\\?[$€£¥₹](?P<sign_behind>[-+])?)?"
    rf"(?<![A-Za-z0-9_^])(?<!\^\{{)(?<!\^-)(?<!\^\{{-)(?<![0-9]\.)"
    rf"(?P<digits>(?:{_DIGITS})(?:[eE][-+]?[0-9]+)?)"
    rf"(?:\s?/\s?(?P<below>[0-9]+(?:\.[0-9]+)?))?(?P<power>[ \t]?(?:\^|\*\*[0-9({{]))?"
)
# Bold text, not a power: nothing that could be a base stands directly before the first mark.
_BOLD = re.compile(r"(?<![\w)\]}*])( ?)(\*\*|__)(?=[^\s*_])([^\n]*?[^\s*_])\2(?![\w({*])")
_CALCULATION = re.compile(r"<<[^<>\n]*>>")
_HASHES = re.compile(r"####[ \t]*(\S[^\n]*?)[ \t]*$", re.MULTILINE)
_HEADING = re.compile(r"[0-9]+\.\s|(?:.*\s)?(?:[Ss]tep|[Pp]art|[Cc]ase|[Cc]hapter)\b")
_MARKED = re.compile(r"(?:[-+]?[$€£¥₹]?[-+]?[0-9][0-9,./ ]*(?<![./ ]) ?\\?%?)(?: [A-Za-z]\S*){0,2}")
_SMALL_FRACTION = re.compile(r"(?<![0-9])\\[dtc]?frac\s?(?:\{([0-9.]+)\}\s?\{([0-9.]+)\}|([0-9])\s?([0-9]))")
_SPACING = re.compile(
    r"(?<=,) ?\\! ?|(?<!\\)\\[!;: ]|\\,(?=[0-9]{3})|(?<=[0-9])[\u00a0\u2009\u202f](?=[0-9]{3})"
    r"|(?<=\\\\)\[-?[0-9.]+ ?[a-z]{2}\]"
)
_BRACES = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed\s+(-?[0-9][0-9.,]*[0-9]|-?[0-9]|[A-Za-z](?![A-Za-z]))")
_FORMULA = re.compile(  # an environment may not contain another of its kind, which keeps the search linear
    r"\$\$([^$]+)\$\$|(?<!\\)\$([^$\n]+)\$|\\\(((?:(?!\\\().)+?)\\\)|\\\[((?:(?!\\\[).)+?)\\\]"
    r"|(-?\\[dt]?frac\{[^{}]*\}\{[^{}]*\})",
    re.DOTALL,
)
_PROSE = re.compile(r"(?<![\\A-Za-z{])[a-z]{3,}")  # text between two currency signs
_LINK = re.compile(
    r"(?:[\s$.*]|\\[()\[\]]|\\quad)*(?:,|;|\\text\s*\{|\})*[\s$]*"
    r"(?:,?\s*\b(and|or)\b)?(?:[\s$*]|\\[()\[\]]|\}|[A-Za-z](?:_\S)? ?= ?)*"
)
_SAYS = re.compile(
    r"(?:^[ \t*_#>-]*|[.!?:,(*_]\s*|\b(?:the|final|my|our|your)\s+)answers?\b[*_]*"
    r"(?:\s+(?:to|for|of)\s[^.,:\n]{0,60}?)?[*_]*\s*(?:(?:is|are|was|would be|must be|should be)\b|:|=)"
    r"[*_]*(?:\s+(?:therefore|thus|then|simply|indeed))?[:\s*_]*(?!not\b)",
    re.IGNORECASE | re.MULTILINE,
)
_SENTENCE = re.compile(
    r"\n|[.!?](?=\s|$)|,?\s(?:since|because|which|where|as|so|but|not)\s|\s[-\u2013\u2014]\s(?=[A-Za-z])"
)
_OR_BEFORE = re.compile(r"(?<![\w.])(-?\$?[0-9][0-9.,]*)\s*,?\s+or\s+[$]?$")
_DENIED = re.compile(r"\bnot\s*[$(\\]*\s*$")
_BEFORE_COLON = re.compile(r"(?:(?<![0-9:.])[0-9]+(?:\.[0-9]+)? ?: ?)+$")
_HALF_DAY = re.compile(r" ?[ap]\.?m\b", re.IGNORECASE)
_ASSIGNED = re.compile(r"\s*([A-Za-z](?:_\S+)?)\s*=")
_MOST_BOXES = 40


@dataclass(frozen=True)
class Claim:
    """The answer in a text: a marked part (`marked`), or all of it.

    `listed`: the parts that were marked one by one, joined by commas.
    """

    text: str
    marked: bool
    listed: str = ""


def gold_claim(gold: str) -> Claim:
    """The gold answer in a row's column: the whole text, or the end of a solution."""
    gold = one_form(gold)
    found = boxes(gold)
    if "####" in gold:
        gold = gold.rpartition("####")[2]
    elif found:
        gold = _together(gold, found)[0]
    return Claim(_tidy(gold).strip(), marked=True)


def answer_part(completion: str) -> str:
    """The text between the last `<answer>` and `</answer>`, else that behind `</think>`, else the whole completion.

    >>> answer_part("<think>6 * 7</think><answer>42</answer>"), answer_part("<think>6 * 7</think>42"), answer_part("42")
    ('42', '42', '42')
    """
    before, end, _ = completion.rpartition("</answer>")
    if end and "<answer>" in before:
        return before.rpartition("<answer>")[2]
    said = completion.rpartition("</think>")[2]
    return said if said.strip() else completion


def claim(completion: str) -> Claim:
    """The answer of a completion: the last line `#### 42` or box, else what "the answer is", else the whole text."""
    completion = answer_part(one_form(completion))
    found = boxes(completion)
    marks = [mark for mark in _HASHES.finditer(completion) if _is_answer(mark[1])]
    if marks and (not found or marks[-1].start() > found[-1][0]):
        inside = boxes(marks[-1][1])
        return Claim(_tidy(inside[-1][2] if inside else _plain(marks[-1][1])), marked=True)
    if found:
        text, listed = _together(completion, found)
        return Claim(_tidy(text), marked=True, listed=_tidy(listed))
    text = _plain(_tidy(completion))
    said = list(_SAYS.finditer(text))
    return _said(text[said[-1].end() :]) if said else Claim(text, marked=False)


def _said(rest: str) -> Claim:
    """The claim in what follows "the answer is"."""
    found = _FORMULA.match(rest)
    if found and not _PROSE.search(found.group()):
        run, listed = _linked(rest, from_start=True)
        return Claim(run, marked=True, listed=listed)
    stop = _SENTENCE.search(rest)
    sentence = (rest[: stop.start()] if stop else rest).strip()
    words = re.search(r"[A-Za-z]{2,}", re.sub(r"\\[A-Za-z]+", "", sentence))
    return Claim(sentence, marked=not words or not re.search(r"[0-9$\\]", sentence))


def boxes(text: str) -> list[tuple[int, int, str]]:
    """(start, end, content) of each complete `\\boxed{...}` that is not inside another one, nor behind "not".

    >>> boxes("\\\\boxed{1}, no: \\\\boxed{\\\\frac{1}{2}}, or \\\\boxed{3")
    [(0, 9, '1'), (15, 34, '\\\\frac{1}{2}')]
    """
    found: list[tuple[int, int, str]] = [(m.start(), m.end(), m[1]) for m in _BARE_BOX.finditer(text)]
    open_: list[re.Match[str]] = []
    for brace in _BRACES.finditer(text):
        if brace.group()[-1] == "{" and brace.group() != "\\{":
            open_.append(brace)
        elif brace.group() == "}" and open_:
            start = open_.pop()
            if start.group() != "{":
                while found and found[-1][0] > start.start():
                    found.pop()
                if not _DENIED.search(text, max(0, start.start() - 20), start.start()):
                    found.append((start.start(), brace.end(), text[start.end() : brace.start()]))
    return sorted(found)


def last_box(text: str) -> tuple[int, str] | None:
    """The position and the content of the last complete box, or None.

    >>> last_box("\\\\boxed{1}, no: \\\\boxed{\\\\frac{1}{2}}, or \\\\boxed{3")
    (15, '\\\\frac{1}{2}')
    """
    found = boxes(text)
    return (found[-1][0], found[-1][2]) if found else None


def last_value(one: Claim) -> Decimal | None:
    """The claim's number: of a marked one the only number, else the last. None if there is none, if it is the base of a
    power or too large, or if the claim names several."""
    text = one.text
    if one.marked:
        text = re.split(r"=|\\approx", text)[-1]
        if re.search(
            r"[0-9}]\s*(?:,\s|;|,?\s*(?:\\text\s*\{\s*)?(?:and|or)\b|,(?![0-9]{3}(?![0-9])))\s*\}?\s*[-\\$]*[0-9]", text
        ):
            return None
    found = _numbers(_SMALL_FRACTION.sub(lambda m: f"{m[1] or m[3]}/{m[2] or m[4]} ", text))
    if not found or found[-1]["power"] or _BEFORE_COLON.search(found[-1].string, 0, found[-1].start()):
        return None
    number = found[-1]
    value = decimal(number["digits"])
    other = _OR_BEFORE.search(number.string, max(0, number.start() - 60), number.start())
    if other and decimal(re.sub(r"[^0-9.-]", "", other[1]).rstrip(".")) != value:
        return None
    if number["below"]:
        value = _CONTEXT.divide(value, decimal(number["below"]))
    if "-" in (number["sign"], number["sign_behind"]):
        value = -value
    return value if value.is_finite() else None


def decimal(digits: str) -> Decimal:
    """A plain number with separators between its thousands."""
    return _CONTEXT.create_decimal(digits.replace(",", "").replace(" ", ""))


def formula(one: Claim) -> tuple[str, str]:
    """(the answer, a list that it may be part of): a marked answer as a whole, else the last formula or number.

    Empty if there is none.
    """
    return (one.text.strip(" \n\t$"), one.listed) if one.marked else _last(one.text)


def _last(text: str) -> tuple[str, str]:
    """The last formula or number of a text."""
    numbers = _numbers(text)
    formulas = [m for m in _FORMULA.finditer(text) if not _PROSE.search(m.group())]
    if formulas and (not numbers or formulas[-1].end() >= numbers[-1].end()):
        return _linked(text, from_start=False)
    if not numbers or numbers[-1]["power"]:
        return "", ""
    number = numbers[-1]
    if colon := _BEFORE_COLON.search(text, max(0, number.start() - 30), number.start()):
        half = _HALF_DAY.match(text, number.end())
        return colon.group() + number["digits"] + (half.group() if half else ""), ""
    sign = "-" if "-" in (number["sign"], number["sign_behind"]) else ""
    value = (
        sign + number["digits"].replace(",", "").replace(" ", "") + (f"/{number['below']}" if number["below"] else "")
    )
    other = _OR_BEFORE.search(text, max(0, number.start() - 60), number.start())
    return (f"{other[1]} or {value}" if other else value), ""


def _linked(text: str, from_start: bool) -> tuple[str, str]:
    """The first or last formula, with those that commas, "and" or "or" join to it."""
    found = [m for m in _FORMULA.finditer(text) if not _PROSE.search(m.group())]
    parts = [next(part for part in m.groups() if part is not None).strip(" \n\t,;") for m in found]
    low = high = 0 if from_start else len(found) - 1
    sure = False
    while high + 1 < len(found) and (link := _link(text[found[high].end() : found[high + 1].start()])):
        high, sure = high + 1, sure or link == "or"
    while low > 0 and (link := _link(text[found[low - 1].end() : found[low].start()])):
        low, sure = low - 1, sure or link == "or"
    run = parts[low : high + 1]
    names = [m[1] for m in map(_ASSIGNED.match, run) if m]
    joined = " or ".join(run) if sure else ", ".join(run)
    if len(run) == 1 or sure or len(set(names)) < len(run):
        return joined, joined
    return run[0 if from_start else -1], joined  # `a = 3, b = 4, c = 5`: three values, of which the last may be asked


def _link(text: str) -> str:
    """How two formulas are joined: "or", ",", or empty if they are not."""
    if not re.search(r",|;|\band\b|\bor\b", text) or len(text) > 60:
        return ""
    found = _LINK.fullmatch(text)
    return "" if found is None else ("or" if found[1] == "or" else ",")


def _together(text: str, found: list[tuple[int, int, str]]) -> tuple[str, str]:
    """The last box with those joined to it; and, with several boxes, all of them as a list."""
    found = found[-_MOST_BOXES:]
    low = len(found) - 1
    words = []
    while low > 0 and (link := _link(text[found[low - 1][1] : found[low][0]])):
        low -= 1
        words.append(link)
    parts = [part for _, _, part in found]
    run = (" or " if "or" in words else ", ").join(dict.fromkeys(parts[low:]))
    if low == len(found) - 1 and re.match(r"\s*\\?%", text[found[-1][1] :]):
        run += "\\%"
    return run, ", ".join(parts) if len(parts) > 1 else ""


def _is_answer(line: str) -> bool:
    """Whether the text of a line `#### ...` is an answer, not a heading."""
    bare = _plain(line).strip(" .$")
    if _MARKED.fullmatch(bare) or "\\boxed" in bare:
        return True
    words = re.sub(r"\\[A-Za-z]+(?:\{[^{}]*\})?", "", bare)
    return bool(re.search(r"[0-9\\]", bare)) and not _HEADING.match(bare) and not re.search(r"[A-Za-z]{2,}", words)


def _plain(text: str) -> str:
    """Without marks of bold text and GSM8K's calculator notes. Two spaces keep a bold number apart from one before."""
    return _BOLD.sub(lambda m: m[1] * 2 + m[3], _CALCULATION.sub("", text))


def _tidy(text: str) -> str:
    """The same mathematics with one notation for thousands separators, minus and dollar signs."""
    text = _SPACING.sub(lambda m: " " if m.group() in ("\\,", "\u00a0", "\u2009", "\u202f") else "", text)
    return re.sub(r"\{,\}(?=[0-9]{3}(?![0-9]))", ",", text).replace("\u2212", "-")


def _numbers(text: str) -> list[re.Match[str]]:
    return list(_NUMBER.finditer(text))
