"""`code_tests`: the program in an answer, the columns with tests, and the solutions of real data sets."""

import doctest
import gzip
import json
from pathlib import Path

import pytest

import reward.code
from data.config import FileSource
from data.records import Message, Prompt
from reward.code import code_tests, extract
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError
from tests.row_sets import load

PROMPT = (Message("user", "Write f, which adds one."),)
BEGINNING = 'def f(n: int) -> int:\n    """n and one more"""\n'
CHECK = "def check(candidate):\n    assert candidate(1) == 2\n    assert candidate(5) == 6\n"

EXTRACTED = {
    "the last fence": ("```python\na\n```\nor\n```python\nb\n```\nso.", "b\n"),
    "a fence with another mark": ("```py\na\n```\n```json\n{}\n```", "a\n"),
    "an unmarked one": ("```\na\n```\nand\n```sh\nls\n```", "a\n"),
    "Python before unmarked": ("```python\na\n```\n```\noutput\n```", "a\n"),
    "one not closed": ("Sure:\n```python\na\nb", "a\nb"),
    "indented in a list": ("1. so\n   ```python\n   def f():\n       return 1\n   ```", "def f():\n    return 1\n"),
    "marks with attributes": ("```python title=x\na\n```", "a\n"),
    "no fence": ("a = 1", "a = 1"),
    "only other languages": ("```rust\nfn\n```", "```rust\nfn\n```"),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("name", EXTRACTED)
def test_the_program_of_an_answer(name):
    answer, program = EXTRACTED[name]
    assert extract(answer) == program


def test_the_examples_in_docstrings():
    done = doctest.testmod(reward.code)
    assert done.failed == 0 and done.attempted >= 2


COMPLETIONS = {
    "a body": "    return n + 1\n",
    "a body without its first indent": "return n + 1",
    "a body of two lines without its first indent": "m = n + 1\n    return m",
    "a body without any indent": "m = n + 1\nreturn m",
    "a body in a fence": "```python\n    return n + 1\n```",
    "a body with a fence in prose": "The body:\n```python\nm = n + 1\nreturn m\n```\n",
    "all of it": "def f(n):\n    return n + 1",
    "all of it in a fence": f"Here:\n```python\n{BEGINNING}    return n + 1\n```\nIt adds.",
    "all of it with a helper of the beginning": "```python\ndef f(n):\n    return one() + n\n```",
    "a body and more": "    return n + 1\n\ndef g():\n    return f(2)\n",
}


@pytest.mark.parametrize("where", ["message", "fenced", "column"])
def test_ways_to_complete_a_function(where):
    beginning = "def one():\n    return 1\n\n" + BEGINNING
    said = {"message": beginning, "fenced": f"Complete it:\n```python\n{beginning}```", "column": "Complete f."}[where]
    columns = {"test": [CHECK], "entry_point": ["f"]} | ({"prompt": [beginning]} if where == "column" else {})
    repeated = {name: column * len(COMPLETIONS) for name, column in columns.items()}
    prompts = [(Message("user", said),)] * len(COMPLETIONS)
    values = code_tests(prompts, list(COMPLETIONS.values()), **repeated)
    assert dict(zip(COMPLETIONS, values, strict=True)) == dict.fromkeys(COMPLETIONS, 1.0)


def test_value_is_all_or_the_share():
    answers = ["def f(n): return n + 1", "def f(n): return 2 * n", "def f(n): return 0", "no", "def f(n): return 1 / 0"]
    tests = [["assert f(1) == 2", "assert f(0) == 1", "assert f(5) == 6", "assert f(2) == 3"]] * len(answers)
    prompts = [PROMPT] * len(answers)
    assert code_tests(prompts, answers, test_list=tests) == [1.0, 0.0, 0.0, 0.0, 0.0]
    share = code_tests(prompts, answers, test_list=tests, credit="fraction")
    assert share == [1.0, 0.25, 0.0, 0.0, 0.0]
    script = ["\n".join(tests[0])] * len(answers)
    assert code_tests(prompts, answers, tests=script, credit="fraction") == share
    checks = {"test": [CHECK] * len(answers), "entry_point": ["f"] * len(answers)}
    assert code_tests(prompts, answers, **checks, credit="fraction") == [1.0, 0.5, 0.0, 0.0, 0.0]


def test_rows_of_other_data_score_none():
    values = code_tests(
        [PROMPT] * 3, ["x = 1", "def f(n): return n + 1", "y"], test_list=[None, ["assert f(1) == 2"], None]
    )
    assert values == [None, 1.0, None]
    assert code_tests([], [], tests=[]) == []


def test_a_composition_passes_the_columns():
    answers = Answers(
        prompts=[PROMPT, PROMPT],
        prompt_ids=[[1], [1]],
        texts=["def f(n): return n + 1", "42"],
        ids=[[1], [1]],
        stopped=[True, True],
        columns=[{"tests": "assert f(1) == 2", "family": "code"}, {"answer": "42"}],
    )
    entries = [
        RewardConfig(function="code_tests", args={"timeout": 2, "credit": "fraction"}),
        RewardConfig(function="exact_match"),
    ]
    scores = Composition(entries, {})(answers)
    assert scores.parts == {"code_tests": [1.0, None], "exact_match": [None, 1.0]}


BAD = {
    "no column": ({}, "has no column with tests; it needs `tests`, or `test_list`"),
    "two columns": (
        {"tests": ["assert 1"], "test_list": [["assert 1"]]},
        "row 0 .* has tests in `tests` and `test_list`",
    ),
    "no entry point": ({"test": [CHECK]}, "row 0 .*Write f.*: `test` needs `entry_point`"),
    "an entry point that is none": ({"test": [CHECK], "entry_point": ["f()"]}, r"got 'f\(\)'"),
    "a list of numbers": ({"test_list": [[1]]}, r"`test_list` is \[1\]; expected a list of Python statements"),
    "an empty list": ({"test_list": [[]]}, r"`test_list` is \[\]"),
    "text as a list": ({"test_list": ["assert f(1)"]}, "expected a list of Python statements"),
    "a number": ({"tests": [3]}, "`tests` is 3; expected Python text or a list of statements"),
    "setup that is no text": (
        {"tests": ["assert f(1)"], "test_setup_code": [["x"]]},
        "`test_setup_code` is .*expected text",
    ),
    "tests that are not valid Python": (
        {"tests": ["assert f("]},
        "row 0 .*the tests or their setup are not valid Python",
    ),
    "tests that test nothing": ({"test_list": [["f(1)"]]}, "row 0 .*the tests contain no assert"),
    "tests of objects": ({"tests": ["class A: pass\nassert f(A())"]}, "define the class in `test_setup_code`"),
    "a fraction of a second": (
        {"tests": ["assert f(1)"], "timeout": 0.5},
        "`timeout` is 0.5; give a whole number from 1",
    ),
    "no memory": ({"tests": ["assert f(1)"], "memory_mb": 1}, "`memory_mb` is 1; give a whole number from 64"),
    "no workers": ({"tests": ["assert f(1)"], "workers": 0}, "`workers` is 0"),
    "another credit": ({"tests": ["assert f(1)"], "credit": "some"}, "`credit` is 'some'; use all or fraction"),
    "an unknown protection": ({"tests": ["assert f(1)"], "require": ["disk"]}, "`require` names 'disk'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_by_name(name):
    given, message = BAD[name]
    with pytest.raises(RewardError, match=message):
        code_tests([PROMPT], ["def f(n): return n + 1"], **given)


MEGABYTES = "def f(n): return 'é' * 900_000\ndef g(*a): return 1"  # JSON writes the character in six bytes
ENDS_NOTHING = {
    "values too large to send back": (MEGABYTES, "assert g(f(1)) == 1\nassert g(f(1), f(2)) == 2", 1 / 2),
    "a global value too large to send back": (f"N = 'a' * 5_000_000\n{MEGABYTES}", "assert g(N, N) == 1", 0.0),
    "a callback's result too large to send": ("def f(n): return n('x' * 5_000_000)", "assert f(lambda s: s * 2)", 0.0),
    "a value that picks an object of the tests": (
        "def f(n): return None",
        "class A: pass\nassert f(f(1) or A()) == 1",
        0.0,
    ),
    "an exception that is passed on": (
        "def f(n): raise ValueError",
        "try: f(1)\nexcept ValueError as e: error = e\nassert f(error) == 1",
        0.0,
    ),
    "a helper that fails thousands of times": (
        "def f(n): return '\\N{GRINNING FACE}' * 400",
        "def check(n):\n    assert f(n) == 1, f(n)\nfor n in range(3000): check(n)",
        0.0,
    ),
    "a program that is too large": (f"x = '{'a' * (9 << 20)}'\ndef f(n): return 1", "assert f(1) == 1", 0.0),
}


@pytest.mark.parametrize("name", ENDS_NOTHING)
def test_no_program_ends_the_training(name):
    program, tests, share = ENDS_NOTHING[name]
    assert code_tests([PROMPT], [program], tests=[tests], credit="fraction") == [share]


def test_values_that_could_not_be_sent_are_said(caplog):
    program, tests, _ = ENDS_NOTHING["a value that picks an object of the tests"]
    code_tests([PROMPT] * 2, ["def f(n): return 1", program], tests=[tests, tests])
    assert "code_tests: 1 programs failed" in caplog.text and "in row 1 ('Write f" in caplog.text
    assert "mend its tests" in caplog.text


def test_many_asserts_that_fail_are_all_counted():
    tests = "\n".join(f"assert f({n}) == {n // 2}, 'x' * 400" for n in range(1500))
    assert code_tests([PROMPT], ["def f(n): return n // 2 + n % 2"], tests=[tests], credit="fraction") == [0.5]


def rows(shared_data: Path, name: str) -> list[dict]:
    with gzip.open(shared_data / "verifiable" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


WRONG = """
def _other(x):
    if isinstance(x, bool) or x is None: return not x
    if isinstance(x, (int, float)): return x + 1
    if isinstance(x, str): return x + "x"
    if isinstance(x, (list, tuple)): return type(x)([*x, 0])
    if isinstance(x, dict): return {**x, "x": 0}
    return None
_right = NAME
def NAME(*args): return _other(_right(*args))
"""


@pytest.mark.slow
def test_every_solution_of_humaneval_passes_and_every_altered_one_fails(shared_data):
    prompts = load(
        [FileSource(source="file", path="verifiable/humaneval.jsonl.gz")], Prompt, shared_data, seed=0
    ).records  # as a recipe reads it: `prompt` is the user's turn, the others are columns
    columns = {name: [p.columns[name] for p in prompts] for name in ("test", "entry_point", "canonical_solution")}
    solutions, turns = columns.pop("canonical_solution"), [p.messages for p in prompts]
    assert len(prompts) == 164
    assert code_tests(turns, solutions, **columns) == [1.0] * 164
    whole = [f"Sure!\n```python\n{turn[-1].content}{text}```\n" for turn, text in zip(turns, solutions, strict=True)]
    assert code_tests(turns, whole, **columns, credit="fraction") == [1.0] * 164
    altered = [
        f"```python\n{turn[-1].content}{text}\n{WRONG.replace('NAME', name)}```"
        for turn, text, name in zip(turns, solutions, columns["entry_point"], strict=True)
    ]
    assert code_tests(turns, altered, **columns) == [0.0] * 164
    assert code_tests(turns, ["    pass\n"] * 164, **columns) == [0.0] * 164


@pytest.mark.slow
def test_the_solutions_of_mbpp_pass(shared_data):
    data = rows(shared_data, "mbpp")
    columns = {name: [row[name] for row in data] for name in ("test_list", "test_setup_code")}
    turns = [(Message("user", row["text"]),) for row in data]
    values = code_tests(turns, [f"```python\n{row['code']}\n```" for row in data], **columns)
    failed = [row["task_id"] for row, value in zip(data, values, strict=True) if value != 1.0]
    assert len(data) == 974 and failed == []
