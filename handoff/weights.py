"""Reads names and shapes from the headers of a model's safetensors files, without loading a tensor.

Format: 8 bytes, the header's length as a little-endian unsigned integer; the header, JSON of
{name: {dtype, shape, data_offsets}}; the tensors' bytes (https://huggingface.co/docs/safetensors).
"""

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

from handoff.errors import HandoffError
from handoff.files import read_json

INDEX_NAME = "model.safetensors.index.json"
# Last part of the input embedding's name. In this order: Llama, Mistral, Qwen, Gemma and OPT; GPT-2 and GPT-J;
# GPT-NeoX; Falcon and Bloom; InternLM2; Mamba.
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings", "embeddings"}
_MAX_HEADER = 100_000_000  # bytes, the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files that make up the model. Raises HandoffError when the index names a missing file."""
    index = model_dir / INDEX_NAME
    if index.is_file():
        names = sorted(set(read_json(index)["weight_map"].values()))
        for name in names:
            if not (model_dir / name).is_file():
                raise HandoffError(
                    f"{model_dir}: {name} is missing, but {INDEX_NAME} lists it; copy or download it again"
                )
        return [model_dir / name for name in names]
    single = model_dir / "model.safetensors"
    if single.is_file():  # some publishers put the same weights beside it in their own format
        return [single]
    return sorted(model_dir.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one file. Raises HandoffError when it is truncated or not a safetensors file."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise HandoffError(f"{path} is truncated ({size} bytes); copy or download it again")
        (length,) = struct.unpack("<Q", prefix)
        if length > min(size - 8, _MAX_HEADER):
            raise HandoffError(f"{path} is truncated, or not a safetensors file ({size} bytes)")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise HandoffError(f"{path} is not a safetensors file: its header is not JSON") from error
    header.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if size != end:
        raise HandoffError(f"{path} has {size} bytes instead of {end}: it is truncated; copy or download it again")
    return {name: TensorInfo(path.name, entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}


def read_tensors(model_dir: Path) -> dict[str, TensorInfo]:
    """All tensors of a model directory, from its headers. Raises HandoffError when there are none, or when one has no
    elements (which a ZeRO-3 save without gathering leaves behind)."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(model_dir):
        tensors |= read_header(path)
    if not tensors:
        raise HandoffError(f"{model_dir} has no weights (*.safetensors)")
    for name, info in sorted(tensors.items()):
        if prod(info.shape) == 0:
            raise HandoffError(
                f"{model_dir / info.file}: tensor {name} has no elements (shape {list(info.shape)}): "
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
