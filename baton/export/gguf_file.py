"""Writes a model directory as one GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).

One tensor at a time is in memory. Norms and biases stay float32 in every precision, as llama.cpp wants them.
"""

import importlib.util
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from baton.export.gguf_settings import family_of, file_names, rope_factors, settings, stored
from baton.export.gguf_vocabulary import Vocabulary, vocabulary_of
from handoff.errors import HandoffError
from handoff.files import quoted, read_json
from handoff.gate import LIMITS
from handoff.weights import read_tensors, weight_files

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

    from data.encode import Encoder

EXACT = ("f32", "f16", "bf16")
"""Those that only round."""
# LLAMA_FTYPE of llama.h.
_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 7, "bf16": 32}
_LARGEST_HALF = 65504.0
_BLOCK = 32
"""Values that a quantised format scales together; a row has a whole number of them."""
_AT_THE_ENDS = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Written:
    """What a file holds besides what was asked for."""

    vocabulary: Vocabulary
    kept: list[str]
    """Names of matrices that could not be quantised, and are f16."""


def need_gguf() -> None:
    """Raises HandoffError if the package is missing."""
    if importlib.util.find_spec("gguf") is None:
        raise HandoffError("writing GGUF files needs a package: pip install 'baton-align[gguf]'")


def check_holdable(config_dir: Path, encoder: "Encoder", place: str) -> None:
    """Raises HandoffError if no GGUF file can hold the model: before it is loaded or merged."""
    need_gguf()
    config = text_config(config_dir)
    settings(config, place)
    vocabulary_of(encoder, config["vocab_size"])


def text_config(model_dir: Path) -> dict[str, Any]:
    """config.json, of a model with several parts that of the one that reads and writes text."""
    config: dict[str, Any] = read_json(model_dir / "config.json", LIMITS["config.json"], infinity=True)
    inner = config.get("text_config")
    return config if inner is None else {**inner, "model_type": inner.get("model_type", f"{config['model_type']}_text")}


def write_gguf(
    model_dir: Path, path: Path, dtype: str, encoder: "Encoder", *, name: str, origin: Mapping[str, str]
) -> Written:
    """Writes the model in `model_dir`, which has whole weights that are not quantised.

    Args:
        dtype: one of `EXACT`, q8_0 or q4_0.
        encoder: its tokenizer, with the chat template and the stop ids.
        name: what the file calls the model.
        origin: more keys of the file.

    Raises:
        HandoffError: the file cannot hold the model.
        OSError: the disk.
    """
    from gguf import GGUFWriter
    from safetensors import safe_open

    config = text_config(model_dir)
    place = str(model_dir)
    family = family_of(config, place)
    shapes = {key: info.shape for key, info in read_tensors(model_dir).items()}
    rows = next(shape[0] for key, shape in shapes.items() if key.endswith("embed_tokens.weight"))
    vocabulary = vocabulary_of(encoder, rows)
    keys = settings(config, place)
    names = file_names(config, iter(shapes), place)
    writer = GGUFWriter(path, family.name)
    with ExitStack() as files:
        files.callback(writer.close)
        _describe(writer, family.name, keys | {"vocab_size": rows}, name, dtype, origin)
        _add_tokenizer(writer, vocabulary, encoder)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        kept = []
        types = {}
        for key, target in names.items():
            types[key] = kind = _type(target, shapes[key], dtype)
            if kind.name == "F16" and dtype not in EXACT:
                kept.append(target)
            writer.add_tensor_info(target, shapes[key], np.dtype(np.float32), _bytes(shapes[key], kind), kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        opened = [files.enter_context(safe_open(file, "pt")) for file in weight_files(model_dir)]
        places = {key: file for file in opened for key in file.keys()}  # noqa: SIM118  # it is no mapping
        for key in names:
            values = stored(family, config, key, places[key].get_tensor(key).float().numpy())
            writer.write_tensor_data(_encoded(values, types[key], f"{quoted(place)}: {key}"))
    return Written(vocabulary, kept)


def _describe(
    writer: "GGUFWriter", family: str, keys: Mapping[str, Any], name: str, dtype: str, origin: Mapping[str, str]
) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_FILE_TYPES[dtype])
    writer.add_quantization_version(2)
    for key, value in keys.items():
        if isinstance(value, str):
            writer.add_string(f"{family}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{family}.{key}", value)
        else:
            writer.add_float32(f"{family}.{key}", value)
    for key, text in origin.items():
        writer.add_string(key, text)


def _add_tokenizer(writer: "GGUFWriter", vocabulary: Vocabulary, encoder: "Encoder") -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    around = encoder.tokenizer.backend_tokenizer.encode("").ids
    writer.add_add_bos_token(around[:1] == [encoder.bos_id])
    writer.add_add_eos_token(around[-1:] == [encoder.eos_id])
    if encoder.bos_id is not None:
        writer.add_bos_token_id(encoder.bos_id)
    writer.add_eos_token_id(encoder.eos_id)
    writer.add_pad_token_id(encoder.pad_id)
    unknown = encoder.tokenizer.unk_token_id
    if unknown is not None:
        writer.add_unk_token_id(unknown)
    # A file has names for three tokens that end an answer; llama.cpp finds more by their usual texts.
    others = [token for token in encoder.stop_ids if token != encoder.eos_id]
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        add(token)
    template = encoder.tokenizer.chat_template
    if template is not None:
        writer.add_chat_template(template)


def _type(target: str, shape: tuple[int, ...], dtype: str) -> "GGMLQuantizationType":
    """The type of a tensor in a file of that precision."""
    from gguf import GGMLQuantizationType

    if len(shape) < 2:
        return GGMLQuantizationType.F32
    if dtype in EXACT:
        return GGMLQuantizationType[dtype.upper()]
    if shape[-1] % _BLOCK:
        return GGMLQuantizationType.F16
    # Errors of the embeddings and of the head reach every token.
    return GGMLQuantizationType["Q8_0" if target in _AT_THE_ENDS else dtype.upper()]


def _bytes(shape: tuple[int, ...], kind: "GGMLQuantizationType") -> int:
    from gguf import GGML_QUANT_SIZES

    block, size = GGML_QUANT_SIZES[kind]
    return prod(shape) // block * size


def _encoded(values: np.ndarray, kind: "GGMLQuantizationType", what: str) -> np.ndarray:
    from gguf import quants

    if kind.name == "F16" and np.abs(values).max(initial=0) > _LARGEST_HALF:
        raise HandoffError(f"{what} has values that are too large for f16; give --dtype bf16 or f32")
    return np.ascontiguousarray(quants.quantize(np.ascontiguousarray(values), kind))
