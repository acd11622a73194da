"""A stand-in for a vLLM server: its HTTP protocol over a tiny model of transformers, with faults on demand.

Its status codes and JSON are those of vLLM 0.31.0 on a CPU (tests/test_rollout_vllm_real.py runs the real server). It
runs in threads of the test's process.
"""

import copy
import json
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.distributed import TCPStore
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from rollout.batch import pad_batch
from rollout.config import VLLMConfig
from rollout.logprobs import completion_logprobs
from rollout.sampling import Completion, SamplingSpec

Reply = tuple[int, Any] | None
"""Status and JSON; None: the connection is closed without a word."""


CPU = torch.device("cpu")
PROMPTS = [[5, 9, 11], [7] * 10, [5, 9, 11], [8, 9, 10, 11, 12, 13], [40, 41], [6]]
KEYS = [("row", i) for i in range(len(PROMPTS))]
SPEC = SamplingSpec(8, (2, 17, 30, 31), 0, temperature=0.7)


def tiny_llama(seed: int = 0, vocab_size: int = 64, hidden_size: int = 64, tied: bool = False) -> PreTrainedModel:
    """Random weights, scaled up so that distributions are not nearly uniform and temperature or truncation shows."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=tied,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def save_tiny(path: Path, tied: bool = False, vocab_size: int = 64) -> Path:
    """A checkpoint of such a model."""
    tiny_llama(vocab_size=vocab_size, tied=tied).save_pretrained(path)
    return path


def trained(model_dir: Path, noise: float = 0.1) -> PreTrainedModel:
    """The model of `model_dir` with changed weights, as after some training."""
    model = AutoModelForCausalLM.from_pretrained(model_dir).float().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator))
    return model


def assert_logprobs_of(model: PreTrainedModel, completions: list[Completion], temperature: float) -> None:
    """Checks that the log-probabilities in the completions of PROMPTS are those of `model`."""
    batch = pad_batch(PROMPTS, [c.ids for c in completions], 0, CPU)
    with torch.no_grad():
        logp, _ = completion_logprobs(model, batch, temperature)
    for i, completion in enumerate(completions):
        expected = logp[i, : len(completion.ids)]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def error(status: int, message: str) -> Reply:
    return status, {"error": {"message": message, "type": "", "param": None, "code": status}}


def asks_for_vocabulary(body: dict[str, Any]) -> bool:
    """Whether a request for a completion only asks whether the server has a token: its bias is 0."""
    return set(body.get("logit_bias", {}).values()) == {0.0}


class FakeVLLM:
    """Serves `model_dir` on `port`. A `with` block starts and stops it; `die` and `start` do so at any time.

    `fault(path, times, reply)` makes `reply(body)` answer the next `times` requests to `path`; `alter(body, answer)`
    may change any completion. `asked` holds the bodies of all completion requests.
    """

    def __init__(self, model_dir: Path, port: int, **served: Any) -> None:
        self.original = AutoModelForCausalLM.from_pretrained(model_dir).float().eval()
        self.name, self.port = str(model_dir), port
        self.served = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs", "backend": "nccl"} | served
        self.window = self.served.pop("max_model_len", 256)
        self.lock = threading.Lock()
        self.asked: list[dict[str, Any]] = []
        self.alter: Callable[[dict, dict], dict] = lambda body, answer: answer
        self.faults: dict[str, list[Callable[[dict], Reply]]] = {}
        self.resets = 0
        self.http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "FakeVLLM":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.die()

    def start(self) -> None:
        """Starts as a new process would, with the weights of `model_dir`."""
        self.model = copy.deepcopy(self.original)
        self.weight_version, self.cache_filled = "default", False
        self.store: TCPStore | None = None
        self.round, self.updating = 0, False
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer({})

            def do_POST(self) -> None:
                self.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}"))

            def answer(self, body: dict[str, Any]) -> None:
                reply = fake.reply(self.path.partition("?")[0], body)
                if reply is None or fake.http is not self.server:  # the request was aborted, or the server has "died"
                    self.connection.close()
                    return
                text = reply[1] if isinstance(reply[1], bytes) else json.dumps(reply[1]).encode()
                self.send_response(reply[0])
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                pass

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (OSError, ValueError):  # one of the two sides has closed the connection
                    self.close_connection = True

        class Http(ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, request_queue_size = True, True, 128

        self.http = Http(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def die(self) -> None:
        """Stops listening, and breaks all current connections without an answer."""
        http, self.http = self.http, None
        if http is not None:
            http.shutdown()
            http.server_close()

    def restart_after(self, seconds: float) -> None:
        """Dies now, and restarts later."""
        self.die()
        threading.Timer(seconds, self.start).start()

    def fault(self, path: str, times: int, reply: Callable[[dict], Reply]) -> None:
        self.faults.setdefault(path, []).extend([reply] * times)

    def reply(self, path: str, body: dict[str, Any]) -> Reply:
        with self.lock:
            if path == "/v1/completions" and not asks_for_vocabulary(body):
                self.asked.append(body)
            waiting = self.faults.get(path)
            fault = waiting.pop(0) if waiting else None
        if fault is not None:
            return fault(body)
        routes: dict[str, Callable[[dict], Reply]] = {
            "/health": lambda _: (200, b""),
            "/server_info": lambda _: (200, {"vllm_config": self.config(), "vllm_env": {}, "system_env": {}}),
            "/v1/models": lambda _: (200, {"data": [{"id": self.name, "max_model_len": self.window}]}),
            "/get_world_size": lambda _: (200, {"world_size": 1}),
            "/weight_info": lambda _: (200, {"weight_version": self.weight_version}),
            "/reset_prefix_cache": self.reset_prefix_cache,
            "/collective_rpc": self.collective_rpc,
            "/update_weight_version": self.update_weight_version,
            "/init_weight_transfer_engine": self.init_weight_transfer_engine,
            "/start_weight_update": self.start_weight_update,
            "/update_weights": self.update_weights,
            "/finish_weight_update": self.finish_weight_update,
            "/v1/completions": self.complete,
        }
        route = routes.get(path)
        return route(body) if route else (404, {"detail": "Not Found"})

    def config(self) -> dict[str, Any]:
        model = {"dtype": self.served["dtype"], "logprobs_mode": self.served["logprobs_mode"], "model": self.name}
        backend = self.served["backend"]
        return {"model_config": model, "weight_transfer_config": {"backend": backend} if backend else None}

    # ---- weights

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        state = self.model.state_dict()
        unknown = weights.keys() - state.keys()
        if unknown:
            raise KeyError(f"There is no module or parameter named {min(unknown)!r}")
        with self.lock, torch.no_grad():
            for name, tensor in weights.items():
                state[name].copy_(tensor)

    def collective_rpc(self, body: dict[str, Any]) -> Reply:
        assert body["method"] == "reload_weights"
        files = sorted(Path(body["kwargs"]["weights_path"]).glob("*.safetensors"))
        if not files:
            return error(500, "Call to collective_rpc method failed: Worker failed with error 'Repo id must be ...'")
        for file in files:
            self.load(load_file(file))
        return 200, {"results": [None]}

    def update_weight_version(self, body: dict[str, Any]) -> Reply:
        self.weight_version = body["new_version"]
        return 200, {"success": True, "new_version": self.weight_version}

    def reset_prefix_cache(self, body: dict[str, Any]) -> Reply:
        self.resets += 1
        self.cache_filled = False
        return 200, {"success": True}

    def init_weight_transfer_engine(self, body: dict[str, Any]) -> Reply:
        info = body["init_info"]
        assert info["packed"] and info["rank_offset"] == 1
        wait = timedelta(seconds=10)
        self.store = TCPStore(
            info["master_address"], info["master_port"], info["world_size"], False, wait, wait_for_workers=True
        )
        self.round = 0
        return 200, {"message": "Weight transfer initialized"}

    def start_weight_update(self, body: dict[str, Any]) -> Reply:
        if self.updating:
            return error(500, "start_weight_update called while a weight update is already active.")
        self.updating = True
        return 200, {"message": "Weight update started"}

    def update_weights(self, body: dict[str, Any]) -> Reply:
        """Receives the announced number of tensors; blocks until they arrive, as NCCL does."""
        info = body["update_info"]
        assert self.store is not None and self.updating
        received = {}
        for name, dtype, shape in zip(info["names"], info["dtype_names"], info["shapes"], strict=True):
            data = bytearray(self.store.get(f"{self.round}/{len(received)}"))
            received[name] = torch.frombuffer(data, dtype=getattr(torch, dtype)).reshape(shape)
        self.round += 1
        self.load(received)
        return 200, {"message": "Weights updated"}

    def finish_weight_update(self, body: dict[str, Any]) -> Reply:
        self.updating = False
        self.weight_version = body.get("weight_version", self.weight_version)
        return 200, {"message": "Weight update finished"}

    # ---- completions

    def complete(self, body: dict[str, Any]) -> Reply:
        prompt, vocab = body["prompt"], self.model.config.vocab_size
        outside = [int(token) for token in body.get("logit_bias", {}) if int(token) >= vocab]
        if outside:
            return error(
                400, f"token_id(s) {outside} in logit_bias contain out-of-vocab token ids. Vocabulary: {vocab}"
            )
        if body["model"] != self.name:
            return error(404, f"The model `{body['model']}` does not exist.")
        if len(prompt) + body["max_tokens"] > self.window:
            return error(400, f"This model's maximum context length is {self.window} tokens.")
        with self.lock:
            ids, logprobs, reason = self.sample(body)
        tokens = [f"token_id:{token}" for token in ids]
        choice = {
            "index": 0,
            "text": "",
            "token_ids": ids,
            "prompt_token_ids": prompt if body.get("return_token_ids") else None,
            "logprobs": {"tokens": tokens, "token_logprobs": logprobs},
            "finish_reason": reason,
        }
        answer = {"choices": [choice], "model": self.name}
        return 200, answer if asks_for_vocabulary(body) else self.alter(body, answer)

    @torch.no_grad()
    def sample(self, body: dict[str, Any]) -> tuple[list[int], list[float], str]:
        generator = torch.Generator().manual_seed(body.get("seed") or 0)
        temperature = body.get("temperature", 1.0)
        ids: list[int] = []
        logprobs = []
        self.cache_filled = True
        while len(ids) < body["max_tokens"]:
            logits = self.model(torch.tensor([body["prompt"] + ids])).logits[0, -1]
            for biased, value in body.get("logit_bias", {}).items():
                logits[int(biased)] += value
            logp = torch.log_softmax(logits / (temperature or 1.0), -1)
            token = int(torch.multinomial(logp.exp(), 1, generator=generator)) if temperature else int(logp.argmax())
            ids.append(token)
            logprobs.append(float(logp[token]))
            if token in body.get("stop_token_ids", ()):
                return ids, logprobs, "stop"
        return ids, logprobs, "length"


class FakeGroup:
    """The trainer's end of the store that replaces NCCL."""

    def __init__(self, store: TCPStore) -> None:
        self.store, self.round = store, 0


def trainer_init(init_info: dict[str, Any]) -> FakeGroup:
    """Replaces vllm.distributed.weight_transfer.nccl_common.trainer_init; blocks until the server connects."""
    wait = timedelta(seconds=10)
    address, port = init_info["master_address"], init_info["master_port"]
    return FakeGroup(TCPStore(address, port, init_info["world_size"], True, wait, wait_for_workers=True))


def packed_nccl_broadcast_producer(iterator: Any, group: FakeGroup, src: int, post_iter_func: Any) -> None:
    """Replaces vllm.distributed.weight_transfer.packed_tensor.packed_nccl_broadcast_producer."""
    assert src == 0
    for i, item in enumerate(iterator):
        tensor = post_iter_func(item).contiguous()
        group.store.set(f"{group.round}/{i}", tensor.view(-1).view(torch.uint8).numpy().tobytes())
        time.sleep(0)
    group.round += 1


def config(fake: FakeVLLM, **keys: Any) -> VLLMConfig:
    """A configuration for tests, with short waits."""
    quick = {"retry_wait": 0.01, "start_timeout": 5.0, "timeout": 20.0, "sync_timeout": 20.0}
    return VLLMConfig(**({"base_url": fake.url, "dtype": "float32"} | quick | keys))
