"""The web chat of `baton serve --ui`: one page, and the route by which it keeps preferences (docs/web_chat.md).

The page is one document without any other file. Its policy (the header Content-Security-Policy) lets it run its own
script and style, by their hashes, ask this server, and nothing else; no text can become markup or script in it.
"""

import asyncio
import base64
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from baton.serve.errors import Refused, wrong
from baton.serve.fields import Body, read
from baton.serve.guard import State, log, read_body
from baton.serve.preferences import Preferences
from data.errors import DataError
from data.load import read_row
from data.records import Origin, Preference
from handoff.errors import UserError

PAGE, KEEP = "/", "/ui/preferences"


class Turn(BaseModel):
    """A turn of the conversation that both answers answer."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    role: Literal["system", "user", "assistant"]
    content: str


class PreferenceBody(Body):
    """A request to keep a preference."""

    messages: list[Turn] = Field(min_length=1)
    chosen: str
    rejected: str
    chosen_model: str
    rejected_model: str


@dataclass(frozen=True)
class Document:
    """The page, and the headers that it is sent with."""

    text: str
    headers: dict[str, str]


def document() -> Document:
    """Puts the page together from its files."""
    folder = Path(__file__).parent
    text, style, script = ((folder / name).read_text(encoding="utf-8") for name in ("page.html", "page.css", "page.js"))
    text = text.replace("<style></style>", f"<style>{style}</style>")
    text = text.replace("<script></script>", f"<script>{script}</script>")
    policy = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "connect-src 'self'",
        "img-src data:",  # the empty icon, without which a browser asks for one
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return Document(
        text,
        {
            "Content-Security-Policy": "; ".join(policy),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Opener-Policy": "same-origin",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Cache-Control": "no-store",
        },
    )


def _hash(source: str) -> str:
    return f"'sha256-{base64.b64encode(sha256(source.encode()).digest()).decode()}'"


def add_page(app: FastAPI, state: State, names: Collection[str], preferences: Preferences) -> None:
    """Adds the page and its route to a server of these models. The page itself needs no key: it asks for it."""
    made = document()

    async def show(request: Request) -> Response:
        return HTMLResponse(made.text, headers=made.headers)

    async def keep(request: Request) -> Response:
        body = read(PreferenceBody, await read_body(request, state.limits))
        row = _row(body, names)
        try:
            await asyncio.to_thread(preferences.add, row)
        except OSError as error:
            log.error("%s: a preference could not be written (%s)", preferences.path, error.strerror)
            raise Refused(500, f"it could not be written ({error.strerror})", code="not_written") from None
        except UserError as error:
            log.error("a preference could not be written: %s", error)
            raise Refused(500, "it could not be written; the server's log says why", code="not_written") from None
        return JSONResponse({"kept": True})

    app.add_api_route(PAGE, show, methods=["GET"], response_model=None)
    app.add_api_route(KEEP, keep, methods=["POST"], response_model=None)
    state.routes = state.routes | {PAGE, KEEP}
    state.open = state.open | {PAGE}


def _row(body: PreferenceBody, names: Collection[str]) -> dict[str, object]:
    """The row to write. Raises Refused, 400, if stages that learn from preferences would not use it."""
    if body.model is not None:
        raise wrong("model", "name the two models in chosen_model and rejected_model")
    for field in ("chosen_model", "rejected_model"):
        if getattr(body, field) not in names:
            raise wrong(field, f"there are {', '.join(names)}")
    # Answers are turns, because a text that begins with `Human:` would be read as a transcript.
    row: dict[str, object] = {
        "prompt": [turn.model_dump() for turn in body.messages],
        "chosen": [{"role": "assistant", "content": body.chosen}],
        "rejected": [{"role": "assistant", "content": body.rejected}],
        "chosen_model": body.chosen_model,
        "rejected_model": body.rejected_model,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        read_row(row, "preference", Preference, Origin("request", 1))
    except DataError as error:
        raise wrong("messages", f"no stage could learn from this pair: {error}") from None
    return row
