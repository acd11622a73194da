"""Who may ask, and what is logged of it: the layer around the application.

A request is logged with its method, route, status and time, never with its text, its query or its key. Without a key,
a server that listens on this machine alone answers no page of the web: a browser names the page in `Origin`, and the
address that it was led to in `Host`.
"""

import asyncio
import ipaddress
import logging
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.serve.errors import Refused
from baton.serve.metrics import Metrics
from baton.serve.settings import ApiKey, Limits

log = logging.getLogger("baton.serve")
OPEN = ("/health",)
"""Routes that need no key."""


@dataclass
class State:
    """What the layer and the routes share."""

    limits: Limits
    key: ApiKey | None
    host: str
    """The address that the server listens on."""
    routes: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset(OPEN)
    metrics: Metrics = field(default_factory=Metrics)
    draining: bool = False
    """Whether the server ends, and takes no new requests."""


class Guard:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, state: State) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                self._check(scope)
            except Refused as refused:
                await reply(refused)(scope, receive, sending)
            else:
                await self._app(scope, receive, sending)
        except Exception as error:  # its text may have some of the request in it
            log.error("a request failed: %s", type(error).__name__)
            log.debug("where it failed", exc_info=error)
            if not status:
                broken = Refused(500, f"the server failed ({type(error).__name__})", code="server_failed")
                await reply(broken)(scope, receive, sending)
        finally:
            path = str(scope["path"])
            route = path if path in self._state.routes else "other"
            self._state.metrics.requests[route, status or 499] += 1
            log.info("%s %s %s %.2fs", scope["method"], route, status or 499, time.monotonic() - start)

    def _check(self, scope: Scope) -> None:
        headers, state = Headers(scope=scope), self._state
        if state.key is None and _is_loopback(state.host):
            origin = headers.get("origin")
            for name, given in (("Host", "//" + headers.get("host", "")), ("Origin", origin or "")):
                if given and not _is_loopback(_host_of(given)):
                    raise Refused(403, f"{name}: a server without a key answers only this machine", code="forbidden")
        if state.draining and scope["path"] != "/metrics":
            raise Refused(503, "the server is ending", code="unavailable", retry=5)
        if state.key is not None and scope["path"] not in state.open:
            shown = headers.get("authorization")
            if not state.key.accepts(shown):
                told = "the key is wrong" if shown else "a key is needed, in the header Authorization: Bearer KEY"
                raise Refused(401, told, code="invalid_api_key")
        if scope["method"] == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, "Content-Type: give application/json", code="unsupported_media_type")
            length = headers.get("content-length", "")
            if length.isascii() and length.isdigit() and int(length) > state.limits.max_body:
                raise _too_large(state.limits)


def _host_of(address: str) -> str:
    try:
        return urlsplit(address).hostname or ""
    except ValueError:
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reply(refused: Refused) -> JSONResponse:
    """The response to a request that is refused."""
    return JSONResponse(refused.body(), refused.status, refused.headers)


def _too_large(limits: Limits) -> Refused:
    return Refused(413, f"the request has more than {limits.max_body} bytes", code="request_too_large")


async def read_body(request: Request, limits: Limits) -> bytes:
    """The whole body. Raises Refused, 413 or 408."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                size += len(part)
                if size > limits.max_body:
                    raise _too_large(limits)
                parts.append(part)
    except TimeoutError:
        raise Refused(408, f"the request did not come whole within {limits.body_seconds:g} s", code="timeout") from None
    return b"".join(parts)
