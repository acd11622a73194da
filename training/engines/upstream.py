"""Every private name of another library that Baton uses, in one list, and the code that uses them for the engines.

`PRIVATE` says where each name lives. tests/test_upstream.py asks each library for it and fails by name when it has gone
or takes other arguments, so that an upgrade shows what must be looked at.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class PrivateName:
    """A name without a promise."""

    owner: str
    """`package.module:Class`, or `package.module`."""
    name: str
    parameters: tuple[str, ...] | None
    """Of a function or method, without self; None for an attribute."""
    why: str
    """What it is used for, and why no public name does."""


PRIVATE: tuple[PrivateName, ...] = ()


# ---- DeepSpeed


def zero_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, whether ZeRO-3 has cut it up or not."""
    return tuple(parameter.ds_shape) if "ds_shape" in vars(parameter) else tuple(parameter.shape)


def zero_flat_groups(zero: Any, stage3: bool) -> list[tuple[Any, dict[str, Any]]]:
    """DeepSpeed's flat float32 tensors of this process, each with its optimizer group. `zero`: the ZeRO optimizer."""
    groups = zero.optimizer.param_groups
    if stage3:
        numbers = zero.sub_group_to_group_id
        return [(flat, groups[numbers[i]]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
    return [(flat, group) for group in groups for flat in group["params"]]


def zero_keys(zero: Any, stage3: bool) -> tuple[list[str], float]:
    """Names of the moments, and the steps taken; ([], 0) before the first step."""
    state = zero.optimizer.state
    flats = [flat for flat, _ in zero_flat_groups(zero, stage3)]
    if not flats or flats[0] not in state:
        return [], 0.0
    steps = {float(state[flat]["step"]) for flat in flats}
    assert len(steps) == 1, f"groups of parameters have taken different numbers of steps: {steps}"
    return sorted(key for key, value in state[flats[0]].items() if value is not None and key != "step"), steps.pop()


def link_moments(zero: Any, stage3: bool) -> None:
    """Lets each parameter find its moments. DeepSpeed links them after the first of several groups has stepped, which
    leaves out the others."""
    if not stage3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def writing_zero(zero: Any, stage3: bool) -> Iterator[None]:
    """Inside, float32 weights and moments may be written; afterwards the forward pass reads the new weights."""
    if not stage3:
        yield
        zero.update_lp_params()
        return
    zero.checkpoint_event_prologue()  # releases the parameters that ZeRO-3 keeps whole
    yield
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.checkpoint_event_epilogue()


@contextmanager
def without_zero_loading() -> Iterator[None]:
    """Inside, transformers does not know that ZeRO-3 is set up, and loads weights whole."""
    from transformers.integrations import deepspeed

    set_up = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = set_up


@contextmanager
def without_zero_hooks(model: Any) -> Iterator[None]:
    """Inside, forward passes of a gathered ZeRO-3 module neither fetch nor release parameters.

    TRL's public `unwrap_model_for_generation` asks the wrapped module for what only a transformers model has; ours may
    hold two models.
    """
    from trl.models.utils import add_hooks, remove_hooks

    remove_hooks(model)
    try:
        yield
    finally:
        add_hooks(model)


# ---- FSDP2


def allow_fsdp_on_cpu() -> None:
    """accelerate wraps in FSDP only where it counts GPUs; it offers no way to ask for gloo and FSDP together."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo


def layers(model: "torch.nn.Module") -> list[Any]:
    """The repeated layers of every transformers model inside `model`: what is cut up as one piece."""
    from transformers import PreTrainedModel

    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    names = {name for m in inner for name in m._no_split_modules or ()}
    return [m for m in model.modules() if type(m).__name__ in names]


def initialise_fsdp_root(model: Any) -> None:
    """Parts of a sharded module may be called only once the root knows that it is the root; its first forward pass
    would tell it."""
    model._get_fsdp_state()._lazy_init()
