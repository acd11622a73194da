"""The labelled pairs of maths_pairs.txt: every right answer counts, and no wrong one does."""

import doctest
import hashlib
from pathlib import Path

import pytest

import reward.functions
import reward.verifiers.maths_claim
import reward.verifiers.maths_clean
import reward.verifiers.maths_form
import reward.verifiers.maths_number
import reward.verifiers.maths_same
from reward.verifiers.maths import math_equal, math_equal_unreadable, numeric_match
from reward.verifiers.maths_number import number

Pair = tuple[str, str, bool]


def pairs() -> list[Pair]:
    """(gold answer, completion, whether they are the same)."""
    found: list[Pair] = []
    gold = ""
    for line in Path(__file__).with_name("maths_pairs.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("= "):
            gold = line[2:]
        elif line.startswith(("+ ", "- ")):
            found.append((gold, line[2:].replace("⏎", "\n"), line[0] == "+"))
    return found


def held_out(gold: str) -> bool:
    """Half of the gold answers, by a hash. Nobody looks at these pairs while mending, only at how many are right."""
    return hashlib.sha256(gold.encode()).digest()[1] % 3 == 0


@pytest.fixture(scope="module")
def scored() -> list[tuple[Pair, float | None]]:
    """All pairs with their scores."""
    known = pairs()
    scores = math_equal([], [text for _, text, _ in known], answer=[gold for gold, _, _ in known])
    return list(zip(known, scores, strict=True))


def test_there_are_many_pairs_of_both_kinds_and_a_third_is_held_out():
    known = pairs()
    assert len(known) > 800 and len(set(known)) == len(known)
    assert sum(right for _, _, right in known) > 400 and sum(not right for _, _, right in known) > 300
    assert sum(held_out(gold) for gold, _, _ in known) > len(known) / 3


def test_no_wrong_answer_counts(scored):
    assert [pair for pair, score in scored if not pair[2] and score == 1.0] == []


def test_right_answers_count(scored):
    assert [pair for pair, score in scored if pair[2] and not held_out(pair[0]) and score != 1.0] == []
    held = [score for pair, score in scored if pair[2] and held_out(pair[0])]
    assert sum(score == 1.0 for score in held) >= 0.98 * len(held)


def test_numeric_match_never_counts_a_wrong_number():
    known = [pair for pair in pairs() if number(pair[0]) is not None]
    scores = numeric_match([], [text for _, text, _ in known], answer=[gold for gold, _, _ in known])
    # It reads no formulas, words or multipliers, which the last number of a text may stand in.
    reads = [pair for pair in known if not any(mark in pair[1] for mark in "\\<^_:")]
    wrong = [pair for pair, score in zip(known, scores, strict=True) if pair in reads and not pair[2] and score == 1.0]
    assert len(reads) > 20 and wrong == []


def test_every_gold_answer_of_the_pairs_can_be_read():
    golds = list(dict.fromkeys(gold for gold, _, _ in pairs()))
    assert math_equal_unreadable(len(golds), {"answer": golds}) == {}


UNREADABLE = ["", "??", "\\frac{1}{", "$$", "\\boxed{}"]


def test_gold_answers_that_say_nothing_are_found():
    assert set(math_equal_unreadable(6, {"answer": [*UNREADABLE, "42"]})) == set(range(5))


def test_the_same_text_counts_even_where_it_cannot_be_read():
    assert math_equal([], ["\\boxed{\\frac{1}{}}", "\\boxed{7}"], answer=["\\frac{1}{}"] * 2) == [1.0, None]


HOSTILE = [
    "$", "\\boxed{", "\\boxed{1} or ", "the answer is ", "**", "** ", "__", "1 000", "1,111", "1:", "1 : ", "<<",
    "#### 1 ", "\\(", "\\[", "$1$ and ", "\\text{a}", "{", "(", "\\frac1", "0.\\overline{1}", "\\pm", "{,}",
    "\\cup ", "x<", "\n", " ",
]  # fmt: skip


@pytest.mark.parametrize("form", ["{}", "1{}", "\\boxed{{{}}}", "the answer is {}!"])
def test_long_nonsense_scores_zero(form):
    texts = [form.format(part * (8000 // len(part))) for part in HOSTILE]
    assert math_equal([], texts, answer=["\\sqrt{2}"] * len(texts), time_limit=1.0) == [0.0] * len(texts)
    assert numeric_match([], texts, answer=["17"] * len(texts)) == [0.0] * len(texts)


@pytest.mark.parametrize(
    "module",
    [
        reward.functions,
        reward.verifiers.maths_claim,
        reward.verifiers.maths_clean,
        reward.verifiers.maths_form,
        reward.verifiers.maths_number,
        reward.verifiers.maths_same,
    ],
)
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 1
