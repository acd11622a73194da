"""The engine of one process, and what the other engines have in common with it.

Imports of torch are inside the functions: an engine is chosen before torch is loaded.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from training.engines import finite
from training.engines.detect import running
from training.engines.launch import LaunchError, Request
from training.engines.processes import TIMEOUT, Processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from training.config import OptimizerConfig, TrainConfig

# On a CPU with bfloat16, smaller matrix products gain less from it than the conversions cost.
_LEAST_WIDTH = 256


@dataclass(frozen=True)
class Entry:
    """One tensor of a model or an optimizer, before it is gathered."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    whole: "Callable[[], torch.Tensor]"
    """Gathers it. Every process calls it, in the same order."""


class Single(Processes):
    """One process with the whole model."""

    splits = False
    """Whether a process holds only a part of each parameter between forward passes."""
    sharding = ""
    """Suffix of the rehearsal's launch file in recipes/launch/."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._accelerator: Any = None

    # ---- choices that follow from the recipe, the launch file and the machine

    def check_machine(self) -> None:
        """Refuses what this machine cannot do, and sets what must be set before torch is loaded.

        Raises:
            LaunchError: no GPU, too few, or a missing package or compiler.
        """
        if self.request.device == "cuda":
            self._check_gpus()
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # where DeepSpeed is installed, transformers imports it

    def _check_gpus(self) -> None:
        import torch

        request = self.request
        here = int(os.environ.get("LOCAL_WORLD_SIZE", request.processes))
        found = torch.cuda.device_count()
        if found == 0:
            raise LaunchError(
                f"the launch file asks for {here} GPU{'s' if here > 1 else ''} on this machine ({request}), which has "
                "none that torch can use. To rehearse it on the CPU, use "
                f"recipes/launch/cpu2{self.sharding}.yaml"
            )
        if found < here:
            raise LaunchError(
                f"the launch file asks for {here} processes on this machine, which has {found} GPUs: one each. "
                f"Give accelerate launch `--num_processes {found}`, or write num_processes: {found} in the launch file"
            )

    def choose_bf16(self, asked: bool | Literal["auto"], supported: bool, width: int | None = None) -> bool:
        """Whether to compute in bfloat16.

        Args:
            asked: `train.bf16` of the recipe.
            supported: whether the GPU, or the CPU, multiplies matrices of bfloat16.
            width: hidden size of the model, where its training is known to gain from bfloat16 on a CPU.

        Raises:
            LaunchError: it was asked for and cannot be had.
        """
        cuda = self.request.device == "cuda"
        if asked == "auto":
            return supported and (cuda or (not self.splits and (width or 0) >= _LEAST_WIDTH))
        if asked and cuda and not supported:
            raise LaunchError("train.bf16 is true, and this GPU has no bfloat16: write `bf16: auto` or false")
        if asked and not cuda and self.splits:
            raise LaunchError(
                f"train.bf16 is true; a rehearsal of {self.request.name} on the CPU runs in float32: write `bf16: auto`"
            )
        return asked

    def _bf16(self, asked: bool | Literal["auto"], width: int | None = None) -> bool:
        import torch

        if self.request.device == "cuda":
            supported = torch.cuda.is_bf16_supported()
        else:
            found = torch.cpu.get_capabilities()
            supported = bool(found.get("avx512_bf16") or found.get("amx_bf16"))
        return self.choose_bf16(asked, supported, width)

    def choose_compile(self, asked: bool | Literal["auto"]) -> bool:
        """Whether to compile the model; `auto`: on GPUs, where the parameters stay whole."""
        return self.request.device == "cuda" and not self.splits if asked == "auto" else asked

    def check_trained_dtype(self, dtype: "torch.dtype") -> None:
        """Raises LaunchError for a precision that the engine's own float32 weights would make useless."""

    def check_optimizer(self, key: str, name: str) -> None:
        """Raises LaunchError for an optimizer that needs whole matrices where they are cut. `key`: of the recipe."""

    # ---- stages with an upstream trainer

    def training_arguments(self, train: "TrainConfig") -> dict[str, Any]:
        """The arguments of `transformers.TrainingArguments` that depend on the engine, and those that must reach it.

        Raises:
            LaunchError: the batch sizes do not divide, or the precision cannot be had.
        """
        cpu = self.request.device == "cpu"
        return {
            "per_device_train_batch_size": train.per_device_train_batch_size,
            "per_device_eval_batch_size": train.per_device_eval_batch_size,
            "gradient_accumulation_steps": accumulation_steps(
                train.global_batch_size, train.per_device_train_batch_size, self.data_world
            ),
            "max_grad_norm": train.max_grad_norm,
            "bf16": self._bf16(train.bf16),
            "torch_compile": self.choose_compile(train.torch_compile),
            "activation_checkpointing": train.gradient_checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            # Under an engine that splits, `use_cpu` would have accelerate wrap in plain DDP.
            "use_cpu": cpu and not self.splits,
            "ddp_backend": self._backend,
            "ddp_timeout": int(TIMEOUT.total_seconds()),
            "ddp_find_unused_parameters": False,
            "dataloader_pin_memory": not cpu,
        }

    @property
    def _backend(self) -> str | None:
        """What accelerate must be told to use between processes: only where it would not see that there is no GPU."""
        return "gloo" if self.request.device == "cpu" and self.request.processes > 1 else None

    def adopt(self, trainer: Any) -> None:
        """Takes over a transformers Trainer whose `train()` has wrapped its model: in `on_train_begin`.

        Raises:
            LaunchError: another engine than the one asked for came up.
        """
        self._accelerator = trainer.accelerator
        self.check_model(trainer.model_wrapped)

    def held_rate_back(self, trainer: Any) -> bool:
        """Whether the Trainer has not moved the learning rate after the step that it has just taken."""
        return False

    # ---- loops written by hand

    def set_up(self, train: "OptimizerConfig", width: int) -> None:
        """To be called once before `prepare`. `width`: hidden size of the model (see `choose_bf16`)."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier stage of this process may have had another
        self._accelerator = Accelerator(
            cpu=self.request.device == "cpu" and not self.splits,
            mixed_precision="bf16" if self._bf16(train.bf16, width) else "no",
            kwargs_handlers=[InitProcessGroupKwargs(backend=self._backend, timeout=TIMEOUT)],
            **self._accelerator_arguments(train),
        )

    def _accelerator_arguments(self, train: "OptimizerConfig") -> dict[str, Any]:
        return {}

    @property
    def bf16(self) -> bool:
        """Whether forward passes of the loop run under bfloat16 autocast."""
        return bool(self._accelerator.mixed_precision == "bf16")

    def autocast(self) -> Any:
        """The context of a forward pass outside of the prepared model: the same precision as training's."""
        return self._accelerator.autocast()

    def prepare(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> tuple[Any, Any]:
        """The model and the optimizer as the engine wraps them, checked. `model` may hold several transformers models.

        Raises:
            LaunchError: another engine than the one asked for came up.
        """
        accelerator: Accelerator = self._accelerator
        parameters = len(list(model.parameters()))
        model, optimizer = accelerator.prepare(model, optimizer)
        self.check_model(model)
        assert len(list(model.parameters())) == parameters, "weights that were tied no longer are"
        return model, optimizer

    def check_model(self, model: Any) -> None:
        """Compares what came up with what the launch file asked for.

        Raises:
            LaunchError: another engine, ZeRO stage, number of processes or device.
        """
        accelerator = self._accelerator
        deepspeed = self.request.name == "deepspeed"
        found = running(model, accelerator.num_processes, accelerator.device.type, deepspeed=deepspeed)
        if found != self.request:
            raise LaunchError(
                f"the launch file asks for {self.request}, and what came up is {found}. Nothing was trained"
            )

    def backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        """Adds the gradients of `loss` (scalar). Those of all micro-batches and processes are summed, never averaged.

        So a loss is divided once, by the caller, by its global count. Every process calls this equally often; `last`
        says that the next call is `step`.
        """
        # Every engine divides by the number of processes.
        self._backward(model, finite.carry_nonfinite(loss) * self.request.processes, last)

    def _backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        loss.backward()

    def step(self, model: Any, optimizer: Any, max_grad_norm: float) -> float:
        """Clips (0: does not), steps, clears the gradients. Returns the norm of all gradients before clipping.

        When the norm is not finite, weights and moments stay as they are.
        """
        import torch

        norm = self._number(torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm or float("inf")))
        if math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad()
        return norm

    def _number(self, norm: "torch.Tensor") -> float:
        return float(norm)

    def unwrapped(self, model: Any) -> Any:
        """The module inside what `prepare` or a Trainer wrapped around it."""
        import torch

        return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """The plain module with whole parameters and without gradients, for generation and scoring.

        Inside, no forward pass of it, or of a part of it, waits for another process: each may take as many as it needs.
        Every process enters and leaves together. `model`: prepared or frozen by this engine.
        """
        import torch

        with torch.no_grad():
            yield self.unwrapped(model)

    # ---- models that are not trained

    def freeze(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """A model that is only read: no gradients, evaluation mode, cut up as the engine cuts the others.

        It computes inside `whole`. Every process calls it.
        """
        return model.eval().requires_grad_(False).to(self.device)

    def mix(self, frozen: "torch.nn.Module", trained: Any, part: str, alpha: float) -> None:
        """frozen ← alpha·trained + (1 − alpha)·frozen, weight by weight. Every process calls it.

        `trained`: a prepared model; `part`: name of the sub-module in it that corresponds to `frozen`.
        """
        import torch

        source = self.unwrapped(trained).get_submodule(part)
        with torch.no_grad():
            for mine, theirs in zip(frozen.parameters(), source.parameters(), strict=True):
                self._mix(mine, theirs, alpha)

    def load_frozen(self, model: "torch.nn.Module", read: "Callable[[str], torch.Tensor]") -> None:
        """Puts whole tensors, `read` by name, into a frozen model. Every process calls it."""
        for name, parameter in model.named_parameters():
            self._put(parameter, read(name))
        kept = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in kept:
                buffer.copy_(read(name))

    def _put(self, parameter: Any, whole: "torch.Tensor") -> None:
        parameter.copy_(self._share_of(whole, parameter))

    def _mix(self, mine: Any, theirs: Any, alpha: float) -> None:
        mine.lerp_(theirs.to(mine.dtype), alpha)

    # ---- weights and optimizer, tensor by tensor

    def weights(self, model: Any) -> list[Entry]:
        """Everything in the model's state, under the names of the plain module; a tied weight comes once."""
        module = self.unwrapped(model)
        parameters = dict(module.named_parameters())
        aliases = {name for name, _ in module.named_parameters(remove_duplicate=False)} - parameters.keys()
        kept = module.state_dict().keys() - aliases
        return [
            self._weight(name, tensor)
            for name, tensor in [*parameters.items(), *module.named_buffers()]
            if name in kept
        ]

    def trained(self, model: Any) -> list[Entry]:
        """Those of `weights` that training changes: parameters with gradients, and buffers."""
        module = self.unwrapped(model)
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        return [entry for entry in self.weights(model) if entry.name not in frozen]

    def _weight(self, name: str, tensor: Any) -> Entry:
        return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def moments(self, model: Any, optimizer: Any) -> list[Entry]:
        """What the optimizer keeps, as `key/parameter`; nothing before its first step."""
        state = torch_optimizer(optimizer).state
        return [
            Entry(f"{key}/{name}", value.dtype, tuple(value.shape), partial(self._full, value))
            for name, parameter in self._trained_parameters(model).items()
            for key, value in sorted(state.get(parameter, {}).items())
        ]

    def _full(self, tensor: Any) -> Any:
        return tensor

    def _share_of(self, whole: "torch.Tensor", parameter: Any) -> Any:
        """`whole` cut up as the parameter is; each process has all of it, so nothing is sent."""
        return whole

    def _trained_parameters(self, model: Any) -> "dict[str, torch.Tensor]":
        module = self.unwrapped(model)
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def load_weights(self, model: Any, read: "Callable[[str], torch.Tensor]") -> None:
        """Puts whole tensors, `read` by name, into the parameters that are trained."""
        for name, parameter in self._trained_parameters(model).items():
            parameter.copy_(self._share_of(read(name), parameter))

    def load_moments(self, model: Any, optimizer: Any, names: set[str], read: "Callable[[str], torch.Tensor]") -> None:
        """Puts whole tensors, `read` under the names that `moments` gave, into the optimizer."""
        trained = self._trained_parameters(model)
        inner = torch_optimizer(optimizer)
        number = {id(p): i for i, p in enumerate(p for group in inner.param_groups for p in group["params"])}
        state: dict[int, dict[str, Any]] = {}
        for entry in names:
            key, _, name = entry.partition("/")
            value = read(entry)
            if key != "step":
                value = self._share_of(value, trained[name])
            state.setdefault(number[id(trained[name])], {})[key] = value
        inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Inside, transformers loads or builds a model whole, on this process alone."""
        yield

    # ---- memory

    def release_memory(self) -> None:
        """Gives pages on which only freed tensors lie back to the system.

        glibc keeps them. When one phase has filled memory with tensors of its own sizes, the next phase puts its
        tensors behind them, and the peak is the sum of both. On a GPU torch's own allocator handles this.
        """
        if self.request.device == "cpu" and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function
            if trim is not None:
                trim(0)


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


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
