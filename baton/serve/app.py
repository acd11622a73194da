"""The routes of the server."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp

from baton.serve import chat, completions, embeddings
from baton.serve.errors import Refused
from baton.serve.fields import B, ChatBody, CompletionBody, EmbeddingBody, read
from baton.serve.generation import Generation
from baton.serve.guard import Guard, State, read_body, reply
from baton.serve.served import Served, Worker

Events = AsyncIterator[dict[str, Any]]
T = TypeVar("T")


class Application:
    """The routes, for some models. `asgi` is what a server runs."""

    def __init__(self, served: Sequence[Served], worker: Worker, state: State) -> None:
        self._served = {one.name: one for one in served}
        self._worker, self._state = worker, state
        # Few threads: the tokenizer has a lock, and what a thread has once allocated for a long prompt, it keeps.
        self._readers = ThreadPoolExecutor(2, "baton-read")
        self.fast = FastAPI(title="Baton", docs_url=None, redoc_url=None, openapi_url=None)
        add = self.fast.add_api_route
        routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._completions),
            ("POST", "/v1/embeddings", self._embeddings),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._one_model),
            ("GET", "/health", self._health),
            ("GET", "/metrics", self._metrics),
        ]
        for method, path, handler in routes:
            add(path, handler, methods=[method], response_model=None)
        state.routes = state.routes | {path for _, path, _ in routes}
        self.fast.add_exception_handler(Refused, _refused)
        self.fast.add_exception_handler(HTTPException, _http)
        self.fast.add_exception_handler(ClientDisconnect, _left)
        self.fast.add_exception_handler(Exception, _broken)
        self.asgi: ASGIApp = Guard(self.fast, state)

    async def _read(self, request: Request, kind: type[B]) -> tuple[B, Served]:
        body = read(kind, await read_body(request, self._state.limits))
        if body.model is None and len(self._served) > 1:
            raise Refused(400, f"model: give one of {', '.join(self._served)}", "model", "missing")
        if body.model is not None and body.model not in self._served:
            raise Refused(404, f"model: there are {', '.join(self._served)}", "model", "model_not_found")
        return body, self._served[body.model or next(iter(self._served))]

    async def _aside(self, work: Callable[[Served, B], T], served: Served, body: B) -> T:
        """Reads the prompts in another thread, while this one goes on with other requests."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, work, served, body)

    async def _chat(self, request: Request) -> Response:
        body, served = await self._read(request, ChatBody)
        made = await self._aside(chat.prepare, served, body)
        generation = chat.start(served, self._worker, body, made)
        if body.stream:
            return self._stream(generation, chat.chunks(served, body, made, generation))
        return await self._whole(request, generation, chat.whole(served, body, made, generation))

    async def _completions(self, request: Request) -> Response:
        body, served = await self._read(request, CompletionBody)
        prompts = await self._aside(completions.prompts_of, served, body)
        echoed = await self._until_left(request, completions.echoed(served, self._worker, body, prompts))
        if body.max_tokens == 0:
            return JSONResponse(completions.without_answer(served, prompts, echoed))
        generation = completions.start(served, self._worker, body, prompts)
        if body.stream:
            return self._stream(generation, completions.chunks(served, body, generation))
        return await self._whole(request, generation, completions.whole(served, body, prompts, echoed, generation))

    async def _embeddings(self, request: Request) -> Response:
        body, served = await self._read(request, EmbeddingBody)
        rows = await self._aside(embeddings.rows_of, served, body)
        work = embeddings.embedded(served, self._worker, body, rows)
        return JSONResponse(await self._until_left(request, work))

    async def _whole(self, request: Request, generation: Generation, work: Awaitable[dict[str, Any]]) -> Response:
        start = time.monotonic()
        try:
            return JSONResponse(await self._until_left(request, work))
        finally:
            self._ended(generation, start)

    def _stream(self, generation: Generation, events: Events) -> Response:
        async def lines() -> AsyncIterator[str]:
            start = time.monotonic()
            try:
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False)}\n\n"
                yield "data: [DONE]\n\n"
            except Refused as refused:
                yield f"data: {json.dumps(refused.body())}\n\n"
            finally:
                self._ended(generation, start)

        return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    def _ended(self, generation: Generation, start: float) -> None:
        generation.close()
        metrics = self._state.metrics
        metrics.prompt_tokens += generation.prompt_tokens
        metrics.completion_tokens += generation.completion_tokens
        metrics.disconnects += not generation.complete
        metrics.seconds.add(time.monotonic() - start)
        if generation.first is not None:
            metrics.first_token.add(generation.first - start)

    async def _until_left(self, request: Request, work: Awaitable[Any]) -> Any:
        """The result of `work`, unless the client leaves before. Raises ClientDisconnect then."""

        async def left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        doing, leaving = asyncio.ensure_future(work), asyncio.ensure_future(left())
        try:
            await asyncio.wait((doing, leaving), return_when=asyncio.FIRST_COMPLETED)
            if not doing.done():
                raise ClientDisconnect
            return doing.result()
        finally:
            for task in (doing, leaving):
                if not task.done():
                    task.cancel()
                    with suppress(asyncio.CancelledError, Exception):
                        await task

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [one.described() for one in self._served.values()]})

    async def _one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._served:
            raise Refused(404, f"model: there are {', '.join(self._served)}", "model", "model_not_found")
        return JSONResponse(self._served[name].described())

    async def _health(self, request: Request) -> Response:
        if not self._worker.alive:
            raise Refused(503, "the thread that computes has ended", code="unavailable")
        return JSONResponse({"status": "ok", "running": self._worker.running, "waiting": self._worker.waiting})

    async def _metrics(self, request: Request) -> Response:
        text = self._state.metrics.text(self._worker.running, self._worker.waiting)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    return reply(error)


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return reply(Refused(error.status_code, str(error.detail), code="no_such_route"))


async def _broken(request: Request, error: Exception) -> Response:
    return reply(Refused(500, f"the server failed ({type(error).__name__})", code="server_failed"))


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)
