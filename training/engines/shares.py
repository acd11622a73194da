"""What each engine holds of a model on one process, in bytes, before anything is started. No torch here."""

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from training.engines.launch import Request
from training.engines.launch_file import read_launch_file

_BUCKET = 500_000_000  # DeepSpeed's reduce_bucket_size, in numbers
_DEEPSPEED = 100 * 2**20  # of DeepSpeed on CPUs, besides a model's
_LIVE = 1_000_000_000  # ZeRO-3: stage3_max_live_parameters


def planned(launch: Path | None, device: Literal["cpu", "cuda"]) -> Request:
    """The engine that a launch file asks for; without one, a single process.

    Args:
        launch: an accelerate configuration.
        device: what one process runs on, if there is no launch file.

    Raises:
        LaunchError: the launch file has mistakes.
    """
    if launch is None:
        return Request("single", None, 1, device)
    return read_launch_file(launch).request


@dataclass(frozen=True)
class Shares:
    """Bytes for one model's parameters on one process."""

    weights: float
    gradients: float = 0.0
    optimizer: float = 0.0
    live: float = 0.0
    """Weights of other processes that a forward and backward pass brings here, and buffers for exchanging gradients."""
    whole: float = 0.0
    """Weights of other processes while the model is whole, for sampling and scoring."""
    lasting: float = 0.0
    """The part of `gradients` whose memory is never given back."""


def trained(
    request: Request, parameters: int, largest: int, width: int, moments: float, bf16: bool, together: int = 0
) -> Shares:
    """Of a model that is trained.

    Args:
        request: the engine.
        parameters: how many parameters are trained.
        largest: parameters of the largest part that is live at once: the embeddings and two layers.
        width: bytes of a number of the weights.
        moments: bytes of the optimizer's state for one parameter.
        bf16: whether the forward pass runs in bfloat16.
        together: parameters of all models that are trained as one, if there are several.
    """
    n, processes, cuda = parameters, request.processes, request.device == "cuda"
    if request.name == "single":
        return Shares(width * n, width * n, moments * n)
    if request.name == "ddp":
        return Shares(width * n, width * n, moments * n, live=width * n)
    share = n / processes
    if request.name == "fsdp2":
        # On CPUs, the memory of gathered layers, of their gradients and of what gloo exchanges stays with the process.
        live: float = largest * (2 if bf16 else 4) if cuda else 12 * n
        return Shares(4 * share, 4 * share, moments * share, live=live, whole=4 * (n - share))
    # DeepSpeed: a copy for the forward pass, and the float32 weights that the optimizer steps. On a CPU the memory of a
    # bucket is taken as far as it is used.
    copy = 2 if bf16 else 4
    together = together or n
    bucket = copy * (_BUCKET if cuda else min(_BUCKET, together) * n / together)
    if request.zero_stage == 3:
        # Weights that have been gathered stay until the backward pass, up to a number that few models reach. Gradients
        # are collected in one bucket, cut up in a second one, and kept in a buffer and as the optimizer's own.
        live = copy * min(_LIVE, n) + 2 * bucket
        shares = Shares(copy * share + 4 * share, (copy + 4) * share, moments * share, live=live)
        return replace(shares, whole=copy * (n - share), lasting=copy * share)
    gradients = copy * (n if request.zero_stage == 1 else share)
    return Shares(copy * n + 4 * share, gradients, moments * share, live=bucket)


def process(request: Request) -> float:
    """Bytes of a process that do not depend on the model, besides those that every process takes; as measured."""
    return _DEEPSPEED if request.name == "deepspeed" and request.device == "cpu" else 0.0


def frozen(request: Request, size: float) -> Shares:
    """Of weights of `size` bytes that are not trained: cut up where the engine cuts them up, and whole while they
    compute."""
    if request.name == "fsdp2" or request.zero_stage == 3:
        share = size / request.processes
        return Shares(share, whole=size - share)
    return Shares(size)


def alone(request: Request) -> Request:
    """One process on the same kind of device."""
    return replace(request, name="single", zero_stage=None, processes=1)


def furthest(requests: Iterable[Request]) -> Request:
    """The request that cuts up most."""
    return max(requests, key=lambda request: request.zero_stage or 0)


def in_its_precision(request: Request) -> bool:
    """Whether the weights of a pass are in the precision of that pass already, and not cast for it."""
    return request.name in ("deepspeed", "fsdp2")


def sharded(request: Request) -> list[Request]:
    """The engines to which `request` can change on the same processes, in the order in which more is cut up."""
    if request.processes == 1:
        return []
    order = [replace(request, name="deepspeed", zero_stage=stage) for stage in (2, 3)]
    if request.name == "ddp":
        return order
    return order[1:] if request.zero_stage in (1, 2) else []


def launch_file(request: Request) -> str:
    """The launch file in recipes/launch/ with this engine."""
    name = {"single": "", "ddp": "ddp", "fsdp2": "fsdp2", "deepspeed": f"zero{request.zero_stage}"}[request.name]
    if request.device == "cpu":
        name = "cpu" if request.name == "single" else "cpu2" if request.name == "ddp" else f"cpu2_{name}"
    return f"recipes/launch/{name}.yaml" if name else "no launch file"


def free_disk(folder: Path) -> int:
    """Bytes that are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free
