"""The JSON of answers, in OpenAI's form."""

import time
import uuid
from collections.abc import Sequence
from functools import cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from baton.serve.served import Served
from rollout.live import Token

_UNKNOWN = "�"


def head(served: Served, kind: str, prefix: str) -> dict[str, Any]:
    """What every reply begins with. `kind`: its `object`."""
    return {
        "id": f"{prefix}-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": served.name,
        "system_fingerprint": served.parent.fingerprint[:16],
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """`usage`. Stop tokens count as tokens of the answer."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


def chat_logprobs(served: Served, tokens: Sequence[Token]) -> dict[str, Any]:
    """`logprobs` of a chat's choice, of every token, also the one that ended the answer."""
    return {
        "content": [
            {**_entry(served, token.id, token.logprob), "top_logprobs": [_entry(served, *one) for one in token.top]}
            for token in tokens
        ],
        "refusal": None,
    }


def _entry(served: Served, token: int, logprob: float | None) -> dict[str, Any]:
    text = served.encoder.text([token], special=True)
    return {"token": text, "logprob": logprob, "bytes": list(_bytes(served, token, text))}


def _bytes(served: Served, token: int, text: str) -> bytes:
    """The bytes of a token, which may be a part of a character."""
    if _UNKNOWN not in text:
        return text.encode()
    name = str(served.encoder.tokenizer.convert_ids_to_tokens(token))
    if name.startswith("<0x") and name.endswith(">") and len(name) == 6:
        return bytes([int(name[3:5], 16)])
    table = _table()
    return bytes(table[c] for c in name) if all(c in table for c in name) else text.encode()


@cache
def _table() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for."""
    return {character: byte for byte, character in bytes_to_unicode().items()}


def completion_logprobs(served: Served, tokens: Sequence[Token | int], start: int) -> dict[str, Any]:
    """`logprobs` of a completion's choice. An id without a log-probability is the first token of an echoed prompt.

    `start`: length of the text before the first token.
    """
    found: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for token in tokens:
        text = served.encoder.text([token if isinstance(token, int) else token.id], special=True)
        found["tokens"].append(text)
        found["text_offset"].append(start)
        start += len(text)
        if isinstance(token, int):
            found["token_logprobs"].append(None)
            found["top_logprobs"].append(None)
            continue
        found["token_logprobs"].append(token.logprob)
        top = {served.encoder.text([i], special=True): logprob for i, logprob in reversed(token.top)}
        found["top_logprobs"].append(top if text in top or not token.top else {**top, text: token.logprob})
    return found
