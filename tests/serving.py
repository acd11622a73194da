"""A tiny model with random weights, a server in a thread of the test's process, and requests to it."""

import asyncio
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from baton.serve.app import Application
from baton.serve.guard import State
from baton.serve.page import add_page
from baton.serve.preferences import Preferences
from baton.serve.run import Server, listen
from baton.serve.served import Served, Worker
from baton.serve.settings import ApiKey, Limits, Pooling
from baton.targets import open_target
from handoff.parent import Parent
from tests.test_chat_templates import NAMES, TEMPLATES, tokenizer


def write_model(folder: Path, template: str | None = "qwen3", *, window: int = 1024) -> Parent:
    """A model of a few thousand weights with a published chat template, or with none."""
    made = tokenizer()
    made.chat_template = None if template is None else TEMPLATES[template]
    made.save_pretrained(folder)
    ids = {f"{role}_id": made.convert_tokens_to_ids(text) for role, text in NAMES.items()}
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(made) + 8, max_position_embeddings=window, num_key_value_heads=2, **sizes, **ids
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random weights predict nearly uniformly; answers of a sharper model differ by more
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    model.save_pretrained(folder)
    return open_target(str(folder))


ASKED = [{"role": "user", "content": "What is 2 + 3?"}]


@dataclass
class Running:
    """A server that runs."""

    url: str
    served: list[Served]
    worker: Worker
    state: State
    server: Server
    key: str | None

    @property
    def base(self) -> str:
        """As clients are given it."""
        return f"{self.url}/v1"

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        """A request, whatever it is answered."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json", **self._key(), **headers}
        return httpx.post(self.url + path, content=content, headers=given, timeout=60)

    def get(self, path: str, **headers: str) -> httpx.Response:
        """A request, whatever it is answered."""
        return httpx.get(self.url + path, headers={**self._key(), **headers}, timeout=60)

    def chat(self, text: str = "What is 2 + 3?", **body: Any) -> dict[str, Any]:
        """The reply to one question."""
        answer = self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **body})
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def stream(self, path: str, body: Any) -> list[dict[str, Any]]:
        """The events of a stream, which ends as it should."""
        lines = self.post(path, {**body, "stream": True}).text.split("\n\n")
        assert lines[-2:] == ["data: [DONE]", ""]
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]

    def _key(self) -> dict[str, str]:
        return {} if self.key is None else {"Authorization": f"Bearer {self.key}"}


@contextmanager
def serving(
    parents: Sequence[Parent],
    *,
    key: str | None = None,
    pooling: Pooling = "mean",
    preferences: Path | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """Serves these models on a free port until the end of the block; with the page if there is a file for its rows."""
    state = State(Limits(**limits), None if key is None else ApiKey(key), "127.0.0.1")
    served = [Served(parent, state.limits, pooling) for parent in parents]
    worker = Worker(served)
    listening = listen("127.0.0.1", 0)
    application = Application(served, worker, state)
    if preferences is not None:
        add_page(application.fast, state, [one.name for one in served], Preferences(preferences))
    server = Server(application.asgi, state, "ready")
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])))
    worker.start()
    thread.start()
    try:
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", served, worker, state, server, key)
    finally:
        server.should_exit = True
        thread.join()
        worker.close()
        listening.close()
