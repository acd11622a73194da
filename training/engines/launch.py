"""What a launch file asks for. No torch at module level: what is read here decides how torch is loaded.

accelerate falls back silently where it cannot give what a launch file asks for: one process in place of two, plain data
parallelism in place of ZeRO-3. So `requested` reads what was asked, an engine's `check_machine` refuses what this
machine cannot do, and its `check_model` compares what came up with what was asked before the first step.

A rehearsal runs a GPU engine's processes on the CPU. Its launch file has `gpu_ids: "-1,-1"`: accelerate turns that into
CUDA_VISIBLE_DEVICES, which hides every GPU, and it is the one line of a launch file that reaches the processes of every
engine. Several processes run on the CPU only with this line; a GPU launch file on a machine without a GPU is an error.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from handoff.errors import UserError

REHEARSAL = "-1,-1"


class LaunchError(UserError):
    """The launch file asks for what this machine, or accelerate on it, does not give."""


@dataclass(frozen=True)
class Request:
    """The engine that a launch file asks for."""

    name: Literal["single", "ddp", "deepspeed", "fsdp2"]
    zero_stage: int | None
    """1 to 3 for deepspeed, None otherwise."""
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


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def requested() -> Request:
    """The engine that the launch file asked for, read from the variables that `accelerate launch` sets.

    Raises:
        LaunchError: an engine that Baton does not have, or several processes of which accelerate would start one.
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
    # The simple launcher of accelerate sets the address of a group only when the file asks for several processes.
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
    """Removes accelerate's settings for what the recipe sets; refuses those that are not defaults: they were meant."""
    settings = (
        ("ACCELERATE_MIXED_PRECISION", "mixed_precision", ("no",), "train.bf16"),
        ("ACCELERATE_DYNAMO_BACKEND", "dynamo_config", ("NO", "no"), "train.torch_compile"),
        # accelerate says 1.0 where the launch file says nothing.
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
