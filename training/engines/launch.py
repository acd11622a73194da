"""Reads which engine a launch file asks for. No torch at module level: the result decides how torch is loaded.

accelerate falls back silently when it cannot do what a launch file asks for: one process instead of two, plain data
parallelism instead of ZeRO-3. So `requested` reads the request, an engine's `check_machine` refuses what this machine
cannot do, and before the first step its `check_model` compares the engine that started with the request.

A rehearsal runs a GPU engine's processes on the CPU. Its launch file has `gpu_ids: "-1,-1"`. accelerate turns that into
CUDA_VISIBLE_DEVICES, which hides every GPU; no other line of a launch file reaches the processes of every engine.
Several processes run on the CPU only with this line; a GPU launch file on a machine without a GPU is an error.
"""

import fcntl
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handoff.errors import UserError

REHEARSAL = "-1,-1"


class LaunchError(UserError):
    """The launch file asks for something that this machine, or accelerate on it, cannot provide."""


@dataclass(frozen=True)
class Request:
    """The engine that a launch file asks for."""

    name: Literal["single", "ddp", "deepspeed", "fsdp2"]
    zero_stage: int | None
    """1 to 3 for deepspeed; otherwise None."""
    processes: int
    device: Literal["cpu", "cuda"]

    def __str__(self) -> str:
        zero = f" ZeRO-{self.zero_stage}" if self.name == "deepspeed" else ""
        return f"{self.name}{zero}, {self.processes} process{'es' if self.processes > 1 else ''}, {self.device}"


def rank() -> int:
    """Number of this process among all of them, from 0."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def world_size() -> int:
    """Number of processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def say_error(text: str) -> None:
    """Prints an error to standard error, unless another process of this launch on this machine has printed the same.

    The processes share the folder that torch's agent has made for this launch, and removes afterwards. The lock is held
    until the text is printed: if a process is killed before that, the next one prints it.
    """
    own = os.environ.get("TORCHELASTIC_ERROR_FILE")
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()
    try:
        file = (Path(own).parent.parent / f"said-{digest}").open("a+") if own else None
    except OSError:  # the launch is ending
        file = None
    if file is None:
        print(text, file=sys.stderr, flush=True)
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        if not file.read():
            print(text, file=sys.stderr, flush=True)
            print("said", file=file, flush=True)


def check_environment(launched: bool = True) -> None:
    """Checks the variables by which a launcher tells a process its place among the others.

    Variables that an earlier job left behind would have this process wait for others that nobody has started.

    Args:
        launched: whether a launcher may have started this process; a `baton` command is always one process.

    Raises:
        LaunchError: the variables contradict each other, or there is no launcher that could have set them.
    """
    given = {name: os.environ[name] for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if name in os.environ}
    told = ", ".join(f"{name}={value}" for name, value in given.items())
    remedy = f"; if an earlier job left them behind: `unset {' '.join(given)}`"
    wrong = [name for name, value in given.items() if not re.fullmatch("[0-9]{1,7}", value)]
    if wrong:
        raise LaunchError(f"the environment has {told}, and {wrong[0]} is not a number{remedy}")
    if given and "WORLD_SIZE" not in given:
        raise LaunchError(f"the environment has {told} without WORLD_SIZE{remedy}")
    count = world_size()
    if not launched and count != 1:
        raise LaunchError(
            f"the environment has {told}, as in a process that a launcher started, and this command is one process. "
            f"It starts its own launcher for `--launch <file>`{remedy}"
        )
    if count > 1 and not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        raise LaunchError(f"the environment has {told} without {' and '.join(missing)}{remedy}")
    if "WORLD_SIZE" in given and rank() >= count:
        raise LaunchError(f"the environment has {told}: there is no process {rank()} among {count}{remedy}")


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def requested() -> Request:
    """The engine that the launch file asked for, read from the variables that `accelerate launch` sets.

    Raises:
        LaunchError: Baton does not have this engine; or several processes were asked for, and accelerate started one.
    """
    processes = world_size()
    cpu = os.environ.get("CUDA_VISIBLE_DEVICES") == REHEARSAL or _flag("ACCELERATE_USE_CPU")
    device: Literal["cpu", "cuda"] = "cpu" if cpu else "cuda"
    if _flag("ACCELERATE_USE_MEGATRON_LM"):
        raise LaunchError(
            "the launch file asks for Megatron-LM, which Baton does not use; take recipes/launch/zero3.yaml"
        )
    if _flag("ACCELERATE_USE_DEEPSPEED"):
        stage = _zero_stage()
        if stage not in (1, 2, 3):
            raise LaunchError(f"the launch file asks for DeepSpeed with zero_stage: {stage}; Baton uses 1, 2 or 3")
        return Request("deepspeed", stage, processes, device)
    if _flag("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise LaunchError(
                f"the launch file asks for FSDP version {version}; write `fsdp_version: 2` under fsdp_config"
            )
        return Request("fsdp2", None, processes, device)
    if processes > 1:
        return Request("ddp", None, processes, device)
    # accelerate's simple launcher sets a group's address only if the launch file asks for several processes.
    mpi = any(int(os.environ.get(name, 1)) > 1 for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"))
    if "WORLD_SIZE" not in os.environ and (mpi or {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= os.environ.keys()):
        raise LaunchError(
            "several processes were asked for, and this is one alone: `distributed_type: MULTI_CPU` or NO starts no "
            "group. Use recipes/launch/cpu2.yaml (num_processes is in it); for one process, unset MASTER_ADDR."
        )
    if not cpu:
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Request("single", None, 1, device)


def _zero_stage() -> int:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    try:
        return int(json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path}: cannot be read as a DeepSpeed configuration: {error}") from error


def leave_to_recipe() -> None:
    """Removes accelerate's defaults for what the recipe sets. Raises LaunchError if the launch file changed one."""
    settings = (
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", ("no",), "train.bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_config", ("NO", "no"), "train.torch_compile"),
        # accelerate sets 1.0 if the launch file has no value.
        ("ACCELERATE_GRADIENT_CLIPPING", "gradient_clipping", ("1.0", "auto"), "train.max_grad_norm"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "gradient_accumulation_steps",
            ("1", "auto"),
            "train.global_batch_size",
        ),
    )
    for variable, key, defaults, recipe_key in settings:
        value = os.environ.get(variable)
        if value is not None and value not in defaults:
            raise LaunchError(
                f"the launch file sets {key} ({value}); the recipe does, as {recipe_key}: remove the line"
            )
    os.environ.pop("ACCELERATE_GRADIENT_CLIPPING", None)
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
