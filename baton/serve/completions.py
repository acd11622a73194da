"""/v1/completions, with the log-probabilities of prompts (`echo`), by which evaluations score given answers."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from baton.serve import replies
from baton.serve.errors import wrong
from baton.serve.fields import CompletionBody
from baton.serve.generation import Generation, check_size, failure
from baton.serve.served import Served, Worker
from data.streaming import Streamed
from rollout.live import Token

_DEFAULT_TOKENS = 16  # as OpenAI's
Echoed = list[tuple[str, list[Token | int]]]
"""Of each prompt its text and, if they are asked for, its tokens with log-probabilities."""


def prompts_of(served: Served, body: CompletionBody) -> list[list[int]]:
    """The prompts' ids. Raises Refused."""
    if body.max_tokens == 0 and not body.echo:
        raise wrong("max_tokens", "0 gives nothing without `echo`")
    if body.stream and body.echo:
        raise wrong("echo", "a stream cannot begin with the prompt; leave out `stream` or `echo`", "unsupported_value")
    found = []
    for prompt in body.prompts:
        ids = served.document(prompt) if isinstance(prompt, str) else prompt
        if any(i >= served.encoder.vocab_size for i in ids):
            raise wrong("prompt", f"token ids are below {served.encoder.vocab_size}")
        found.append(ids)
    check_size(served, body, found, "prompt")
    return found


async def echoed(served: Served, worker: Worker, body: CompletionBody, prompts: Sequence[list[int]]) -> Echoed:
    """What of the prompts is in the answer; empty without `echo`. Raises Refused."""
    if not body.echo:
        return []
    texts = [served.encoder.text(ids, special=True) for ids in prompts]
    if body.logprobs is None:
        return [(text, []) for text in texts]
    wanted = [partial(served.live.logprobs, ids, body.logprobs) for ids in prompts]
    futures = worker.call(served, wanted)
    try:
        found = [await asyncio.wrap_future(future) for future in futures]
    except Exception as error:
        raise failure(error) from None
    finally:
        for future in futures:
            future.cancel()
    return [(text, [ids[0], *tokens]) for text, ids, tokens in zip(texts, prompts, found, strict=True)]


def start(served: Served, worker: Worker, body: CompletionBody, prompts: Sequence[list[int]]) -> Generation:
    """Asks for the answers. Raises Refused."""
    return Generation(
        served,
        worker,
        body,
        prompts,
        room=body.max_tokens or _DEFAULT_TOKENS,
        field_name="prompt",
        said=lambda: Streamed(served.encoder, body.stop, form="text"),
        top=body.logprobs,
    )


async def whole(
    served: Served, body: CompletionBody, prompts: Sequence[list[int]], before: Echoed, generation: Generation
) -> dict[str, Any]:
    """The reply at once."""
    count = len(generation.choices)
    texts, ends = [""] * count, [""] * count
    tokens: list[list[Token | int]] = [[] for _ in range(count)]
    async for piece in generation.pieces():
        texts[piece.index] += piece.text
        tokens[piece.index] += piece.tokens
        ends[piece.index] = piece.end or ""
    choices = []
    for i in range(count):
        lead, known = before[i // body.n] if before else ("", [])
        logprobs = None if body.logprobs is None else replies.completion_logprobs(served, [*known, *tokens[i]], 0)
        choices.append({"index": i, "text": lead + texts[i], "logprobs": logprobs, "finish_reason": ends[i]})
    return _reply(served, choices, prompts, generation.completion_tokens)


def without_answer(served: Served, prompts: Sequence[list[int]], before: Echoed) -> dict[str, Any]:
    """The reply with the prompts alone."""
    choices = [
        {
            "index": i,
            "text": text,
            "logprobs": replies.completion_logprobs(served, tokens, 0) if tokens else None,
            "finish_reason": "length",
        }
        for i, (text, tokens) in enumerate(before)
    ]
    return _reply(served, choices, prompts, 0)


async def chunks(served: Served, body: CompletionBody, generation: Generation) -> AsyncIterator[dict[str, Any]]:
    """The reply in parts."""
    head = replies.head(served, "text_completion", "cmpl")
    if body.include_usage:
        head["usage"] = None
    length = [0] * len(generation.choices)
    async for piece in generation.pieces():
        logprobs = None
        if body.logprobs is not None:
            logprobs = replies.completion_logprobs(served, piece.tokens, length[piece.index])
            length[piece.index] += sum(map(len, logprobs["tokens"]))
        yield {
            **head,
            "choices": [{"index": piece.index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.end}],
        }
    if body.include_usage:
        found = replies.usage(generation.prompt_tokens, generation.completion_tokens)
        yield {**head, "choices": [], "usage": found}


def _reply(served: Served, choices: list[dict[str, Any]], prompts: Sequence[list[int]], tokens: int) -> dict[str, Any]:
    return {
        **replies.head(served, "text_completion", "cmpl"),
        "choices": choices,
        "usage": replies.usage(sum(map(len, prompts)), tokens),
    }
