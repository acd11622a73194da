"""Words, sentences and languages of a text, as the checks of IFEval count them."""

import functools
import re
import unicodedata
from typing import Any

# Letters and digits, joined by apostrophes and hyphens: "don't" and "well-known" are one word each.
_WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
_HEADING = re.compile(r"^[ \t]*(?:#+[ \t].*|<<[^<>\n]*>>[ \t]*)$", re.MULTILINE)
_BLOCK = re.compile(r"\n\s*\n|\n(?=[ \t]*(?:[-*+•]|[0-9]+[.)])\s)")  # at a blank line, and before an item of a list
_END = re.compile(r"[.!?…]+[\"'”’»)\]*_]*(?=\s|$)|[。！？।॥؟۔]+")
_NEXT = re.compile(r"\s*(\S?)")
_TITLES = frozenset({"mr", "mrs", "ms", "dr", "prof", "st", "sr", "jr", "gen", "sgt", "rev", "gov", "sen", "vs", "fig"})
_ABBREVIATIONS = frozenset({"etc", "inc", "ltd", "co", "corp", "dept", "est", "approx", "al", "cf"})

_SURE = 0.5
"""Below this probability the detector's result is not reliable, as for texts of a few words."""
_FOREIGN = 0.9
"""From this probability on, a paragraph counts as being in a different language."""
_PARAGRAPH_LETTERS = 80
"""Minimum number of letters for a paragraph to be checked by itself."""
_SAME = {
    "no": {"nn", "nb"},
    "zh": {"yue", "wuu"},
    "ar": {"arz", "ary"},
    "pt-br": {"pt"},
    "zh-cn": {"zh"},
    "zh-tw": {"zh"},
}


def words(text: str) -> list[str]:
    """
    >>> words("Don't stop -- the *well-known* 3rd act!")
    ["Don't", 'stop', 'the', 'well-known', '3rd', 'act']
    """
    return _WORD.findall(text)


def occurrences(phrase: str, text: str) -> int:
    """How often a word or phrase occurs in the text as whole words, in any case.

    >>> occurrences("cat", "Cat, cats, concatenate, _cat_")
    2
    """
    parts = r"\s+".join(re.escape(part) for part in phrase.split())
    return len(re.findall(rf"(?<![^\W_]){parts}(?![^\W_])", text, re.IGNORECASE))


def sentences(text: str) -> int:
    """How many sentences the text has.

    A sentence ends at `.`, `!`, `?` or `…` before white space, but not after abbreviations ("Dr.", "e.g."), initials or
    list numbers. The end of a list item or a paragraph also ends a sentence. Headings (`# ...`) and titles (`<<...>>`)
    do not count.

    >>> sentences("Dr. Smith paid $3.50 at 5 p.m. today. Why? Nobody knows...")
    3
    >>> sentences("# Shopping\\n1. Buy milk\\n2. Buy eggs.\\n\\nThat is all")
    3
    """
    return sum(_sentences_of(block) for block in _BLOCK.split(_HEADING.sub("\n", text)))


def _sentences_of(block: str) -> int:
    count, start = 0, 0
    for end in _END.finditer(block):
        if not _WORD.search(block, start, end.start()):
            start = end.end()
        elif not _goes_on(block, start, end):
            count, start = count + 1, end.end()
    return count + bool(_WORD.search(block, start))


def _goes_on(block: str, start: int, end: re.Match[str]) -> bool:
    """Whether the sentence continues after this mark."""
    behind = _NEXT.match(block, end.end())
    after = behind[1] if behind else ""
    if end.group()[:2] == ".." or end.group()[0] == "…":
        return after.islower()
    if end.group()[0] != ".":
        return False
    before = block[max(start, end.start() - 100) : end.start()].split()
    last = before[-1].lstrip("(\"'“‘[*_") if before else ""
    if last.lower() in _TITLES or (len(last) == 1 and last.isupper() and last != "I"):
        return bool(after)
    if last.lower() in _ABBREVIATIONS or ("." in last and not last[0].isdigit()):  # etc., e.g., p.m.
        return after.islower()
    return len(before) == 1 and last.isdigit() and bool(after)


@functools.cache
def _detector() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def languages() -> frozenset[str]:
    """Codes (ISO 639) of the languages that the detector knows."""
    return frozenset(_detector().labels) | frozenset(_SAME)


def is_language(text: str, language: str) -> bool:
    """Whether all of the text is in the language, according to py3langid.

    The whole text must be in the language, and no paragraph of 80 letters or more clearly in another. A text too short
    for the detector passes as English when all its letters are ASCII ("Yes.").

    >>> is_language("The cat sat on the mat.", "en"), is_language("Le chat est sur le tapis.", "en")
    (True, False)
    """
    accepted = {language} | _SAME.get(language, set())
    code, probability = _detector().classify(text)
    if code not in accepted:
        letters = [c for c in text if c.isalpha()]
        return language == "en" and probability < _SURE and bool(letters) and all(c.isascii() for c in letters)
    for paragraph in re.split(r"\n\s*\n", text):
        if sum(c.isalpha() for c in paragraph) >= _PARAGRAPH_LETTERS:
            code, probability = _detector().classify(paragraph)
            if code not in accepted and probability >= _FOREIGN:
                return False
    return True


def commas(text: str) -> int:
    """Commas of all scripts: Latin, Arabic, Chinese and Japanese.

    >>> commas("one, two، three， four、")
    4
    """
    return sum(unicodedata.normalize("NFKC", c) in ",،、﹐" for c in text)
