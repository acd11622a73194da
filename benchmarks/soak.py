"""Sixteen clients for half an hour: no answer is lost, none is wrong, and the server's memory does not grow.

    python -m benchmarks.soak [--minutes 30] [--clients 16] [--model TARGET] [--json FILE]

First one client alone asks every question in every length, greedily and with a seed. Then all clients ask at random:
answers at once and streams, which must equal those; several answers; embeddings; requests that are wrong; and some
leave in the middle. Memory is measured from a fifth of the time on; "flat" is at most 5 % above what it is then. Exit
code 1 when something is not as it should be.
"""

import argparse
import json
import random
import socket
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import psutil

from benchmarks.serving import CHAT, Address, body, served

LENGTHS = (4, 20, 60, 150)
FLAT = 1.05
WRONG: tuple[tuple[Any, int], ...] = (
    ({"messages": []}, 400),
    (body("x", temperature=-1), 400),
    (body("x", foo=1), 400),
    (body("x", n=1000), 400),
    (body("word " * 50_000), 400),
    (body("x" * 2**21), 413),
    ({"messages": [{"role": "user", "content": "x"}], "model": "absent"}, 404),
)


class Soak:
    """The questions, their right answers, and what has happened."""

    def __init__(self, server: Address, seconds: float) -> None:
        self.server, self.end = server, time.monotonic() + seconds
        self.done: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.right: dict[tuple[str, int, bool], str] = {}
        self._lock = threading.Lock()

    def learn(self, questions: int) -> None:
        """What one client alone is answered to the first `questions` prompts, which all clients then ask."""
        del self.server.prompts[questions:]
        with self.server.client() as client:
            for prompt in self.server.prompts:
                for length in LENGTHS:
                    for greedy in (True, False):
                        self.right[prompt, length, greedy] = _said(
                            client.post(CHAT, json=_asked(prompt, length, greedy)).raise_for_status().json()
                        )

    def client(self, number: int) -> None:
        """One client, until the end."""
        chance = random.Random(number)
        kinds = (self._whole, self._stream, self._several, self._embedding, self._mistake, self._leave)
        with self.server.client() as client:
            while time.monotonic() < self.end:
                kind = chance.choices(kinds, (8, 6, 1, 1, 2, 2))[0]
                try:
                    problem = kind(client, chance)
                except (httpx.HTTPError, OSError, ValueError, KeyError) as error:
                    problem = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.done[kind.__name__.strip("_")] += 1
                    if problem:
                        self.wrong.append(f"{kind.__name__.strip('_')}: {problem}"[:300])

    def _question(self, chance: random.Random) -> tuple[str, int, bool]:
        return chance.choice(self.server.prompts), chance.choice(LENGTHS), chance.random() < 0.7

    def _whole(self, client: httpx.Client, chance: random.Random) -> str:
        question = self._question(chance)
        said = _said(client.post(CHAT, json=_asked(*question)).raise_for_status().json())
        return "" if said == self.right[question] else f"{said!r} instead of {self.right[question]!r}"

    def _stream(self, client: httpx.Client, chance: random.Random) -> str:
        question = self._question(chance)
        said, last = "", ""
        with client.stream("POST", CHAT, json={**_asked(*question), "stream": True}) as reply:
            for line in reply.iter_lines():
                last = line or last
                if line.startswith("data: {"):
                    said += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        if last != "data: [DONE]":
            return f"the stream ended with {last[:100]}"
        return "" if said == self.right[question] else f"{said!r} instead of {self.right[question]!r}"

    def _several(self, client: httpx.Client, chance: random.Random) -> str:
        prompt, length, _ = self._question(chance)
        reply = client.post(CHAT, json={**_asked(prompt, length, False), "n": 3}).raise_for_status().json()
        first = reply["choices"][0]["message"]["content"]
        return "" if first == self.right[prompt, length, False] and len(reply["choices"]) == 3 else "other answers"

    def _embedding(self, client: httpx.Client, chance: random.Random) -> str:
        asked = {"input": chance.choices(self.server.prompts, k=3)}
        reply = client.post("/v1/embeddings", json=asked).raise_for_status().json()
        return "" if len(reply["data"]) == 3 else "other vectors"

    def _mistake(self, client: httpx.Client, chance: random.Random) -> str:
        asked, status = chance.choice(WRONG)
        try:
            found = client.post(CHAT, json=asked).status_code
        except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
            return "" if status == 413 else "the connection broke"  # it is refused before it is read whole
        return "" if found == status else f"{found} instead of {status}"

    def _leave(self, client: httpx.Client, chance: random.Random) -> str:
        prompt, _, _ = self._question(chance)
        data = json.dumps({**_asked(prompt, max(LENGTHS), False), "stream": chance.random() < 0.5}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        host, _, port = self.server.url.removeprefix("http://").rpartition(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            time.sleep(chance.random() / 2)
        return ""


def _asked(prompt: str, length: int, greedy: bool) -> dict[str, Any]:
    return body(prompt, max_tokens=length, **({"temperature": 0} if greedy else {"seed": length, "top_p": 0.9}))


def _said(reply: dict[str, Any]) -> str:
    text: str = reply["choices"][0]["message"]["content"]
    return text


def soak(minutes: float, clients: int, model: str | None, questions: int = 16) -> dict[str, Any]:
    """Runs it; returns what was found."""
    with served(model, "5M", 0.005) as server:
        process = psutil.Process(server.process.pid)
        found = Soak(server, 0)
        found.learn(questions)
        start = time.monotonic()
        found.end = start + 60 * minutes
        threads = [threading.Thread(target=found.client, args=(i,)) for i in range(clients)]
        for thread in threads:
            thread.start()
        memory: list[tuple[float, float]] = []
        while any(thread.is_alive() for thread in threads):
            memory.append((time.monotonic() - start, process.memory_info().rss / 2**20))
            time.sleep(min(5.0, 0.6 * minutes))
        for thread in threads:
            thread.join()
        health = _settled(server)
    settled = [mib for second, mib in memory if second >= 12 * minutes] or [mib for _, mib in memory]
    begin = statistics.median(settled[: max(len(settled) // 8, 1)])
    return {
        "minutes": minutes,
        "clients": clients,
        "requests": dict(found.done),
        "wrong": found.wrong,
        "memory_mib": [round(begin, 1), round(max(settled), 1)],
        "memory_ratio": round(max(settled) / begin, 4),
        "health": health,
        "exit_code": server.process.returncode,
    }


def _settled(server: Address) -> dict[str, Any]:
    """The server's state, once nobody asks."""
    with server.client() as client:
        for _ in range(300):
            found: dict[str, Any] = client.get("/health").json()
            if found["running"] == found["waiting"] == 0:
                break
            time.sleep(0.1)
    return found


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--model", help="serve this target of `baton serve` instead of random weights")
    parser.add_argument("--json", type=Path, help="write what was found to this file")
    given = parser.parse_args()
    found = soak(given.minutes, given.clients, given.model)
    print(json.dumps(found, indent=2))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    flat = found["memory_ratio"] <= FLAT
    idle = found["health"]["running"] == found["health"]["waiting"] == 0
    right = not found["wrong"] and found["exit_code"] == 0
    print(f"memory {'flat' if flat else 'GROWS'}; answers {'right' if right else 'WRONG or lost'}; "
          f"places {'free' if idle else 'STILL TAKEN'}")  # fmt: skip
    return 0 if flat and idle and right else 1


if __name__ == "__main__":
    sys.exit(main())
