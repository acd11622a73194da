"""Gold answers that no reward can read are found before the first answer is sampled; accents have two equal forms."""

import pytest

from reward.config import RewardConfig
from reward.functions import FUNCTIONS, RewardError, exact_match
from reward.golds_check import CHECKS, has_checks, unreadable
from reward.verifiers.ifeval import ifeval
from reward.verifiers.json_schema import json_schema
from reward.verifiers.maths import math_equal
from reward.verifiers.text import regex_format, xml_format

COMPOSED, APART = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"


def entry(function: str, **args) -> RewardConfig:
    return RewardConfig(function=function, args=args)


CASES = {
    "math_equal": (
        [{"answer": "\\frac{1}{2}"}, {"answer": "??"}, {"answer": None}],
        {},
        "neither a formula nor a word",
    ),
    "numeric_match": (
        [{"ground_truth": 4}, {"ground_truth": "four"}],
        {},
        "no single number in the gold answer 'four'",
    ),
    "regex_extract": ([{"answer": "4"}, {"answer": ["4"]}], {"pattern": "(.*)"}, "a gold answer is text or a number"),
    "multiple_choice": ([{"key": "B"}, {"key": 1}], {"column": "key"}, "not one of the letters"),
    "exact_match": ([{"answer": 4}, {"answer": ["4"]}], {}, r"holds \['4'\]; `exact_match` needs text or a number"),
    "json_schema": ([{"schema": {"type": "object"}}, {"schema": {"type": "thing"}}], {}, "the schema cannot be used"),
    "ifeval": (
        [
            {"instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
            {"instruction_id_list": ["punctuation:no_coma"], "kwargs": [{}]},
        ],
        {},
        "unknown instruction `punctuation:no_coma`; did you mean",
    ),
    "code_tests": ([{"tests": "assert f(1)"}, {"tests": "assert f("}], {"timeout": 2}, "not valid Python"),
}


@pytest.mark.parametrize("function", CASES)
def test_rows_that_a_function_cannot_read_are_found_without_an_answer(function):
    rows, args, why = CASES[function]
    names = {name for row in rows for name in row}
    found = unreadable([entry(function, **args)], names, rows)
    assert list(found) == [1] and found[1][0] == function
    assert unreadable([entry(function, **args)], names, rows[:1]) == {}
    with pytest.raises(RewardError, match=f"reward `{function}` can read the gold answer of no prompt; .*{why}"):
        unreadable([entry(function, **args)], names, rows[1:2])


def test_every_check_belongs_to_a_function_and_others_need_none():
    assert set(CHECKS) == set(CASES) and set(CHECKS) <= set(FUNCTIONS)
    assert not has_checks([entry("length_penalty"), RewardConfig(model="reward")])
    assert unreadable([entry("length_penalty")], {"answer"}, [{"answer": "??"}]) == {}


def test_a_missing_column_is_an_error_before_an_answer_is_sampled():
    with pytest.raises(RewardError, match="`math_equal` needs the gold answers in column `answer`"):
        unreadable([entry("math_equal")], {"solution"}, [{"solution": "1"}])


def test_accents_in_one_character_or_two_are_equal():
    for gold, given in ((COMPOSED, APART), (APART, COMPOSED)):
        assert exact_match([], [given], answer=[gold]) == [1.0]
        assert math_equal([], [f"\\boxed{{\\text{{{given}}}}}"], answer=[gold]) == [1.0]
        assert regex_format([], [given], pattern=f"{gold}") == [1.0]
        assert xml_format([], [f"<{given}>x</{given}>"], tags=[gold]) == [1.0]
        assert json_schema([], [f'{{"{given}": 1}}'], schema={"required": [gold], "type": "object"}) == [1.0]
        asked = {"instruction_id_list": [["keywords:existence"]], "kwargs": [[{"keywords": [gold]}]]}
        assert ifeval([], [f"A {given} there."], **asked) == [1.0]
    assert exact_match([], ["cafe"], answer=[COMPOSED]) == [0.0]


def test_exact_match_reads_numbers():
    assert exact_match([], ["4", "4.5", "5", "x"], answer=[4, 4.5, 4, ["x"]]) == [1.0, 1.0, 0.0, None]
