"""Reads names and shapes from the headers of a model's safetensors files, without loading a tensor.

Format: 8 bytes, the header's length as a little-endian unsigned integer; the header, JSON of
{name: {dtype, shape, data_offsets}}; the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from handoff.errors import HandoffError
from handoff.files import quoted, read_json, what_is_wrong_with

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
# Last part of the input embedding's name. In this order: Llama, Mistral, Qwen, Gemma and OPT; GPT-2 and GPT-J;
# GPT-NeoX; Falcon and Bloom; InternLM2; Mamba.
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit
_PLAIN = re.compile(r"[\w+-][\w.+-]*", re.ASCII)
_BITS = {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "BOOL": 8, "U8": 8, "I8": 8},
    **{"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "I16": 16, "U16": 16, "F32": 32, "I32": 32},
    **{"U32": 32, "F64": 64, "I64": 64, "U64": 64, "C64": 64},
}
"""Bits of an element of each type of the format."""
_Size = Annotated[int, Field(strict=True, ge=0, lt=1 << 60)]


class _Entry(BaseModel):
    """A tensor in the header of a file."""

    model_config = ConfigDict(extra="forbid")
    dtype: str
    shape: tuple[_Size, ...]
    data_offsets: tuple[_Size, _Size]


_HEADER: TypeAdapter[dict[str, _Entry | dict[str, str]]] = TypeAdapter(dict[str, _Entry | dict[str, str]])


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that make up the model, chosen as transformers chooses them.

    Raises:
        HandoffError: there are none; the index is damaged, names a file outside the folder, or names a missing file.
    """
    single = model_dir / SINGLE_NAME
    if os.path.lexists(single):  # some publishers put the same weights beside it in their own format
        return [single]
    if os.path.lexists(model_dir / INDEX_NAME):
        names = sorted(set(weight_map(model_dir).values()))
        for name in names:
            if not os.path.lexists(model_dir / name):
                raise HandoffError(
                    f"{model_dir}: {name} is missing, but {INDEX_NAME} lists it; copy or download it again"
                )
        return [model_dir / name for name in names]
    others = sorted(quoted(path.name) for path in model_dir.iterdir() if path.suffix == ".safetensors")
    if others:
        raise HandoffError(
            f"{model_dir} has neither {SINGLE_NAME} nor {INDEX_NAME}, so its weights ({', '.join(others[:3])}) cannot "
            f"be loaded; rename the file to {SINGLE_NAME}, or download the index too"
        )
    raise HandoffError(f"{model_dir} has no weights (*.safetensors)")


def weight_map(model_dir: Path) -> dict[str, str]:
    """{tensor: file} of the index. The files are plain names. Raises HandoffError."""
    path = model_dir / INDEX_NAME
    fault = what_is_wrong_with(path, model_dir)
    if fault:
        raise HandoffError(f"{path} {fault}")
    index = read_json(path)
    found = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(found, dict) or not found or not all(isinstance(name, str) for name in found.values()):
        raise HandoffError(f"{path}: weight_map must be an object of tensor and file names; download it again")
    for tensor, name in found.items():
        if not _PLAIN.fullmatch(name) or not name.endswith(".safetensors"):
            raise HandoffError(
                f"{path}: weight_map: {quoted(tensor)} is in {quoted(repr(name))}, which is no plain name of a "
                "safetensors file in this folder; put the file there and write its name"
            )
    return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file. Raises HandoffError when it is truncated or not a safetensors file."""
    fault = what_is_wrong_with(path, path.parent)
    if fault:
        raise HandoffError(f"{path} {fault}")
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise HandoffError(f"{path} is truncated ({size} bytes); copy or download it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER):
            raise HandoffError(f"{path} is truncated, or not a safetensors file ({size} bytes)")
        header = file.read(length)
    try:
        entries = _HEADER.validate_json(header)
    except ValidationError as error:
        first = error.errors()[0]
        where = quoted(".".join(map(str, first["loc"])))
        raise HandoffError(
            f"{path} is not a safetensors file: its header{': ' if where else ''}{where}: {first['msg']}; "
            "copy or download it again"
        ) from error
    entries.pop("__metadata__", None)
    tensors = {name: entry for name, entry in entries.items() if isinstance(entry, _Entry)}
    if len(tensors) < len(entries):
        raise HandoffError(f"{path} is not a safetensors file: an entry of its header is no tensor; download it again")
    place = 0
    for name, entry in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        start, end = entry.data_offsets
        if entry.dtype not in _BITS:
            raise HandoffError(
                f"{path}: tensor {quoted(name)} has the unknown type {quoted(repr(entry.dtype))}; save it as float32"
            )
        bits = prod(entry.shape) * _BITS[entry.dtype]
        if start != place or end - start != -(-bits // 8):
            raise HandoffError(
                f"{path}: tensor {quoted(name)} ({entry.dtype}, shape {quoted(list(entry.shape))}) is said to be "
                f"in bytes {start} to {end}, where it cannot be: the file is damaged; copy or download it again"
            )
        place = end
    end = 8 + length + place
    if size != end:
        raise HandoffError(f"{path} has {size} bytes instead of {end}: it is truncated; copy or download it again")
    return {name: TensorInfo(path.name, entry.dtype, entry.shape) for name, entry in tensors.items()}


def read_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of a model directory, from its headers. Raises HandoffError when there are none, or when one has no
    elements (which a ZeRO-3 save without gathering leaves behind)."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        tensors |= read_header(path)
    if not tensors:
        raise HandoffError(f"{model_dir} has no weights: its safetensors files are empty; download them again")
    for name, info in sorted(tensors.items()):
        if prod(info.shape) == 0:
            raise HandoffError(
                f"{model_dir / info.file}: tensor {quoted(name)} has no elements (shape {list(info.shape)}): "
                "it was saved from a sharded model without gathering it"
            )
    return tensors


def embedding_shape(model_dir: Path) -> tuple[int, int]:
    """(rows, width) of the input embedding: the number of token ids that the model has, and the size of a vector."""
    tensors = read_tensors(model_dir)
    names = [
        name
        for name, info in tensors.items()
        if len(info.shape) == 2
        and name.split(".")[-1] == "weight"
        and name.split(".")[-2:-1]
        and name.split(".")[-2] in _EMBEDDINGS
    ]
    if not names:
        raise HandoffError(
            f"{model_dir}: no tensor has the name of a token embedding (*.{{{', '.join(sorted(_EMBEDDINGS))}}}.weight)"
        )
    # A multi-token-prediction layer may repeat the embedding; the model's own has the shortest name.
    rows, width = tensors[min(names, key=len)].shape
    return rows, width
