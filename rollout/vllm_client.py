"""HTTP calls to a vLLM server, and the errors of a failed call. `vllm_server` decides what to request.

The standard library's client is enough. It reads no proxy from the environment, and each call opens a new connection,
so that no connection to a dead server remains.

The server is not trusted: one deadline covers a whole call, however slowly or endlessly it sends, and an answer has a
largest size and no compression.
"""

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPConnection, HTTPException, HTTPSConnection, IncompleteRead
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

from rollout.errors import ConnectionBroken, ServerFailed, ServerRefused, ServerTimeout

T = TypeVar("T")
_CONNECT_SECONDS = 10.0
_SHOWN = 500  # characters of an error's text
_LARGEST = 64 << 20  # bytes; an answer of a million tokens has about as many


class Client:
    """Calls the server at `base_url`. May be used from several threads."""

    def __init__(self, base_url: str) -> None:
        parts = urlsplit(base_url)
        assert parts.hostname is not None  # VLLMConfig.base_url has a pattern
        self.base_url, self.host = base_url, parts.hostname
        self._secure = parts.scheme == "https"
        self.port = parts.port or (443 if self._secure else 80)

    def get(self, path: str, timeout: float) -> Any:
        """The decoded JSON of the answer. Raises as `post` does."""
        return self._call("GET", path, None, timeout)

    def post(self, path: str, body: dict[str, Any], timeout: float) -> Any:
        """Sends JSON; the decoded JSON of the answer, or None when it is empty.

        Raises:
            ConnectionBroken: the connection failed or broke.
            ServerTimeout: no answer within `timeout` seconds.
            ServerRefused: status 4xx.
            ServerFailed: any other status except 200, or an answer that is not JSON.
        """
        return self._call("POST", path, json.dumps(body), timeout)

    def _call(self, method: Literal["GET", "POST"], path: str, body: str | None, timeout: float) -> Any:
        where = f"{method} {self.base_url}{path.partition('?')[0]}"
        connection = (HTTPSConnection if self._secure else HTTPConnection)(
            self.host, self.port, timeout=min(timeout, _CONNECT_SECONDS)
        )
        try:
            connection.connect()
            connection.sock.settimeout(timeout)
            with _deadline(connection.sock, timeout):
                connection.request(method, path, body, {"Content-Type": "application/json"})
                response = connection.getresponse()
                content = response.read(_LARGEST + 1)
                if response.length and len(content) <= _LARGEST:
                    raise IncompleteRead(content, response.length)
            status, text = response.status, content.decode("utf-8", "replace")
        except TimeoutError as error:
            raise ServerTimeout(f"{where}: no answer within {timeout:g} s") from error
        except (OSError, HTTPException) as error:
            raise ConnectionBroken(f"{where}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        encoding = response.headers.get("Content-Encoding", "identity")
        if len(content) > _LARGEST or encoding.strip().lower() != "identity":
            what = f"longer than {_LARGEST} bytes" if len(content) > _LARGEST else f"encoded as {encoding[:_SHOWN]}"
            raise ServerFailed(f"{where}: an answer {what}")
        if 400 <= status < 500:
            raise ServerRefused(f"{where}: status {status}: {_message(text)}")
        if status != 200:
            raise ServerFailed(f"{where}: status {status}: {_message(text)}")
        try:
            return json.loads(text) if text else None
        except (ValueError, RecursionError) as error:
            raise ServerFailed(f"{where}: the answer is not JSON: {text[:_SHOWN]!r}") from error


@contextmanager
def _deadline(connection: socket.socket, seconds: float) -> Iterator[None]:
    """Ends the connection after this time, wherever the body stands, and raises TimeoutError. A socket's own time-out
    begins anew with each byte that arrives."""
    over = threading.Event()

    def end() -> None:
        over.set()
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (OSError, HTTPException, ValueError) as error:
        if over.is_set():
            raise TimeoutError from error
        raise
    finally:
        timer.cancel()
    if over.is_set():
        raise TimeoutError


def pick(answer: Any, kind: type[T], *path: str | int) -> T:
    """The value at `path` of an answer. Raises ServerFailed when it is not there or not of this kind."""
    value = answer
    for part in path:
        known = part in value if isinstance(value, dict) else isinstance(value, list) and part in range(len(value))
        value = value[part] if known else None
    if not isinstance(value, kind):
        raise ServerFailed(f"the server's answer has no {'.'.join(map(str, path))}: {str(answer)[:_SHOWN]}")
    return value


def _message(text: str) -> str:
    """The message in an error's body: from vLLM's JSON, or the start of any other text."""
    try:
        return str(json.loads(text)["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text[:_SHOWN]
