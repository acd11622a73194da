"""Model, optimizer and random numbers on disk: whole, under parameter names, the same whichever engine wrote them.

Third part of the runtime; see runtime.py. A state that any engine saved, on any number of processes, is loaded by any
other; by the same engine on the same number of processes to the last bit.

    model.safetensors       {parameter: weights} of those that are trained, and buffers; frozen weights are the parent's
    optimizer.safetensors   {key/parameter: tensor}, of AdamW: exp_avg, exp_avg_sq and the count `step`; of Muon:
                            momentum_buffer
    rng.json                the generators of every process

What it costs: 12 bytes of disk for a parameter under AdamW (weights and two moments, float32). One parameter at a time
is gathered and written, so the memory is that of the largest one, on every process. Only the main process writes. Every
process reads, from a folder that all of them see, and keeps its share.

Imports of torch are inside the functions, as in runtime.py.
"""

import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sampling import uniform
from training import runtime

if TYPE_CHECKING:
    import torch

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.json"
"""Names of the parts."""

_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
           "uint8": "U8", "bool": "BOOL"}  # fmt: skip


@dataclass(frozen=True)
class _Entry:
    """One tensor of a file."""

    name: str
    dtype: "torch.dtype"
    shape: tuple[int, ...]
    whole: "Callable[[], torch.Tensor]"
    """Gathers it. Every process calls it."""


# ---- saving


def state_bytes(model: Any) -> int:
    """What a saved state takes on the disk with AdamW, about; with Muon it is less. `model`: wrapped by now, or not."""
    return 3 * weight_bytes(model)


def weight_bytes(model: Any) -> int:
    """What the weights that are trained take on the disk, in float32."""
    return 4 * sum(prod(_shape(p)) for p in runtime.unwrapped(model).parameters() if p.requires_grad)


def save_state(model: Any, optimizer: Any, path: Path) -> None:
    """Writes model and optimizer into the folder `path`, which exists. Every process calls it.

    Raises:
        OSError: on the main process alone, when every process has done its part: the files cannot be written.
    """
    failed = [_write(path / MODEL, _weights(model)), _write(path / OPTIMIZER, _moments(model, optimizer))]
    for error in failed:
        if error is not None:
            raise error


def _write(path: Path, entries: Sequence[_Entry]) -> OSError | None:
    """Writes a safetensors file, a tensor at a time. An error is given back, since the other processes wait for this
    one to gather the rest."""
    import torch

    header, end = {}, 0
    for entry in entries:
        dtype = str(entry.dtype).removeprefix("torch.")
        size = prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _DTYPES[dtype], "shape": list(entry.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to eight bytes
    error: OSError | None = None
    file = None
    try:
        if runtime.is_main():
            try:
                file = path.open("wb")
                file.write(struct.pack("<Q", len(text)) + text)
            except OSError as refused:
                error = refused
        for entry in entries:
            tensor = entry.whole().detach()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name} has shape {tuple(tensor.shape)}"
            if file is None or error is not None:
                continue
            data = tensor.to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
            try:
                file.write(data.data)
            except OSError as refused:
                error = refused
    finally:
        if file is not None:
            try:
                file.close()
            except OSError as refused:
                error = error or refused
    return error


def _weights(model: Any) -> list[_Entry]:
    import torch

    module = runtime.unwrapped(model)
    deepspeed = runtime.requested().name == "deepspeed"
    entries = []
    for name, parameter in _trained(module).items():
        dtype = torch.float32 if deepspeed else parameter.dtype
        entries.append(_Entry(name, dtype, _shape(parameter), lambda p=parameter: _whole_weights(p)))
    for name, buffer in _buffers(module).items():
        entries.append(_Entry(name, buffer.dtype, tuple(buffer.shape), lambda b=buffer: b))
    return entries


def _moments(model: Any, optimizer: Any) -> list[_Entry]:
    """What the optimizer has; nothing before its first step."""
    import torch

    trained = _trained(runtime.unwrapped(model))
    entries = []
    if runtime.requested().name == "deepspeed":
        from deepspeed.utils import safe_get_full_optimizer_state

        keys, step = _deepspeed_keys(model.optimizer)
        if keys:
            _link(model.optimizer)
        for name, parameter in trained.items() if keys else ():
            for key in keys:
                whole = lambda p=parameter, k=key: safe_get_full_optimizer_state(p, k)  # noqa: E731
                entries.append(_Entry(f"{key}/{name}", torch.float32, _shape(parameter), whole))
            entries.append(_Entry(f"step/{name}", torch.float32, (), lambda: torch.tensor(step)))
        return entries
    state = _torch_optimizer(optimizer).state
    for name, parameter in trained.items():
        for key, value in sorted(state.get(parameter, {}).items()):
            entries.append(_Entry(f"{key}/{name}", value.dtype, tuple(value.shape), lambda v=value: _full(v)))
    return entries


# ---- loading


def load_state(model: Any, optimizer: Any, path: Path, moments: bool = True) -> None:
    """Puts what `save_state` wrote into a prepared model and optimizer. Every process calls it.

    `moments`: False leaves the optimizer as it is.
    """
    import torch

    with torch.no_grad(), _reading(path / MODEL) as names_read:
        names, read = names_read
        module = runtime.unwrapped(model)
        trained, buffers = _trained(module), _buffers(module)
        assert names == trained.keys() | buffers.keys(), f"{path / MODEL} is of another model"
        for name, buffer in buffers.items():
            buffer.copy_(read(name))
        if runtime.requested().name != "deepspeed":
            for name, parameter in trained.items():
                parameter.copy_(_share_of(read(name), parameter))
            if moments:
                _load_moments(trained, optimizer, path / OPTIMIZER)
        else:
            _load_deepspeed(model.optimizer, trained, read, path / OPTIMIZER if moments else None)
    runtime.barrier()


def _load_moments(trained: "dict[str, torch.Tensor]", optimizer: Any, path: Path) -> None:
    inner = _torch_optimizer(optimizer)
    number = {id(p): i for i, p in enumerate(p for group in inner.param_groups for p in group["params"])}
    state: dict[int, dict[str, Any]] = {}
    with _reading(path) as (names, read):
        for entry in names:
            key, _, name = entry.partition("/")
            value = read(entry)
            if key != "step":
                value = _share_of(value, trained[name])
            state.setdefault(number[id(trained[name])], {})[key] = value
        inner.load_state_dict({"state": state, "param_groups": inner.state_dict()["param_groups"]})


def _load_deepspeed(
    engine: Any, trained: "dict[str, torch.Tensor]", read: "Callable[[str], torch.Tensor]", moments: Path | None
) -> None:
    """`engine`: the ZeRO optimizer, which has each parameter twice: for the forward pass, and in float32."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    zero3 = runtime.requested().zero_stage == 3
    if zero3:
        engine.checkpoint_event_prologue()  # lets go of the parameters that are kept whole
    for name, parameter in trained.items():
        value = read(name)
        if zero3:
            safe_set_local_fp32_param(parameter, _zero3_share(value, parameter))
        else:
            safe_set_full_fp32_param(parameter, value)
    if moments is not None:
        with _reading(moments) as (names, read_moments):
            _load_deepspeed_moments(engine, trained, names, read_moments, zero3)
    if zero3:
        for number in range(len(engine.fp32_partitioned_groups_flat)):
            engine._reassign_or_swap_out_partitioned_parameters(number)
        engine.checkpoint_event_epilogue()
    else:
        engine.update_lp_params()


def _load_deepspeed_moments(
    engine: Any,
    trained: "dict[str, torch.Tensor]",
    names: set[str],
    read: "Callable[[str], torch.Tensor]",
    zero3: bool,
) -> None:
    import torch
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    keys = sorted({name.partition("/")[0] for name in names} - {"step"})
    if not keys:
        return
    # DeepSpeed counts the steps of a whole group; where a parameter was without gradient it has fewer elsewhere.
    step = max(float(read(name)) for name in names if name.startswith("step/"))
    for flat, group in _flat_groups(engine):
        state = engine.optimizer.state[flat]
        if isinstance(engine.optimizer, torch.optim.AdamW):
            on_device = group["fused"] or group["capturable"]
            state["step"] = torch.tensor(step, device=flat.device if on_device else "cpu")
        else:  # DeepSpeed's own, for moments that are kept on the CPU
            state["step"] = int(step)
        for key in keys:
            state.setdefault(key, torch.zeros_like(flat.data))
    _link(engine)
    for name, parameter in trained.items():
        for key in keys:
            entry = f"{key}/{name}"
            value = read(entry) if entry in names else torch.zeros(_shape(parameter))
            if zero3:
                safe_set_local_optimizer_state(parameter, _zero3_share(value, parameter), key)
            else:
                safe_set_full_optimizer_state(parameter, value, key)


@contextmanager
def _reading(path: Path) -> "Iterator[tuple[set[str], Callable[[str], torch.Tensor]]]":
    """The names in a safetensors file, and a function that reads one of its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        # A copy: what is read lies in the file's mapping.
        yield set(file.keys()), lambda name: file.get_tensor(name).clone()


# ---- how an engine holds a tensor


def _trained(module: Any) -> "dict[str, torch.Tensor]":
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _buffers(module: Any) -> "dict[str, torch.Tensor]":
    """Those that belong to a model's state."""
    kept = module.state_dict().keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in kept}


def _torch_optimizer(optimizer: Any) -> Any:
    from accelerate.optimizer import AcceleratedOptimizer

    return optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer


def _shape(parameter: Any) -> tuple[int, ...]:
    if runtime.requested().zero_stage == 3 and "ds_shape" in vars(parameter):  # not there before DeepSpeed has it
        return tuple(parameter.ds_shape)
    return tuple(parameter.shape)


def _whole_weights(parameter: Any) -> Any:
    if runtime.requested().name == "deepspeed":
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
    return _full(parameter)


def _full(tensor: Any) -> Any:
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _share_of(whole: "torch.Tensor", parameter: Any) -> Any:
    """`whole` cut up as the parameter is; each process has all of it, so that nothing is sent."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor):
        return whole
    mesh = parameter.device_mesh
    # A copy, since a piece would keep the whole alive.
    return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).clone()


def _zero3_share(whole: "torch.Tensor", parameter: Any) -> "torch.Tensor":
    """The piece that this process keeps; pieces are of one size, and the last ones are filled up with zeros."""
    import torch

    size = parameter.ds_tensor.numel()
    piece = whole.reshape(-1)[runtime.rank() * size :][:size]
    return torch.nn.functional.pad(piece, (0, size - piece.numel()))


def _flat_groups(engine: Any) -> list[tuple[Any, dict[str, Any]]]:
    """DeepSpeed's flat float32 tensors of this process, each with the optimizer's group that it is of."""
    groups = engine.optimizer.param_groups
    if runtime.requested().zero_stage == 3:
        numbers = engine.sub_group_to_group_id
        return [(flat, groups[numbers[i]]) for i, flat in enumerate(engine.fp32_partitioned_groups_flat)]
    return [(flat, group) for group in groups for flat in group["params"]]


def _link(engine: Any) -> None:
    """Has each parameter know where its moments are. DeepSpeed does so when the first of several groups has stepped,
    which leaves out the others."""
    if runtime.requested().zero_stage != 3:
        engine._hp_optimizer_states_linked = False
        engine._lazy_init_hp_params_optimizer_state()


def _deepspeed_keys(engine: Any) -> tuple[list[str], float]:
    """Which moments there are, and the steps taken; ([], 0) before the first."""
    state = engine.optimizer.state
    flats = [flat for flat, _ in _flat_groups(engine)]
    if not flats or flats[0] not in state:
        return [], 0.0
    steps = {float(state[flat]["step"]) for flat in flats}
    assert len(steps) == 1, f"groups of parameters have taken different numbers of steps: {steps}"
    return sorted(key for key, value in state[flats[0]].items() if value is not None and key != "step"), steps.pop()


# ---- random numbers


def rng_states() -> list[dict[str, Any]]:
    """The generators of all processes, JSON. Every process calls it."""
    return runtime.all_gather_object(_generators())


def write_rng(path: Path, states: list[dict[str, Any]]) -> None:
    """Writes them as a part of the state in the folder `path`."""
    (path / RNG).write_text(json.dumps({"processes": states}), encoding="utf-8")


def load_rng(path: Path, seed: int, step: int) -> None:
    """Sets the generators of this process: as saved on as many processes, else anew from (`seed`, `step`, rank)."""
    states = json.loads((path / RNG).read_text(encoding="utf-8"))["processes"]
    if len(states) == runtime.world_size():
        _set_generators(states[runtime.rank()])
    else:
        seed_rng(seed, step)


def seed_rng(seed: int, step: int) -> None:
    """Sets the generators of this process from (`seed`, `step`, rank)."""
    import numpy as np
    import torch

    drawn = int(uniform(1, seed, "generators", step, runtime.rank())[0] * 2**32)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def _generators() -> dict[str, Any]:
    import numpy as np
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    cuda = runtime.device().type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if cuda else None,
    }


def _set_generators(state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] is not None and runtime.device().type == "cuda":
        torch.cuda.set_rng_state(tensor(state["cuda"]))
