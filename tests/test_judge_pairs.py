"""Pairwise judging: both orders, ties, a position-biased judge; also on real preference data."""

import pytest

from data.config import FileSource
from data.records import Message, Preference
from reward.functions import RewardError
from reward.judge import judge, judge_statistics, reset_judge_statistics
from tests.judge_server import chat, failed, pieces, preferred, serve
from tests.row_sets import load

PROMPT = (Message("user", "Say something."),)
REAL = [
    "preference/instructions-with-preference-1100.json.gz",
    "preference/hh-rlhf-harmless-1800.jsonl.gz",
    "preference/messages-preference-sample.jsonl.gz",
]


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_judge_statistics()


def ask(url, answers, prompts=None, **options):
    options = {"model": "judge-1", "mode": "pairwise", "backoff": 0.0, **options}
    return judge(prompts or [PROMPT] * len(answers), answers, base_url=url, **options)


def counted():
    ((_, sums),) = judge_statistics().items()
    return tuple(int(sums[name]) for name in ("pairs", "disagreements", "chose_first", "chose_second"))


def longer(body, margin=0):
    """Prefers the longer answer, or the first one if the difference is within the margin."""
    seen = pieces(body)
    difference = len(seen["answer-a"]) - len(seen["answer-b"])
    if margin and abs(difference) <= margin:
        return preferred("A")
    return preferred("tie" if difference == 0 else "A" if difference > 0 else "B")


def test_both_orders_are_asked_and_agree():
    with serve(longer) as (server, url):
        assert ask(url, ["long", "s", "same"], answer=["ab", "ab", "four"]) == [1.0, 0.0, 0.5]
    shown = sorted((pieces(body)["answer-a"], pieces(body)["answer-b"]) for body in server.bodies)
    assert shown == [("ab", "long"), ("ab", "s"), ("four", "same"), ("long", "ab"), ("s", "ab"), ("same", "four")]
    assert counted() == (3, 0, 2, 2)


@pytest.mark.parametrize(
    ("answer_first", "reference_first", "value", "disagree"),
    [
        ("A", "B", 1.0, 0),
        ("B", "A", 0.0, 0),
        ("tie", "tie", 0.5, 0),
        ("A", "A", 0.5, 1),
        ("B", "B", 0.5, 1),
        ("A", "tie", 0.5, 1),
        ("tie", "A", 0.5, 1),
    ],
)
def test_disagreement_between_orders_is_a_tie(answer_first, reference_first, value, disagree):
    def answer(body):
        return preferred(answer_first if pieces(body)["answer-a"] == "mine" else reference_first)

    with serve(answer) as (_, url):
        assert ask(url, ["mine"], gold=["theirs"], reference_column="gold") == [value]
    assert counted()[:2] == (1, disagree)


def test_a_position_biased_judge_gives_ties_and_a_warning(caplog):
    with serve(lambda body: preferred("A")) as (_, url):
        assert ask(url, [f"answer {i}" for i in range(8)], answer=["other"] * 8) == [0.5] * 8
    assert counted() == (8, 8, 16, 0)
    assert "`judge-1` disagreed with itself on 8 of 8 pairs" in caplog.text
    assert "it chose the first 16 times, the second 0 times" in caplog.text


def test_one_order_without_a_verdict_scores_none():
    def answer(body):
        return chat("Hm.") if pieces(body)["answer-b"] == "mine" else preferred("A")

    with serve(answer) as (_, url):
        assert ask(url, ["mine", "other"], answer=["theirs", "x"], max_failure_fraction=0.5) == [None, 0.5]
        ((_, sums),) = judge_statistics().items()
        assert (sums["rows"], sums["rows_without_verdict"], sums["questions"], sums["nonsense"]) == (2, 1, 4, 1)
        assert counted() == (1, 1, 2, 0)


def test_rows_count_once_against_the_fraction_though_both_orders_fail():
    def answer(body):
        return failed(500) if "bad" in pieces(body).values() else longer(body)

    with serve(answer) as (_, url):
        answers, others = ["bad", "bb", "cc", "dd", "ee"], ["a"] * 5
        assert ask(url, answers, answer=others, retries=0) == [None, 1.0, 1.0, 1.0, 1.0]
        with pytest.raises(RewardError, match="1 of 5 rows without a verdict, 0 allowed"):
            ask(url, answers, answer=others, retries=0, max_failure_fraction=0.0)


def test_an_answer_equal_to_its_reference_is_one_question():
    with serve(lambda body: preferred("A")) as (server, url):
        assert ask(url, ["same"], answer=["same"]) == [0.5]
    assert len(server.bodies) == 1


@pytest.mark.parametrize("path", REAL)
def test_the_win_rate_on_real_pairs_follows_the_lengths(path, shared_data, tmp_path):
    source = FileSource(source="file", path=path, limit=60)
    pairs = load([source], Preference, shared_data, 0).records
    assert len(pairs) == 60
    answers, references = [pair.chosen for pair in pairs], [pair.rejected for pair in pairs]
    prompts = [pair.prompt for pair in pairs]
    differences = [len(a) - len(b) for a, b in zip(answers, references, strict=True)]
    expected = [0.5 if d == 0 else float(d > 0) for d in differences]
    assert {0.0, 1.0} <= set(expected)
    with serve(longer) as (_, url):
        assert ask(url, answers, prompts, answer=references, concurrency=4) == expected
        assert ask(url, references, prompts, answer=answers, concurrency=4) == [1 - value for value in expected]
        assert counted()[:2] == (120, 0)

    margin = sorted(map(abs, differences))[len(pairs) // 3]
    close = [abs(d) <= margin for d in differences]
    with serve(lambda body: longer(body, margin)) as (server, url):
        values = ask(url, answers, prompts, answer=references, cache_dir=str(tmp_path))
        assert values == [0.5 if near else value for near, value in zip(close, expected, strict=True)]
        sums = judge_statistics()[url, "judge-1"]
        assert sums["disagreements"] == sum(close)
        assert sums["chose_first"] - sums["chose_second"] == 2 * sum(close)
        asked = len(server.bodies)
        assert ask(url, answers, prompts, answer=references, cache_dir=str(tmp_path)) == values
        assert len(server.bodies) == asked
