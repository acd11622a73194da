"""Saves and loads model, optimizer and random numbers: whole tensors under parameter names, equal for all engines.

Any engine with any number of processes can load a state that another one saved. The same engine with the same number of
processes restores it to the last bit.

    model.safetensors       {parameter: weights} of trained parameters, and buffers; frozen weights are the parent's
    optimizer.safetensors   {key/parameter: tensor}; AdamW: exp_avg, exp_avg_sq and the count `step`; Muon:
                            momentum_buffer
    rng.json                the random generators of every process

With AdamW a parameter takes 12 bytes on disk (weights and two moments, float32). Parameters are gathered and written
one at a time, so every process needs extra memory for the largest one only. Only the main process writes. Every process
reads, from a folder that all of them can see, and keeps its share.

torch is imported inside functions, because programs without torch use the constants here.
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
"""Names of a state's files."""

_DTYPES = {"float32": "F32", "float64": "F64", "bfloat16": "BF16", "float16": "F16", "int64": "I64", "int32": "I32",
           "uint8": "U8", "bool": "BOOL"}  # fmt: skip


# ---- saving


def state_bytes(engine: Engine, model: Any) -> int:
    """Approximate bytes of a saved state with AdamW; Muon needs less. `model` need not be prepared yet."""
    return 3 * weight_bytes(engine, model)


def weight_bytes(engine: Engine, model: Any) -> int:
    """Bytes of the trained weights on disk, in float32."""
    return 4 * sum(prod(entry.shape) for entry in engine.trained(model))


def save_state(engine: Engine, model: Any, optimizer: Any, path: Path) -> None:
    """Writes model and optimizer into the existing folder `path`. Every process calls it.

    Raises:
        OSError: a file cannot be written; only on the main process, after all processes have done their part.
    """
    parts = ((MODEL, engine.trained(model)), (OPTIMIZER, engine.moments(model, optimizer)))
    failed = [_write(engine, path / name, entries)[1] for name, entries in parts]
    for error in failed:
        if error is not None:
            raise error


def write_tensors(engine: Engine, path: Path, entries: "Sequence[Entry]") -> str | None:
    """Writes a safetensors file, one tensor at a time. Every process calls it.

    Returns:
        On the main process, the file's SHA-256, computed while writing; None on the others.

    Raises:
        OSError: only on the main process, after all processes have done their part.
    """
    digest, error = _write(engine, path, entries)
    if error is not None:
        raise error
    return digest


def _write(engine: Engine, path: Path, entries: "Sequence[Entry]") -> tuple[str | None, OSError | None]:
    """Returns (hash, error). It does not raise, because the other processes still need this one to gather the rest."""
    import torch

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        dtype = str(entry.dtype).removeprefix("torch.")
        size = prod(entry.shape) * entry.dtype.itemsize
        header[entry.name] = {"dtype": _DTYPES[dtype], "shape": list(entry.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # aligns the tensors to eight bytes
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
    """Loads what `save_state` wrote into a prepared model and optimizer. Every process calls it.

    `moments`: if False, the optimizer is not changed.
    """
    import torch

    with torch.no_grad(), _reading(path / MODEL) as (names, read):
        expected = {entry.name for entry in engine.trained(model)}
        assert names == expected, f"{path / MODEL} is of another model"
        engine.load_weights(model, names, read)
        if moments:
            with _reading(path / OPTIMIZER) as (kept, read_moments):
                engine.load_moments(model, optimizer, kept, read_moments)
    engine.barrier()


def load_frozen(engine: Engine, model: Any, path: Path) -> None:
    """Loads a file of `engine.weights(model)` into a frozen model. Every process calls it."""
    with _reading(path) as (names, read):
        assert names == {entry.name for entry in engine.weights(model)}, f"{path} is of another model"
        engine.load_weights(model, names, read)
    engine.barrier()


@contextmanager
def _reading(path: Path) -> "Iterator[tuple[set[str], Callable[[str], torch.Tensor]]]":
    """Yields the names in a safetensors file, and a function that reads one of its tensors."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        # A copy, because `get_tensor` returns memory that is mapped to the file.
        yield set(file.keys()), lambda name: file.get_tensor(name).clone()


# ---- random numbers


def rng_states(engine: Engine) -> list[dict[str, Any]]:
    """States of the random generators of all processes, as JSON values. Every process calls it."""
    return engine.of_all(_generators(engine))


def write_rng(engine: Engine, path: Path, states: list[dict[str, Any]]) -> None:
    """Writes `rng_states` into the state's folder `path`, on the main process."""
    if engine.is_main:
        (path / RNG).write_text(json.dumps({"processes": states}), encoding="utf-8")


def load_rng(engine: Engine, path: Path, seed: int, step: int) -> None:
    """Restores this process's generators; if the number of processes has changed, seeds them (`seed_rng`) instead."""
    states = json.loads((path / RNG).read_text(encoding="utf-8"))["processes"]
    if len(states) == engine.data_world:
        _set_generators(engine, states[engine.data_rank])
    else:
        seed_rng(engine, seed, step)


def seed_rng(engine: Engine, seed: int, step: int) -> None:
    """Seeds this process's generators from (`seed`, `step`, rank)."""
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
