"""The processes of a run, and training under whichever engine they form.

With launch.py, its first part, and portable.py, its last, the only file that knows accelerate, DeepSpeed, FSDP, ranks
and devices.

Imports of torch are inside the functions: `prepare` sets variables that are read when torch is loaded.
"""

import ctypes
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from handoff.manifest import EngineRecord
from training.launch import Engine, LaunchError, rank, requested, world_size
from training.launch import prepare as prepare  # the first call of every program that trains

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from training.config import OptimizerConfig, TrainConfig

# A collective that waits longer than this is dead. Nothing slow (tokenising, building) happens inside one.
TIMEOUT = timedelta(minutes=30)
# On a processor with bfloat16, smaller products gain less from it than the conversions cost.
_LEAST_WIDTH = 256


# ---- the processes


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device() -> "torch.device":
    """Where this process computes."""
    import torch

    if requested().device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def group() -> bool:
    """Whether there are others; starts the process group the first time, so that no slow start-up runs inside it."""
    if world_size() == 1:
        return False
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        here = device()
        if here.type == "cuda":
            torch.cuda.set_device(here)
        dist.init_process_group("nccl" if here.type == "cuda" else "gloo", timeout=TIMEOUT)
    return True


def barrier() -> None:
    """Waits until every process is here."""
    if not group():
        return
    import torch.distributed as dist

    here = device()
    dist.barrier(device_ids=[here.index] if here.type == "cuda" else None)


def all_gather_object(value: Any) -> list[Any]:
    """`value` of every process, by rank. Small picklable objects."""
    if not group():
        return [value]
    import torch.distributed as dist

    gathered: list[Any] = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: Any) -> Any:
    """The main process's `value`."""
    if not group():
        return value
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def largest(*values: float) -> list[float]:
    """The largest of each value on any process: one small collective, where there are several."""
    if not group():
        return list(values)
    import torch
    import torch.distributed as dist

    numbers = torch.tensor(values, dtype=torch.float64, device=device())
    dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
    found: list[float] = numbers.tolist()
    return found


def shutdown() -> None:
    """Ends the process group. The last call of a run, after a failure too; it waits for no other process.

    Left to the interpreter's exit, one run in about fifteen on gloo hung or was aborted after it had succeeded: gloo's
    threads still have to let go of tensors of the last collective, for which they need the interpreter, and the group's
    destructor waits for those threads without giving the interpreter free. So it is given to them first.
    """
    if world_size() == 1:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        time.sleep(0.2)
        dist.destroy_process_group()


def engine_record() -> EngineRecord:
    """What the manifest keeps about how the stage ran."""
    engine = requested()
    return EngineRecord(
        name=engine.name, zero_stage=engine.zero_stage, processes=engine.processes, device=engine.device
    )


# ---- choices that follow from the recipe and the engine


def accumulation_steps(global_batch_size: int, per_device: int, processes: int) -> int:
    """Forward passes of one process in one optimizer step.

    Raises:
        LaunchError: the global batch is not a multiple of what all processes take in one pass.
    """
    at_once = per_device * processes
    if global_batch_size % at_once:
        share, rest = divmod(global_batch_size, processes)
        fits = [n for n in range(1, min(per_device, share) + 1) if share % n == 0] if not rest else []
        remedy = (
            f"take train.per_device_train_batch_size={fits[-1]}"
            if fits
            else f"take a train.global_batch_size that is a multiple of {processes} processes"
        )
        raise LaunchError(
            f"train.global_batch_size is {global_batch_size}, which is not a multiple of {at_once} "
            f"(train.per_device_train_batch_size {per_device} × {processes} processes): {remedy}"
        )
    return global_batch_size // at_once


def choose_bf16(asked: bool | Literal["auto"], engine: Engine, supported: bool, width: int | None = None) -> bool:
    """Whether to compute in bfloat16.

    Args:
        asked: in the recipe.
        engine: that runs.
        supported: whether the GPU, or the processor, has products of bfloat16.
        width: of the model, where its training is known to gain from bfloat16 on a processor (`_LEAST_WIDTH`).

    Raises:
        LaunchError: it was asked for, and cannot be had.
    """
    if asked == "auto":
        gains = engine.device == "cuda" or (engine.name in ("single", "ddp") and (width or 0) >= _LEAST_WIDTH)
        return gains and supported
    if asked and engine.device == "cuda" and not supported:
        raise LaunchError("train.bf16 is true, and this GPU has no bfloat16: write `bf16: auto` or false")
    if asked and engine.device == "cpu" and engine.name in ("deepspeed", "fsdp2"):
        raise LaunchError(
            f"train.bf16 is true; a rehearsal of {engine.name} on the CPU runs in float32: write `bf16: auto`"
        )
    return asked


def choose_compile(asked: bool | Literal["auto"], engine: Engine) -> bool:
    """Whether to compile the model; `auto`: on GPUs, where the engine leaves the parameters whole."""
    if asked == "auto":
        return engine.device == "cuda" and engine.name in ("single", "ddp")
    return asked


def _bf16(asked: bool | Literal["auto"], engine: Engine, width: int | None = None) -> bool:
    import torch

    if engine.device == "cuda":
        supported = torch.cuda.is_bf16_supported()
    else:
        found = torch.cpu.get_capabilities()
        supported = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
    return choose_bf16(asked, engine, supported, width)


def _backend(engine: Engine) -> str | None:
    """What accelerate is to call its backend: it has to be told only where it would not see that there is no GPU."""
    return "gloo" if engine.device == "cpu" and engine.processes > 1 else None


def training_arguments_kwargs(train: "TrainConfig") -> dict[str, Any]:
    """Those arguments of `transformers.TrainingArguments` that depend on the engine, and those that must reach it.

    Raises:
        LaunchError: the batch sizes do not divide, or the precision cannot be had.
    """
    engine = requested()
    return {
        "per_device_train_batch_size": train.per_device_train_batch_size,
        "per_device_eval_batch_size": train.per_device_eval_batch_size,
        "gradient_accumulation_steps": accumulation_steps(
            train.global_batch_size, train.per_device_train_batch_size, engine.processes
        ),
        "max_grad_norm": train.max_grad_norm,
        "bf16": _bf16(train.bf16, engine),
        "torch_compile": choose_compile(train.torch_compile, engine),
        "activation_checkpointing": train.gradient_checkpointing,
        "activation_checkpointing_kwargs": {"use_reentrant": False},
        # Under these two, `use_cpu` would have accelerate wrap in plain DDP.
        "use_cpu": engine.device == "cpu" and engine.name in ("single", "ddp"),
        "ddp_backend": _backend(engine),
        "ddp_timeout": int(TIMEOUT.total_seconds()),
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": engine.device == "cuda",
    }


def accelerator(train: "OptimizerConfig", width: int) -> "Accelerator":
    """The accelerator of a loop written by hand, which then uses `prepare_model`, `backward` and `step`.

    `width`: of the model, whose attention the loop computes in float32 on a processor (`choose_bf16`).
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs

    engine = requested()
    AcceleratorState._reset_state(reset_partial_state=True)  # an earlier stage of this process may have had another
    plugin = None
    if engine.name == "deepspeed":
        plugin = DeepSpeedPlugin(gradient_accumulation_steps=1)
        plugin.deepspeed_config.update(
            gradient_accumulation_steps=1,
            gradient_clipping=train.max_grad_norm,
            train_micro_batch_size_per_gpu=train.per_device_train_batch_size,
        )
    made = Accelerator(
        cpu=engine.device == "cpu" and engine.name in ("single", "ddp"),
        mixed_precision="bf16" if _bf16(train.bf16, engine, width) else "no",
        deepspeed_plugin=plugin,
        kwargs_handlers=[InitProcessGroupKwargs(backend=_backend(engine), timeout=TIMEOUT)],
    )
    if engine.name == "deepspeed":
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # With it set, `from_pretrained` would hand out empty parameters under ZeRO-3; the engine cuts them up later.
        unset_hf_deepspeed_config()
    return made


# ---- training under the engine, for loops written by hand


def prepare_model(
    accelerator: "Accelerator", model: "torch.nn.Module", optimizer: "torch.optim.Optimizer"
) -> tuple[Any, Any]:
    """The model and the optimizer as the engine wraps them, checked. `model` may hold several transformers models.

    Raises:
        LaunchError: another engine than the one asked for came up.
    """
    if requested().name == "fsdp2":
        from transformers import PreTrainedModel

        inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
        wanted = {name for m in inner for name in m._no_split_modules or ()}
        accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(
            {type(m).__name__ for m in model.modules()} & wanted
        )
    parameters = len(list(model.parameters()))
    model, optimizer = accelerator.prepare(model, optimizer)
    check_model(model, accelerator)
    assert len(list(model.parameters())) == parameters, "weights that were tied no longer are"
    if requested().name == "ddp":
        # Gradients stay with their process until `backward` is told that it is the last one.
        model.require_backward_grad_sync = False
    return model, optimizer


def check_model(model: Any, accelerator: "Accelerator") -> None:
    """Compares what came up with what the launch file asked for.

    Raises:
        LaunchError: another engine, ZeRO stage or number of processes.
    """
    found = _running(model, accelerator.num_processes, accelerator.device.type)
    asked = requested()
    if found != asked:
        raise LaunchError(f"the launch file asks for {asked}, and what came up is {found}. Nothing was trained")


def check_trainer(trainer: Any) -> None:
    """`check_model` for a transformers Trainer, once `train()` has wrapped its model: in `on_train_begin`."""
    check_model(trainer.model_wrapped, trainer.accelerator)


def _running(model: Any, processes: int, device: Any) -> Engine:
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return Engine("ddp", None, processes, device)
    if isinstance(model, FSDPModule):
        assert all(isinstance(p, DTensor) for p in model.parameters()), "FSDP left parameters whole"
        return Engine("fsdp2", None, processes, device)
    if requested().name == "deepspeed":
        from deepspeed import DeepSpeedEngine

        if isinstance(model, DeepSpeedEngine):
            return Engine("deepspeed", model.zero_optimization_stage(), processes, device)
    return Engine("single", None, processes, device)


def backward(accelerator: "Accelerator", model: Any, loss: "torch.Tensor", last: bool) -> None:
    """Adds the gradients of `loss` (scalar). Those of all micro-batches and processes are summed, never averaged.

    So a loss is divided once, by the caller, by its global count. Every process calls this equally often; `last` says
    that the next call is `step`.
    """
    engine = requested()
    loss = spoilt(loss) * engine.processes  # every engine divides by it
    if engine.name == "deepspeed":
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss, scale_wrt_gas=False)
    elif engine.name == "ddp" and last:
        with accelerator.trigger_sync_in_backward(model):
            loss.backward()
    else:
        if engine.name == "fsdp2":
            model.set_requires_gradient_sync(last)
        loss.backward()


def spoilt(loss: "torch.Tensor") -> "torch.Tensor":
    """The same loss (scalar, of a graph); one that is not finite now has a gradient that is not finite either.

    By itself it may have one: behind a clamp, a logarithm of zero does. The norm of the gradients is that of all
    processes, so all of them see alike that there is nothing to step on, under every engine.
    """
    import torch

    factor = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
    loss.register_hook(lambda gradient: gradient * factor)
    return loss


def step(model: Any, optimizer: Any, max_grad_norm: float) -> float:
    """Clips (0: does not), steps, clears the gradients. Returns the norm of all gradients before clipping.

    When it is not finite, weights and moments stay as they are. DeepSpeed sees to that itself, and calls the norm inf.
    """
    import torch
    from torch.distributed.tensor import DTensor

    if requested().name == "deepspeed":
        assert model.gradient_clipping() == max_grad_norm, "DeepSpeed was set up with another max_grad_norm"
        model.step()
        return float(model.get_global_grad_norm())
    clipped = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf"))
    norm = float(clipped.full_tensor() if isinstance(clipped, DTensor) else clipped)
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


@contextmanager
def gathered(accelerator: "Accelerator", model: Any) -> Iterator[Any]:
    """The plain module with whole parameters, without gradients, for generation.

    Inside, no forward pass of it, or of a part of it, waits for another process: each may take as many as it needs.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule

    plain = unwrapped(model)
    with torch.no_grad():
        if isinstance(plain, FSDPModule):
            # Parts may be called only after the root knows that it is the root, which its first forward pass would do.
            plain._get_fsdp_state()._lazy_init()
            parts = [m for m in plain.modules() if isinstance(m, FSDPModule)]
            plain.set_reshard_after_forward(False)
            for part in parts:
                part.unshard()
            try:
                yield plain
            finally:
                again = accelerator.state.fsdp_plugin.reshard_after_forward
                for part in parts:
                    part.set_reshard_after_forward(again and part is not plain, recurse=False)
                    part.reshard()
        elif plain is not model and requested().zero_stage == 3:
            import deepspeed
            from trl.models.utils import add_hooks, remove_hooks

            with deepspeed.zero.GatheredParameters(list(model.parameters())):
                remove_hooks(model)
                try:
                    yield plain
                finally:
                    add_hooks(model)
        else:
            yield plain


def unwrapped(model: Any) -> Any:
    """The module inside what `prepare_model` or a Trainer wrapped around it (FSDP2 wraps nothing around it).

    accelerate's own way there imports DeepSpeed wherever it is installed: seconds that a single process never needs.
    """
    import torch
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return model.module
    if requested().name == "deepspeed":
        from deepspeed import DeepSpeedEngine

        return model.module if isinstance(model, DeepSpeedEngine) else model
    return model


# ---- weights and memory


def release_memory() -> None:
    """Gives pages that only freed tensors stood on back to the system.

    glibc keeps them. When one phase has filled memory with tensors of its own sizes, the next puts its own behind them,
    and the most that is ever resident is the sum of both. On a GPU torch's own allocator sees to it.
    """
    if requested().device == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function
        if trim is not None:
            trim(0)


def full_state_dict(accelerator: "Accelerator", model: Any) -> dict[str, "torch.Tensor"]:
    """All weights, whole, in float32, on the CPU of the main process; empty on the others. Every process calls it.

    Weights that are tied come under each of their names, as one tensor.
    """
    engine = requested()
    if engine.name == "fsdp2":
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    module = unwrapped(model)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    whole: dict[int, Any] = {}
    result = {}
    for key, value in module.state_dict().items():
        source = parameters.get(key, value)
        if id(source) not in whole:
            tensor = _whole(source) if engine.name == "deepspeed" and key in parameters else source.detach()
            kept = tensor.to("cpu", copy=True) if is_main() else None
            whole[id(source)] = kept.float() if kept is not None and kept.is_floating_point() else kept
        result[key] = whole[id(source)]
    return result if is_main() else {}


def _whole(parameter: Any) -> Any:
    """One parameter under DeepSpeed: of a trained one, the float32 weights that the optimizer has."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()
