"""Tokens per second of `baton serve` with eight clients at once, beside one client: continuous batching.

    python -m benchmarks.serve [--json FILE] [--model TARGET]

By default the model has random weights, 24 million of them, and every answer 64 tokens. Ours is eight clients, the peer
is one; rows are answers at once, and streams.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path

from benchmarks.serving import CHAT, Address, body, served
from benchmarks.table import in_turns, report

CLIENTS, REQUESTS, TOKENS = 8, 3, 64


def main(path: Path | None, model: str | None = None) -> None:
    """Runs the benchmark."""
    with served(model, "25M", 0.0) as server:
        numbers = count()

        def rate(clients: int, stream: bool) -> float:
            start = time.perf_counter()
            with ThreadPoolExecutor(clients) as pool:
                tokens = sum(pool.map(lambda _: _ask(server, next(numbers), stream), range(clients)))
            return tokens / (time.perf_counter() - start)

        rows = [
            in_turns(f"serve_{kind}", "tokens/s", partial(rate, CLIENTS, stream), partial(rate, 1, stream))
            for kind, stream in (("answers", False), ("streams", True))
        ]
    report(rows, path)


def _ask(server: Address, number: int, stream: bool) -> int:
    """One client's requests, one after the other; returns their tokens."""
    tokens = 0
    with server.client() as client:
        for i in range(REQUESTS):
            prompt = server.prompts[(number * REQUESTS + i) % len(server.prompts)]
            asked = body(prompt, seed=number, max_tokens=TOKENS)
            if not stream:
                tokens += client.post(CHAT, json=asked).raise_for_status().json()["usage"]["completion_tokens"]
                continue
            asked |= {"stream": True, "logprobs": True}  # an event for each token
            with client.stream("POST", CHAT, json=asked) as reply:
                tokens += sum('"top_logprobs"' in line for line in reply.iter_lines())
    return tokens


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--model", help="serve this target of `baton serve` instead")
    given = parser.parse_args()
    main(given.json, given.model)
