"""HTTP calls to a vLLM server, and the errors of a failed call. `vllm_server` decides what to request.

The standard library's client is enough. It reads no proxy from the environment, and each call opens a new connection,
so that no connection to a dead server remains.
"""

import json
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Literal
from urllib.parse import urlsplit

from rollout.errors import ConnectionBroken, ServerFailed, ServerRefused, ServerTimeout

_CONNECT_SECONDS = 10.0
_SHOWN = 500  # characters of an error's text


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
            connection.request(method, path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            status, text = response.status, response.read().decode("utf-8", "replace")
        except TimeoutError as error:
            raise ServerTimeout(f"{where}: no answer within {timeout:g} s") from error
        except (OSError, HTTPException) as error:
            raise ConnectionBroken(f"{where}: {error or type(error).__name__}") from error
        finally:
            connection.close()
        if 400 <= status < 500:
            raise ServerRefused(f"{where}: status {status}: {_message(text)}")
        if status != 200:
            raise ServerFailed(f"{where}: status {status}: {_message(text)}")
        try:
            return json.loads(text) if text else None
        except ValueError as error:
            raise ServerFailed(f"{where}: the answer is not JSON: {text[:_SHOWN]!r}") from error


def _message(text: str) -> str:
    """The message in an error's body: from vLLM's JSON, or the start of any other text."""
    try:
        return str(json.loads(text)["error"]["message"])[:_SHOWN]
    except (ValueError, KeyError, TypeError):
        return text[:_SHOWN]
