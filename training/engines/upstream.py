"""A list of every private name of another library that Baton uses, and the engines' code that uses them.

`PRIVATE` says where each name is defined. tests/test_upstream.py looks each one up and fails if it has disappeared or
takes other arguments, so that an upgrade of a library shows what to check.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


_HF_DEEPSPEED = "transformers.integrations.deepspeed"
_HF_LOADING = "transformers.core_model_loading"
_ZERO12 = "deepspeed.runtime.zero.stage_1_and_2:DeepSpeedZeroOptimizer"
_ZERO3 = "deepspeed.runtime.zero.stage3:DeepSpeedZeroOptimizer_Stage3"


@dataclass(frozen=True)
class PrivateName:
    """A private name, which its library may change at any time."""

    owner: str
    """`package.module:Class`, or `package.module`."""
    name: str
    parameters: tuple[str, ...] | None
    """Parameters of a function or method, without self. None for an attribute, whose name the owner's source has."""
    why: str
    """What Baton uses it for; if not obvious, why no public name will do."""


PRIVATE: tuple[PrivateName, ...] = (
    # accelerate
    PrivateName("accelerate.state:AcceleratorState", "_reset_state", ("reset_partial_state",), "a second Accelerator"),
    PrivateName(
        "accelerate.state:PartialState", "_prepare_backend", ("cpu", "sagemaker_dp", "backend"), "FSDP2 on CPU"
    ),
    PrivateName(
        "accelerate:Accelerator",
        "_original_forward",
        None,
        "generation runs without the autocast that accelerate puts around a prepared model's forward pass; its own way "
        "to take it off is for good",
    ),
    # torch
    PrivateName("torch._dynamo:OptimizedModule", "_orig_mod", None, "the module inside a compiled one"),
    PrivateName(
        "torch.distributed.fsdp:FSDPModule",
        "_get_fsdp_state",
        (),
        "sets up a sharded model before its parts are called",
    ),
    PrivateName("torch.distributed.fsdp._fully_shard._fsdp_state:FSDPState", "_lazy_init", (), "the same"),
    PrivateName(
        "torch.nn:Module", "_parameters", None, "float32 copies of weights in half precision while a layer computes"
    ),
    PrivateName("torch.nn:Module", "_forward_hooks", None, "finds layers with hooks, which fused kernels would skip"),
    PrivateName("torch.nn:Module", "_forward_pre_hooks", None, "the same"),
    # transformers
    PrivateName(
        "transformers:PreTrainedModel", "_no_split_modules", None, "the classes of layers to shard as one unit"
    ),
    PrivateName("transformers:PreTrainedModel", "_keep_in_fp32_modules", None, "layers that are not to be quantised"),
    PrivateName("transformers:PreTrainedModel", "_supports_sdpa", None, "the attention that an architecture has"),
    PrivateName("transformers:PreTrainedModel", "_supports_flash_attn", None, "the same"),
    PrivateName(
        "transformers.core_model_loading",
        "_weight_conversions",
        None,
        "removed from a model whose quantised weights were loaded as plain ones, which it would save as quantised",
    ),
    PrivateName(
        "transformers:PretrainedConfig",
        "_attn_implementation",
        None,
        "the attention that a model uses; no public getter",
    ),
    PrivateName(
        _HF_DEEPSPEED, "_hf_deepspeed_config_weak_ref", None, "switched off to load whole weights under ZeRO-3"
    ),
    PrivateName(
        _HF_LOADING,
        "rename_source_key",
        ("source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict", "reverse"),
        "reads a parent layer by layer; `from_pretrained` reads it whole",
    ),
    PrivateName(
        _HF_LOADING,
        "convert_and_load_state_dict_in_model",
        ("model", "state_dict", "load_config", "disk_offload_index"),
        "the same",
    ),
    PrivateName(
        "transformers.conversion_mapping",
        "get_model_conversion_mapping",
        ("model", "key_mapping", "hf_quantizer", "add_legacy"),
        "the same",
    ),
    PrivateName(
        "transformers:Trainer", "_get_train_sampler", ("train_dataset",), "the order of the rows, from seed and epoch"
    ),
    PrivateName(
        "transformers:Trainer", "_save_checkpoint", ("model", "trial"), "saves states that any engine can load"
    ),
    PrivateName(
        "transformers:Trainer", "_load_from_checkpoint", ("resume_from_checkpoint", "model"), "loads such states"
    ),
    PrivateName(
        "transformers:Trainer",
        "_prepare_for_training",
        ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "loads the state after model and optimizer are wrapped",
    ),
    PrivateName(
        "transformers:Trainer",
        "_load_rng_state",
        ("checkpoint",),
        "restores random numbers immediately before the first batch",
    ),
    PrivateName("transformers:Trainer", "_get_grad_norm", ("model", "grad_norm"), "detects steps that are not finite"),
    PrivateName("transformers:Trainer", "_prepare_inputs", ("inputs",), "moves held-out batches to the device"),
    PrivateName("transformers:Trainer", "_tr_loss", None, "a resumed run continues the average of a logged line"),
    PrivateName("transformers:Trainer", "_globalstep_last_logged", None, "the same"),
    # trl
    PrivateName(
        "trl.trainer.base_trainer:_BaseTrainer",
        "_send_telemetry",
        (),
        "replaced, so that nothing is sent over the network",
    ),
    PrivateName("trl:SFTTrainer", "_metrics", None, "a resumed run continues the averages of a logged line"),
    PrivateName("trl:SFTTrainer", "_total_train_tokens", None, "a resumed run continues the count of tokens"),
    PrivateName(
        "trl:DPOTrainer",
        "_prepare_dataset",
        ("dataset", "processing_class", "args", "dataset_name"),
        "replaced, since Baton's pairs are already encoded",
    ),
    PrivateName("trl:DPOTrainer", "precompute_ref_logps", None, "TRL's loss reads the reference from the rows"),
    PrivateName(
        "trl.trainer.dpo_trainer",
        "create_model_from_path",
        ("model_id", "architecture", "kwargs"),
        "switched off, so that TRL loads no reference; it has no option for rows that have the reference's numbers",
    ),
    PrivateName("trl.models.utils", "add_hooks", ("model",), "generation under ZeRO-3, see `without_zero_hooks`"),
    PrivateName("trl.models.utils", "remove_hooks", ("model",), "the same"),
    PrivateName(
        "trl.trainer.utils",
        "add_fused_lm_head",
        ("model", "temperature", "cast_lm_head_to_fp32", "outputs"),
        "log-probabilities without logits of the whole vocabulary",
    ),
    PrivateName(
        "trl.trainer.utils",
        "_use_triton",
        ("device",),
        "where it is false, the fused head computes logits for padding and prompts, too",
    ),
    # peft
    PrivateName(
        "peft.tuners.tuners_utils:BaseTunerLayer",
        "_disable_adapters",
        None,
        "the reference is the policy without its adapter; the public switch also changes what is trained",
    ),
    PrivateName("peft.utils.other:AuxiliaryTrainingWrapper", "_disable_adapters", None, "the same"),
    PrivateName(
        "peft.tuners.tuners_utils:BaseTunerLayer", "_active_adapter", None, "the same, beside a frozen adapter"
    ),
    # DeepSpeed
    PrivateName(_ZERO12, "_hp_optimizer_states_linked", None, "links the moments of every group of parameters"),
    PrivateName(_ZERO12, "_lazy_init_hp_params_optimizer_state", (), "the same"),
    PrivateName(_ZERO12, "update_lp_params", (), "copies loaded weights to where the forward pass reads"),
    PrivateName(_ZERO3, "_reassign_or_swap_out_partitioned_parameters", ("args", "kwargs"), "the same"),
    PrivateName(_ZERO3, "checkpoint_event_prologue", (), "the same"),
    PrivateName(_ZERO3, "fp32_partitioned_groups_flat", None, "float32 weights and moments"),
    PrivateName(_ZERO3, "sub_group_to_group_id", None, "the same"),
    PrivateName("deepspeed.runtime.zero.partition_parameters:Init", "ds_shape", None, "shape of a whole parameter"),
    PrivateName("deepspeed.runtime.zero.partition_parameters:Init", "ds_tensor", None, "this process's piece of it"),
)


# ---- transformers


def weight_conversions(model: Any) -> list[Any]:
    """How transformers renames, splits and combines stored tensors for this architecture."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model))


def names_in_memory(model: Any, conversions: Sequence[Any], stored: Iterable[str]) -> dict[str, str]:
    """{name of a stored tensor: name of a tensor of `model` that it goes into}; the same name if it goes into none."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    known = model.state_dict()
    names = {}
    for name in stored:
        new, _ = rename_source_key(name, renamings, converters, model.base_model_prefix, known)
        if new not in known and name in known:
            new, _ = rename_source_key(name, [], [], model.base_model_prefix, known)
        names[name] = new
    return names


def converted(model: Any, conversions: Sequence[Any], stored: Mapping[str, Any]) -> "dict[str, torch.Tensor]":
    """Stored tensors, or safetensors slices of them, under the names and in the form that `model` has in memory.

    `model` is on the meta device, and stays there; a tensor that it does not have is left out.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    empty = model.state_dict(keep_vars=True)
    convert_and_load_state_dict_in_model(model, dict(stored), LoadStateDictConfig(weight_mapping=list(conversions)))
    found = {name: value for name, value in model.state_dict(keep_vars=True).items() if not value.is_meta}
    for name in found:
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, empty[name])
    return {name: value.detach() for name, value in found.items()}


# ---- DeepSpeed


def zero_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, whether ZeRO-3 has sharded it or not."""
    return tuple(parameter.ds_shape) if "ds_shape" in vars(parameter) else tuple(parameter.shape)


def zero_flat_groups(zero: Any, stage3: bool) -> list[tuple[Any, dict[str, Any]]]:
    """This process's flat float32 tensors of DeepSpeed, each with its optimizer group. `zero`: the ZeRO optimizer."""
    groups = zero.optimizer.param_groups
    if stage3:
        numbers = zero.sub_group_to_group_id
        return [(flat, groups[numbers[i]]) for i, flat in enumerate(zero.fp32_partitioned_groups_flat)]
    return [(flat, group) for group in groups for flat in group["params"]]


def zero_keys(zero: Any, stage3: bool) -> tuple[list[str], float]:
    """Names of the moments, and the number of steps taken; ([], 0) before the first step."""
    state = zero.optimizer.state
    flats = [flat for flat, _ in zero_flat_groups(zero, stage3)]
    if not flats or flats[0] not in state:
        return [], 0.0
    steps = {float(state[flat]["step"]) for flat in flats}
    assert len(steps) == 1, f"groups of parameters have taken different numbers of steps: {steps}"
    return sorted(key for key, value in state[flats[0]].items() if value is not None and key != "step"), steps.pop()


def link_moments(zero: Any, stage3: bool) -> None:
    """Links each parameter to its moments. DeepSpeed does this after the first group's step, which leaves out the
    other groups."""
    if not stage3:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def writing_zero(zero: Any, stage3: bool) -> Iterator[None]:
    """Inside, float32 weights and moments may be written; on exit the forward pass's weights are updated from them."""
    if not stage3:
        yield
        zero.update_lp_params()
        return
    # This releases the small parameters that ZeRO-3 keeps whole. The next forward pass gathers them again, as the first
    # one does: DeepSpeed then notices weights that another module than their own uses, such as the head's.
    zero.checkpoint_event_prologue()
    yield
    for number in range(len(zero.fp32_partitioned_groups_flat)):
        zero._reassign_or_swap_out_partitioned_parameters(number)
    zero.invalidate_secondary_tensor()


@contextmanager
def without_zero_loading() -> Iterator[None]:
    """Hides the ZeRO-3 configuration from transformers, so that it loads weights whole."""
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

    TRL's public `unwrap_model_for_generation` needs attributes of a transformers model; our module may contain two
    models.
    """
    from trl.models.utils import add_hooks, remove_hooks

    remove_hooks(model)
    try:
        yield
    finally:
        add_hooks(model)


# ---- accelerate


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Inside, the model's forward pass is its own, without the autocast around it that accelerate has prepared."""
    mine = vars(model)
    if "_original_forward" not in mine:
        yield
        return
    wrapped = mine["forward"]
    model.forward = mine["_original_forward"]
    try:
        yield
    finally:
        model.forward = wrapped


# ---- TRL


@contextmanager
def without_reference() -> Iterator[None]:
    """Inside, a new DPOTrainer has no reference model. It would load a whole one in every process."""
    from trl.trainer import dpo_trainer

    place: Any = dpo_trainer
    load = place.create_model_from_path
    place.create_model_from_path = lambda *args, **kwargs: None
    try:
        yield
    finally:
        place.create_model_from_path = load


def score_labels_alone() -> None:
    """Makes TRL's fused head project only the positions with a label, on CPUs as on GPUs.

    Elsewhere it scores every position, for devices that compile a kernel for each shape. A CPU compiles none, and
    products with a large vocabulary for prompts and padding take much of a step.
    """
    from trl.trainer import utils

    place: Any = utils
    place._use_triton = lambda device: True


# ---- FSDP2


def allow_fsdp_on_cpu() -> None:
    """Makes accelerate use gloo with FSDP. It wraps models in FSDP only on GPUs, and has no option for this."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    def gloo(self: PartialState, *args: Any, **kwargs: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_GPU

    PartialState._prepare_backend = gloo


def layers(model: "torch.nn.Module") -> list[Any]:
    """The repeated layers of every transformers model inside `model`, the units of sharding."""
    from transformers import PreTrainedModel

    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)]
    names = {name for m in inner for name in m._no_split_modules or ()}
    return [m for m in model.modules() if type(m).__name__ in names]


def initialise_fsdp_root(model: Any) -> None:
    """Initialises the root of a sharded module, so that its parts may be called before its first forward pass."""
    model._get_fsdp_state()._lazy_init()
