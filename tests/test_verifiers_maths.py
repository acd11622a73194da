"""Mathematical answers: reading a completion, equality, limits, processes and threads, real data."""

import doctest
import gzip
import json
import logging
import multiprocessing
import os
import re
import signal
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import reward.verifiers.golds
import reward.verifiers.maths
from data.config import FileSource
from data.records import Message, Prompt
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError
from reward.verifiers import maths_process
from reward.verifiers.maths import math_equal, numeric_match
from reward.verifiers.maths_process import Comparer, Pair
from tests.row_sets import load

NUMBERS = [  # completion, its number; None where it has none
    ("The answer is 42.", "42"),
    ("so x=−7", "-7"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("a loss of -\\$1,250.50 in all", "-1250.50"),
    ("1{,}000 or 1\\,000", "1000"),
    ("1,\\!000,\\!000 people", "1000000"),
    ("1\u202f000 km", "1000"),
    ("5-3", "3"),
    ("pages 10-20", "20"),
    ("costs $5 and earns $10", "10"),
    ("an area of 5 m^2", "5"),
    ("5 m2, or 5 m^{-2}", "5"),
    ("two molecules of H2O", None),
    ("3 molecules of H2O", "3"),
    ("50%", "50"),
    ("**42**", "42"),
    ("3/4 of it", "0.75"),
    ("$-\\frac{3}{4}$", "-0.75"),
    ("\\dfrac12", "0.5"),
    ("1/0", None),
    ("2^10", None),
    ("1,2,3", "3"),
    ("12,34", "34"),
    ("1e3", "1000"),
    ("1e999999999999", None),
    (".5", "0.5"),
    ("3.14.", "3.14"),
    ("\\boxed{5} and then 7", "5"),
    ("\\boxed{5} or \\boxed{\\frac{1}{4}}", None),
    ("\\boxed{5}. No: \\boxed{\\frac{1}{4}}", "0.25"),
    ("\\boxed{5}\n#### 6", "6"),
    ("#### 6\nthat is \\boxed{5}", "5"),
    ("#### 1,200 dollars\n\nQuestion: what is 3?", "1200"),
    ("#### 2. The second step\nSo 72", "72"),
    ("\\boxed{12", "12"),
    ("<think>\\boxed{1}, 2</think><answer>3 apples</answer> of 4", "3"),
    ("</answer> 5 <answer>", "5"),
    ("\\boxed{none} of the 3", None),
    ("no idea", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), NUMBERS)
def test_the_number_is_read_from_a_completion(text, number):
    gold = "12345" if number is None else number
    assert numeric_match([], [text], answer=[gold]) == [float(number is not None)]
    assert numeric_match([], [text], answer=[f"{gold}1"]) == [0.0]


def test_a_tolerance_is_absolute():
    assert numeric_match([], ["3.14", "3.15", "-3.14"], answer=["3.1416"] * 3, tolerance=0.01) == [1.0, 1.0, 0.0]
    assert numeric_match([], ["0.3"], answer=[0.1 + 0.2]) == [0.0]
    assert numeric_match([], ["0.3"], answer=[0.1 + 0.2], tolerance=1e-9) == [1.0]
    assert numeric_match([], ["192000001"], answer=["192000000"]) == [0.0]


EQUAL = [
    ("0.5", "\\boxed{\\frac{1}{2}}"),
    ("\\frac{1}{3}", "It is $0.333333$"),
    ("x^2 - 1", "\\[(x-1)(x+1)\\]"),
    ("2\\sqrt{3}", "$$\\sqrt{12}$$"),
    ("\\{1, 2\\}", "\\boxed{\\{2, 1\\}}"),
    ("(1, 2)", "\\boxed{(1, 2)}"),
    ("[2, 5)", "\\boxed{[2,5)}"),
    ("5", "\\boxed{x = 5}"),
    ("60^\\circ", "\\boxed{60}"),
    ("1,\\!000,\\!000", "There are 1,000,000 of them."),
    ("\\text{(C)}", "\\boxed{C}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\boxed{\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}}"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\[ \\begin{pmatrix} 1 \\\\[2pt] 2 \\end{pmatrix} \\]"),
    ("So it is \\boxed{\\frac{3}{4}}.", "The answer is \\frac{3}{4}"),
    ("6 * 7 = 42\n#### 42", "\\(6 \\cdot 7 = 42\\)"),
    ("42", "costs \\$12 and \\$30, $42 in all"),
    ("$7$", "7"),
    ("\\frac{7}{2}", "\\boxed{3\\frac{1}{2}}"),
]
UNEQUAL = [
    ("\\frac{1}{3}", "It is 0.33"),
    ("(1, 2)", "\\boxed{(2, 1)}"),
    ("5", "\\boxed{\\{1, 2, 3, 4, 5\\}}"),
    ("5", "\\boxed{1, 2, 3, 4, 5}"),
    ("5", "\\boxed{5} or \\boxed{6}"),
    ("5", "It is 5, no, 6"),
    ("x", "\\boxed{y}"),
    ("3", "\\boxed{x \\le 3}"),
    ("3", "\\boxed{}"),
    ("3", ""),
    ("\\frac{1}{2}", "no idea"),
    ("0.5", "\\boxed{0.51}"),
    ("5", "\\boxed{\\text{five}}"),
    ("2", "\\boxed{\\frac{1}{0}}"),
    ("\\sqrt{2}", "\\boxed{{{{((("),
]


def test_equal_and_unequal():
    for pairs, value in ((EQUAL, 1.0), (UNEQUAL, 0.0)):
        gold, texts = zip(*pairs, strict=True)
        got = math_equal([], texts, answer=gold)
        assert [pair for pair, v in zip(pairs, got, strict=True) if v != value] == []


def test_equal_answers_of_a_group_are_compared_once(monkeypatch):
    asked = []
    compare = Comparer.compare
    monkeypatch.setattr(
        Comparer, "compare", lambda self, pairs, seconds: asked.extend(pairs) or compare(self, pairs, seconds)
    )
    assert math_equal([], ["\\boxed{x}"] * 5 + ["\\boxed{y}"], answer=["x"] * 6) == [1.0] * 5 + [0.0]
    assert asked == [Pair("x", "x"), Pair("x", "y")]
    asked.clear()
    assert math_equal([], ["5", "6"], answer=["5", "5"]) == [1.0, 0.0]
    assert asked == []


@settings(max_examples=150, deadline=None)
@given(st.text() | st.text(alphabet="0123456789.,/-+^$€%()[]{}\\ #=abefrcox\n", max_size=80))
def test_numbers_of_any_text(text):
    for answer in (text, f"\\boxed{{{text}}}", f"#### {text}"):
        values = numeric_match([], [answer, "7"], answer=["7", "7"])
        assert values[0] in (0.0, 1.0) and values[1] == 1.0


@settings(max_examples=60, deadline=None)
@given(st.text() | st.text(alphabet="0123456789.,/-+^$()[]{}\\ =abefrcoxqsin\n", max_size=40))
def test_formulas_of_any_text(text):
    for answer in (text, f"\\boxed{{{text}}}"):
        values = math_equal([], [answer, "$x$"], answer=["x + 1", "x"], time_limit=1.0)
        assert values[0] in (0.0, 1.0) and values[1] == 1.0


@settings(max_examples=100, deadline=None)
@given(st.integers(-(10**20), 10**20), st.sampled_from(["{:,}", "{}", "${:,}", "**{}**", "{} km", "is {}.", "#### {}"]))
def test_every_integer_is_found(number, form):
    text = "First 17 things, then " + form.format(number).replace("$-", "-$")
    assert numeric_match([], [text], answer=[str(number)]) == [1.0]
    assert math_equal([], [text], answer=[str(number)]) == [1.0]
    assert numeric_match([], [text], answer=[number + 1]) == [0.0]


HOSTILE = [
    "9^{9^{9^9}}",
    "10^{10^{10}}!",
    "1000000000!",
    "(x+1)^{100000}",
    "\\int_0^1 \\sin(\\cos(x^x)) dx",
    "\\sum_{n=1}^{\\infty} \\frac{1}{n^{2.5} + \\sin n}",
    "(" * 3000,
    "\\frac{1}{" * 300 + "1" + "}" * 300,
    "9" * 20000,
    "{" * 5000,
]


@pytest.mark.slow
def test_endless_computation_scores_zero(caplog):
    texts = ["\\boxed{" + text + "}" for text in HOSTILE] + ["\\boxed{\\sqrt{4}}"]
    with caplog.at_level(logging.WARNING):
        assert math_equal([], texts, answer=["\\sqrt{2} + 1"] * len(HOSTILE) + ["2"], time_limit=0.5) == [
            *[0.0] * len(HOSTILE),
            1.0,
        ]
    assert "comparisons were stopped after 0.5 s and score 0" in caplog.text


def test_a_process_that_dies_or_stops_is_started_again(monkeypatch):
    comparer = Comparer()
    assert comparer.compare([Pair("1/2", "0.5")], 5.0)[0].equal
    for end in (lambda p: p.kill(), lambda p: (p.kill(), p.wait())):
        end(comparer._process)
        verdicts = comparer.compare([Pair("1/2", "0.5"), Pair("1/2", "0.5")], 5.0)
        assert verdicts[1].equal
    monkeypatch.setattr(maths_process, "WALL_FACTOR", 0.01)
    os.kill(comparer._process.pid, 19)  # SIGSTOP: uses no processor time, never answers
    assert comparer.compare([Pair("1/2", "0.5")], 5.0)[0].late
    comparer.close()
    assert comparer._process is None


def test_signals_to_the_trainer_do_not_end_the_worker():
    """Slurm and terminals signal both processes, but the trainer still finishes its step."""
    comparer = Comparer()
    comparer.compare([Pair("1", "1")], 5.0)
    process = comparer._process
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        process.send_signal(signum)
    assert comparer.compare([Pair("1/2", "0.5")], 5.0)[0].equal
    assert comparer._process is process
    comparer.close()


def test_a_process_that_cannot_start_is_an_error(monkeypatch, tmp_path):
    (tmp_path / "maths_worker.py").write_text("raise ImportError('no module named math_verify')")
    monkeypatch.setattr(maths_process, "__file__", str(tmp_path / "maths_process.py"))
    with pytest.raises(RewardError, match=r"(?s)does not start: .*no module named math_verify"):
        Comparer().compare([Pair("1", "1")], 1.0)


def test_off_the_main_thread_and_from_many_threads():
    out = {}

    def work(i):
        out[i] = math_equal([], [f"\\boxed{{\\sqrt{{{i * i}}}}}", "\\boxed{x}"], answer=[str(i), "y"])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2, 8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert out == {i: [1.0, 0.0] for i in range(2, 8)}


def _in_a_child(queue):
    queue.put(math_equal([], ["\\boxed{\\sqrt{9}}"], answer=["3"]))


def test_in_a_forked_daemon_beside_the_parent():
    assert math_equal([], ["\\boxed{\\sqrt{4}}"], answer=["2"]) == [1.0]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(queue,), daemon=True)
    child.start()
    assert queue.get(timeout=120) == [1.0]
    child.join()
    assert math_equal([], ["\\boxed{\\sqrt{16}}"], answer=["4"]) == [1.0]


def test_the_process_ends_with_its_owner():
    comparer = Comparer()
    comparer.compare([Pair("1", "1")], 5.0)
    process = comparer._process
    process.stdin.close()  # as when the trainer is killed
    assert process.wait(timeout=60) == 0
    process.stdout.close()
    process.stderr.close()


@pytest.mark.parametrize("function", [numeric_match, math_equal])
def test_a_missing_column_is_an_error(function):
    prompts = [(Message("user", "a" * 200),), (Message("user", "How many?"),)]
    name = function.__name__
    with pytest.raises(
        RewardError, match=rf"`{name}` needs the gold answers in column `answer` or `ground_truth`; the "
    ):
        function(prompts, ["1", "2"])
    with pytest.raises(RewardError, match=r"in column `Answer`; the prompts have `answer`\. Rename yours, or name it"):
        function(prompts, ["1", "2"], column="Answer", answer=["1", "2"])


@pytest.mark.parametrize("function", [numeric_match, math_equal])
def test_gold_answers_that_cannot_be_read_get_no_score_and_are_named(function, caplog):
    prompts = [(Message("user", "a" * 200),), (Message("user", "How many?"),)]
    cases = [
        (["1", ["2"]], [1.0, None], r"row 1 of the batch \(prompt 'How many\?'\): column `answer` holds \["),
        (["1", "??"], [1.0, None], r"row 1 of the batch .*gold answer '\?\?'"),
        (["", "2"], [None, 1.0], rf"row 0 of the batch \(prompt '\.\.\.{'a' * 80}'\)"),
    ]
    for golds, scores, said in cases:
        caplog.clear()
        assert function(prompts, ["1", "2"], answer=golds) == scores
        assert re.search(rf"{function.__name__}: 1 rows get no score, for example {said}", caplog.text)


@pytest.mark.parametrize("function", [numeric_match, math_equal])
def test_rows_of_another_kind_score_none(function):
    constraint = '{"func_name": "validate_no_commas"}'
    columns = {"answer": ["5", None, None], "ground_truth": [None, constraint, "6"]}
    assert function([], ["5", "5", "5"], **columns) == [1.0, None, 0.0]
    assert function([], ["51", "x"], column="Answer", Answer=[51.0, None]) == [1.0, None]


def gsm8k(shared_data):
    with gzip.open(shared_data / "verifiable" / "gsm8k-train.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line)["answer"] for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize("function", [numeric_match, math_equal])
def test_gsm8k_gold_is_right_and_one_more_is_wrong(function, shared_data):
    golds = gsm8k(shared_data)
    assert len(golds) == 7473
    assert function([], golds, answer=golds) == [1.0] * 7473
    parts = [gold.rpartition("#### ") for gold in golds]
    wrong = [f"{steps}#### {int(final.replace(',', '')) + 1}" for steps, _, final in parts]
    assert function([], wrong, answer=golds) == [0.0] * 7473
    for form in ("{}The answer is {}.", "{}It is ${}$", "{}\\boxed{{{}}}", "{}So ${} in all"):
        texts = [form.format(steps, final) for steps, _, final in parts]
        assert function([], texts, answer=golds) == [1.0] * 7473


@pytest.mark.parametrize("function", [numeric_match, math_equal])
def test_svamp_gold_is_right_and_one_more_is_wrong(function, shared_data):
    with gzip.open(shared_data / "verifiable" / "svamp.json.gz", "rt", encoding="utf-8") as file:
        rows = json.load(file)
    golds = [row["Answer"] for row in rows]
    assert len(golds) == 1000
    texts = [f"{row['Body']} {row['Question']}\n{gold:.0f} of them." for row, gold in zip(rows, golds, strict=True)]
    assert function([], texts, column="Answer", Answer=golds) == [1.0] * 1000
    wrong = [f"The answer is {gold + 1:.0f}" for gold in golds]
    assert function([], wrong, column="Answer", Answer=golds) == [0.0] * 1000


def test_rlvr_golds_equal_themselves(shared_data):
    with gzip.open(shared_data / "verifiable" / "rlvr-sample.jsonl.gz", "rt", encoding="utf-8") as lines:
        golds = [json.loads(line)["ground_truth"] for line in lines]
    assert len(golds) == 100
    for form in ("Thus \\boxed{{{}}}.", "The answer is ${}$."):
        assert math_equal([], [form.format(gold) for gold in golds], ground_truth=golds) == [1.0] * 100
    terms = [gold for gold in golds if "," not in gold]  # 1 cannot be added to a tuple
    others = ["\\boxed{" + gold + " + 1}" for gold in terms]
    assert math_equal([], others, ground_truth=terms) == [0.0] * len(terms)


def test_by_a_recipe_from_file_to_score(shared_data):
    source = FileSource(source="file", path="verifiable/gsm8k-train.jsonl.gz", limit=4)
    prompts = load([source], Prompt, shared_data, 0).records
    texts = [f"So it is {prompt.columns['answer']}." for prompt in prompts[:3]] + ["No idea."]
    answers = Answers(
        prompts=[prompt.messages for prompt in prompts],
        prompt_ids=[[1]] * 4,
        texts=texts,
        ids=[[1]] * 4,
        stopped=[True] * 4,
        columns=[prompt.columns for prompt in prompts],
    )
    entries = [RewardConfig(function="math_equal"), RewardConfig(function="numeric_match", args={"tolerance": 0.1})]
    scores = Composition(entries, {})(answers)
    assert scores.parts == {"math_equal": [1.0, 1.0, 1.0, 0.0], "numeric_match": [1.0, 1.0, 1.0, 0.0]}
    assert scores.total == [2.0, 2.0, 2.0, 0.0]


@pytest.mark.parametrize("module", [reward.verifiers.maths, reward.verifiers.golds])
def test_the_examples_in_docstrings(module):
    result = doctest.testmod(module)
    assert result.failed == 0 and result.attempted >= 2
