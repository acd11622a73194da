"""/v1/embeddings: a text's hidden states in the last layer, their mean or the last one, as a vector of length 1."""

import asyncio
import base64
import struct
from collections.abc import Sequence
from functools import partial
from typing import Any

from baton.serve.errors import wrong
from baton.serve.fields import EmbeddingBody
from baton.serve.generation import failure
from baton.serve.served import Served, Worker


def rows_of(served: Served, body: EmbeddingBody) -> list[list[int]]:
    """The inputs' ids. Raises Refused."""
    inputs = body.inputs
    if len(inputs) > served.limits.max_inputs:
        raise wrong("input", f"{len(inputs)} texts; at most {served.limits.max_inputs} a request")
    if body.dimensions is not None and body.dimensions != served.hidden_size:
        raise wrong("dimensions", f"this model's vectors have {served.hidden_size} and cannot be shortened")
    rows = []
    for i, given in enumerate(inputs):
        ids = served.document(given) if isinstance(given, str) else given
        if any(token >= served.encoder.vocab_size for token in ids):
            raise wrong("input", f"token ids are below {served.encoder.vocab_size}")
        if not 0 < len(ids) <= served.context:
            raise wrong(
                "input", f"text {i} has {len(ids)} tokens; 1 to {served.context} fit", "context_length_exceeded"
            )
        rows.append(ids)
    return rows


async def embedded(served: Served, worker: Worker, body: EmbeddingBody, rows: Sequence[list[int]]) -> dict[str, Any]:
    """The reply. Raises Refused."""

    def vector(ids: list[int]) -> list[float]:
        return served.vector(served.live.hidden(ids), served.pooling)

    futures = worker.call(served, [partial(vector, ids) for ids in rows])
    try:
        vectors = [await asyncio.wrap_future(future) for future in futures]
    except Exception as error:
        raise failure(error) from None
    finally:
        for future in futures:
            future.cancel()
    tokens = sum(map(len, rows))
    return {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": _written(found, body.encoding_format)}
            for i, found in enumerate(vectors)
        ],
        "model": served.name,
        "pooling": served.pooling,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


def _written(vector: list[float], encoding: str) -> list[float] | str:
    if encoding == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")
