"""A local chat-completions endpoint for the judge's tests; each test supplies its answers."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Body = dict[str, Any]


@dataclass
class Response:
    content: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drip: threading.Event | None = None
    """Send the content over and over, byte by byte, until this is set."""
    hang_up: bool = False
    """Close the connection without a word."""


def chat(
    text: str | None, finish: str | None = "stop", usage: tuple[int, int] | None = (100, 20), **message
) -> Response:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    body: Body = {"id": "x", "object": "chat.completion", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Response(json.dumps(body).encode())


def graded(score: object) -> Response:
    return chat(json.dumps({"reasoning": "It {is} so.", "score": score}))


def preferred(winner: str) -> Response:
    return chat(json.dumps({"reasoning": "It is so.", "winner": winner}))


def failed(status: int, message: str = "no", headers: dict[str, str] | None = None, **marks: str) -> Response:
    return Response(json.dumps({"error": {"message": message, **marks}}).encode(), status, headers or {})


def pieces(body: Body) -> dict[str, str]:
    """The fenced texts of a question by the mark's name without its tag, parsed as the judge is told to read them."""
    system, user = (message["content"] for message in body["messages"])
    tag = re.search(r"the tag ([0-9a-f]{16})", system)[1]
    return {m[1]: m[2] for m in re.finditer(rf"<([\w-]+)-{tag}>\n(.*?)\n</\1-{tag}>", user, re.DOTALL)}


class JudgeServer:
    """`bodies` of the questions, their `keys` (Authorization), when they `arrived`, and how many were `in_flight`."""

    def __init__(self, answer: Callable[[Body], Response]) -> None:
        self.answer = answer
        self.bodies: list[Body] = []
        self.keys: list[str | None] = []
        self.arrived: list[float] = []
        self.most_in_flight = 0
        self._in_flight = 0
        self._lock = threading.Lock()

    def handle(self, body: Body, key: str | None) -> Response:
        with self._lock:
            self.bodies.append(body)
            self.keys.append(key)
            self.arrived.append(time.monotonic())
            self._in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self._in_flight)
        try:
            return self.answer(body)
        finally:
            with self._lock:
                self._in_flight -= 1


@contextmanager
def serve(answer: Callable[[Body], Response]) -> Iterator[tuple[JudgeServer, str]]:
    """(server, base URL)."""
    judge_server = JudgeServer(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = 1 << 16  # head and body in one packet; else each answer waits for an acknowledgement

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                response = failed(404, f"no {self.path}")
            else:
                response = judge_server.handle(body, self.headers["Authorization"])
            if response.hang_up:
                self.close_connection = True
                return
            self.send_response(response.status)
            for name, value in response.headers.items():
                self.send_header(name, value)
            length = len(response.content) if response.drip is None else 1_000_000
            self.send_header("Content-Length", str(length))
            self.end_headers()
            if response.drip is None:
                self.wfile.write(response.content)
                return
            self.close_connection = True
            while not response.drip.wait(0.01):
                self.wfile.write(response.content)
                self.wfile.flush()

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *arguments: object) -> None:  # some tests have a client that gives up
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield judge_server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
