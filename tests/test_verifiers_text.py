"""Choices, patterns, tags and JSON: right and wrong forms, hostile text, bad arguments; all found by name."""

import doctest
import json
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward.verifiers.json_schema
import reward.verifiers.text
from data.records import Message
from reward.functions import FUNCTIONS, RewardError, find
from reward.verifiers.json_schema import json_schema
from reward.verifiers.text import multiple_choice, regex_format, xml_format

TAGS = ["think", "answer"]
CHOOSES_B = [
    "B",
    "(B)",
    "[B]",
    "B.",
    "B) Paris",
    "B: Paris",
    "**B**",
    "$B$",
    "The answer is B",
    "The answer is (B).",
    "The correct answer is: **B**, because Paris is the capital.",
    "Answer:\n\nB",
    "Final Answer: option (B)",
    "The answer is B. A dog barks.",
    "The answer is A. Wait, that is wrong. The answer is B.",
    "A. London\nB. Paris\nThe answer is B",
    "First, London is no choice here.\n\\boxed{\\text{(B)}}",
    "\\boxed{A}, no: \\boxed{B}",
    "I choose B because (A) is wrong.",
    "I'd go with option B",
    "not (A) but (B)",
    "B is the correct choice",
    "(A) was wrong; (B)",
    "<think>(A) or (B)? (C)?</think>\n<answer>B</answer>",
]
CHOOSES_NOT_B = [
    "",
    "b",
    "A",
    "A, B, C, D",
    "(A) (B)",
    "A. London\nB. Paris",
    "The answer is A or B",
    "The answer is B, C",
    "The answer is B and C.",
    "The answer is A B C D",
    "Answer: A/B",
    "The answer is not B.",
    "It cannot be (B)",
    "(B) is wrong",
    "\\boxed{A, B}",
    "\\boxed{}",
    "Big Ben",
    "The answer is Brussels",
    "The answer is B's brother",
    "The answer is B. The answer is C.",
]


def test_multiple_choice():
    for texts, value in ((CHOOSES_B, 1.0), (CHOOSES_NOT_B, 0.0)):
        got = multiple_choice([], texts, answer=["B"] * len(texts))
        assert [text for text, v in zip(texts, got, strict=True) if v != value] == []


def test_multiple_choice_reads_golds_as_they_are_published(caplog):
    golds = ["b", "(B)", "B.", "\\text{(B)}", " B ", None]
    assert multiple_choice([], ["B"] * 6, ground_truth=golds) == [1.0] * 5 + [None]
    prompts = [(Message("user", "Which?"),)]
    for gold in ("K", 1, "Paris", "A, B", ""):
        caplog.clear()
        assert multiple_choice(prompts, ["B"], ground_truth=[gold]) == [None]
        assert "multiple_choice: 1 rows get no score, for example row 0 " in caplog.text
        assert "is not one of the letters ABCDEFGHIJ; give its letter" in caplog.text
    assert multiple_choice([], ["E"], answer=["E"], letters="ABCDE") == [1.0]
    assert multiple_choice([], ["The answer is E"], answer=["A"], letters="ABCD") == [0.0]
    with pytest.raises(RewardError, match="`letters: abc`; give the capital letters"):
        multiple_choice([], ["B"], answer=["B"], letters="abc")


def test_regex_format():
    assert regex_format([], ["a1", "xa1"], pattern=r"a\d") == [1.0, 0.0]
    assert regex_format([], ["a\nb", "a\nb"], pattern=r"(?s)a.b") == [1.0, 1.0]
    assert regex_format([], ["a\nb", "xx a\nb"], pattern=r"a.b", match="search") == [0.0, 0.0]
    with pytest.raises(RewardError, match=r"`pattern: \(` is not a regular expression: missing \)"):
        regex_format([], ["a"], pattern="(")
    with pytest.raises(RewardError, match="`match: all` is neither `full` nor `search`"):
        regex_format([], ["a"], pattern="a", match="all")


def test_catastrophic_backtracking_scores_zero(caplog, monkeypatch):
    monkeypatch.setattr(reward.verifiers.text, "PATTERN_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING):
        hostile = "ab" * 4000 + "c"
        assert regex_format([], [hostile, "ab"], pattern=r"(?:a|b|ab)*(?:a|b|ab)*(?:a|b|ab)*d|ab") == [0.0, 1.0]
    assert "1 of 2 completions the pattern took over 0.1 s" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "<answer>b</answer><think>a</think>",
        "<think>a<answer>b</answer></think>",
        "<think>a</think><answer>b</answer><answer>c</answer>",
        "<think>a</think><think>a</think><answer>b</answer>",
        "<think>a</think><answer> \n</answer>",
        "<think></think><answer>b</answer>",
        "<think>a</think>",
        "<think>a</think><answer>b",
        "<think>a<answer>b</answer>",
        "</think>a<think><answer>b</answer>",
        "<think>a</think><answer>b</answer> so b",
        "Well: <think>a</think><answer>b</answer>",
        "<think>a</think> so <answer>b</answer>",
        "<Think>a</Think><answer>b</answer>",
        "",
    ],
)
def test_tags_that_are_not_in_form(text):
    assert xml_format([], [text], tags=TAGS) == [0.0]


def test_tags_in_form():
    assert xml_format([], [" <think>a\n< b</think>\n<answer>\nb</answer>\n"], tags=TAGS) == [1.0]
    outside = ["So <think>a</think> then <answer>b</answer>!", "<think>a</think>", "a </think> b"]
    assert xml_format([], outside, tags=TAGS, text_outside=True) == [1.0, 0.0, 0.0]
    assert xml_format([], outside, tags=["think"], text_outside=True) == [1.0, 1.0, 0.0]
    assert xml_format([], ["<c>1</c><b>2</b><a>3</a>", "<a>3</a><b>2</b><c>1</c>"], tags=["c", "b", "a"]) == [1.0, 0.0]


@pytest.mark.parametrize("tags", [[], "think", ["a b"], ["<think>"], ["a", "a"], [["a"], ["b"]]])
def test_invalid_tags_are_refused(tags):
    with pytest.raises(RewardError, match="`xml_format`: `tags:"):
        xml_format([], ["a"], tags=tags)


PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": "^[A-Z]"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"name": "Ann", "age": 3}', 1.0),
        (' \n{"name": "Ann"}\n', 1.0),
        ('```json\n{"name": "Ann"}\n```', 1.0),
        ('```\n{\n  "name": "Ann"\n}\n```\n', 1.0),
        ('{"name": "ann"}', 0.0),
        ('{"name": "Ann", "age": -1}', 0.0),
        ('{"name": "Ann", "age": 3.5}', 0.0),
        ('{"name": "Ann", "age": true}', 0.0),
        ('{"name": "Ann", "x": 1}', 0.0),
        ('{"age": 3}', 0.0),
        ('{"name": "Ann", "name": "Bob"}', 0.0),
        ("{'name': 'Ann'}", 0.0),
        ('{"name": "Ann",}', 0.0),
        ('{"name": "Ann"} // done', 0.0),
        ('Here: {"name": "Ann"}', 0.0),
        ('Here:\n```json\n{"name": "Ann"}\n```', 0.0),
        ('```json\n{"name": "Ann"}\n```\n```json\n{"name": "Ann"}\n```', 0.0),
        ('```json\n{"name": "Ann"}', 0.0),
        ('{"name": "Ann"}{"name": "Ann"}', 0.0),
        ('{"name": "Ann", "age": NaN}', 0.0),
        ('{"name": "Ann", "age": 1e999}', 0.0),
        ('{"name": "Ann", "age": ' + "9" * 6000 + "}", 0.0),
        ("[" * 100000, 0.0),
        ("[]", 0.0),
        ("", 0.0),
    ],
)
def test_json_of_a_schema(text, value):
    assert json_schema([], [text], schema=PERSON) == [value]


def test_schemas_by_row_and_as_text():
    schemas = [{"type": "integer"}, json.dumps({"type": "string"}), None]
    assert json_schema([], ["1", "1", "1"], schema=schemas) == [1.0, 0.0, None]
    assert json_schema([], ["1", "1", "1"], column="form", form=schemas) == [1.0, 0.0, None]
    assert json_schema([], ["1", "x"], schema='{"const": 1}') == [1.0, 0.0]
    old = {"$schema": "http://json-schema.org/draft-04/schema#", "maximum": 5, "exclusiveMaximum": True}
    assert json_schema([], ["4", "5"], schema=old) == [1.0, 0.0]


def test_hostile_json(monkeypatch):
    monkeypatch.setattr(reward.verifiers.json_schema, "PATTERN_SECONDS", 0.1)
    tree = {"$defs": {"t": {"type": "array", "items": {"$ref": "#/$defs/t"}}}, "$ref": "#/$defs/t"}
    assert json_schema([], ["[" * 900 + "]" * 900, "[[]]"], schema=tree) == [0.0, 1.0]
    assert json_schema([], ["9" * 4000, "1.5", "1.6"], schema={"multipleOf": 0.5}) == [0.0, 1.0, 0.0]
    slow = {"pattern": r"(?:a|b|ab)*(?:a|b|ab)*(?:a|b|ab)*d"}
    assert json_schema([], [json.dumps("ab" * 4000 + "c"), '"abd"'], schema=slow) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "integre"}, r"the schema cannot be used: 'integre' is not valid"),
        ("{type: object}", r"the schema cannot be used: Expecting property name"),
        (5, r"the schema cannot be used: 5 is not an object"),
        ({"$ref": "https://example.com/schema.json"}, r"the schema cannot be used: .*example\.com"),
        ({"pattern": "("}, r"the schema cannot be used: "),
    ],
)
def test_an_invalid_schema_names_the_row(schema, message):
    prompts = [(Message("user", "Fill it in."),)]
    with pytest.raises(RewardError, match=r"`json_schema`, row 0 of the batch \(prompt 'Fill it in\.'\): " + message):
        json_schema(prompts, ['"text"'], schema=schema)


def test_no_schema_and_a_list_of_them():
    with pytest.raises(RewardError, match=r"needs a schema: .*or add a column `schema` to the prompts"):
        json_schema([], ["1"])
    with pytest.raises(RewardError, match=r"`schema` in `args:` is a list"):
        json_schema([], ["1"], schema=[{"type": "integer"}] * 2)


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet='AB()[].:,*" \n<>/think{}0129eE-tfn', max_size=60))
def test_no_text_raises(text):
    answers = [text, f"The answer is {text}", f"<think>{text}</think><answer>{text}</answer>", f'{{"n": {text}}}']
    for values in (
        multiple_choice([], answers, answer=["B"] * 4),
        regex_format([], answers, pattern=r"(?s)<(\w+)>.*</\1>.*", match="search"),
        xml_format([], answers, tags=TAGS),
        xml_format([], answers, tags=TAGS, text_outside=True),
        json_schema([], answers, schema=PERSON),
        json_schema([], answers, schema={"properties": {"n": {"multipleOf": 0.1, "uniqueItems": True}}}),
    ):
        assert len(values) == 4 and set(values) <= {0.0, 1.0}


@settings(max_examples=100, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(), lambda v: st.lists(v) | st.dictionaries(st.text(), v), max_leaves=10))  # fmt: skip
def test_every_json_value_equals_itself(value):
    text = json.dumps(value)
    assert json_schema([], [text, f"```json\n{text}\n```", text + "]"], schema={"const": value}) == [1.0, 1.0, 0.0]


def test_every_verifier_is_found_by_name():
    names = [name for name, place in FUNCTIONS.items() if place.startswith("reward.verifiers.")]
    assert {"math_equal", "numeric_match", "multiple_choice", "regex_format", "xml_format", "json_schema"} < set(names)
    for name in names:
        assert find("a reward", name, {}).function.__name__ == name


@pytest.mark.parametrize("module", [reward.verifiers.text, reward.verifiers.json_schema])
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 2
