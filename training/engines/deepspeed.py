"""DeepSpeed ZeRO: shards optimizer states (stage 1), gradients (2) and weights (3) among the processes.

DeepSpeed holds each trained parameter twice: a copy for the forward pass, and a float32 copy that the optimizer steps.
The float32 copy is saved and published.
"""

import os
import shutil
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.engines import upstream
from training.engines.launch import LaunchError, Request, rank
from training.engines.single import Entry
from training.engines.splitting import Splitting

if TYPE_CHECKING:
    import torch

    from training.config import OptimizerConfig


class DeepSpeed(Splitting):
    """Several processes under a `DeepSpeedEngine`."""

    extra = "deepspeed"

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.sharding = f"_zero{max(2, request.zero_stage or 0)}"
        self._zero3 = request.zero_stage == 3

    # ---- choices

    def check_machine(self) -> None:
        """As `Single.check_machine`."""
        super().check_machine()
        if self.request.device == "cpu":
            _check_build_tools()
        if find_spec("deepspeed") is None:
            raise LaunchError(
                "the launch file asks for DeepSpeed, which is not installed: pip install 'baton-align[deepspeed]'"
            )

    def left_behind(self) -> list[Path]:
        """As `Single.left_behind`: the locks of killed builds."""
        return stale_build_locks(_build_root()) if self.request.device == "cpu" else []

    def held_rate_back(self, trainer: Any) -> bool:
        """As `Single.held_rate_back`: DeepSpeed itself skips non-finite steps, and the Trainer then keeps the rate."""
        return bool(trainer.accelerator.optimizer_step_was_skipped)

    # ---- loops written by hand

    def set_up(self, train: "OptimizerConfig", width: int) -> None:
        """As `Single.set_up`."""
        super().set_up(train, width)
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        # With this config, `from_pretrained` would return empty parameters under ZeRO-3; here `prepare` shards them.
        unset_hf_deepspeed_config()

    def _accelerator_arguments(self, train: "OptimizerConfig") -> dict[str, Any]:
        from accelerate.utils import DeepSpeedPlugin

        plugin = DeepSpeedPlugin(gradient_accumulation_steps=1)
        plugin.deepspeed_config.update(
            gradient_accumulation_steps=1,
            gradient_clipping=train.max_grad_norm,
            train_micro_batch_size_per_gpu=train.per_device_train_batch_size,
        )
        return {"deepspeed_plugin": plugin}

    def _backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        model.set_gradient_accumulation_boundary(last)
        model.backward(loss, scale_wrt_gas=False)

    def step(self, model: Any, optimizer: Any, max_grad_norm: float) -> float:
        """As `Single.step`. DeepSpeed itself skips a step whose norm is not finite, and reports that norm as inf."""
        assert model.gradient_clipping() == max_grad_norm, "DeepSpeed was set up with another max_grad_norm"
        model.step()
        return float(model.get_global_grad_norm())

    def unwrapped(self, model: Any) -> Any:
        """As `Single.unwrapped`."""
        from deepspeed import DeepSpeedEngine

        plain = super().unwrapped(model)
        return plain.module if isinstance(plain, DeepSpeedEngine) else plain

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """As `Single.whole`."""
        plain = self.unwrapped(model)
        if not self._zero3:
            with super().whole(model):
                yield plain
            return
        import deepspeed
        import torch

        with torch.no_grad(), deepspeed.zero.GatheredParameters(list(plain.parameters())):
            if plain is model:  # frozen: it has no hooks of DeepSpeed's engine
                yield plain
            else:
                with upstream.without_zero_hooks(model):
                    yield plain

    # ---- models that are not trained

    def freeze(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """As `Single.freeze`."""
        if not self._zero3:
            return super().freeze(model)
        import deepspeed

        self.group()
        self.barrier()
        frozen = model.eval().requires_grad_(False)
        # Shards the parameters of an existing module in place, each as soon as it has been moved to the device.
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
        deepspeed.zero.Init(module=frozen, config_dict_or_path=config, dtype=next(frozen.parameters()).dtype)
        for buffer in frozen.buffers():
            buffer.data = buffer.data.to(self.device)
        return frozen

    def _put(self, tensor: Any, whole: "torch.Tensor") -> None:
        import deepspeed

        if "ds_tensor" in vars(tensor) and not tensor.numel():
            tensor.ds_tensor.copy_(_zero3_share(whole, tensor))
            return
        # ZeRO-3 keeps small parameters whole.
        with deepspeed.zero.GatheredParameters([tensor], modifier_rank=0):
            super()._put(tensor, whole)

    def _mix(self, mine: Any, theirs: Any, alpha: float) -> None:
        import deepspeed

        with deepspeed.zero.GatheredParameters([theirs]):
            source = theirs.detach().clone()
        with deepspeed.zero.GatheredParameters([mine], modifier_rank=0):
            super()._mix(mine, source, alpha)

    # ---- weights and optimizer

    def _weight(self, name: str, tensor: Any) -> Entry:
        import torch

        if not isinstance(tensor, torch.nn.Parameter):
            return super()._weight(name, tensor)
        dtype = torch.float32 if tensor.requires_grad else tensor.dtype
        return Entry(name, dtype, upstream.zero_shape(tensor), lambda: _whole(tensor))

    def moments(self, model: Any, optimizer: Any) -> list[Entry]:
        """As `Single.moments`."""
        import torch
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = model.optimizer
        keys, step = upstream.zero_keys(zero, self._zero3)
        if not keys:
            return []
        upstream.link_moments(zero, self._zero3)
        entries = []
        for name, parameter in self._trained_parameters(model).items():
            for key in keys:
                whole = lambda p=parameter, k=key: safe_get_full_optimizer_state(p, k)  # noqa: E731
                entries.append(Entry(f"{key}/{name}", torch.float32, upstream.zero_shape(parameter), whole))
            entries.append(Entry(f"step/{name}", torch.float32, (), lambda: torch.tensor(step)))
        return entries

    def load_weights(self, model: Any, names: "Collection[str]", read: "Callable[[str], torch.Tensor]") -> None:
        """As `Single.load_weights`. Of a trained parameter, the float32 copy is loaded, which the other one follows."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

        trained = {name: parameter for name, parameter in self._trained_parameters(model).items() if name in names}
        super().load_weights(model, set(names) - trained.keys(), read)
        if not trained:
            return
        with upstream.writing_zero(model.optimizer, self._zero3):
            for name, parameter in trained.items():
                value = read(name)
                if self._zero3:
                    safe_set_local_fp32_param(parameter, _zero3_share(value, parameter))
                else:
                    safe_set_full_fp32_param(parameter, value)

    def load_moments(self, model: Any, optimizer: Any, names: set[str], read: "Callable[[str], torch.Tensor]") -> None:
        """As `Single.load_moments`."""
        import torch
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        keys = sorted({name.partition("/")[0] for name in names} - {"step"})
        if not keys:
            return
        zero = model.optimizer
        # DeepSpeed counts steps per group; other engines count fewer for a parameter that got no gradient.
        step = max(float(read(name)) for name in names if name.startswith("step/"))
        with upstream.writing_zero(zero, self._zero3):
            for flat, group in upstream.zero_flat_groups(zero, self._zero3):
                state = zero.optimizer.state[flat]
                if isinstance(zero.optimizer, torch.optim.AdamW):
                    on_device = group["fused"] or group["capturable"]
                    state["step"] = torch.tensor(step, device=flat.device if on_device else "cpu")
                else:  # DeepSpeed's own optimizer, for moments on the CPU
                    state["step"] = int(step)
                for key in keys:
                    state.setdefault(key, torch.zeros_like(flat.data))
            upstream.link_moments(zero, self._zero3)
            for name, parameter in self._trained_parameters(model).items():
                for key in keys:
                    entry = f"{key}/{name}"
                    value = read(entry) if entry in names else torch.zeros(upstream.zero_shape(parameter))
                    if self._zero3:
                        safe_set_local_optimizer_state(parameter, _zero3_share(value, parameter), key)
                    else:
                        safe_set_full_optimizer_state(parameter, value, key)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """As `Single.loading`.

        After a ZeRO-3 trainer has been set up, transformers would shard weights while it loads them, and wait for other
        processes that may not be loading. `prepare` and `freeze` shard them instead.
        """
        with upstream.without_zero_loading():
            yield


def _whole(parameter: Any) -> Any:
    """One whole parameter; for a trained one, the optimizer's float32 weights."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        return safe_get_full_fp32_param(parameter)
    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _zero3_share(whole: "torch.Tensor", parameter: Any) -> "torch.Tensor":
    """The piece that this process keeps. All pieces have the same size; the last ones are padded with zeros."""
    import torch

    size = parameter.ds_tensor.numel()
    piece = whole.reshape(-1)[rank() * size :][:size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


# ---- DeepSpeed's build


def _check_build_tools() -> None:
    # Finds programs such as ninja in a virtual environment that is not activated.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    compiler = os.environ.get("CXX", "c++")
    for program, remedy in ((compiler, "apt-get install g++"), ("ninja", "pip install ninja")):
        if shutil.which(program) is None:
            raise LaunchError(
                f"DeepSpeed builds its communication for the CPU when it is first used, and `{program}` is not "
                f"here to do so ({remedy})"
            )


def _build_root() -> Path:
    """Torch's extensions folder."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def stale_build_locks(root: Path) -> list[Path]:
    """The locks that killed builds of DeepSpeed left in torch's extensions folder `root`.

    torch waits for such a lock for ever, without a message. A build keeps its lock file open, so a lock that no process
    of this machine has open is stale. If the system does not list open files, a lock is stale after ten minutes.
    """
    stale = []
    for lock in (*root.glob("deepspeed_*/lock"), *root.glob("*/deepspeed_*/lock")):
        if _held(lock):
            continue
        time.sleep(0.5)  # a build that has finished closes its lock, then deletes it
        if lock.exists() and not _held(lock):
            stale.append(lock)
    return stale


def _held(lock: Path) -> bool:
    if Path("/proc/self/fd").is_dir():
        for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
            try:
                if descriptor.readlink() == lock.resolve():
                    return True
            except OSError:  # the process has ended, or belongs to another user
                continue
        return False
    try:
        return time.time() - lock.stat().st_mtime < 600
    except FileNotFoundError:
        return False
