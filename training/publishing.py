"""Writes the weights of a published model: whole, or the adapter alone; one tensor at a time, hashed while written."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict, inject_adapter_in_model
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from handoff.files import read_json, write_json
from handoff.gate import ADAPTER_CONFIG
from handoff.weights import INDEX_NAME, SINGLE_NAME
from training.adapter import Adapter
from training.engines.files import write_tensors
from training.engines.protocol import Engine
from training.engines.single import Entry
from training.parent_weights import ChangeTally, layer_of

_FILE_BYTES = 5 << 30  # a published model is written in files of about this size


@dataclass(frozen=True)
class Written:
    """The result of `Model.write`."""

    hashes: dict[str, str]
    """{file: SHA-256} of the weight files, computed while they were written; empty on processes that do not write."""
    changed: float | None = None
    """Share of the parent's weights that training has changed; None if there is nothing to compare."""
    published: float | None = None
    """Share of those that differ from the parent's as they were published; None if they were not rounded."""

    def metrics(self) -> dict[str, float]:
        """The shares that are known, by the names of metrics."""
        found = {"weights/changed": self.changed, "weights/changed_as_published": self.published}
        return {name: share for name, share in found.items() if share is not None}


def whole_model(
    module: PreTrainedModel, entries: Sequence[Entry], prefix: str, adapter: Adapter | None
) -> list[list[Entry]]:
    """The entries in the form that transformers publishes: with its names, in float32, a tied weight once, and an
    adapter merged.

    In memory, an architecture may combine several published tensors into one (the experts of a layer). They are
    split layer by layer, so the entries of one group are gathered together.

    Args:
        module: the plain module.
        entries: the engine's entries of what it or a trainer wrapped.
        prefix: what precedes the module's own names there.
    """
    tied = module.all_tied_weights_keys  # {name that is left out: name that is kept}
    plain = _named(entries, prefix)
    if adapter is not None:
        plain = adapter.whole(plain)
    named = {tied.get(name, name): entry for name, entry in plain.items() if tied.get(name) not in plain}
    groups: dict[str, dict[str, Entry]] = {}
    for name, entry in named.items():
        dtype = torch.float32 if entry.dtype.is_floating_point else entry.dtype
        groups.setdefault(layer_of(name), {})[name] = replace(entry, name=name, dtype=dtype)
    return [_converted(module, group) for group in groups.values()]


def adapter_alone(adapter: Adapter, entries: Sequence[Entry], prefix: str) -> list[Entry]:
    """The entries of an adapter's file. Arguments as for `whole_model`."""
    return adapter.stored(_named(entries, prefix))


def _named(entries: Sequence[Entry], prefix: str) -> dict[str, Entry]:
    return {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}


def _converted(module: PreTrainedModel, group: dict[str, Entry]) -> list[Entry]:
    shapes = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in group.items()}
    wanted = revert_weight_conversion(module, shapes)
    if {name: value.shape for name, value in wanted.items()} == {name: v.shape for name, v in shapes.items()}:
        return list(group.values())
    held: dict[str, torch.Tensor] = {}

    def whole(name: str) -> torch.Tensor:
        if not held:  # every process gets here together, since all write the same entries in the same order
            found = {key: entry.whole().detach().to("cpu", entry.dtype) for key, entry in group.items()}
            held.update(revert_weight_conversion(module, found))
        return held.pop(name)

    return [Entry(name, value.dtype, tuple(value.shape), partial(whole, name)) for name, value in wanted.items()]


def write_weights(
    engine: Engine, path: Path | None, files: Mapping[str, Sequence[Entry]], tally: ChangeTally | None = None
) -> dict[str, str]:
    """Writes {file: its entries}. Every process calls it; only the main process writes.

    Returns {file: SHA-256}, empty on processes that do not write.

    Args:
        path: an existing directory; None on processes that do not write.
        tally: sees each tensor on its way.

    Raises:
        OSError: a file cannot be written; on the main process, after every process has done its part.
    """
    hashes: dict[str, str] = {}
    full: OSError | None = None
    for name, entries in files.items():
        watched = entries
        if path is not None and tally is not None:
            watched = [replace(entry, whole=_watched(tally, entry)) for entry in entries]
        try:
            digest = write_tensors(engine, (path or Path()) / name, watched)
        except OSError as error:  # the next files are gathered all the same, since the other processes wait for it
            full = full or error
            continue
        if digest is not None:
            hashes[name] = digest
    if full is not None:
        raise full
    if path is not None and len(files) > 1:
        _write_index(path, files)
    return hashes


def model_files(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """{file name: its entries} of a whole model, in the order of the entries."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        bytes_ = prod(entry.shape) * entry.dtype.itemsize
        if parts[-1] and size + bytes_ > _FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += bytes_
    if len(parts) == 1:
        return {SINGLE_NAME: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_index(path: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    total = sum(prod(e.shape) * e.dtype.itemsize for entries in files.values() for e in entries)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: name for name, entries in files.items() for entry in entries},
    }
    (path / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _watched(tally: ChangeTally, entry: Entry) -> "Callable[[], torch.Tensor]":
    def whole() -> torch.Tensor:
        tensor = entry.whole()
        tally.see(entry.name, tensor, entry.dtype)
        return tensor

    return whole


def write_adapter_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Writes adapter_config.json."""
    write_json(path / ADAPTER_CONFIG, dict(settings))


def adapter_differences(path: Path, shapes: Mapping[str, tuple[int, ...]], base: PreTrainedModel) -> list[str]:
    """Names of tensors that peft would look for in vain in an adapter's file, or that it would not read.

    Args:
        path: directory of adapter_config.json.
        shapes: {name: shape} of the tensors.
        base: the base's network on torch's meta device; it gets the adapter.
    """
    config = PeftConfig.from_peft_type(**read_json(path / ADAPTER_CONFIG))  # type: ignore[no-untyped-call]  # as above
    config.inference_mode = False
    base = inject_adapter_in_model(config, base, low_cpu_mem_usage=True)  # type: ignore[assignment]  # the same model
    wanted = get_peft_model_state_dict(base, save_embedding_layers=False)
    expected = {f"base_model.model.{name}": tuple(value.shape) for name, value in wanted.items()}
    return sorted(name for name, _ in expected.items() ^ dict(shapes).items())
