"""A judge's endpoint and a vLLM server that send slowly, endlessly, compressed, or what no model could have said."""

import contextlib
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import rollout.vllm_client
from data.records import Message
from reward.functions import RewardError
from reward.judge import judge, judge_statistics, reset_judge_statistics
from reward.judge_client import read_reply
from rollout.errors import RolloutError, ServerFailed, ServerTimeout, WrongAnswer
from rollout.sampling import SamplingSpec
from rollout.vllm_answers import completion, read
from rollout.vllm_client import Client, pick
from tests.judge_server import Response, chat, failed, graded, serve

KEY = "sk/not+to-be-seen-0123456789"
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    reset_judge_statistics()


def ask(url: str, **options) -> list[float | None]:
    options = {"model": "judge-1", "backoff": 0.0, "timeout": 30.0, "retries": 0, "on_failure": "error", **options}
    return judge([(Message("user", "2 + 2?"),)], ["4"], base_url=url, **options)


@contextlib.contextmanager
def raw(first: bytes, then: bytes = b"", pause: float = 0.0) -> Iterator[str]:
    """A server that answers every request with `first` and, until the client leaves, with `then` over and over."""
    over = threading.Event()
    listening = socket.create_server(("127.0.0.1", 0))

    def serve_one(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(first)
            while then and not over.wait(pause):
                connection.sendall(then)

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                threading.Thread(target=serve_one, args=(listening.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        over.set()
        listening.close()


SLOW = {
    "a dripped header": (b"HTTP/1.1 200 OK\r\nX-", b"a", 0.01),
    "endless continuations": (b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.001),
    "a dripped body": (HEAD + b"Content-Length: 100000\r\n\r\n", b" ", 0.01),
    "silence": (b"", b"", 0.0),
}


def timed_out(call: Callable[[], object], kind: type[Exception], words: str) -> None:
    begun = time.monotonic()
    with pytest.raises(kind, match=words):
        call()
    assert time.monotonic() - begun < 20  # without a deadline it would never end


@pytest.mark.parametrize("how", SLOW)
def test_one_deadline_covers_a_whole_call(how):
    first, then, pause = SLOW[how]
    if how == "silence":
        then, pause = b"x", 30.0
    with raw(first, then, pause) as url:
        timed_out(lambda: ask(f"{url}/v1", timeout=0.3), RewardError, r"ReadTimeout: no complete reply within 0\.3 s")
        timed_out(lambda: Client(url).get("/health", 0.3), ServerTimeout, r"no answer within 0\.3 s")


def test_an_endless_body_is_cut_off(monkeypatch):
    monkeypatch.setattr(rollout.vllm_client, "_LARGEST", 1 << 20)
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with raw(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", piece) as url:
        with pytest.raises(RewardError, match="a reply of more than"):
            ask(f"{url}/v1")
        with pytest.raises(ServerFailed, match="an answer longer than 1048576 bytes"):
            Client(url).get("/health", 30.0)


def test_compressed_answers_are_refused_and_not_asked_for():
    body = gzip.compress(gzip.compress(graded(10).content))
    head = HEAD + b"Content-Encoding: gzip, gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
    with raw(head + body) as url:
        with pytest.raises(RewardError, match="a reply encoded as gzip, gzip, which was not asked for"):
            ask(f"{url}/v1")
        with pytest.raises(ServerFailed, match="an answer encoded as gzip, gzip"):
            Client(url).get("/health", 30.0)


def test_a_body_that_ends_early_is_a_broken_connection():
    with raw(HEAD + b"Content-Length: 100\r\n\r\n{}") as url, pytest.raises(RolloutError, match="IncompleteRead"):
        Client(url).get("/health", 30.0)


@pytest.mark.parametrize("count", ["1e999", "-5", "1e30", "NaN", '"7"', "true", "9" * 5000, "[]"])
def test_an_impossible_number_of_tokens_is_neither_counted_nor_fatal(count):
    content = graded(10).content.replace(b'"completion_tokens": 20', b'"completion_tokens": ' + count.encode())
    with serve(lambda _: Response(content)) as (_, url):
        assert ask(url, on_failure="none", max_failure_fraction=1.0, max_cost=1.0, price_per_million_output=1.0) == [
            None
        ]
    ((_, sums),) = judge_statistics().items()
    assert (sums["failures"], sums["cost"], sums["output_tokens"]) == (1, 0, 0)


def test_a_plausible_number_of_tokens_is_counted():
    assert read_reply(b'{"choices": [{}], "usage": {"prompt_tokens": 3.0, "completion_tokens": 0}}').tokens == (3, 0)


FORMS = {"plain": KEY, "in an address": "sk%2Fnot%2Bto-be-seen-0123456789", "in JSON": "sk\\/not+to-be-seen-0123456789"}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
@pytest.mark.parametrize("before", [0, 180, 285])
def test_the_key_is_removed_before_anything_is_cut(form, before, caplog, tmp_path):
    """285 characters before the key: a message that is cut at 300 would end in a part of it."""
    text = "x" * before + f" {form}"
    answers = [
        chat(text),
        chat(None, refusal=text),
        chat(None, finish=f"content_filter {text}"),
        failed(500, text),
        failed(400, text),
        Response(text.encode()),
        Response(json.dumps({"error": text}).encode(), 500),
        Response(b"", 301, {"Location": f"https://x/{text}"}),
    ]
    for number, answer in enumerate(answers):
        with serve(lambda _, answer=answer: answer) as (_, url), pytest.raises(RewardError) as caught:
            ask(url, cache_dir=str(tmp_path / str(number)))
        assert not any(part in str(caught.value) for part in ("to-be-seen", "sk/", "sk%2F", "sk\\/"))
    assert "to-be-seen" not in caplog.text
    kept = b"".join(path.read_bytes() for path in Path(tmp_path).rglob("*") if path.is_file())
    assert kept and b"to-be-seen" not in kept


SPEC = SamplingSpec(3, (2, 9), 0)


def answer(ids: list[int], logprobs: list[float], reason: str = "length") -> dict:
    tokens = {"tokens": [f"token_id:{token}" for token in ids], "token_logprobs": logprobs}
    choice = {"prompt_token_ids": [5], "token_ids": ids, "finish_reason": reason, "logprobs": tokens}
    return {"choices": [choice]}


def test_an_answer_that_a_model_can_give_is_read():
    assert read(answer([5, 6, 2], [-1, -0.5, 0.0], "stop"), [5], SPEC, 10).end == "stop"
    assert completion([5, 6, 7], [-1.0, -0.5, 1e-6], False, SPEC, 10).ids == [5, 6, 7]


@pytest.mark.parametrize(
    ("ids", "logprobs", "reason", "kind", "message"),
    [
        ([5, 6, 7, 2], [-1.0] * 4, "stop", WrongAnswer, "has 4 tokens instead of 3"),
        (["5", 6, 7], [-1.0] * 3, "length", ServerFailed, "choices.0.token_ids.0"),
    ],
)
def test_an_answer_that_no_model_can_give_is_refused(ids, logprobs, reason, kind, message):
    with pytest.raises(kind, match=message):
        read(answer(ids, logprobs, reason), [5], SPEC, 10)


@pytest.mark.parametrize("found", [None, [], {}, {"a": None}, {"a": [{}]}, {"a": [{"b": 1}]}, {"a": {"0": {"b": "x"}}}])
def test_a_control_answer_of_another_form_is_refused(found):
    with pytest.raises(ServerFailed, match=r"has no a\.0\.b"):
        pick(found, str, "a", 0, "b")
    assert pick({"a": [{"b": "x"}]}, str, "a", 0, "b") == "x"
