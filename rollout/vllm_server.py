"""Generation by a vLLM server that the user runs.

Two things must never happen: an answer from stale weights, and a lost answer. The server has a tag for its weights,
which we set after each transfer; a restarted server has the tag "default". So the tag is read before and after every
round of requests, and answers that may be from other weights are requested again:

- a row that failed alone (time-out, status 5xx) is requested again in the next round;
- when a connection breaks, the server may have died. Rows answered before that moment count, because they came from the
  process whose tag was read. Later rows do not count, because they may come from a new process;
- a server that lost its weights gets them again, from the copy that the transfer keeps;
- a tag that was set neither by us nor by a restart belongs to another run, and is an error.

A repeated request has the same seed, which follows from the run's seed and the row's key.
"""

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch

from rollout.config import VLLMConfig
from rollout.errors import (
    ConnectionBroken,
    EngineMissing,
    RolloutError,
    ServerFailed,
    ServerRefused,
    ServerTimeout,
    ServerUnreachable,
    StaleWeights,
    TransferFailed,
    WrongModel,
)
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm_answers import check_fit, read, sampling
from rollout.vllm_client import Client, pick
from rollout.vllm_weights import DTYPES, DiskTransfer, NCCLTransfer, Stored, Transfer, cast

logger = logging.getLogger(__name__)
T = TypeVar("T")

FRESH = "default"  # the tag of a server that never received weights
_PASSING = (ConnectionBroken, ServerTimeout, ServerFailed)  # a retry may succeed
_CONTROL_SECONDS = 60.0  # for calls that compute nothing


class Server:
    """The connection to the server at `config.base_url`, used only by the main process.

    Raises RolloutError; the constructor does so when no server answers or it does not serve `model_dir`.
    """

    def __init__(self, config: VLLMConfig, model_dir: Path, device: torch.device) -> None:
        self._config, self._stored = config, Stored.read(model_dir)
        self._client = Client(config.base_url)
        self._dtype = DTYPES[config.dtype]
        self._run = uuid.uuid4().hex[:8]
        self._tag: str | None = None
        self._wait()
        self._model, self._window = self._check()
        self._transfer: Transfer
        if config.transfer == "disk":
            self._transfer = DiskTransfer(self._client, config.weights_dir, config.sync_timeout)
        elif device.type == "cuda":
            self._transfer = NCCLTransfer(self._client, device, config.transfer_port, config.sync_timeout)
        else:
            raise EngineMissing(f"vllm.transfer nccl needs a GPU to train on, not {device}; use `transfer: disk`")

    def update_weights(self, named: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Sends these weights to the server, for all later answers."""
        self._tag = None
        weights = {n: cast(t, self._dtype).to("cpu", copy=True) for n, t in self._stored.select(named).items()}
        self._transfer.keep({name: tensor.contiguous() for name, tensor in weights.items()})
        self._push(f"{version}@{self._run}")

    def generate(self, prompts: Sequence[Sequence[int]], spec: SamplingSpec, seeds: list[int]) -> list[Completion]:
        """One answer per prompt. `seeds`: one per prompt, used by the server for sampling."""
        check_fit(prompts, spec, self._window, self._stored.vocab_size)
        bodies = [self._body(prompt, spec, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        done: dict[int, Completion] = {}
        problem: RolloutError | None = None
        for attempt in range(self._config.retries + 1):
            missing = [i for i in range(len(bodies)) if i not in done]
            if not missing:
                break
            if problem is not None:
                logger.warning("%d of %d answers are requested again: %s", len(missing), len(bodies), problem)
                self._pause(attempt)
            self._ensure_weights()
            answered, broke, problem = self._round(missing, bodies, spec)
            if not self._vouched(broke):
                answered = {}
                problem = problem or StaleWeights(f"the server at {self._client.base_url} was started anew meanwhile")
            done |= answered
        if len(done) < len(bodies):
            assert problem is not None
            raise type(problem)(
                f"{len(bodies) - len(done)} of {len(bodies)} answers did not come after {self._config.retries + 1} "
                f"tries; the last error: {problem}. The server's log says more; vllm.timeout, retries and concurrency "
                "may help"
            )
        return [done[i] for i in range(len(bodies))]

    def close(self) -> None:
        """Cleans up; the server keeps running with its weights."""
        self._transfer.close()

    # ---- requests

    def _body(self, prompt: Sequence[int], spec: SamplingSpec, seed: int) -> dict[str, Any]:
        """One request. It sets every parameter by which a server or generation_config.json could change sampling."""
        return {
            "model": self._model,
            "prompt": list(prompt),
            "n": 1,
            "max_tokens": spec.max_new_tokens,
            **sampling(spec, seed, self._stored.vocab_size),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
        }

    def _round(
        self, rows: list[int], bodies: list[dict[str, Any]], spec: SamplingSpec
    ) -> tuple[dict[int, Completion], bool, RolloutError | None]:
        """Requests these rows concurrently. Returns the answers, whether a connection broke, and the last error that a
        retry may fix.

        After a connection has broken, no further request is sent, and later answers do not count.
        """
        broke, stop = threading.Event(), threading.Event()

        def ask(row: int) -> Completion | RolloutError | None:
            if stop.is_set():
                return None
            try:
                answer = self._client.post("/v1/completions", bodies[row], self._config.timeout)
                return None if broke.is_set() else read(answer, bodies[row]["prompt"], spec, self._stored.vocab_size)
            except ConnectionBroken as error:
                broke.set()
                stop.set()
                return error
            except (ServerTimeout, ServerFailed) as error:
                return error
            except RolloutError:
                stop.set()
                raise

        with ThreadPoolExecutor(min(self._config.concurrency, len(rows))) as pool:
            results = list(pool.map(ask, rows))
        answered = {row: result for row, result in zip(rows, results, strict=True) if isinstance(result, Completion)}
        problems = [result for result in results if isinstance(result, RolloutError)]
        return answered, broke.is_set(), problems[-1] if problems else None

    # ---- weights

    def _vouched(self, broke: bool) -> bool:
        """Whether the answers of a round come from our weights. `broke`: a connection broke; later answers were
        discarded."""
        try:
            found = self._tag_of_server()
        except _PASSING:
            return broke
        return found == self._tag or (found == FRESH and broke)

    def _ensure_weights(self) -> None:
        """Waits for the server, and sends the weights again if it was restarted."""
        assert self._tag is not None, "update_weights has to succeed before generate"
        self._wait()
        if self._tried(self._tag_of_server) == self._tag:
            return
        logger.warning("the server at %s was restarted: sending its weights again", self._client.base_url)
        self._model, self._window = self._check()
        self._push(self._tag)

    def _tag_of_server(self) -> str:
        """The server's tag for its weights. Raises StaleWeights when another run has set it."""
        found = pick(self._client.get("/weight_info", _CONTROL_SECONDS), str, "weight_version")
        if self._tag is not None and found not in (self._tag, FRESH):
            raise StaleWeights(
                f"the server at {self._client.base_url} has the weights {found!r} instead of {self._tag!r}: another "
                "run also sends weights to it; start a separate server for each run"
            )
        return found

    def _push(self, tag: str) -> None:
        def push() -> None:
            self._wait()
            self._transfer.push(tag)
            answer = self._client.post("/reset_prefix_cache", {}, _CONTROL_SECONDS)  # computed by the old weights
            if not pick(answer, bool, "success"):
                raise ServerFailed("the server could not empty its prefix cache: it is answering other requests")
            if (found := pick(self._client.get("/weight_info", _CONTROL_SECONDS), str, "weight_version")) != tag:
                raise ServerFailed(f"after the transfer, its tag for the weights is {found!r} instead of {tag!r}")

        try:
            self._tried(push)
        except (ServerTimeout, ServerFailed, ServerRefused) as error:
            raise TransferFailed(
                f"the weights did not reach the server at {self._client.base_url}: {error}. See its log; check that it "
                f"serves {self._stored.model_dir} and can read the folder vllm.weights_dir. {self._start()}"
            ) from error
        self._tag = tag

    # ---- the server itself

    def _wait(self) -> None:
        """Waits until the server reports that it is ready, at most `start_timeout` seconds."""
        deadline = time.monotonic() + self._config.start_timeout
        while True:
            try:
                self._client.get("/health", _CONTROL_SECONDS)
                return
            except _PASSING as error:
                left = deadline - time.monotonic()
                if left <= 0:
                    raise ServerUnreachable(
                        f"no vLLM server answered within {self._config.start_timeout:g} s ({error}). {self._start()}"
                    ) from error
                time.sleep(min(self._config.retry_wait, left))

    def _check(self) -> tuple[str, int]:
        """The served model's name and longest sequence, after checking that it matches the model in training."""
        url = self._client.base_url
        try:
            info = self._tried(lambda: self._client.get("/server_info?config_format=json", _CONTROL_SECONDS))
            self._tried(lambda: self._client.get("/weight_info", _CONTROL_SECONDS))
            served = pick(self._tried(lambda: self._client.get("/v1/models", _CONTROL_SECONDS)), dict, "data", 0)
        except ServerRefused as error:
            raise WrongModel(
                f"{error}. Training needs vLLM 0.28 or later with its development endpoints. {self._start()}"
            ) from error
        config = pick(info, dict, "vllm_config")
        dtype = pick(config, str, "model_config", "dtype").removeprefix("torch.")
        if dtype != self._config.dtype:
            raise WrongModel(
                f"the server at {url} computes in {dtype}, but vllm.dtype is {self._config.dtype}. {self._start()}"
            )
        if (mode := pick(config, str, "model_config", "logprobs_mode")) != "processed_logprobs":
            raise WrongModel(
                f"the server at {url} returns {mode}, not those of the tempered distribution. {self._start()}"
            )
        transfer = config.get("weight_transfer_config")
        if self._config.transfer == "nccl" and (not isinstance(transfer, dict) or transfer.get("backend") != "nccl"):
            raise WrongModel(f"the server at {url} has no weight-transfer engine for NCCL. {self._start()}")
        model, window = pick(served, str, "id"), pick(served, int, "max_model_len")
        self._check_vocabulary(model)
        return model, window

    def _check_vocabulary(self, model: str) -> None:
        """Compares vocabulary sizes by logit biases: the server refuses a bias on a token that it does not have."""
        size = self._stored.vocab_size

        def refusal(token: int) -> ServerRefused | None:
            body = {"model": model, "prompt": [0], "max_tokens": 1, "logit_bias": {str(token): 0.0}}
            try:
                self._tried(lambda: self._client.post("/v1/completions", body, self._config.timeout))
            except ServerRefused as error:
                return error
            return None

        last, beyond = refusal(size - 1), refusal(size)
        if last is not None or beyond is None:
            raise WrongModel(
                f"{self._stored.model_dir} has {size} tokens, but the served model {model} has "
                f"{'more' if last is None else f'fewer ({last})'}. {self._start()}"
            )

    def _start(self) -> str:
        """The command that starts a suitable server, for messages."""
        nccl = """ --weight-transfer-config '{"backend": "nccl"}'""" if self._config.transfer == "nccl" else ""
        return (
            f"Start one with: VLLM_SERVER_DEV_MODE=1 vllm serve {self._stored.model_dir} --port {self._client.port} "
            f"--dtype {self._config.dtype} --logprobs-mode processed_logprobs{nccl}"
        )

    def _tried(self, call: Callable[[], T]) -> T:
        """The call's result, with retries after an error that a retry may fix."""
        for attempt in range(self._config.retries + 1):
            if attempt:
                self._pause(attempt)
            try:
                return call()
            except _PASSING as error:
                last = error
        raise type(last)(f"{last} (tried {self._config.retries + 1} times; the server's log may say why)")

    def _pause(self, attempt: int) -> None:
        time.sleep(self._config.retry_wait * 2 ** (attempt - 1))
