"""The engine for one process, which the other engines extend.

torch is imported inside functions, because an engine is chosen before torch is loaded.
"""

import ctypes
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from training.engines import finite, upstream
from training.engines.detect import running
from training.engines.launch import LaunchError, Request
from training.engines.processes import Processes

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from training.config import OptimizerConfig, TrainConfig

# On a CPU with bfloat16, models with a smaller hidden size gain less from it than the conversions cost.
_LEAST_WIDTH = 256


@dataclass(frozen=True)
class Entry:
    """One tensor of a model or an optimizer, before it is gathered."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    whole: "Callable[[], torch.Tensor]"
    """Gathers the whole tensor. Every process calls this, in the same order."""


class Single(Processes):
    """One process with the whole model."""

    splits = False
    """Whether a process holds only a part of each parameter between forward passes."""
    sharding = ""
    """Suffix of the launch file in recipes/launch/ that rehearses this engine on the CPU."""
    extra: str | None = None
    """The extra of this project that brings the packages which only this engine needs."""

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self._accelerator: Any = None

    # ---- choices that follow from the recipe, the launch file and the machine

    def check_machine(self) -> None:
        """Checks that this machine can run the engine, and sets variables that must be set before torch is loaded.

        Raises:
            LaunchError: no GPU, too few, or a missing package or compiler.
        """
        if self.request.device == "cuda":
            self._check_gpus()
        else:
            os.environ["DS_ACCELERATOR"] = "cpu"  # transformers imports DeepSpeed if it is installed

    def left_behind(self) -> list[Path]:
        """Files that killed processes have left on this machine, for which this engine would wait for ever."""
        return []

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
            supported: whether the device multiplies bfloat16 matrices.
            width: the model's hidden size, if its training may use bfloat16 on a CPU under `auto`; otherwise None.

        Raises:
            LaunchError: the recipe asks for bfloat16, and the device or the engine cannot provide it.
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
        """Whether to compile the model. `auto`: only on GPUs, and only if the engine keeps parameters whole."""
        return self.request.device == "cuda" and not self.splits if asked == "auto" else asked

    def choose_liger(self, asked: bool | Literal["auto"], *, installed: bool, compiled: bool) -> bool:
        """Whether to use Liger's kernels. `auto`: on GPUs where it is installed, if nothing else compiles the model.

        Raises:
            LaunchError: the recipe asks for it, and it cannot run here.
        """
        possible = self.request.device == "cuda" and installed
        if asked is True and not possible:
            lacking = "the package liger-kernel" if self.request.device == "cuda" else "a CUDA GPU"
            raise LaunchError(f"train.use_liger_kernel is true, which needs {lacking}: write `auto` or false")
        return possible and not compiled if asked == "auto" else asked

    def check_trained_dtype(self, dtype: "torch.dtype") -> None:
        """Raises LaunchError if `dtype` has no effect because the engine always trains float32 weights."""

    def check_optimizer(self, key: str, name: str) -> None:
        """Raises LaunchError if the optimizer needs whole matrices and the engine shards them. `key`: recipe key."""

    def check_adapter(self, *, dora: bool) -> None:
        """Raises LaunchError if the engine cannot train an adapter of this kind."""

    def check_quantised(self, place: str) -> None:
        """Raises LaunchError if the engine cannot hold quantised weights. `place`: the model, for the message."""

    def check_pairs_on_adapter(self) -> None:
        """Raises LaunchError if preference pairs cannot be trained on from a parent that is an adapter."""

    # ---- stages with an upstream trainer

    def micro_batch(self, train: "TrainConfig") -> int:
        """Rows of one forward pass of one process in training. Raises LaunchError as the function `micro_batch`."""
        return micro_batch(train.global_batch_size, train.per_device_train_batch_size, self.data_world)

    def training_arguments(self, train: "TrainConfig") -> dict[str, Any]:
        """The arguments of `transformers.TrainingArguments` that depend on the engine or that it needs.

        Raises:
            LaunchError: the processes cannot share the global batch evenly, or the precision is not available.
        """
        cpu = self.request.device == "cpu"
        rows = self.micro_batch(train)
        return {
            "per_device_train_batch_size": rows,
            "per_device_eval_batch_size": train.per_device_eval_batch_size,
            "gradient_accumulation_steps": train.global_batch_size // (rows * self.data_world),
            "max_grad_norm": train.max_grad_norm,
            "bf16": self._bf16(train.bf16),
            "torch_compile": self.choose_compile(train.torch_compile),
            "activation_checkpointing": train.gradient_checkpointing,
            "activation_checkpointing_kwargs": {"use_reentrant": False},
            # With `use_cpu`, accelerate would wrap the model in plain DDP even if the engine shards.
            "use_cpu": cpu and not self.splits,
            "ddp_backend": self._backend,
            "ddp_timeout": int(self._timeout.total_seconds()),
            "ddp_find_unused_parameters": False,
            "dataloader_pin_memory": not cpu,
        }

    @property
    def _backend(self) -> str | None:
        """The communication backend to set in accelerate; None if accelerate's own choice is right."""
        return "gloo" if self.request.device == "cpu" and self.request.processes > 1 else None

    def adopt(self, trainer: Any) -> None:
        """Uses a transformers Trainer's accelerator. Call it when its model is wrapped, before anything is computed.

        Raises:
            LaunchError: the engine that started is not the one that the launch file asks for.
        """
        self._accelerator = trainer.accelerator
        # The last batch of an epoch is full (`trainer.StepOrder`). accelerate takes it for a short one that was filled
        # up for some processes, and would leave those out of the metrics.
        trainer.accelerator.gather_for_metrics = trainer.accelerator.gather
        self.check_model(trainer.model_wrapped)

    def held_rate_back(self, trainer: Any) -> bool:
        """Whether the Trainer kept the learning rate unchanged after its last step."""
        return False

    # ---- loops written by hand

    def set_up(self, train: "OptimizerConfig", width: int) -> None:
        """Creates the Accelerator. Call it once before `prepare`. `width`: the model's hidden size (`choose_bf16`)."""
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import InitProcessGroupKwargs

        self.group()
        AcceleratorState._reset_state(reset_partial_state=True)  # an earlier stage may have set another
        self._accelerator = Accelerator(
            cpu=self.request.device == "cpu" and not self.splits,
            mixed_precision="bf16" if self._bf16(train.bf16, width) else "no",
            kwargs_handlers=[InitProcessGroupKwargs(backend=self._backend, timeout=self._timeout)],
            **self._accelerator_arguments(train),
        )

    def _accelerator_arguments(self, train: "OptimizerConfig") -> dict[str, Any]:
        return {}

    @property
    def bf16(self) -> bool:
        """Whether forward passes run under bfloat16 autocast."""
        return bool(self._accelerator.mixed_precision == "bf16")

    def autocast(self) -> Any:
        """Context for forward passes outside the prepared model, with the same precision as in training."""
        return self._accelerator.autocast()

    def prepare(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> tuple[Any, Any]:
        """Wraps model and optimizer, and checks the engine. `model` may contain several transformers models.

        Raises:
            LaunchError: the engine that started is not the one that the launch file asks for.
        """
        self.barrier()  # each process may have loaded its model for another length of time
        accelerator: Accelerator = self._accelerator
        parameters = len(list(model.parameters()))
        model, optimizer = accelerator.prepare(model, optimizer)
        self.check_model(model)
        assert len(list(model.parameters())) == parameters, "weights that were tied no longer are"
        return model, optimizer

    def check_model(self, model: Any) -> None:
        """Compares the engine that wrapped `model` with the launch file.

        Raises:
            LaunchError: the engine, ZeRO stage, number of processes or device differs.
        """
        accelerator = self._accelerator
        deepspeed = self.request.name == "deepspeed"
        found = running(model, accelerator.num_processes, accelerator.device.type, deepspeed=deepspeed)
        if found != self.request:
            raise LaunchError(
                f"the launch file asks for {self.request}, and what came up is {found}. Nothing was trained"
            )

    def backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        """Adds the gradients of `loss` (scalar). Gradients of micro-batches and processes are summed, never averaged.

        So the caller divides a loss once, by its global count. Every process calls this equally often; `last` says that
        `step` comes next.
        """
        # Every engine divides gradients by the number of processes.
        self._backward(model, finite.carry_nonfinite(loss) * self.request.processes, last)

    def _backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        loss.backward()

    def step(self, model: Any, optimizer: Any, max_grad_norm: float) -> float:
        """Clips gradients (0: no clipping), steps, clears them. Returns the norm of all gradients before clipping.

        If the norm is not finite, weights and moments do not change.
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
        """The plain module inside a model that `prepare` or a Trainer has wrapped."""
        import torch

        return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """Context that yields the plain module with whole parameters and no gradients, for generation and scoring.

        Inside, forward passes of the module or its parts do not wait for other processes, so processes may run
        different numbers of them. All processes must enter and leave together. `model`: prepared or frozen here.
        """
        import torch

        plain = self.unwrapped(model)
        with torch.no_grad(), upstream.own_forward(plain):
            yield plain

    # ---- models that are not trained

    def freeze(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """Prepares a model that is not trained: no gradients, evaluation mode, sharded if the engine shards.

        Use it inside `whole` only. Every process calls this.
        """
        return model.eval().requires_grad_(False).to(self.device)

    def mix(self, frozen: "torch.nn.Module", trained: Any, part: str, alpha: float) -> None:
        """frozen ← alpha·trained + (1 − alpha)·frozen, weight by weight. Every process calls it.

        `trained`: a prepared model; `part`: name of its submodule that corresponds to `frozen`.
        """
        import torch

        source = self.unwrapped(trained).get_submodule(part)
        with torch.no_grad():
            for mine, theirs in zip(frozen.parameters(), source.parameters(), strict=True):
                self._mix(mine, theirs, alpha)

    def _mix(self, mine: Any, theirs: Any, alpha: float) -> None:
        mine.lerp_(theirs.to(mine.dtype), alpha)

    # ---- weights and optimizer, one tensor at a time

    def weights(self, model: Any) -> list[Entry]:
        """All tensors of the model's state, under the plain module's names; a tied weight appears once."""
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
        """The entries of `weights` that training changes: parameters with gradients, and buffers."""
        module = self.unwrapped(model)
        frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
        return [entry for entry in self.weights(model) if entry.name not in frozen]

    def _weight(self, name: str, tensor: Any) -> Entry:
        return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: tensor)

    def moments(self, model: Any, optimizer: Any) -> list[Entry]:
        """The optimizer's state, with entries named `key/parameter`; empty before the first step."""
        state = torch_optimizer(optimizer).state
        return [
            Entry(f"{key}/{name}", value.dtype, tuple(value.shape), partial(self._full, value))
            for name, parameter in self._trained_parameters(model).items()
            for key, value in sorted(state.get(parameter, {}).items())
        ]

    def _full(self, tensor: Any) -> Any:
        return tensor

    def _share_of(self, whole: "torch.Tensor", parameter: Any) -> Any:
        """This process's piece of `whole`. Every process has all of `whole`, so nothing is sent."""
        return whole

    def _trained_parameters(self, model: Any) -> "dict[str, torch.Tensor]":
        module = self.unwrapped(model)
        return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}

    def load_weights(self, model: Any, names: "Collection[str]", read: "Callable[[str], torch.Tensor]") -> None:
        """Loads whole tensors into the parameters and buffers `names`; `read` returns one by name.

        `model`: prepared or frozen here. Every process calls it. The tensors are read in the model's order.
        """
        import torch

        module = self.unwrapped(model)
        with torch.no_grad():
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if name in names:
                    self._put(tensor, read(name))

    def _put(self, tensor: Any, whole: "torch.Tensor") -> None:
        tensor.copy_(self._share_of(whole, tensor))

    def load_moments(self, model: Any, optimizer: Any, names: set[str], read: "Callable[[str], torch.Tensor]") -> None:
        """Loads whole tensors into the optimizer; `read` returns one by its name in `moments`."""
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
        """Inside, transformers loads or builds a whole model in this process, without other processes."""
        yield

    # ---- memory

    def forget_peak(self) -> int:
        """Forgets what this process had at most, and returns what it has now, in bytes; as `peak` counts it."""
        import torch

        if self.request.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            return 0
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return _resident("VmRSS")

    def peak(self) -> int:
        """The most memory that this process had since `forget_peak`, in bytes: on a CPU resident memory, on a GPU what
        torch's allocator took."""
        import torch

        return torch.cuda.max_memory_reserved() if self.request.device == "cuda" else _resident("VmHWM")

    def release_memory(self) -> None:
        """Returns memory pages that hold only freed tensors to the system.

        glibc keeps such pages. If the next phase allocates tensors of other sizes, they may not fit there, and the peak
        becomes the sum of both phases. On a GPU torch's own allocator handles this.
        """
        if self.request.device == "cpu" and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have no such function
            if trim is not None:
                trim(0)


def _resident(key: str) -> int:
    """Bytes by a key of /proc/self/status. Raises LaunchError where the system has no such file."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise LaunchError("memory is measured on Linux alone") from error
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def micro_batch(global_batch_size: int, at_most: int, processes: int) -> int:
    """Rows of one forward pass of one process: the largest number up to `at_most` by which the batch can be divided.

    Raises:
        LaunchError: the global batch size is not a multiple of the number of processes.
    """
    share, rest = divmod(global_batch_size, processes)
    if rest:
        raise LaunchError(
            f"train.global_batch_size is {global_batch_size}, which {processes} processes cannot share evenly: "
            f"take a train.global_batch_size that is a multiple of {processes}, or start fewer processes"
        )
    return max(rows for rows in range(1, min(at_most, share) + 1) if share % rows == 0)


def torch_optimizer(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
