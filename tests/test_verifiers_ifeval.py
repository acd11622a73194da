"""IFEval's 25 instruction types: answers that follow, answers that only seem to, the published data, bad input."""

import doctest
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward.verifiers.ifeval
import reward.verifiers.ifeval_checks
import reward.verifiers.ifeval_rlvr
import reward.verifiers.ifeval_text
from data.records import Message
from reward.functions import RewardError
from reward.verifiers.ifeval import check_of, ifeval
from reward.verifiers.ifeval_checks import INSTRUCTIONS
from reward.verifiers.ifeval_rlvr import RLVR
from reward.verifiers.ifeval_text import sentences, words
from tests.ifeval_cases import CASES, ENGLISH, HINDI


def test_the_cases_cover_all_25_types():
    assert len(INSTRUCTIONS) == 25
    assert set(CASES) == set(INSTRUCTIONS)
    for name, groups in CASES.items():
        assert sum(len(good) for _, good, _ in groups) >= 2, name
        assert sum(len(bad) for _, _, bad in groups) >= 3, name


@pytest.mark.parametrize("name", sorted(CASES))
def test_answers_that_follow_pass_and_others_fail(name):
    wrong = []
    for kwargs, good, bad in CASES[name]:
        for wanted, answers in ((1.0, good), (0.0, [*bad, "", " \n"])):
            values = ifeval([], answers, instruction_id_list=[[name]] * len(answers), kwargs=[[kwargs]] * len(answers))
            wrong += [(wanted, kwargs, text) for text, value in zip(answers, values, strict=True) if value != wanted]
    assert wrong == []


@pytest.mark.parametrize("name", sorted(CASES))
@settings(max_examples=40, deadline=None)
@given(text=st.text())
def test_no_text_raises(name, text):
    for kwargs, good, _ in CASES[name]:
        # Alone, and around an answer that follows, which is closer to a policy's text.
        for answer in (text, text + good[0], good[0] + text):
            for mode in ("strict", "loose"):
                values = ifeval([], [answer], instruction_id_list=[[name]], kwargs=[[kwargs]], mode=mode)
                assert values in ([0.0], [1.0])


@settings(max_examples=60, deadline=None)
@given(st.text(alphabet="ab *#.!?\n\"'-1,", max_size=60))
def test_strict_implies_loose(text):
    ids = ["punctuation:no_comma", "detectable_format:number_bullet_lists", "startend:quotation"]
    kwargs = [{}, {"num_bullets": 1}, {}]
    values = {
        (mode, credit): ifeval([], [text], [ids], [kwargs], mode=mode, credit=credit)[0]
        for mode in ("strict", "loose")
        for credit in ("all", "fraction")
    }
    assert values["loose", "fraction"] >= values["strict", "fraction"] >= values["strict", "all"]
    assert values["loose", "all"] >= values["strict", "all"]
    assert values["strict", "all"] == float(values["strict", "fraction"] == 1)


def test_loose_forgives_first_line_last_line_and_asterisks():
    ids, kwargs = [["startend:quotation"]], [[{}]]
    for text in ('Sure, here it is:\n"Hello"', '"Hello"\nHope it helps.', 'Sure:\n**"Hello"**\nBye', '*"Hello"*'):
        assert ifeval([], [text], ids, kwargs) == [0.0]
        assert ifeval([], [text], ids, kwargs, mode="loose") == [1.0]
    assert ifeval([], ['a\nb\n"Hello"'], ids, kwargs, mode="loose") == [0.0]
    # Without the first and the last line nothing is left, and empty text follows no instruction.
    assert ifeval([], ["a, b\nc, d"], [["punctuation:no_comma"]], kwargs, mode="loose") == [0.0]


def test_credit_for_a_fraction():
    ids = [["punctuation:no_comma", "detectable_format:title", "startend:quotation", "keywords:existence"]]
    kwargs = [[{}, {}, {}, {"keywords": ["sea"]}]]
    text = "<<Ode>> O, sea"
    assert ifeval([], [text], ids, kwargs, credit="fraction") == [0.5]
    assert ifeval([], [text], ids, kwargs) == [0.0]


def test_the_published_data(shared_data):
    with gzip.open(shared_data / "verifiable" / "ifeval-prompts.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    assert len(rows) == 541
    seen = {name for row in rows for name in row["instruction_id_list"]}
    assert seen == set(INSTRUCTIONS)
    ids, kwargs = [r["instruction_id_list"] for r in rows], [r["kwargs"] for r in rows]
    answers = [r["prompt"] for r in rows]
    strict, loose = (ifeval([], answers, ids, kwargs, mode=mode) for mode in ("strict", "loose"))
    assert len(strict) == 541 and set(strict) == {0.0, 1.0}
    assert all(a <= b for a, b in zip(strict, loose, strict=True))
    # As on the hub: all arguments for every instruction, null for those that do not apply.
    names = {name for many in kwargs for one in many for name in one}
    padded = [[{**dict.fromkeys(names), **one} for one in many] for many in kwargs]
    assert ifeval([], answers, ids, padded) == strict


def test_rows_without_instructions_score_none():
    assert ifeval([], ["a", "b"], [None, []], [None, []]) == [None, None]
    assert ifeval([], ["a", "a,"], ground_truth=["42", '{"func_name": "validate_no_commas"}']) == [None, 0.0]


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        (
            ["punctuation:no_coma"],
            [{}],
            r"unknown instruction `punctuation:no_coma`; did you mean `punctuation:no_comma`",
        ),
        (
            ["length_constraints:number_words"],
            [{"relation": "at least"}],
            r"needs `num_words` in its kwargs; they have rel",
        ),
        (["length_constraints:number_words"], [None], r"needs `relation` in its kwargs; they have none"),
        (
            ["keywords:existence"],
            [{"keywords": "sea"}],
            r"`keywords` of `keywords:existence` is 'sea'; expected a list",
        ),
        (["keywords:existence"], [{"keywords": []}], r"expected a list"),
        (["detectable_format:title"], [{"num_words": 3}], r"takes no `num_words`"),
        (["detectable_format:title"], [], r"1 instructions but 0 `kwargs`; give one for each"),
        (["detectable_format:title"], None, r"no `kwargs`"),
        (["language:response_language"], [{"language": "xx"}], r"expected the code of a language: "),
        (["detectable_format:number_bullet_lists"], [{"num_bullets": "3"}], r"is '3'; expected a number"),
        (["detectable_format:number_bullet_lists"], [{"num_bullets": 2.5}], r"is 2.5; expected a number"),
        (["detectable_format:number_bullet_lists"], [{"num_bullets": float("nan")}], r"is nan; expected a number"),
        (
            ["keywords:letter_frequency"],
            [{"letter": "ab", "let_relation": "at least", "let_frequency": 1}],
            r"one character",
        ),
        (
            ["length_constraints:number_words"],
            [{"relation": "some", "num_words": 3}],
            r"expected one of at least, less than",
        ),
    ],
)
def test_bad_data_names_the_row(ids, kwargs, message):
    prompts = [(Message("user", "fine"),), (Message("user", "Write a poem."),)]
    with pytest.raises(RewardError, match=r"`ifeval`, row 1 of the batch \(prompt 'Write a poem\.'\): .*" + message):
        ifeval(prompts, ["a", "b"], [["punctuation:no_comma"], ids], [[{}], kwargs])


def test_missing_columns_and_wrong_arguments():
    with pytest.raises(RewardError, match=r"needs the columns `instruction_id_list` and `kwargs`.*have `family`"):
        ifeval([], ["a"], family=["x"])
    with pytest.raises(RewardError, match="`mode: lose`"):
        ifeval([], ["a"], [[]], [[]], mode="lose")


RLVR_ARGUMENTS = {
    "verify_keywords": ({"keyword_list": ["sea"]}, "the sea", "the lake"),
    "verify_keyword_frequency": ({"word": "sea", "N": 2}, "sea and sea", "sea sea sea"),
    "validate_forbidden_words": ({"forbidden_words": ["sea"]}, "the lake", "the sea"),
    "verify_letter_frequency": ({"letter": "z", "N": 1}, "a zoo", "zz"),
    "validate_response_language": ({"language": "en"}, ENGLISH, HINDI),
    "verify_paragraph_count": ({"N": 2}, "a\n* * *\nb", "a\n\nb"),
    "validate_word_constraint": ({"N": 20, "quantifier": "around"}, "a " * 22, "a " * 23),
    "verify_sentence_constraint": ({"N": 2, "quantifier": "at most"}, "We go. We stop.", "We go. We stop. We end."),
    "validate_paragraphs": ({"N": 2, "first_word": "now", "i": 2}, "a\n\nNow b", "Now a\n\nb"),
    "verify_postscript": ({"postscript_marker": "P.S."}, "a\nP.S. b", "a\nb"),
    "validate_placeholders": ({"N": 1}, "Dear [name]", "Dear name"),
    "verify_bullet_points": ({"N": 1}, "* a", "a"),
    "validate_title": ({}, "<<a>>", "a"),
    "validate_choice": ({"options": ["yes", "no"]}, "I say yes!", "yes or no"),
    "validate_highlighted_sections": ({"N": 1}, "a *b*", "a b"),
    "validate_sections": ({"N": 1, "section_splitter": "Part"}, "Part 1\na", "a"),
    "validate_json_format": ({}, "{}", "a"),
    "validate_repeat_prompt": ({"original_prompt": "Say a."}, "Say a. a", "a"),
    "validate_two_responses": ({}, "a\n******\nb", "a"),
    "validate_uppercase": ({}, "THE CAT", "the cat"),
    "validate_lowercase": ({}, "the cat", "The cat"),
    "validate_frequency_capital_words": ({"N": 1, "quantifier": "at least"}, "the USA", "the us"),
    "validate_end": ({"end_phrase": "The end."}, "So. The end.", "So."),
    "validate_quotation": ({}, '"a"', "a"),
    "validate_no_commas": ({}, "a b", "a, b"),
}


@pytest.mark.parametrize("name", sorted(RLVR))
def test_constraints_of_rlvr(name):
    """As in the mixture: the arguments of all functions, null for those that do not apply."""
    assert set(RLVR_ARGUMENTS) == set(RLVR)
    assert {instruction for instruction, _, _ in RLVR.values()} == set(INSTRUCTIONS)
    given, good, bad = RLVR_ARGUMENTS[name]
    others = {key for arguments, _, _ in RLVR_ARGUMENTS.values() for key in arguments}
    truth = {"func_name": name, **dict.fromkeys(others), **given}
    for form in (truth, json.dumps(truth)):
        assert ifeval([], [good, bad], ground_truth=[form, form]) == [1.0, 0.0]


def test_an_unknown_constraint_of_rlvr():
    with pytest.raises(RewardError, match=r"row 0 .*unknown constraint `validate_rhyme`; known are verify_keywords"):
        ifeval([], ["a"], ground_truth=['{"func_name": "validate_rhyme"}'])


@settings(max_examples=80, deadline=None)
@given(st.lists(st.sampled_from(["Cats", "sleep", "all", "day", "long"]), min_size=1), st.sampled_from(".!?"))
def test_sentences_and_words_add_up(parts, mark):
    sentence = "The " + " ".join(parts) + mark
    assert words(sentence) == ["The", *parts]
    assert sentences(sentence) == 1
    assert sentences(" ".join([sentence] * 5)) == 5
    assert sentences("\n\n".join([sentence] * 3)) == 3


def test_arguments_are_read_once_for_all_variants():
    check = check_of("length_constraints:number_words", {"relation": "at least", "num_words": 2.0})
    assert check("two words") and not check("one")


@pytest.mark.parametrize(
    "module",
    [
        reward.verifiers.ifeval,
        reward.verifiers.ifeval_checks,
        reward.verifiers.ifeval_rlvr,
        reward.verifiers.ifeval_text,
    ],
)
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 1
