"""The 25 instruction types of IFEval (Zhou et al. 2023, arXiv:2311.07911, table 4), each a function of the text.

Written from the descriptions in the paper and the prompts. Where these are ambiguous, the check takes the reading that
a policy cannot satisfy by form alone: keywords are whole words, counted items have content, and an empty answer follows
no instruction. docs/rewards.md lists where this is stricter than the published checker.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from reward.functions import one_form
from reward.verifiers.ifeval_text import commas, is_language, languages, occurrences, sentences, words
from reward.verifiers.json_schema import strict_json

YES_NO_MAYBE: Final = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
_DIVIDER = re.compile(r"(?<!\S)\*[ ]?\*[ ]?\*(?!\S)")  # `***`, also written `* * *`; not ***bold***
_SIX_STARS = re.compile(r"(?<!\*)\*{6}(?!\*)")
_BULLET = re.compile(r"^[ \t]*[-*+][ \t]+(?![-*+ \t]*$)\S", re.MULTILINE)  # not the rules `* * *` and `- - -`
_HIGHLIGHT = re.compile(r"(?<![*\w])(\*{1,3})(?=[^\s*])[^*\n]*?(?<=[^\s*])\1(?!\*)")
_PLACEHOLDER = re.compile(r"\[[^\[\]\n]*\w[^\[\]\n]*\](?!\(\s*(?:https?:|mailto:|/|#))")  # not the links of markdown
_TITLE = re.compile(r"<<[^<>\n]*\w[^<>\n]*>>")
_OPENING = '"“„«'
_CLOSING = '"”“»'


def compare(found: int, relation: str, wanted: int) -> bool:
    """Whether a count satisfies its relation. IFEval uses the first two relations, the RLVR mixture all five.

    >>> compare(3, "at least", 3), compare(3, "less than", 3), compare(109, "around", 100)
    (True, False, True)
    """
    holds = {
        "at least": found >= wanted,
        "less than": found < wanted,
        "at most": found <= wanted,
        "around": abs(found - wanted) <= max(1, round(wanted / 10)),
        "exactly": found == wanted,
    }
    return holds[relation]


def existence(text: str, keywords: list[str]) -> bool:
    """The text includes all of the keywords."""
    return all(occurrences(keyword, text) for keyword in keywords)


def keyword_frequency(text: str, keyword: str, relation: str, frequency: int) -> bool:
    """The keyword appears the required number of times."""
    return compare(occurrences(keyword, text), relation, frequency)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    """The text includes none of the words."""
    return not any(occurrences(word, text) for word in forbidden_words)


def letter_frequency(text: str, letter: str, let_relation: str, let_frequency: int) -> bool:
    """The letter (in any case) or other character appears the required number of times."""
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, language: str) -> bool:
    """The entire response is in the language."""
    return is_language(text, language)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Exactly `num_paragraphs` non-empty paragraphs, separated by the divider `***`, which may also begin and end the
    text."""
    parts = [part.strip() for part in _DIVIDER.split(text)]
    inner = parts[1:-1] if len(parts) > 1 else []
    return all(inner) and sum(map(bool, parts)) == num_paragraphs


def number_words(text: str, relation: str, num_words: int) -> bool:
    """So many words."""
    return compare(len(words(text)), relation, num_words)


def number_sentences(text: str, relation: str, num_sentences: int) -> bool:
    """So many sentences."""
    return compare(sentences(text), relation, num_sentences)


def nth_paragraph_first_word(text: str, first_word: str, num_paragraphs: int, nth_paragraph: int) -> bool:
    """Exactly `num_paragraphs` paragraphs, separated by two line breaks; the n-th begins with the word, in any case."""
    paragraphs = [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
    if len(paragraphs) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    first = words(paragraphs[nth_paragraph - 1])[:1]
    return [word.lower() for word in first] == [first_word.lower()]


def postscript(text: str, postscript_marker: str) -> bool:
    """The text ends with a postscript: a line that begins with the marker, such as P.S., and has content."""
    letters = re.findall(r"[A-Za-z]", postscript_marker)
    marker = re.escape(postscript_marker.strip())
    if len(letters) <= 4 and re.fullmatch(r"[A-Za-z. ]+", postscript_marker):
        # P.S. and P.P.S, with or without the last dot, also written P. S.
        marker = (r"\.[ ]?" if "." in postscript_marker else r"\.?[ ]?").join(letters) + r"(?:\.|\b)"
    found = re.search(rf"^[ \t*_>\"“#]*{marker}(?P<said>.*)", text, re.IGNORECASE | re.MULTILINE | re.DOTALL)
    return found is not None and bool(words(found["said"]))


def number_placeholders(text: str, num_placeholders: int) -> bool:
    """At least `num_placeholders` placeholders in square brackets, such as [address]."""
    return len(_PLACEHOLDER.findall(text)) >= num_placeholders


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    """Exactly `num_bullets` markdown bullet points: `* This is a point.`"""
    return len(_BULLET.findall(text)) == num_bullets


def title(text: str) -> bool:
    """A title in double angular brackets: <<poem of joy>>."""
    return _TITLE.search(text) is not None


def constrained_response(text: str, options: tuple[str, ...] = YES_NO_MAYBE) -> bool:
    """The text gives exactly one of the options, word for word, perhaps with an explanation."""
    return sum(re.search(rf"(?<!\w){re.escape(option)}(?!\w)", text) is not None for option in options) == 1


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    """At least `num_highlights` sections are highlighted in markdown: *like this* or **like this**."""
    return sum(1 for _ in _HIGHLIGHT.finditer(text)) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    """At least `num_sections` sections, each with content and a first line such as `SECTION 1`.

    Not exactly that number: some prompts in the data ask for "at least two", others for twice the number in two
    responses.
    """
    marker = rf"^[ \t*_#>\"“(\[]*{re.escape(section_spliter.strip())}[ \t]*(?:[0-9]+|[IVX]+)\b"
    return (
        sum(bool(words(part)) for part in re.split(marker, text, flags=re.IGNORECASE | re.MULTILINE)[1:])
        >= num_sections
    )


def json_format(text: str) -> bool:
    """The entire output is one JSON object or array, bare or in a code fence."""
    try:
        return isinstance(strict_json(text), dict | list)
    except (ValueError, RecursionError):
        return False


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    """The text begins with the request, unchanged except for white space, and an answer follows."""
    said, request = " ".join(text.split()), " ".join(prompt_to_repeat.split())
    return said.startswith(request) and bool(words(said[len(request) :]))


def two_responses(text: str) -> bool:
    """Two different responses, separated by six asterisks."""
    parts = [" ".join(part.split()) for part in _SIX_STARS.split(text)]
    inner = parts[1:-1] if len(parts) > 1 else []
    given = [part for part in parts if part]
    return all(inner) and len(given) == 2 and given[0].lower() != given[1].lower()


def english_capital(text: str) -> bool:
    """All in English and in capital letters."""
    return text.isupper() and is_language(text, "en")


def english_lowercase(text: str) -> bool:
    """All in English and in lowercase letters."""
    return text.islower() and is_language(text, "en")


def capital_word_frequency(text: str, capital_relation: str, capital_frequency: int) -> bool:
    """Words all in capital letters, including "I" and "A", appear the required number of times."""
    return compare(sum(word.isupper() for word in words(text)), capital_relation, capital_frequency)


def end_checker(text: str, end_phrase: str) -> bool:
    """The text ends with the phrase, in any case (others may ask for capitals); a closing quote may follow."""
    said, phrase = " ".join(text.split()).lower(), " ".join(end_phrase.split()).lower()
    return said.endswith(phrase) or said.rstrip(_CLOSING + " ").endswith(phrase.rstrip(_CLOSING + " "))


def quotation(text: str) -> bool:
    """The entire response is in double quotation marks."""
    said = text.strip()
    return len(said) > 2 and said[0] in _OPENING and said[-1] in _CLOSING and bool(words(said))


def no_comma(text: str) -> bool:
    """No commas, of any script."""
    return commas(text) == 0


# Readers of keyword arguments: each returns the value for the check, or raises ValueError that says what is expected.
def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer() or value < 0:
        raise ValueError("a number of things, 0 or more")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError("text that is not empty")
    return one_form(value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("a list of texts")
    return [_text(one) for one in value]


def _letter(value: Any) -> str:
    if not isinstance(value, str) or len(one_form(value)) != 1:
        raise ValueError("one character")
    return one_form(value)


def _relation(value: Any) -> str:
    relations = ("at least", "less than", "at most", "around", "exactly")
    if value not in relations:
        raise ValueError(f"one of {', '.join(relations)}")
    return str(value)


def _language(value: Any) -> str:
    if not isinstance(value, str) or value.lower() not in languages():
        raise ValueError(f"the code of a language: {', '.join(sorted(languages()))}")
    return value.lower()


@dataclass(frozen=True)
class Instruction:
    """A check, with its required and optional keyword arguments and a reader for each."""

    check: Callable[..., bool]
    needs: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)
    may_have: Mapping[str, Callable[[Any], Any]] = field(default_factory=dict)


INSTRUCTIONS: Final[dict[str, Instruction]] = {
    "keywords:existence": Instruction(existence, {"keywords": _texts}),
    "keywords:frequency": Instruction(
        keyword_frequency, {"keyword": _text, "relation": _relation, "frequency": _count}
    ),
    "keywords:forbidden_words": Instruction(forbidden_words, {"forbidden_words": _texts}),
    "keywords:letter_frequency": Instruction(
        letter_frequency, {"letter": _letter, "let_relation": _relation, "let_frequency": _count}
    ),
    "language:response_language": Instruction(response_language, {"language": _language}),
    "length_constraints:number_sentences": Instruction(
        number_sentences, {"relation": _relation, "num_sentences": _count}
    ),
    "length_constraints:number_paragraphs": Instruction(number_paragraphs, {"num_paragraphs": _count}),
    "length_constraints:number_words": Instruction(number_words, {"relation": _relation, "num_words": _count}),
    "length_constraints:nth_paragraph_first_word": Instruction(
        nth_paragraph_first_word, {"first_word": _text, "num_paragraphs": _count, "nth_paragraph": _count}
    ),
    "detectable_content:number_placeholders": Instruction(number_placeholders, {"num_placeholders": _count}),
    "detectable_content:postscript": Instruction(postscript, {"postscript_marker": _text}),
    "detectable_format:number_bullet_lists": Instruction(number_bullet_lists, {"num_bullets": _count}),
    "detectable_format:title": Instruction(title),
    "detectable_format:constrained_response": Instruction(constrained_response, may_have={"options": _texts}),
    "detectable_format:number_highlighted_sections": Instruction(
        number_highlighted_sections, {"num_highlights": _count}
    ),
    "detectable_format:multiple_sections": Instruction(
        multiple_sections, {"section_spliter": _text, "num_sections": _count}
    ),
    "detectable_format:json_format": Instruction(json_format),
    "combination:repeat_prompt": Instruction(repeat_prompt, {"prompt_to_repeat": _text}),
    "combination:two_responses": Instruction(two_responses),
    "change_case:english_capital": Instruction(english_capital),
    "change_case:english_lowercase": Instruction(english_lowercase),
    "change_case:capital_word_frequency": Instruction(
        capital_word_frequency, {"capital_relation": _relation, "capital_frequency": _count}
    ),
    "startend:end_checker": Instruction(end_checker, {"end_phrase": _text}),
    "startend:quotation": Instruction(quotation),
    "punctuation:no_comma": Instruction(no_comma),
}
