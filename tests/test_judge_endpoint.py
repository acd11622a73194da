"""The judge against a local endpoint: good answers, every kind of failure, and the counts."""

import email.utils
import json
import logging
import re
import threading
import time

import pytest
import yaml

from data.records import Message
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError
from reward.judge import judge, judge_statistics, reset_judge_statistics
from reward.judge_client import LONGEST_WAIT
from reward.judge_config import read_options
from tests.judge_server import Response, chat, failed, graded, pieces, serve

KEY = "sk-not-to-be-seen-0123456789"
PROMPT = (Message("user", "2 + 2?"),)


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_judge_statistics()


def ask(url, answers, **options):
    options = {"model": "judge-1", "backoff": 0.0, "timeout": 30.0, **options}
    return judge([PROMPT] * len(answers), answers, base_url=url, **options)


def counted(**expected):
    ((endpoint, sums),) = judge_statistics().items()
    assert endpoint[1] == "judge-1"
    assert {name: sums[name] for name in expected} == expected


def test_grades_are_scaled_to_rewards(caplog):
    with serve(lambda body: graded(int(pieces(body)["answer"]))) as (server, url):
        assert ask(url + "/", ["1", "10", "5"]) == pytest.approx([0.0, 1.0, 4 / 9])
        assert ask(url, ["0", "4"], lowest=0, highest=4, rubric="Is it even?") == [0.0, 1.0]
    first, last = server.bodies[0], server.bodies[-1]
    assert {name: first[name] for name in first if name != "messages"} == {
        "model": "judge-1",
        "temperature": 0,
        "max_tokens": 1024,
    }
    assert "Is it even?" in last["messages"][0]["content"]
    assert server.keys == [f"Bearer {KEY}"] * 5
    assert caplog.records == []
    assert [sums["rows"] for sums in judge_statistics().values()] == [3, 2]


def test_counts_and_costs_are_reported():
    with serve(lambda body: graded(7)) as (_, url):
        ask(url, ["a", "b", "a", "a"], price_per_million_input=10.0, price_per_million_output=100)
        counted(rows=4, questions=4, cache_hits=2, verdicts=4, requests=2, repeated=0, failures=0)
        counted(input_tokens=200, output_tokens=40, cost=pytest.approx(200 * 10 / 1e6 + 40 * 100 / 1e6))
        reset_judge_statistics()
        assert judge_statistics() == {}


def test_keys_of_the_request_are_set_and_left_out():
    with serve(lambda body: graded(7)) as (server, url):
        ask(url, ["a"], request={"temperature": None, "max_tokens": None, "max_completion_tokens": 50, "seed": 1})
    assert set(server.bodies[0]) == {"model", "messages", "max_completion_tokens", "seed"}


def test_no_key_is_sent_where_none_is_needed(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with serve(lambda body: graded(7)) as (server, url):
        ask(url, ["a"], api_key_env=None)
    assert server.keys == [None]


def test_as_a_reward_of_a_recipe():
    with serve(lambda body: graded(10 if "4" in pieces(body)["answer"] else 1)) as (_, url):
        entry = RewardConfig(function="judge", weight=2.0, args={"base_url": url, "model": "judge-1"})
        answers = Answers([PROMPT] * 2, [[1]] * 2, ["4", "5"], [[7], [8]], [True] * 2, [{"answer": "4"}, {}])
        scores = Composition([entry], {})(answers)
    assert scores.total == [2.0, 0.0] and scores.parts == {"judge": [1.0, 0.0]}


def test_a_recipes_mistakes_are_found_before_the_first_answer():
    args = {"base_url": "http://127.0.0.1:9/v1", "model": "judge-1"}
    with pytest.raises(RewardError, match=r"no argument `concurency`; did you mean `concurrency`\?"):
        Composition([RewardConfig(function="judge", args={**args, "concurency": 2})], {})
    del args["model"]
    with pytest.raises(RewardError, match="needs the column `model`"):
        Composition([RewardConfig(function="judge", args=args)], {}).check_columns({"answer"})


def test_a_reference_and_a_rubric_of_each_row():
    seen = {}

    def answer(body):
        seen[pieces(body)["answer"]] = (pieces(body).get("reference"), "Is it short?" in body["messages"][0]["content"])
        return graded(10)

    with serve(answer) as (_, url):
        values = ask(
            url, ["a", "b", "c"], reference_column="gold", gold=["x", None, "z"], rubric=["Is it short?", None, None]
        )
    assert values == [1.0, None, 1.0]
    assert seen == {"a": ("x", True), "c": ("z", False)}
    counted(rows=2, rows_without_verdict=0)


@pytest.mark.parametrize("after", ["0.3", "date"])
def test_a_rate_limited_question_is_retried_after_the_wait(after):
    def answer(body):
        if len(server.bodies) == 1:
            header = after if after == "0.3" else email.utils.formatdate(time.time() + 2, usegmt=True)
            return failed(429, "slow down", {"Retry-After": header})
        return graded(10)

    with serve(answer) as (server, url):
        assert ask(url, ["4"]) == [1.0]
    assert server.arrived[1] - server.arrived[0] >= (0.3 if after == "0.3" else 0.9)  # a date has whole seconds
    counted(requests=2, repeated=1, verdicts=1, failures=0)


def test_a_rate_limit_holds_back_the_other_questions_too():
    def answer(body):
        return failed(429, "slow down", {"Retry-After": "0.3"}) if len(server.bodies) == 1 else graded(10)

    with serve(answer) as (server, url):
        assert ask(url, ["a", "b"], concurrency=1, retries=0, max_failure_fraction=0.5) == [None, 1.0]
    assert server.arrived[1] - server.arrived[0] >= 0.3


def test_an_excessive_wait_is_not_waited(caplog):
    with serve(lambda body: failed(429, "daily limit", {"Retry-After": str(LONGEST_WAIT + 1)})) as (server, url):
        assert ask(url, ["4"]) == [None]
    assert len(server.bodies) == 1
    assert "asks for a wait of 301 s" in caplog.text


@pytest.mark.parametrize("status", [408, 409, 425, 500, 502, 503, 529])
def test_a_server_error_is_retried(status):
    with serve(lambda body: failed(status) if len(server.bodies) < 3 else graded(10)) as (server, url):
        assert ask(url, ["4"]) == [1.0]
    counted(requests=3, repeated=2, verdicts=1)


def test_persistent_errors_score_none_and_then_raise(caplog):
    def answer(body):
        return Response(b"<h1>oops</h1>", 500) if pieces(body)["answer"].startswith("bad") else graded(10)

    with serve(answer) as (server, url):
        assert ask(url, ["bad", "a", "b", "c", "d"], retries=1) == [None, 1.0, 1.0, 1.0, 1.0]
        assert len(server.bodies) == 6
        counted(failures=1, rows_without_verdict=1, verdicts=4)
        assert "1 of 5 rows without a verdict, e.g. failures: 500 <h1>oops</h1> (asked 2 times)" in caplog.text
        with pytest.raises(RewardError, match=r"2 of 5 rows without a verdict, 1 allowed.*\n  failures: 500 <h1>oops"):
            ask(url, ["bad", "bad 2", "b", "c", "d"], retries=0)
        with pytest.raises(RewardError, match="1 of 5 rows without a verdict, 0 allowed"):
            ask(url, ["bad", "a", "b", "c", "d"], retries=0, on_failure="error")
        with pytest.raises(RewardError, match="1 of 5 rows without a verdict, 0 allowed"):
            ask(url, ["bad", "a", "b", "c", "d"], retries=0, max_failure_fraction=0)


def test_a_hopeless_call_ends_early():
    with serve(lambda body: failed(500)) as (server, url), pytest.raises(RewardError, match="without a verdict"):
        ask(url, [str(i) for i in range(100)], retries=0, concurrency=2)
    assert len(server.bodies) < 30


def test_time_outs():
    over = threading.Event()

    def answer(body):
        over.wait(30)
        return graded(10)

    with serve(answer) as (_, url):
        try:
            assert ask(url, ["4"], timeout=0.1, retries=2) == [None]
        finally:
            over.set()
    counted(requests=3, failures=1)


def test_a_server_that_drips_bytes_times_out():
    over = threading.Event()
    with serve(lambda body: Response(b" ", drip=over)) as (_, url):
        try:
            with pytest.raises(RewardError, match=r"ReadTimeout: no complete reply within 0\.2 s"):
                ask(url, ["4"], timeout=0.2, retries=0, on_failure="error")
        finally:
            over.set()


def test_an_endless_reply_is_cut_off():
    big = Response(b" " * (5 << 20))
    with serve(lambda body: big) as (_, url), pytest.raises(RewardError, match="a reply of more than"):
        ask(url, ["4"], retries=0, on_failure="error")


def test_connections_refused_and_broken():
    with serve(lambda body: Response(b"", hang_up=True)) as (server, url):
        with pytest.raises(RewardError, match="failures: RemoteProtocolError"):
            ask(url, ["4"], retries=1, on_failure="error")
        assert len(server.bodies) == 2
    with pytest.raises(RewardError, match=r"3 of 6 rows without a verdict, 2 allowed.*\n  failures: ConnectError"):
        ask(url, list("abcdef"), retries=1)


@pytest.mark.parametrize(
    "content",
    [
        *(
            b"<html>",
            b"",
            b"[]",
            b'{"object": "list", "data": []}',
            b'{"choices": "x"}',
            b'{"choices": [7]}',
            b"[" * 9999,
        ),
        b'{"choices": [{"message": {"content": 7}}]}',
        b'{"choices": [{}], "usage": {"prompt_tokens": [], "completion_tokens": 1}}',
    ],
)
def test_a_malformed_body_is_retried_and_named(content):
    with (
        serve(lambda _: Response(content)) as (server, url),
        pytest.raises(RewardError, match="200, but the reply is not a chat comp"),
    ):
        ask(url, ["4"], retries=1, on_failure="error")
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
    ("response", "kind", "said"),
    [
        (chat("Nice weather."), "nonsense", "nonsense: 'Nice weather.'"),
        (chat('{"score": 99}'), "nonsense", "score"),
        (chat(""), "nonsense", "nonsense: ''"),
        (chat('{"score": 7}', finish="length"), "nonsense", "cut off: raise `max_tokens`"),
        (chat("I'm sorry, I can't judge this."), "refusals", "I can't judge this"),
        (chat(None, refusal="I will not."), "refusals", "refusals: 'I will not.'"),
        (chat('{"score": 7}', finish="content_filter"), "refusals", "content_filter"),
        (chat(None, finish="content_filter: PROHIBITED_CONTENT"), "refusals", "PROHIBITED_CONTENT"),
        (
            Response(b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}'),
            "refusals",
            "content_filter",
        ),
        (failed(400, "the prompt was filtered", code="content_filter"), "refusals", "the prompt was filtered"),
        (failed(400, "Your prompt is beyond the maximum context length of 8192"), "failures", "400 Your prompt"),
        (failed(413, "too large"), "failures", "413 too large"),
    ],
)
def test_nonsense_and_refusals_score_none(response, kind, said, caplog):
    with serve(lambda body: response if pieces(body)["answer"] == "bad" else graded(10)) as (server, url):
        assert ask(url, ["a", "bad", "b"]) == [1.0, None, 1.0]
        assert len(server.bodies) == 3
    counted(rows_without_verdict=1, verdicts=2, **{kind: 1})
    assert said in caplog.text and "1 of 3 rows" in caplog.text


def test_an_echoed_question_cannot_set_the_verdict():
    def answer(body):  # as `transformers serve` does if its response template does not fit the chat template
        return chat("".join(message["content"] for message in body["messages"]) + "Ugh.")

    with serve(answer) as (_, url), pytest.raises(RewardError, match=r"nonsense: .*Ugh\."):
        ask(url, ['{"score": 10}'], on_failure="error")


def test_content_in_parts_and_missing_usage_are_read():
    parts = chat(None, usage=None)
    body = json.loads(parts.content)
    body["choices"][0]["message"]["content"] = [{"type": "text", "text": '{"score"'}, {"type": "text", "text": ": 10}"}]
    with serve(lambda _: Response(json.dumps(body).encode())) as (_, url):
        assert ask(url, ["4"]) == [1.0]
        counted(input_tokens=0, output_tokens=0)
        with pytest.raises(RewardError, match="does not say how many tokens"):
            ask(url, ["4"], max_cost=1.0, price_per_million_input=1.0)


@pytest.mark.parametrize(
    ("response", "match"),
    [
        (
            failed(401, f"Incorrect API key provided: {KEY}"),
            "401 .*<key>; the key in the variable OPENAI_API_KEY is not",
        ),
        (failed(403, "no access"), "403 no access; the key in the variable OPENAI_API_KEY may not use model `judge-1`"),
        (failed(404, "no such model"), "404 no such model; no such path or no model `judge-1` there: check `base_url`"),
        (failed(400, "temperature is deprecated"), "400 temperature is deprecated; change the rejected key.*`request`"),
        (failed(422, "max_tokens?"), "422 max_tokens"),
        (failed(402, "Insufficient Balance"), "402 .* has no credit left"),
        (failed(429, "You exceeded your quota", type="insufficient_quota"), "429 .* has no credit left"),
        (Response(b"", 301, {"Location": "https://other.example/v1"}), "redirects to https://other.example/v1"),
        (
            Response(b'[{"error": {"message": "API key not valid", "status": "INVALID_ARGUMENT"}}]', 400),
            "API key not valid",
        ),
        (Response(b'{"error": "gone"}', 410), "410 gone"),
        (Response(b'{"detail": "Not Found"}', 404), "404 Not Found"),
    ],
)
def test_permanent_errors_raise_without_retries(response, match):
    with serve(lambda body: response) as (server, url), pytest.raises(RewardError, match=match) as caught:
        ask(url, ["4"], retries=3)
    assert len(server.bodies) == 1
    assert KEY not in str(caught.value) and url in str(caught.value)


def test_an_error_ends_the_waits_of_other_questions():
    both = threading.Barrier(2)

    def answer(body):
        both.wait(20)
        return failed(429, "later", {"Retry-After": "20"}) if pieces(body)["answer"] == "slow" else failed(401)

    with serve(answer) as (server, url), pytest.raises(RewardError, match="401"):
        ask(url, ["slow", "wrong"], concurrency=2, timeout=30)
    assert len(server.bodies) == 2  # had the wait continued, "slow" would have been asked again


def test_the_key_is_not_in_quoted_replies(caplog):
    with serve(lambda body: failed(500, f"key {KEY} is in flames")) as (_, url):
        ask(url, ["4"], retries=0)
    assert "key <key> is in flames" in caplog.text and KEY not in caplog.text


def test_a_wrong_path_is_named():
    with serve(lambda _: graded(1)) as (_, url), pytest.raises(RewardError, match=r"/v2/chat/completions answered 404"):
        ask(url.replace("v1", "v2"), ["4"])


def test_questions_are_asked_at_once_but_not_more_than_allowed():
    meet = threading.Barrier(4)  # fails the test unless four questions are in flight at once

    def answer(body):
        meet.wait(timeout=20)
        return graded(10)

    with serve(answer) as (server, url):
        assert ask(url, [str(i) for i in range(16)], concurrency=4, retries=0, timeout=30) == [1.0] * 16
    assert server.most_in_flight == 4


def test_nothing_to_judge_asks_nothing():
    with serve(lambda body: graded(1)) as (server, url):
        assert ask(url, []) == []
        assert ask(url, ["a", "b"], mode="pairwise", answer=[None, None]) == [None, None]
    assert server.bodies == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"mode": "pairs"}, "`mode`: Input should be 'rubric' or 'pairwise'"),
        ({"concurency": 4}, "no option `concurency`: did you mean `concurrency`"),
        ({"xyzzy": 4}, "no option `xyzzy`: it has base_url, model"),
        ({"base_url": "localhost:8000/v1"}, "`base_url` 'localhost:8000/v1' is not of the form https://host/path"),
        ({"base_url": "http://host:port/v1"}, "is not a URL"),
        ({"base_url": "ftp://host/v1"}, "not of the form"),
        ({"base_url": "https://host/v1?key=x"}, "not of the form"),
        ({"base_url": "https://me:secret@host/v1"}, "contains a user or password: use the variable"),
        ({"base_url": "https://host/v1/chat/completions"}, "must not include /chat/completions: remove it"),
        ({"base_url": None}, "`base_url`: Input should be a valid string"),
        ({"model": ""}, "`model`: String should have at least 1 character"),
        ({"model": ["a"]}, "`model`: Field required"),
        ({"lowest": 10}, "`lowest` 10 must be below `highest` 10"),
        ({"concurrency": 0}, "`concurrency`: Input should be greater than or equal to 1"),
        ({"timeout": "60"}, "`timeout`: Input should be a valid number"),
        ({"max_failure_fraction": 20}, "`max_failure_fraction`: Input should be less than or equal to 1"),
        ({"max_cost": 5.0}, "`max_cost` needs `price_per_million_input`"),
        ({"request": {"model": "x", "n": 2}}, "`request` may not set model, n"),
        ({"request": {"seed": float("nan")}}, "`request` is not JSON"),
        ({"request": {"seed": {1}}}, "`request` is not JSON"),
        ({"mode": "pairwise"}, "no column `answer` with reference answers: set `reference_column` to one of gold"),
        ({"reference_column": "golden"}, "no column `golden` with reference answers"),
        ({"reference_column": "gold"}, r"column `gold`, row 0 of the call: 4 is not text"),
        ({"rubric": [7]}, r"column `rubric`, row 0 of the call: 7 is not text"),
        ({"stop": ["a", "b"]}, "`stop` is a list of 2 for 1 answers"),
        ({"api_key_env": "ELSEWHERE"}, "variable ELSEWHERE holds no key for http://127.0.0.1:9/v1: export it"),
    ],
)
def test_options_are_checked_before_anything_is_asked(options, match):
    options = {"base_url": "http://127.0.0.1:9/v1", "model": "judge-1", "gold": [4], **options}
    with pytest.raises(RewardError, match=match):
        judge([PROMPT], ["4"], **options)


def test_the_recipe_entries_of_the_documentation(root):
    blocks = re.findall(
        r"```yaml reward\n(.*?)```", (root / "docs" / "judge.md").read_text(encoding="utf-8"), re.DOTALL
    )
    loaded = [yaml.safe_load(block) for block in blocks]
    entries = [entry for block in loaded for entry in (block if isinstance(block, list) else [block])]
    judges = [RewardConfig(**entry).args for entry in entries if "function" in entry]
    assert len(judges) == 7
    for args in judges:
        config, columns = read_options(args, 1)
        assert columns == {} and config.body([])["model"] == args["model"]


@pytest.mark.parametrize("option", ["base_url", "model"])
def test_required_options_are_named(option):
    options = {"base_url": "http://127.0.0.1:9/v1", "model": "judge-1"}
    del options[option]
    with pytest.raises(RewardError, match=f"`{option}`: Field required"):
        judge([PROMPT], ["4"], **options)


@pytest.mark.parametrize("secret", ["", "  ", "sk-naïve", "sk-a\nb"])
def test_an_invalid_key_is_neither_sent_nor_shown(secret, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    with pytest.raises(RewardError, match="variable OPENAI_API_KEY holds no key") as caught:
        ask("http://127.0.0.1:9/v1", ["4"])
    assert "sk-" not in str(caught.value)


def test_a_key_in_place_of_its_variables_name_is_not_shown():
    with pytest.raises(RewardError, match="`api_key_env`: String should match pattern") as caught:
        ask("http://127.0.0.1:9/v1", ["4"], api_key_env=KEY)
    assert KEY not in str(caught.value)


def test_the_library_logs_no_key(caplog):
    with caplog.at_level(logging.DEBUG), serve(lambda body: graded(10)) as (_, url):
        ask(url, ["4"])
    assert KEY not in caplog.text
