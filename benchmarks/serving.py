"""A server in a process of its own, and what the benchmarks of it ask. Standard library, httpx and psutil."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.rl_setup import make
from benchmarks.turns import WorkerError

CHAT = "/v1/chat/completions"


@dataclass(frozen=True)
class Address:
    """Where the server is, its process, and questions for it."""

    url: str
    process: "subprocess.Popen[str]"
    prompts: list[str]

    def client(self) -> httpx.Client:
        """A client that keeps its connection."""
        return httpx.Client(base_url=self.url, timeout=600)


@contextmanager
def served(model: str | None, size: str, hazard: float, *options: str) -> Iterator[Address]:
    """Serves `model`, or else random weights of a size of `benchmarks.rl_setup`, whose answers end by chance.

    Raises:
        WorkerError: the server does not start.
    """
    with tempfile.TemporaryDirectory(prefix="baton-serve-") as folder:
        material = make(Path(folder), size, (12, 90), 40, hazard)
        rows = [json.loads(line)["prompt"] for line in material.prompts.read_text(encoding="utf-8").splitlines()]
        log = Path(folder, "log")
        command = [sys.executable, "-m", "baton", "serve", model or str(material.policy), "--port", "0", *options]
        with log.open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True)
            assert process.stdout is not None
            try:
                ready = process.stdout.readline().split()
                if not ready:
                    raise WorkerError(f"the server did not start:\n{log.read_text(encoding='utf-8')[-2000:]}")
                yield Address(ready[-1].removesuffix("/v1"), process, rows if model is None else QUESTIONS)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(120)


QUESTIONS = [f"What is {a} plus {b}?" for a in range(2, 10) for b in (3, 14, 27, 40, 58)]
"""For a model that knows words."""


def body(prompt: str, **more: Any) -> dict[str, Any]:
    """A question in a conversation."""
    return {"messages": [{"role": "user", "content": prompt}], **more}
