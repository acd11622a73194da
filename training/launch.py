"""What a launch file asked for, and whether this machine can do it. First half of the runtime; see runtime.py.

A launch file asks for an engine. accelerate falls back in silence where it cannot give it: one process in place of two,
plain data parallelism in place of ZeRO-3. So `requested` reads what was asked, `prepare` refuses what this machine
cannot do, and `runtime.check_model` compares what came up with what was asked before the first step.

A rehearsal is a launch file with `gpu_ids: "-1,-1"`. accelerate turns that into CUDA_VISIBLE_DEVICES, which hides every
GPU, and it is the one line of a launch file that reaches the processes of every engine. Only with it do several
processes run on the CPU; a GPU launch file on a machine without a GPU is an error.

Imports of torch are inside the functions: `prepare` sets variables that are read when torch is loaded.
"""

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from handoff.errors import UserError

REHEARSAL = "-1,-1"


class LaunchError(UserError):
    """The launch file asks for what this machine, or accelerate on it, does not give."""


@dataclass(frozen=True)
class Engine:
    """How the processes of one run train one model."""

    name: Literal["single", "ddp", "deepspeed", "fsdp2"]
    zero_stage: int | None
    """1 to 3 for deepspeed, None otherwise."""
    processes: int
    device: Literal["cpu", "cuda"]

    def __str__(self) -> str:
        zero = f" ZeRO-{self.zero_stage}" if self.name == "deepspeed" else ""
        return f"{self.name}{zero}, {self.processes} process{'es' if self.processes > 1 else ''}, {self.device}"


def rank() -> int:
    """Of this process among all of them, from 0."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


def world_size() -> int:
    """Processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def _flag(name: str) -> bool:
    return os.environ.get(name, "false").lower() in ("true", "1", "yes")


def requested() -> Engine:
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
        return Engine("deepspeed", stage, processes, device)
    if _flag("ACCELERATE_USE_FSDP"):
        version = os.environ.get("FSDP_VERSION", "1")
        if version != "2":
            raise LaunchError(
                f"the launch file asks for FSDP version {version}; write `fsdp_version: 2` under fsdp_config"
            )
        return Engine("fsdp2", None, processes, device)
    if processes > 1:
        return Engine("ddp", None, processes, device)
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
    return Engine("single", None, 1, device)


def _zero_stage() -> int:
    path = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if path is None:
        return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
    try:
        return int(json.loads(Path(path).read_text(encoding="utf-8")).get("zero_optimization", {}).get("stage", 0))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{path}: cannot be read as a DeepSpeed configuration: {error}") from error


def prepare() -> Engine:
    """Makes this process ready for the engine that was asked for. To be called first, before torch is imported.

    Raises:
        LaunchError: this machine does not have the GPUs, the compiler or the package; or the launch file sets what a
            recipe sets (precision, accumulation, clipping, compilation).
    """
    rehearsal = os.environ.get("CUDA_VISIBLE_DEVICES") == REHEARSAL
    if rehearsal:
        # Processes that share cores must not spin while they wait for one another.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    elif world_size() == 1 and "LOCAL_RANK" not in os.environ:
        # One process uses one GPU; transformers would split its batches over all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    _leave_to_recipe()
    engine = requested()
    if engine.name in ("deepspeed", "fsdp2"):
        os.environ.pop("ACCELERATE_USE_CPU", None)  # with it, accelerate would take plain DDP
    if engine.device == "cuda":
        _check_gpus(engine)
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"  # where it is installed, transformers imports it under every engine
    if engine.name == "deepspeed":
        _check_deepspeed(engine)
    if engine.name == "fsdp2":
        # accelerate's default; it loads the weights on one process, and unties those that a model ties.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    if engine.name == "fsdp2" and engine.device == "cpu":
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        _allow_fsdp_on_cpu()
    return engine


def _leave_to_recipe() -> None:
    """Takes accelerate's own settings out of the recipe's way; one that is not a default was meant, and is refused."""
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


def _check_gpus(engine: Engine) -> None:
    import torch

    here = int(os.environ.get("LOCAL_WORLD_SIZE", engine.processes))
    found = torch.cuda.device_count()
    if found == 0:
        suffix = {"deepspeed": f"_zero{max(2, engine.zero_stage or 0)}", "fsdp2": "_fsdp2"}.get(engine.name, "")
        raise LaunchError(
            f"the launch file asks for {here} GPU{'s' if here > 1 else ''} on this machine ({engine}), which has none "
            f"that torch can use. To rehearse it on the CPU, use recipes/launch/cpu2{suffix}.yaml"
        )
    if found < here:
        raise LaunchError(
            f"the launch file asks for {here} processes on this machine, which has {found} GPUs: one each. "
            f"Give accelerate launch `--num_processes {found}`, or write num_processes: {found} in the launch file"
        )


def _check_deepspeed(engine: Engine) -> None:
    if engine.device == "cpu":
        # The programs of a virtual environment that was not activated, ninja among them.
        os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        compiler = os.environ.get("CXX", "c++")
        for program, remedy in ((compiler, "apt-get install g++"), ("ninja", "pip install ninja")):
            if shutil.which(program) is None:
                raise LaunchError(
                    f"DeepSpeed builds its communication for the CPU when it is first used, and `{program}` is not "
                    f"here to do so ({remedy})"
                )
        from torch.utils.cpp_extension import get_default_build_root

        root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
        release_build_locks(root, lambda text: print(text, file=sys.stderr))
    if find_spec("deepspeed") is None:
        raise LaunchError(
            "the launch file asks for DeepSpeed, which is not installed: pip install 'baton-align[deepspeed]'"
        )


def release_build_locks(root: Path, say: Callable[[str], None]) -> None:
    """Removes the locks that killed builds of DeepSpeed left in torch's extensions folder.

    torch waits for such a lock for ever and says nothing. A builder keeps its lock open, so a lock that no process of
    this machine has open has no owner. Where the system does not tell what is open, ten minutes of age decide.
    """
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        if _held(lock):
            continue
        time.sleep(0.5)  # a builder that is done closes its lock and then deletes it
        if lock.exists() and not _held(lock):
            lock.unlink(missing_ok=True)
            say(f"removed {lock}, left by a build that was killed")


def _held(lock: Path) -> bool:
    if Path("/proc/self/fd").is_dir():
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if descriptor.readlink() == lock.resolve():
                    return True
            except OSError:  # the process ended, or is not ours
                continue
        return False
    try:
        return time.time() - lock.stat().st_mtime < 600
    except FileNotFoundError:
        return False


def _allow_fsdp_on_cpu() -> None:
    """accelerate wraps in FSDP only where it counts GPUs; it offers no way to ask for gloo and FSDP together."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo
