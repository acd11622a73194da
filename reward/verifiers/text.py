"""Verifiers of an answer's form: a multiple-choice letter, a regular expression, tags in order."""

import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import regex

from data.records import Message
from reward.functions import RewardError, one_form
from reward.verifiers.golds import Unreadable, golds, warn_unreadable
from reward.verifiers.maths_claim import answer_part, last_box

log = logging.getLogger(__name__)

PATTERN_SECONDS = 2.0
"""Wall time limit for one match of `regex_format`; ordinary patterns take microseconds."""

_IS = r"(?:is|was|would be|should be|must be)"
_NOUN = r"(?:option|choice|letter)"
_CHOOSE = r"(?:choose|chose|pick|select|go with|going with)"
_DENIED_BEFORE = re.compile(rf"(?i:(?:not|n['’]t)(?:\s+be)?)\s*(?i:{_NOUN})?\s*$")
_DENIED_BEHIND = re.compile(r"\s*(?:is|was)(?:n['’]t|\s+not|\s+wrong|\s+incorrect|\s+false)\b")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\s*\{([^{}]*)\}")


def multiple_choice(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    column: str | None = None,
    letters: str = "ABCDEFGHIJ",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion chooses the right letter and no other, else 0; None where the row has no gold answer.

    Only the part in `<answer>` tags is read, if there is one. The choice is the letter in the last box, else after the
    last "answer is" or "Answer:", else the single letter marked as a choice: alone on its line, `(B)`, `B.` or `B)` at
    the start of a line, "option B", "I choose B", "B is correct". Several letters instead of one, or a letter after
    "not", are not a choice.

    Args:
        column: holds the right letter (`B`, `(B)`, `\\text{(B)}`); default: `answer` or `ground_truth`.
        letters: the letters to choose from.

    A gold answer that is not one of the letters scores None, and is counted in a warning.

    Raises:
        RewardError: the column is missing, or `letters` is invalid.

    >>> multiple_choice([], ["The answer is (B).", "**B**", "A, B or C", "B. Paris"], answer=["B"] * 4)
    [1.0, 1.0, 0.0, 1.0]
    """
    if not isinstance(letters, str) or not re.fullmatch(r"[A-Z]{2,}", letters):
        raise RewardError(f"`multiple_choice`: `letters: {letters}`; give the capital letters, such as `letters: ABCD`")
    unreadable: Unreadable = {}
    rights = _letters(len(completions), columns, column, letters, unreadable)
    warn_unreadable("multiple_choice", prompts, unreadable)
    return [
        None if right is None else float(chosen_letter(text, letters) == right)
        for right, text in zip(rights, completions, strict=True)
    ]


def multiple_choice_unreadable(
    rows: int, columns: Mapping[str, Any], column: str | None = None, letters: str = "ABCDEFGHIJ", **_: Any
) -> Unreadable:
    """The rows whose gold answer is not one of the letters, and why. Raises RewardError: the column is missing."""
    unreadable: Unreadable = {}
    _letters(rows, columns, column, letters, unreadable)
    return unreadable


def _letters(
    rows: int, columns: Mapping[str, Any], column: str | None, letters: str, unreadable: Unreadable
) -> list[str | None]:
    """The right letter of each row; rows where it cannot be read are added to `unreadable`."""
    out: list[str | None] = []
    for row, gold in enumerate(golds("multiple_choice", rows, columns, column, unreadable)):
        right = None if gold is None else _lone_letter(gold if "\\" in gold else gold.upper(), letters)
        if gold is not None and right is None:
            unreadable[row] = f"the gold answer {gold[-80:]!r} is not one of the letters {letters}; give its letter"
        out.append(right)
    return out


def regex_format(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    pattern: str,
    match: Literal["full", "search"] = "full",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion matches a regular expression, else 0.

    Args:
        pattern: in Python's syntax; `(?s)` at its start lets the dot match line breaks.
        match: `full` if the pattern must match the whole completion, `search` if it may occur anywhere in it.

    Raises:
        RewardError: an invalid pattern or `match`.

    >>> regex_format([], ["12 km", "about 12 km"], pattern=r"\\d+ km")
    [1.0, 0.0]
    >>> regex_format([], ["about 12 km"], pattern=r"\\d+ km", match="search")
    [1.0]
    """
    if match not in ("full", "search"):
        raise RewardError(f"`regex_format`: `match: {match}` is neither `full` nor `search`")
    try:
        compiled = regex.compile(one_form(pattern))
    except regex.error as error:
        raise RewardError(f"`regex_format`: `pattern: {pattern}` is not a regular expression: {error}") from error
    find = compiled.fullmatch if match == "full" else compiled.search
    out: list[float | None] = []
    late = 0
    for text in completions:
        try:
            out.append(float(find(one_form(text), timeout=PATTERN_SECONDS) is not None))
        except TimeoutError:
            late += 1
            out.append(0.0)
    if late:
        log.warning(
            "regex_format: on %d of %d completions the pattern took over %g s; they score 0. It backtracks too much",
            late,
            len(out),
            PATTERN_SECONDS,
        )
    return out


def xml_format(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    tags: Sequence[str],
    text_outside: bool = False,
    **columns: Any,
) -> list[float | None]:
    """1 where the completion has each tag exactly once, in this order, not nested and not empty; else 0.

    Args:
        tags: the tags' names.
        text_outside: whether the completion may have other text than white space outside the tags.

    Raises:
        RewardError: an invalid tag name, or one given twice.

    >>> xml_format([], ["<think>6 * 7</think><answer>42</answer>", "<answer>42</answer>"], tags=["think", "answer"])
    [1.0, 0.0]
    >>> xml_format([], ["<think>6 * 7</think> It is 42."], tags=["think"], text_outside=True)
    [1.0]
    """
    names = [one_form(tag) for tag in tags if isinstance(tag, str)]
    names = [name for name in names if re.fullmatch(r"[A-Za-z][\w.-]*", name)]
    if isinstance(tags, str) or not tags or len(names) != len(tags):
        raise RewardError(f"`xml_format`: `tags: {tags}` is not a list of tag names, such as `tags: [think, answer]`")
    if len(set(names)) != len(names):
        raise RewardError(f"`xml_format`: `tags: {list(tags)}` names a tag twice")
    return [float(_tagged(one_form(text), names, text_outside)) for text in completions]


def _tagged(text: str, tags: Sequence[str], text_outside: bool) -> bool:
    place = 0
    for tag in tags:
        start, end = f"<{tag}>", f"</{tag}>"
        if text.count(start) != 1 or text.count(end) != 1:
            return False
        begins, ends = text.find(start, place), text.find(end, place)
        inside = text[begins + len(start) : max(ends, 0)]
        if begins < 0 or ends < begins or not inside.strip():
            return False
        if not text_outside and text[place:begins].strip():
            return False
        place = ends + len(end)
    return text_outside or not text[place:].strip()


def _lone_letter(text: str, letters: str) -> str | None:
    """The letter, if the text is a single letter, perhaps in brackets or markup."""
    found = re.fullmatch(rf"[\s($[]*([{letters}])[\s)$\].:]*", _WRAPPED.sub(r"\1", text))
    return found[1] if found else None


def chosen_letter(text: str, letters: str) -> str | None:
    """The letter that the text chooses; None when it chooses none or more than one."""
    text = answer_part(text)
    box = last_box(text)
    if box is not None:
        return _lone_letter(box[1], letters)
    text = re.sub(r"[*`$]", "", _WRAPPED.sub(r"\1", text))
    letter = rf"[(\[]?([{letters}])(?![\w'’])[)\]]?"
    stated = list(re.finditer(rf"\b(?i:answer)\b(?i:\s+{_IS})?[\s:=]*(?i:{_NOUN}\s+)?{letter}", text))
    if stated:
        return None if re.match(_further(letters), text[stated[-1].end() :]) else stated[-1][1]
    marked = re.compile(
        rf"^[ \t]*[(\[]?(?:([{letters}])[)\].:]*[ \t]*$|([{letters}])[)\].:](?=\s))"  # alone on a line, or at its start
        rf"|\(([{letters}])\)"
        rf"|\b(?i:{_NOUN}|{_CHOOSE}(?:\s+{_NOUN})?)\s+{letter}"
        rf"|\b([{letters}])\s+is\s+(?:the\s+)?(?:correct|right|best)\b",
        re.MULTILINE,
    )
    found = set()
    for mark in marked.finditer(text):
        before, after = text[max(0, mark.start() - 24) : mark.start()], text[mark.end() : mark.end() + 24]
        if not _DENIED_BEFORE.search(before) and not _DENIED_BEHIND.match(after):
            found.add(next(group for group in mark.groups() if group))
    return found.pop() if len(found) == 1 else None


def _further(letters: str) -> str:
    """A pattern for another letter right after the first: `, B`, ` or (C)`, ` B C`; but not for `, A dog is`."""
    letter = rf"[(\[]?[{letters}]"
    return rf"[\s,;/&]*(?:(?:and|or)\s+)?{letter}(?=[)\]]|\s*(?:[,;/&.]|and\b|or\b|$|{letter}\b))"
