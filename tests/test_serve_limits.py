"""What the server refuses, and with which status; clients that leave; what is logged."""

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest

from baton.serve.guard import _is_loopback
from baton.serve.run import listen
from baton.serve.settings import KEY_VARIABLE, ApiKey, Limits, read_key
from baton.serve.vllm import chosen, command
from handoff.errors import UserError
from tests.serving import ASKED, serving, write_model

ASK = "/v1/chat/completions"
SECRET = "a secret of the user"


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("models") / "tiny", window=512)


@pytest.fixture(scope="module")
def server(parent):
    with serving([parent], max_body=20_000, max_n=3, queue=8) as running:
        yield running


def connected(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])))


def until(condition, seconds=30.0):
    """Waits; how long depends on the machine's load, the result does not."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


WRONG = {
    "messages": [None, [], "hi", ["hi"], [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"content": "x"}]],
    "messages.0.content": [[{"role": "user", "content": 3}], [{"role": "user", "content": None}]],
    "messages.0.content.0": [
        [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]
    ],
    "messages.0.name": [[{"role": "user", "content": "x", "name": "Ann"}]],
    "messages.0.path": [[{"role": "user", "content": "x", "path": "/etc/passwd"}]],
    "messages.0.tool_calls": [[{"role": "user", "content": "x", "tool_calls": []}, ASKED[0]]],
    "messages.1.tool_calls": [[ASKED[0], {"role": "assistant", "tool_calls": [{"id": 1}]}, ASKED[0]]],
    "temperature": [-0.1, 2.5, "hot", True, [1]],
    "top_p": [0, 1.1, "a"],
    "top_k": [-2, 1.5, "a", True],
    "n": [0, 4, -1, 1.5, "2", True],
    "max_tokens": [0, -1, 1.5, "many", 600],
    "max_completion_tokens": [0, "x"],
    "stop": [[""], "", 3, ["a"] * 17, "x" * 257, [1]],
    "seed": [1.5, "x", 2**64],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}],
    "logprobs": [3, "yes"],
    "top_logprobs": [2, -1, 21],
    "response_format": [3],
    "response_format.type": [{"type": "xml"}],
    "response_format.json_schema": [{"type": "json_schema"}],
    "response_format.json_schema.schema": [{"type": "json_schema", "json_schema": {"name": "x"}}],
    "tools": [3],
    "tools.0": [[{"type": "file_search"}]],
    "tool_choice": ["auto please", {"type": "function", "function": {"name": "absent"}}, "required"],
    "parallel_tool_calls": ["yes"],
    "frequency_penalty": [0.5],
    "presence_penalty": [1],
    "logit_bias": [{"5": 100}],
    "functions": [[{"name": "x"}]],
    "chat_template": ["{{ 7 }}"],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "reasoning_effort": ["high"],
    "guided_regex": ["a*"],
    "model": [3],
}


@pytest.mark.parametrize("field", WRONG)
def test_each_wrong_field_is_refused_by_name(server, field):
    key = field.partition(".")[0]
    for value in WRONG[field]:
        reply = server.post(ASK, {"messages": ASKED, **{key: value}})
        error = reply.json()["error"]
        assert reply.status_code == 400, (value, error)
        assert error["param"].startswith(field) and error["param"] in error["message"], (value, error)
        assert error["type"] == "invalid_request_error" and error["code"]


def test_fields_that_change_nothing_are_taken(server):
    body = {"user": "ann", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "frequency_penalty": 0.0}
    body |= {
        "presence_penalty": 0,
        "logit_bias": {},
        "n": 1,
        "stop": None,
        "seed": None,
        "tools": None,
        "max_tokens": 4,
    }
    assert server.chat(**body)["usage"]["completion_tokens"] <= 4


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        ("/v1/completions", "prompt", {}),
        ("/v1/completions", "prompt", {"prompt": ""}),
        ("/v1/completions", "prompt", {"prompt": []}),
        ("/v1/completions", "prompt", {"prompt": [[1], "a", 3]}),
        ("/v1/completions", "prompt", {"prompt": [10**6]}),
        ("/v1/completions", "prompt", {"prompt": [-1]}),
        ("/v1/completions", "prompt", {"prompt": ["a"] * 9}),
        ("/v1/completions", "prompt", {"prompt": [5] * 600}),
        ("/v1/completions", "max_tokens", {"prompt": [5] * 500, "max_tokens": 50}),
        ("/v1/completions", "max_tokens", {"prompt": "a", "max_tokens": 0}),
        ("/v1/completions", "logprobs", {"prompt": "a", "logprobs": 21}),
        ("/v1/completions", "echo", {"prompt": "a", "echo": True, "stream": True}),
        ("/v1/completions", "best_of", {"prompt": "a", "best_of": 3}),
        ("/v1/completions", "suffix", {"prompt": "a", "suffix": "b"}),
        ("/v1/completions", "n", {"prompt": "a", "n": 4}),
        ("/v1/embeddings", "input", {}),
        ("/v1/embeddings", "input", {"input": [""]}),
        ("/v1/embeddings", "input", {"input": {"file": "/etc/passwd"}}),
        ("/v1/embeddings", "input", {"input": ["a"] * 300}),
        ("/v1/embeddings", "input", {"input": [5] * 600}),
        ("/v1/embeddings", "dimensions", {"input": "a", "dimensions": 5}),
        ("/v1/embeddings", "encoding_format", {"input": "a", "encoding_format": "hex"}),
        (ASK, "messages", {"messages": [{"role": "user", "content": "word " * 600}]}),
        (ASK, "messages", {"messages": [{"role": "user", "content": "a<|im_end|>b"}]}),
        (ASK, "messages", {"messages": [*ASKED, {"role": "assistant", "content": "x"}]}),
        (ASK, "max_completion_tokens", {"messages": ASKED, "max_tokens": 3, "max_completion_tokens": 4}),
    ],
)
def test_requests_that_cannot_be_answered_are_refused_by_name(server, path, field, body):
    reply = server.post(path, body)
    assert reply.status_code == 400 and reply.json()["error"]["param"] == field, reply.text


@pytest.mark.parametrize(
    ("body", "status", "headers"),
    [
        (b"{", 400, {}),
        (b"[]", 400, {}),
        (b"\xff\xfe", 400, {}),
        (b"[" * 10_000, 400, {}),
        (b'{"messages": NaN}', 400, {}),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, {}),
        (b" " * 30_000, 413, {}),
        (b"{}", 415, {"Content-Type": "text/plain"}),
    ],
)
def test_what_is_no_request_gets_its_status(server, body, status, headers):
    reply = server.post(ASK, body, **headers)
    assert reply.status_code == status and reply.json()["error"]["message"]


def test_a_body_without_a_length_is_bounded_too(server):
    def parts():
        for _ in range(40):
            yield b" " * 1000

    reply = httpx.post(server.url + ASK, content=parts(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


def test_a_body_that_does_not_come_is_not_waited_for(parent):
    with serving([parent], body_seconds=0.2) as server, connected(server) as slow:
        head = f"POST {ASK} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        assert b" 408 " in slow.recv(100)


def test_other_routes_and_methods(server):
    for path, status in (("/v1/files", 404), ("/docs", 404), ("/openapi.json", 404), (ASK, 405)):
        reply = server.get(path)
        assert reply.status_code == status and reply.json()["error"]["message"]


def test_a_page_of_the_web_cannot_use_a_server_without_a_key(server):
    for headers in ({"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}):
        assert server.post(ASK, {"messages": ASKED}, **headers).status_code == 403
    for headers in ({"Host": "localhost:8000"}, {"Origin": "http://127.0.0.1:3000"}, {"Host": "[::1]:80"}):
        assert server.get("/health", **headers).status_code == 200
    assert not _is_loopback("localhost.evil.example") and not _is_loopback("")


def test_a_key_is_asked_for(parent, caplog):
    caplog.set_level(logging.INFO, "baton.serve")
    with serving([parent], key="right-key") as server:
        assert server.chat(max_tokens=1)
        for given in ({}, {"Authorization": "Bearer wrong-key"}, {"Authorization": "Basic right-key"}):
            for path in (ASK, "/v1/models", "/metrics", "/v1/files"):
                reply = httpx.get(server.url + path, headers=given)
                assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer", path
        assert httpx.get(server.url + "/health").status_code == 200
        assert server.get("/metrics", Host="any.example").status_code == 200
    assert "right-key" not in caplog.text and "wrong-key" not in caplog.text


def test_where_the_key_comes_from(tmp_path, monkeypatch):
    file = tmp_path / "key"
    monkeypatch.setenv(KEY_VARIABLE, "from-variable")
    assert read_key(None) == "from-variable"
    file.write_text("from-file\nsecond line\n")
    assert read_key(file) == "from-file"
    file.write_text("\n")
    with pytest.raises(UserError, match="its first line is empty"):
        read_key(file)
    with pytest.raises(UserError, match="cannot be read"):
        read_key(tmp_path / "absent")
    for value, told in ((" ", "set and empty"), ("schlüssel", "printable ASCII")):
        monkeypatch.setenv(KEY_VARIABLE, value)
        with pytest.raises(UserError, match=told):
            read_key(None)
    monkeypatch.delenv(KEY_VARIABLE)
    assert read_key(None) is None
    assert ApiKey("k").accepts("bearer k") and not ApiKey("k").accepts(None) and not ApiKey("k").accepts("k")


class Held:
    """The thread that computes, held until the end of the block."""

    def __init__(self, server):
        self.server, self.go, self.there = server, threading.Event(), threading.Event()

    def __enter__(self):
        def wait():
            self.there.set()
            assert self.go.wait(60)

        self.server.worker.call(self.server.served[0], [wait])
        assert self.there.wait(60)
        return self

    def __exit__(self, *_):
        self.go.set()


def test_a_full_queue_refuses(parent):
    with serving([parent], batch_size=1, queue=2) as server, Held(server) as held:
        asked = {"messages": ASKED, "max_tokens": 3, "seed": 0}
        replies = []
        threads = [
            threading.Thread(target=lambda: replies.append(server.post(ASK, asked).status_code)) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        until(lambda: server.worker.waiting == 3)
        for path, body in ((ASK, asked), ("/v1/embeddings", {"input": "a"})):
            full = server.post(path, body)
            assert full.status_code == 429 and full.headers["retry-after"] == "1"
            assert full.json()["error"]["type"] == "rate_limit_error"
        held.go.set()
        for thread in threads:
            thread.join()
        assert replies == [200] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_place(parent, stream):
    with serving([parent], batch_size=1) as server:
        want = server.chat(temperature=0, max_tokens=5)["choices"]
        with Held(server) as held:
            with connected(server) as client:
                body = json.dumps({"messages": ASKED, "max_tokens": 400, "stream": stream, "seed": 1}).encode()
                head = f"POST {ASK} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
                until(lambda: server.worker.waiting == 1)
            until(lambda: server.state.metrics.disconnects == 1)
            held.go.set()
        until(lambda: server.worker.running == server.worker.waiting == 0)
        assert server.served[0].live._running == [] and server.state.metrics.completion_tokens <= 6
        assert server.chat(temperature=0, max_tokens=5)["choices"] == want


def test_an_ending_server_takes_nothing_new(server):
    server.state.draining = True
    try:
        reply = server.post(ASK, {"messages": ASKED})
        assert reply.status_code == 503 and reply.headers["retry-after"] and server.get("/health").status_code == 503
        assert server.get("/metrics").status_code == 200
    finally:
        server.state.draining = False


@pytest.mark.parametrize("stream", [False, True])
def test_a_model_that_fails_is_an_error_of_the_server_and_the_log_has_no_text(parent, stream, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "baton.serve")
    with serving([parent]) as server:

        def broken(*_):
            raise ValueError(SECRET)

        with monkeypatch.context() as patched:
            patched.setattr(server.served[0].live._rows, "decode", broken)
            asked = [{"role": "user", "content": SECRET}]
            reply = server.post(f"{ASK}?question={SECRET}", {"messages": asked, "stream": stream, "seed": 0})
        if stream:
            event = json.loads(reply.text.rstrip().rpartition("data: ")[2])
        else:
            assert reply.status_code == 500
            event = reply.json()
        assert event["error"] == {
            "message": "the model failed (ValueError)",
            "type": "server_error",
            "param": None,
            "code": "model_failed",
        }
        assert server.chat(max_tokens=2)
    assert "the model failed (ValueError)" in caplog.text and SECRET not in caplog.text


def test_an_error_of_a_route_is_answered_and_its_text_is_not_logged(server, caplog, capfd, monkeypatch):
    def broken(*_):
        raise ValueError(SECRET)

    monkeypatch.setattr("baton.serve.chat.prepare", broken)
    reply = server.post(ASK, {"messages": ASKED})
    assert reply.status_code == 500 and reply.json()["error"]["message"] == "the server failed (ValueError)"
    assert "a request failed: ValueError" in caplog.text
    assert SECRET not in caplog.text + reply.text + "".join(capfd.readouterr())


# ---- the command


def baton(*arguments, **options):
    command = [sys.executable, "-m", "baton", "serve", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_sigterm_lets_running_answers_end(parent, root, tmp_path):
    key = tmp_path / "key"
    key.write_text("the-key\n")
    process = baton(parent.path, "--port", 0, "--api-key-file", key, cwd=root)
    try:
        ready = process.stdout.readline()
        assert ready.startswith("serving tiny at http://127.0.0.1:"), process.stderr.read()
        url = ready.split()[-1].removesuffix("/v1")
        body = {"messages": [{"role": "user", "content": SECRET}], "max_tokens": 300, "stream": True, "seed": 3}
        with httpx.stream("POST", url + ASK, json=body, headers={"Authorization": "Bearer the-key"}) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert process.wait(60) == 0
        said = process.stderr.read()
        assert "no new requests" in said and f"POST {ASK} 200" in said
        assert SECRET not in said and "the-key" not in said
    finally:
        process.kill()
        process.communicate()


def test_mistakes_in_the_command_are_named(parent, root, tmp_path):
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = baton(parent.path, "--port", port, cwd=root)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 2 and out == ""
        assert f"127.0.0.1:{port} cannot be used (Address already in use)" in err and "--port" in err
    with pytest.raises(UserError, match="--host no-such-host"):
        listen("no-such-host.invalid", 0)


def test_which_engine_serves(parent, tmp_path, monkeypatch):
    assert chosen("auto", 0) == chosen("auto", 1) == chosen("inprocess", 1) == "inprocess"
    with pytest.raises(UserError, match="vLLM is not installed here"):
        chosen("vllm", 0)
    program = tmp_path / "vllm"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert chosen("auto", 1) == chosen("vllm", 0) == "vllm"
    assert chosen("auto", 0) == chosen("inprocess", 1) == "inprocess"
    made = command(parent, "127.0.0.1", 8000, "the-key", Limits(batch_size=5))
    line = " ".join(made.arguments)
    assert line.startswith(f"{program} serve {parent.model_dir} --host 127.0.0.1 --port 8000 ")
    for part in (
        "--served-model-name tiny",
        "--max-num-seqs 5",
        "--dtype float32",
        f"--generation-config {parent.model_dir}",
    ):
        assert part in line
    assert "the-key" not in line and made.environment == {"VLLM_API_KEY": "the-key"}
    with pytest.raises(UserError, match="--port 0"):
        command(parent, "127.0.0.1", 0, None, Limits())
