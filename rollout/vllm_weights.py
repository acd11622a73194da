"""Selects and names the weights for vLLM, and sends them to a server by disk or by NCCL.

vLLM loads the tensors of a checkpoint directory under their stored names. So exactly the tensors in the directory that
training started from and the server serves are sent, with the same names and shapes. A model with tied embeddings holds
one tensor under two names, and stores it under one or both.
"""

import contextlib
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig

from handoff.gate import named_errors
from handoff.weights import read_tensors
from rollout.errors import EngineMissing, RolloutError, TransferFailed, WrongModel
from rollout.vllm_client import Client, pick

Weights = Mapping[str, Tensor]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class Stored:
    """A checkpoint directory's tensor names and shapes, vocabulary size, and whether embeddings are tied."""

    model_dir: Path
    shapes: dict[str, tuple[int, ...]]
    vocab_size: int
    tied: bool

    @classmethod
    def read(cls, model_dir: Path) -> "Stored":
        """Reads config.json and the headers of the weight files. Raises HandoffError when that fails."""
        with named_errors(model_dir / "config.json"):
            config = AutoConfig.from_pretrained(
                model_dir, trust_remote_code=False, local_files_only=True
            ).get_text_config()
        shapes = {name: info.shape for name, info in read_tensors(model_dir).items()}
        return cls(model_dir, shapes, config.vocab_size, config.tie_word_embeddings)

    def select(self, named: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors that vLLM loads. Raises WrongModel when names or shapes differ from the directory's."""
        kept: dict[str, Tensor] = {}
        foreign: list[str] = []
        for name, tensor in named:
            shape = tuple(tensor.shape)
            if name not in self.shapes:
                if not self._may_be_tied(shape):
                    foreign.append(name)
            elif shape != self.shapes[name]:
                raise WrongModel(
                    f"{name} has shape {list(shape)} in training but {list(self.shapes[name])} in {self.model_dir}"
                )
            else:
                kept[name] = tensor.detach()
        absent = [n for n, shape in self.shapes.items() if n not in kept and not self._may_be_tied(shape)]
        if foreign or absent or not kept:
            raise WrongModel(
                f"the model is stored in {self.model_dir} under other names than it has in training (only stored: "
                f"{_some(absent)}; only in training: {_some(foreign)}), so vLLM cannot load the trained weights; "
                "remove `vllm` from the section"
            )
        return kept

    def _may_be_tied(self, shape: tuple[int, ...]) -> bool:
        return self.tied and len(shape) == 2 and shape[0] == self.vocab_size


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:3]) or "none"


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in `dtype`, if it is a floating-point tensor."""
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class Transfer(Protocol):
    """A way to send weights to the server. Call `keep` before `push`; `push` may be repeated, for a server that has
    lost its weights."""

    def keep(self, weights: Weights) -> None: ...

    def push(self, tag: str) -> None:
        """Sends the kept weights to the server and sets its tag to `tag`. Raises RolloutError on failure."""

    def close(self) -> None: ...


class DiskTransfer:
    """Writes a safetensors file into a folder that both can read, from which the server loads it.

    The folder is named after the server and emptied at the start, so a killed run leaves at most one copy of weights.
    """

    def __init__(self, client: Client, folder: str | None, timeout: float) -> None:
        self._client, self._timeout = client, timeout
        self._root = Path(folder or tempfile.gettempdir()).absolute() / f"baton-weights-{client.host}-{client.port}"
        shutil.rmtree(self._root, ignore_errors=True)
        try:
            self._root.mkdir()
        except OSError as error:
            raise TransferFailed(f"vllm.weights_dir: {self._root}: {error.strerror}") from error
        self._written = 0

    @property
    def _folder(self) -> Path:
        return self._root / str(self._written)

    def keep(self, weights: Weights) -> None:
        """Writes the weights, then removes the previous ones. Raises TransferFailed when they cannot be written."""
        old = self._folder
        self._written += 1
        try:
            self._folder.mkdir()
            save_file(dict(weights), self._folder / "model.safetensors", metadata={"format": "pt"})
        except OSError as error:
            size = sum(t.nbytes for t in weights.values()) / 1e9
            raise TransferFailed(
                f"{self._folder}: {error}; the weights take {size:.2g} GB, twice that while they are replaced: "
                "set vllm.weights_dir to a folder with enough space"
            ) from error
        shutil.rmtree(old, ignore_errors=True)

    def push(self, tag: str) -> None:
        """See `Transfer`."""
        body = {"method": "reload_weights", "kwargs": {"weights_path": str(self._folder)}}
        self._client.post("/collective_rpc", body, self._timeout)
        self._client.post("/update_weight_version", {"new_version": tag}, self._timeout)

    def close(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self._root, ignore_errors=True)


class NCCLTransfer:
    """Broadcasts from the trainer's GPU to the server's, with vLLM's own weight-transfer engine on both sides.

    The sending side of NCCL has no time-out and cannot be interrupted. So it runs in a daemon thread in parallel with
    the HTTP request that makes the server receive. A failure appears as that request's error, and the thread dies with
    the process.
    """

    def __init__(self, client: Client, device: torch.device, port: int, timeout: float) -> None:
        try:
            from vllm.distributed.weight_transfer.nccl_common import trainer_init
            from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_producer
        except ImportError as error:
            raise EngineMissing(
                f"vllm.transfer nccl needs vLLM in the training processes too ({error}); install it, or use "
                "`transfer: disk` (docs/vllm.md)"
            ) from error
        self._open, self._broadcast = trainer_init, packed_nccl_broadcast_producer
        self._client, self._device, self._port, self._timeout = client, device, port, timeout
        self._weights: Weights = {}
        self._group: Any = None

    def keep(self, weights: Weights) -> None:
        """Keeps a copy of the weights in CPU memory, for a server that loses them."""
        self._weights = weights

    def push(self, tag: str) -> None:
        """See `Transfer`."""
        tensors = list(self._weights.values())
        update = {
            "names": list(self._weights),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors],
            "shapes": [list(t.shape) for t in tensors],
        }
        try:
            if self._group is None:
                self._connect()
            self._client.post("/start_weight_update", {}, self._timeout)
            with self._beside(lambda: self._broadcast(self._on_device(), self._group, 0, lambda item: item[1])):
                self._client.post("/update_weights", {"update_info": update}, self._timeout)
            self._client.post("/finish_weight_update", {"weight_version": tag}, self._timeout)
        except RolloutError:
            self._group = None  # the group may be in an undefined state: the next try makes a new one,
            with contextlib.suppress(RolloutError):  # and the server starts no update while another is in progress
                self._client.post("/finish_weight_update", {}, self._timeout)
            raise

    def close(self) -> None:
        """Leaves the group."""
        self._group = None

    def _connect(self) -> None:
        workers = pick(self._client.get("/get_world_size", self._timeout), int, "world_size")
        address, port = _meeting_point(self._client, self._port)
        meeting = {"master_address": address, "master_port": port, "rank_offset": 1, "world_size": workers + 1}
        groups: list[Any] = []
        with self._beside(lambda: groups.append(self._open(meeting))):
            body = {"init_info": {**meeting, "packed": True}}
            self._client.post("/init_weight_transfer_engine", body, self._timeout)
        self._group = groups[0]

    @contextlib.contextmanager
    def _beside(self, sending: Callable[[], None]) -> Iterator[None]:
        """Runs `sending` in a thread while the body lasts, and waits for it if the body succeeds."""
        failures: list[Exception] = []

        def run() -> None:
            try:
                torch.cuda.set_device(self._device)
                sending()
            except Exception as error:
                failures.append(error)

        thread = threading.Thread(target=run, daemon=True, name="vllm-weights")
        thread.start()
        yield
        thread.join(self._timeout)
        if failures or thread.is_alive():
            reason = failures[0] if failures else f"still sending after {self._timeout:g} s"
            raise TransferFailed(f"sending weights to {self._client.base_url}: {reason}")

    def _on_device(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._weights.items():
            yield name, tensor.to(self._device)


def _meeting_point(client: Client, port: int) -> tuple[str, int]:
    """This machine's address as seen from the server's machine, and the given port, or a free one if it is 0."""
    with socket.create_connection((client.host, client.port), timeout=10) as connection:
        address: str = connection.getsockname()[0]
    if port:
        return address, port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return address, probe.getsockname()[1]
