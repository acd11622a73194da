"""Asks one question of an OpenAI-compatible endpoint: `POST <base_url>/chat/completions`, with retries.

There are three outcomes: a `Reply`; `Unanswered`, for a fault of this question alone (the caller goes on with the
others); or a RewardError, for a fault that every question would meet (wrong key, wrong model, no credit).

Retried, up to `retries` times: 408, 409, 425, 429, all 5xx, time-outs, failed or broken connections, and replies that
are not a chat completion. The wait doubles each time, with jitter, and is never shorter than the server's Retry-After.
Retry-After holds back all threads of the client, because a rate limit applies to the account, not to one request.

The endpoint is not trusted: one deadline covers a whole attempt, however slowly or endlessly it sends; a reply must not
be compressed, since a small one may unpack to any size; and the key is removed from whatever it sends before anything
is cut, kept or shown.
"""

import asyncio
import json
import math
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote

import httpx

from reward.functions import RewardError

LONGEST_WAIT = 300.0
"""Seconds. When a server asks for a longer wait, the question counts as unanswered."""
_LONGEST_BACKOFF = 60.0
_LARGEST_REPLY = 4 << 20
_MOST_TOKENS = 10_000_000  # of one question and its answer; no model reads or writes as many
_SHOWN = 300  # characters of a message
_REPEATED = frozenset({408, 409, 425, 429})
# Error codes and types that mean "no credit"; some endpoints send them with status 429, which otherwise means "retry
# later". OpenAI uses several codes with one type, the first here; Anthropic's is the second.
_NO_CREDIT = frozenset({"insufficient_quota", "enforced_spend_limit_reached"})
_FILTERED = frozenset({"content_filter", "content_policy_violation"})
_TOO_LONG = ("context_length_exceeded", "context length", "prompt is too long")


@dataclass(frozen=True)
class Reply:
    """The endpoint's reply to one question."""

    text: str
    """Text of the first choice; empty when there is none."""
    finish: str
    """`finish_reason`: "stop", "length", "content_filter", ...; empty where it was not given."""
    refusal: str
    """The provider's own words for a refusal; empty when there was none."""
    tokens: tuple[int, int] | None
    """Input and output tokens as billed; None where the endpoint does not say."""


class Tally:
    """Sums by name, from many threads."""

    def __init__(self, *names: str) -> None:
        self._sums = dict.fromkeys(names, 0.0)
        self._lock = threading.Lock()

    def add(self, **amounts: float) -> None:
        with self._lock:
            for name, amount in amounts.items():
                self._sums[name] += amount

    def sums(self) -> dict[str, float]:
        with self._lock:
            return dict(self._sums)


class Unanswered(Exception):
    """This question got no answer, for the reason in the message. Other questions may still be answered."""


@dataclass(frozen=True)
class Key:
    """The secret key and the name of the variable that holds it. Only the name is ever shown."""

    secret: str
    variable: str


class Client:
    """Asks questions from many threads over one pool of connections."""

    def __init__(
        self,
        base_url: str,
        model: str,
        key: Key | None,
        tally: Tally,
        *,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float,
    ) -> None:
        """`timeout`: seconds for one whole attempt. `backoff`: seconds before the first retry. `tally` counts
        `requests`, the attempts sent, and `repeated`, how many of them were retries."""
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._model = model
        self._key = key
        self._tally = tally
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        headers = {"Accept-Encoding": "identity"}
        if key is not None:
            headers["Authorization"] = f"Bearer {key.secret}"
        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        # An asynchronous client, because only there can a deadline end a call wherever it stands; no other time-out.
        self._http = httpx.AsyncClient(headers=headers, timeout=None, limits=limits)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge-calls", daemon=True)
        self._thread.start()
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._not_before = 0.0  # time.monotonic()

    def ask(self, body: dict[str, Any]) -> Reply:
        """Raises Unanswered or RewardError; see the module's docstring."""
        trouble = ""
        for attempt in range(self._retries + 1):
            self._wait_for_turn()
            self._tally.add(requests=1, repeated=attempt > 0)
            try:
                response, content = asyncio.run_coroutine_threadsafe(self._post(body), self._loop).result()
            except CancelledError as error:
                raise Unanswered("the call was cancelled") from error
            except httpx.RequestError as error:
                trouble = self._redact(f"{type(error).__name__}: {error}")
            else:
                if response.status_code == 200:
                    try:
                        return read_reply(content, self._redact)
                    except ValueError as error:
                        trouble = f"{error}: {self._redact(_decoded(content))[:200]!r}"
                else:
                    message, marks = read_error(content)
                    trouble = f"{response.status_code} {self._redact(message)[:_SHOWN]}".rstrip()
                    if marks & _FILTERED:
                        return Reply("", "content_filter", trouble, None)
                    self._give_up_if_hopeless(response, trouble, marks)
                    self._hold_back(retry_after(response.headers.get("retry-after", ""), time.time()), trouble)
            if attempt < self._retries:
                # Jitter spreads the threads' retries. No result depends on it, so it needs no seed.
                backoff = min(self._backoff * 2**attempt, _LONGEST_BACKOFF)
                self._stop.wait(backoff * random.uniform(0.5, 1.5))
        raise Unanswered(f"{trouble} (asked {self._retries + 1} times)")

    def stop(self) -> None:
        """Ends every wait and every call at once; no further question is sent."""
        self._stop.set()
        self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        for call in asyncio.all_tasks(self._loop):
            call.cancel()

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._http.aclose(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _post(self, body: dict[str, Any]) -> tuple[httpx.Response, bytes]:
        """One attempt, from the connection to the last byte, within the time and the size that are allowed."""
        content = bytearray()
        try:
            async with asyncio.timeout(self._timeout), self._http.stream("POST", self._url, json=body) as response:
                encoding = response.headers.get("content-encoding", "identity")
                if encoding.strip().lower() != "identity":
                    raise httpx.DecodingError(f"a reply encoded as {encoding[:_SHOWN]}, which was not asked for")
                async for chunk in response.aiter_raw():
                    content += chunk
                    if len(content) > _LARGEST_REPLY:
                        raise httpx.DecodingError(f"a reply of more than {_LARGEST_REPLY} bytes")
        except TimeoutError as error:
            raise httpx.ReadTimeout(f"no complete reply within {self._timeout:g} s") from error
        return response, bytes(content)

    def _wait_for_turn(self) -> None:
        with self._lock:
            wait = self._not_before - time.monotonic()
        if wait > 0:
            self._stop.wait(wait)
        if self._stop.is_set():
            raise Unanswered("the call was cancelled")

    def _hold_back(self, asked: float | None, trouble: str) -> None:
        """Makes all threads wait as long as the server asked for."""
        if asked is None:
            return
        if asked > LONGEST_WAIT:
            raise Unanswered(f"{trouble} (it asks for a wait of {asked:.0f} s; the limit is {LONGEST_WAIT:.0f} s)")
        with self._lock:
            self._not_before = max(self._not_before, time.monotonic() + asked)

    def _give_up_if_hopeless(self, response: httpx.Response, trouble: str, marks: frozenset[str]) -> None:
        """Raises for a status that a later retry would not change."""
        status = response.status_code
        if status == 413 or (status == 400 and any(mark in trouble.lower() for mark in _TOO_LONG)):
            raise Unanswered(trouble)
        if not marks & _NO_CREDIT and (status in _REPEATED or status >= 500):
            return
        name = "(none: `api_key_env` is null)" if self._key is None else f"in the variable {self._key.variable}"
        if marks & _NO_CREDIT or status == 402:
            fix = f"the account of the key {name} has no credit left"
        elif status == 401:
            fix = f"the key {name} is not accepted: set `api_key_env` to a variable that holds a valid one"
        elif status == 403:
            fix = f"the key {name} may not use model `{self._model}`: ask for access, or set another `model` or key"
        elif status == 404:
            fix = f"no such path or no model `{self._model}` there: check `base_url` and `model`"
        elif 300 <= status < 400:
            place = self._redact(response.headers.get("location", "nowhere"))[:_SHOWN]
            fix = f"it redirects to {place}: set `base_url` accordingly"
        else:
            fix = "change the rejected key, or remove it with null, under `request` in the reward's `args`"
        raise RewardError(f"judge {self._url} answered {trouble}; {fix}")

    def _redact(self, text: str) -> str:
        """Removes the key, also as it stands in an address or in JSON; some endpoints repeat it. The whole text is
        given, since a text that is cut first may end in a part of the key."""
        if self._key is None:
            return text
        secret = self._key.secret
        for form in (secret, quote(secret, safe=""), json.dumps(secret)[1:-1], secret.replace("/", "\\/")):
            text = text.replace(form, "<key>")
        return text


def read_reply(content: bytes, redact: Callable[[str], str] = str) -> Reply:
    """A chat completion's first choice. Raises ValueError when the content is not a chat completion.

    `redact`: removes what must not be kept from a text.

    >>> read_reply(b'{"choices": [{"message": {"content": "7"}, "finish_reason": "stop"}], "usage": null}')
    Reply(text='7', finish='stop', refusal='', tokens=None)
    """
    try:
        body = json.loads(content)
        choices = body["choices"] or [{}]  # some endpoints send no choice when they block the question
        message = choices[0].get("message") or {}
        finish = choices[0].get("finish_reason") or ("content_filter" if not body["choices"] else "")
        said = message.get("content") or ""
        parts = [said] if isinstance(said, str) else [part.get("text") or "" for part in said]
        usage = body.get("usage") or {}
        billed = usage.get("prompt_tokens") is not None and usage.get("completion_tokens") is not None
        return Reply(
            text=redact(whole("".join(parts))),
            finish=redact(whole(str(finish)))[:_SHOWN],
            refusal=redact(whole(str(message.get("refusal") or "")))[:_SHOWN],
            tokens=(_count(usage["prompt_tokens"]), _count(usage["completion_tokens"])) if billed else None,
        )
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        why = f" ({error})" if isinstance(error, _BadCount) else ""
        raise ValueError(f"200, but the reply is not a chat completion{why}") from error


class _BadCount(ValueError):
    """A number of tokens that no answer has."""


def _count(value: Any) -> int:
    """A number of tokens: what is spent is added up from it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MOST_TOKENS:
        raise _BadCount(f"its usage says {str(value)[:40]} tokens")
    return int(value)


def read_error(content: bytes) -> tuple[str, frozenset[str]]:
    """The whole message, and the code and type, in the body of an error, in any of the shapes that endpoints use.

    >>> read_error(b'{"error": {"message": "No more.", "type": "insufficient_quota", "code": null}}')
    ('No more.', frozenset({'insufficient_quota'}))
    >>> read_error(b'<h1>Bad gateway</h1>')
    ('<h1>Bad gateway</h1>', frozenset())
    """
    text = _decoded(content)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        return text, frozenset()
    if isinstance(body, list) and body:
        body = body[0]
    error = body.get("error", body) if isinstance(body, dict) else body
    if not isinstance(error, dict):
        return str(error), frozenset()
    marks = frozenset(str(error[name]) for name in ("code", "type", "status") if error.get(name))
    return str(error.get("message") or error.get("detail") or text), marks


def retry_after(header: str, now: float) -> float | None:
    """Seconds to wait by a Retry-After header (a number or a date); None when it is neither. `now`: Unix time.

    >>> retry_after("2.5", 0.0), retry_after("Thu, 01 Jan 1970 00:01:00 GMT", 50.0), retry_after("soon", 0.0)
    (2.5, 10.0, None)
    """
    try:
        seconds = float(header)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(header).timestamp() - now
        except (ValueError, TypeError, OverflowError):
            return None
    return None if math.isnan(seconds) else max(0.0, seconds)


def whole(text: str) -> str:
    """`text` with each lone surrogate, which JSON readers and disks reject, replaced by a question mark."""
    return text.encode("utf-8", errors="replace").decode()


def _decoded(content: bytes) -> str:
    return content.decode("utf-8", errors="replace").strip()
