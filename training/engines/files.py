"""Model, optimizer and random numbers on disk: whole, under parameter names, the same whichever engine wrote them.

A state that any engine saved, on any number of processes, is loaded by any other; by the same engine on the same number
of processes to the last bit.

    model.safetensors       {parameter: weights} of those that are trained, and buffers; frozen weights are the parent's
    optimizer.safetensors   {key/parameter: tensor}, of AdamW: exp_avg, exp_avg_sq and the count `step`; of Muon:
                            momentum_buffer
    rng.json                the generators of every process

On disk a parameter takes 12 bytes under AdamW (weights and two moments, float32). One parameter at a time is gathered
and written, so memory is that of the largest one, on every process. Only the main process writes. Every process reads,
from a folder that all of them see, and keeps its share.

Imports of torch are inside the functions: `rng` and the names are read by programs without it.
"""

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.sampling import uniform
from training.engines.protocol import Engine

if TYPE_CHECKING:
    import torch

    from training.engines.single import Entry

MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.json"
"""Names of the parts."""

_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
           "uint8": "U8", "bool": "BOOL"}  # fmt: skip


# ---- saving


def state_bytes(engine: Engine, model: Any) -> int:
    """What a saved state takes on the disk with AdamW, about; with Muon it is less. `model`: prepared, or not yet."""
    return 3 * weight_bytes(engine, model)


def weight_bytes(engine: Engine, model: Any) -> int:
    """What the weights that are trained take on the disk, in float32."""
    return 4 * sum(prod(entry.shape) for entry in engine.trained(model))


def save_state(engine: Engine, model: Any, optimizer: Any, path: Path) -> None:
    """Writes model and optimizer into the folder `path`, which exists. Every process calls it.

    Raises:
        OSError: on the main process alone, when every process has done its part: the files cannot be written.
    """
    parts = ((MODEL, engine.trained(model)), (OPTIMIZER, engine.moments(model, optimizer)))
    failed = [_write(engine, path / name, entries)[1] for name, entries in parts]
    for error in failed:
        if error is not None:
            raise error


def write_tensors(engine: Engine, path: Path, entries: "Sequence[Entry]") -> str | None:
    """Writes a safetensors file, a tensor at a time. Every process calls it.

    Returns:
        The SHA-256 of the file on the main process, computed while it is written; None on the others.

    Raises:
        OSError: on the main process alone, when every process has done its part.
    """
    digest, error = _write(engine, path, entries)
    if error is not None:
        raise error
    return digest


def _write(engine: Engine, path: Path, entries: "Sequence[Entry]") -> tuple[str | None, OSError | None]:
    """(hash, error). The error is returned and not raised, since the other processes wait for this one to gather the
    rest."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        dtype = str(entry.dtype).removeprefix("torch.")
        size = prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _DTYPES[dtype], "shape": list(entry.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors are aligned to eight bytes
    digest = hashlib.sha256()
    error: OSError | None = None
    file = None

    def put(data: Any) -> None:
        nonlocal error
        try:
            assert file is not None
            file.write(data)
            digest.update(data)
        except OSError as refused:
            error = refused

    try:
        if engine.is_main:
            try:
                file = path.open("wb")
            except OSError as refused:
                error = refused
            else:
                put(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            tensor = entry.whole().detach()
            assert tuple(tensor.shape) == entry.shape, f"{entry.name} has shape {tuple(tensor.shape)}"
            if file is not None and error is None:
                data = tensor.to("cpu", entry.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
                put(data.data)
    finally:
        if file is not None:
            try:
                file.close()
            except OSError as refused:
                error = error or refused
    return (digest.hexdigest() if file is not None else None), error


# ---- loading


def load_state(engine: Engine, model: Any, optimizer: Any, path: Path, moments: bool = True) -> None:
    """Puts what `save_state` wrote into a prepared model and optimizer. Every process calls it.

    `moments`: False leaves the optimizer as it is.
    """
    import torch

    with torch.no_grad(), _reading(path / MODEL) as (names, read):
        module = engine.unwrapped(model)
        expected = {entry.name for entry in engine.trained(model)}
        assert names == expected, f"{path / MODEL} is of another model"
        for name, buffer in module.named_buffers():
            if name in names:
                buffer.copy_(read(name))
        engine.load_weights(model, read)
        if moments:
            with _reading(path / OPTIMIZER) as (kept, read_moments):
                engine.load_moments(model, optimizer, kept, read_moments)
    engine.barrier()


def load_frozen(engine: Engine, model: Any, path: Path) -> None:
    """Puts a file of `engine.weights(model)` back into a model that is only read. Every process calls it."""
    import torch

    with torch.no_grad(), _reading(path) as (names, read):
        assert names == {entry.name for entry in engine.weights(model)}, f"{path} is of another model"
        engine.load_frozen(model, read)
    engine.barrier()


@contextmanager
def _reading(path: Path) -> "Iterator[tuple[set[str], Callable[[str], torch.Tensor]]]":
    """The names in a safetensors file, and a function that reads one of its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        # A copy: what is read lies in the file's mapping.
        yield set(file.keys()), lambda name: file.get_tensor(name).clone()


# ---- random numbers


def rng_states(engine: Engine) -> list[dict[str, Any]]:
    """The generators of all processes, JSON. Every process calls it."""
    return engine.of_all(_generators(engine))


def write_rng(engine: Engine, path: Path, states: list[dict[str, Any]]) -> None:
    """Writes them as a part of the state in the folder `path`, on the main process."""
    if engine.is_main:
        (path / RNG).write_text(json.dumps({"processes": states}), encoding="utf-8")


def load_rng(engine: Engine, path: Path, seed: int, step: int) -> None:
    """Sets the generators of this process: as saved on as many processes, else anew from (`seed`, `step`, rank)."""
    states = json.loads((path / RNG).read_text(encoding="utf-8"))["processes"]
    if len(states) == engine.data_world:
        _set_generators(engine, states[engine.data_rank])
    else:
        seed_rng(engine, seed, step)


def seed_rng(engine: Engine, seed: int, step: int) -> None:
    """Sets the generators of this process from (`seed`, `step`, rank)."""
    import numpy as np
    import torch

    drawn = int(uniform(1, seed, "generators", step, engine.data_rank)[0] * 2**32)
    random.seed(drawn)
    np.random.seed(drawn)
    torch.manual_seed(drawn)


def _generators(engine: Engine) -> dict[str, Any]:
    import numpy as np
    import torch

    kind, keys, position, has_gauss, gauss = np.random.get_state()
    cuda = engine.device.type == "cuda"
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if cuda else None,
    }


def _set_generators(engine: Engine, state: dict[str, Any]) -> None:
    import numpy as np
    import torch

    def tensor(text: str) -> torch.Tensor:
        return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)

    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))
    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] is not None and engine.device.type == "cuda":
        torch.cuda.set_rng_state(tensor(state["cuda"]))
