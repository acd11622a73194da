"""The judge's cache: a question is asked once over all processes, also after kills, and the cost is known."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading

import pytest

from data.records import Message
from reward.functions import RewardError
from reward.judge import judge, judge_statistics, reset_judge_statistics
from reward.judge_cache import Cache
from reward.judge_client import Reply
from tests.judge_server import chat, graded, pieces, serve

PROMPT = (Message("user", "2 + 2?"),)
PRICES = {"price_per_million_input": 10.0, "price_per_million_output": 50.0}  # an answer: 0.001 + 0.001
CHILD = """
import json, sys
from data.records import Message
from reward.judge import judge
answers, options = json.loads(sys.argv[1])
prompts = [(Message("user", "2 + 2?"),)] * len(answers)
print(json.dumps(judge(prompts, answers, model="judge-1", backoff=0.0, **options)))
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_judge_statistics()


def ask(url, answers, **options):
    return judge([PROMPT] * len(answers), answers, base_url=url, **{"model": "judge-1", "backoff": 0.0, **options})


def child(root, answers, **options):
    command = [sys.executable, "-c", CHILD, json.dumps([answers, options])]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def by_length(body):
    return graded(1 + len(pieces(body)["answer"]) % 10)


def test_an_answer_is_paid_once_across_processes_and_ports(root, tmp_path):
    with serve(by_length) as (server, url):
        first = ask(url, ["a", "bb", "ccc"], cache_dir=str(tmp_path / "new" / "cache"))
        assert first == pytest.approx([1 / 9, 2 / 9, 3 / 9])
        again = ask(url, ["ccc", "a", "dddd"], cache_dir=str(tmp_path / "new" / "cache"))
        assert again == pytest.approx([3 / 9, 1 / 9, 4 / 9])
        assert len(server.bodies) == 4
        ((_, sums),) = judge_statistics().items()
        assert (sums["questions"], sums["cache_hits"], sums["requests"]) == (6, 2, 4)
    with serve(by_length) as (server, url):
        process = child(root, ["a", "bb", "ccc", "dddd"], base_url=url, cache_dir=str(tmp_path / "new" / "cache"))
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert json.loads(out)[:3] == first
        assert server.bodies == []


@pytest.mark.parametrize(
    "other",
    [
        {"model": "judge-2"},
        {"rubric": "Is it short?"},
        {"highest": 5},
        {"request": {"temperature": None}},
        {"reference_column": "gold"},
        {"mode": "pairwise", "reference_column": "gold"},
    ],
)
def test_another_question_is_not_answered_from_the_cache(other, tmp_path):
    with serve(lambda body: graded(3)) as (server, url):
        options = {"cache_dir": str(tmp_path), "gold": ["4"], "max_failure_fraction": 1.0}
        ask(url, ["a"], **options)
        ask(url, ["a"], **options, **other)
        assert len(server.bodies) == (3 if "mode" in other else 2)


def test_refusals_and_nonsense_are_kept_too_but_failures_are_not(tmp_path):
    replies = {"refuses": chat(None, refusal="no"), "odd": chat("Hm."), "cut": chat("", finish="length")}

    def answer(body):
        return replies.get(pieces(body)["answer"]) or graded(10)

    with serve(answer) as (server, url):
        options = {"cache_dir": str(tmp_path), "max_failure_fraction": 1.0, "retries": 0}
        for _ in range(2):
            assert ask(url, ["refuses", "odd", "cut", "good"], **options) == [None, None, None, 1.0]
        assert len(server.bodies) == 4
        ((_, sums),) = judge_statistics().items()
        assert (sums["refusals"], sums["nonsense"], sums["rows_without_verdict"]) == (2, 4, 6)
        dead = url.replace(url.split(":")[2], "9/v1")
        assert ask(dead, ["new", "good"], **options) == [None, 1.0]
        assert ask(url, ["new", "good"], **options) == [1.0, 1.0]


def test_a_kill_loses_nothing_that_was_answered(root, tmp_path):
    answers = [str(i) * i for i in range(1, 10)]
    reached, over = threading.Event(), threading.Event()

    def answer(body):
        if len(server.bodies) == 6:
            reached.set()
            over.wait(30)
        return by_length(body)

    with serve(answer) as (server, url):
        process = child(root, answers, base_url=url, cache_dir=str(tmp_path), concurrency=1)
        try:
            assert reached.wait(60)
        finally:
            os.kill(process.pid, signal.SIGKILL)
            process.communicate()
            over.set()
        assert len(server.bodies) == 6
        values = ask(url, answers, cache_dir=str(tmp_path))
        assert values == pytest.approx([len(text) % 10 / 9 for text in answers])
        assert len(server.bodies) == 6 + len(answers) - 5


def test_several_processes_share_one_file(root, tmp_path):
    answers = [f"answer {i}" for i in range(30)]
    with serve(lambda body: graded(1 + len(server.bodies) % 10)) as (server, url):  # a different score at each call
        options = {"base_url": url, "cache_dir": str(tmp_path)}
        processes = [child(root, answers[start:] + answers[:start], **options) for start in (0, 10, 20)]
        outcomes = [process.communicate(timeout=100) for process in processes]
        assert [process.returncode for process in processes] == [0, 0, 0], outcomes
        asked = len(server.bodies)
        assert len(answers) <= asked <= 3 * len(answers)
        kept = ask(url, answers, cache_dir=str(tmp_path))
        for start, (out, _) in zip((0, 10, 20), outcomes, strict=True):
            assert json.loads(out) == kept[start:] + kept[:start]
        assert len(server.bodies) == asked
    file = sqlite3.connect(tmp_path / "judge.sqlite")
    assert file.execute("SELECT COUNT(*) FROM replies").fetchone() == (len(answers),)
    assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    file.close()


def test_all_processes_keep_the_first_answer_to_a_question(tmp_path):
    one, two = Cache(tmp_path), Cache(tmp_path)
    first, second = Reply("7", "stop", "", (1, 2)), Reply("8", "stop", "", None)
    assert one.put("key", "m", first) == first
    assert two.put("key", "m", second) == first
    assert two.get("key") == one.get("key") == first and one.get("other") is None
    assert one.tokens("m") == (1, 2) and one.tokens("n") == (0, 0)
    one.close()
    two.close()


def test_an_unusable_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RewardError, match=r"cannot use `cache_dir` .*file"):
        ask("http://127.0.0.1:9/v1", ["a"], cache_dir=str(tmp_path / "file"))
    (tmp_path / "judge.sqlite").write_bytes(b"not a database, but long enough to be one" * 100)
    with pytest.raises(
        RewardError, match=r"judge.sqlite cannot be used \(file is not a database\).*move the file away"
    ):
        ask("http://127.0.0.1:9/v1", ["a"], cache_dir=str(tmp_path))
    (tmp_path / "judge.sqlite").unlink()
    with sqlite3.connect(tmp_path / "judge.sqlite") as file:
        file.execute("PRAGMA user_version = 7")
    file.close()
    with pytest.raises(RewardError, match="its version is 7, not 1"):
        ask("http://127.0.0.1:9/v1", ["a"], cache_dir=str(tmp_path))


def test_the_cost_limit_stops_a_call_and_paid_answers_are_kept(tmp_path):
    answers = [str(i) for i in range(9)]
    options = {"cache_dir": str(tmp_path), "max_cost": 0.005, "concurrency": 1, **PRICES}
    with serve(lambda body: graded(10)) as (server, url):
        with pytest.raises(
            RewardError, match=r"`judge-1` has cost 0.006 \(300 tokens in, 60 out\).*`max_cost` is 0.005"
        ):
            ask(url, answers, **options)
        assert len(server.bodies) == 3
        ((_, sums),) = judge_statistics().items()
        assert sums["cost"] == pytest.approx(0.006)
        assert ask(url, answers[:3], **options) == [1.0] * 3
        with pytest.raises(RewardError, match=r"has cost 0\.006"):
            ask(url, answers[3:], **options)
        assert len(server.bodies) == 3
        assert ask(url, answers[:5], **{**options, "max_cost": 0.02}) == [1.0] * 5


def test_the_cost_limit_counts_what_other_processes_spent(root, tmp_path):
    options = {"cache_dir": str(tmp_path), "max_cost": 0.005, **PRICES}
    with serve(lambda body: graded(10)) as (server, url):
        process = child(root, ["a", "b", "c"], base_url=url, **options)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and json.loads(out) == [1.0] * 3, err
        with pytest.raises(RewardError, match=r"has cost 0\.006"):
            ask(url, ["d"], **options)
        assert len(server.bodies) == 3


def test_without_a_cache_the_limit_counts_this_process_across_resets():
    with serve(lambda body: graded(10)) as (server, url):
        assert ask(url, ["a", "b", "c"], **PRICES) == [1.0] * 3
        reset_judge_statistics()
        with pytest.raises(RewardError, match=r"has cost 0\.006"):
            ask(url, ["d"], max_cost=0.005, **PRICES)
        assert len(server.bodies) == 3
