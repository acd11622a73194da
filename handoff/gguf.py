"""A parent in one GGUF file, unpacked once into a plain checkpoint directory that is opened like any other.

A GGUF file holds weights, often quantised, with settings, tokenizer and chat template
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). transformers reads it by means of the package `gguf` and
turns the weights back into float32, but it refuses to save what it has read; so the weights are written here.
"""

import importlib.util
import os
import subprocess
import sys
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handoff.errors import HandoffError
from handoff.files import check_free_space, fsync_tree, human_bytes, quoted, read_json, remove_tree, write_json
from handoff.gate import named_errors

if TYPE_CHECKING:
    from gguf import GGUFReader

SUFFIX = ".gguf"
_REFUSED = 2
"""Exit code of the process that unpacks a file, if the file is refused."""
_HEAD = "output.weight"
_SIZES = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
}
"""{key of a config.json: the file's own name}."""
_DIGITS_APART = frozenset({"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"})
"""llama.cpp's names (src/llama-vocab.cpp) for: each digit alone, otherwise as GPT-2 splits."""
_AS_GPT2 = frozenset({"gpt-2", "phi-2", "olmo", "jais", "mpt", "trillion", "granite-docling", "gigachat", "mellum"})
_FLOAT32 = 8  # at most as many times larger are float32 weights than quantised ones


def is_gguf(ref: str | Path) -> bool:
    """Whether it is the path of an existing GGUF file, by its name."""
    with suppress(OSError, RuntimeError):  # a name that is too long, an unknown user after ~
        path = Path(ref).expanduser()
        return path.suffix == SUFFIX and path.is_file()
    return False


def sizes(path: Path) -> tuple[dict[str, Any], int]:
    """The sizes of the file's network under the names of a config.json, and the number of its parameters without an
    output head of its own. Reads no weights, and needs no torch.

    Raises:
        HandoffError: it is no GGUF file, or the package `gguf` is missing.
    """
    _need_package(path)
    with named_errors(path):
        from gguf import GGUFReader

        reader = GGUFReader(path)

        family = _value(reader, "general.architecture")
        named = {key: _value(reader, f"{family}.{name}") for key, name in _SIZES.items()}
        shapes = {tensor.name: [int(size) for size in tensor.shape] for tensor in reader.tensors}
        embedding = shapes["token_embd.weight"]
    config = {key: value for key, value in named.items() if value is not None}
    config |= {"model_type": family, "vocab_size": embedding[1], "tie_word_embeddings": _HEAD not in shapes}
    return config, sum(prod(shape) for name, shape in shapes.items() if name != _HEAD)


def _need_package(path: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise HandoffError(f"{quoted(path)}: reading it needs a package: pip install 'baton-align[gguf]'")


def folder_name(digest: str) -> str:
    """Name of the folder with the unpacked model of a file with that SHA-256."""
    return digest[:16]


def unpacked(path: Path, store: Path, digest: str) -> Path:
    """The directory with the file's model, which is written on the first call.

    Args:
        path: the GGUF file.
        store: the directory below which unpacked models are kept.
        digest: the file's SHA-256; the same content is unpacked once, whatever its name.

    Raises:
        HandoffError: it is no GGUF file, the package `gguf` is missing, transformers does not know its architecture, or
            the disk has too little space.
    """
    folder = store / folder_name(digest)
    if folder.is_dir():
        return folder
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise HandoffError(f"{quoted(path)} is not a GGUF file: it does not begin with the letters GGUF")
    _need_package(path)
    size = path.stat().st_size
    check_free_space(store, _FLOAT32 * size, f"unpacking {quoted(path.name)} ({human_bytes(size)}) to float32 weights")
    written = store / f".tmp-{folder.name}-{os.getpid()}"
    try:
        written.mkdir(parents=True)
        _convert_apart(path, written)
        fsync_tree(written)
        if not folder.is_dir():  # another process may have been faster
            written.rename(folder)
    finally:
        remove_tree(written)
    return folder


def _convert_apart(path: Path, folder: Path) -> None:
    """`_convert` in a process of its own, so that the caller does not keep the memory that the whole model takes."""
    command = [sys.executable, "-m", "handoff.gguf", str(path), str(folder)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).resolve().parent.parent), *sys.path])}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode == _REFUSED:
        raise HandoffError(done.stdout.removesuffix("\n"))
    if done.returncode < 0:
        raise HandoffError(
            f"{quoted(path)}: unpacking was killed by signal {-done.returncode}, by the system for lack of memory or "
            "by someone; it needs twice the size of the model's float32 weights"
        )
    if done.returncode:
        raise RuntimeError(f"{quoted(path)}: unpacking ended with exit code {done.returncode}\n{done.stderr[-4000:]}")


def _convert(path: Path, folder: Path) -> None:
    """Writes the model in float32, and its tokenizer."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    reader = GGUFReader(path)
    keys: dict[str, Any] = {"gguf_file": path.name, "trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **keys)
    _correct_settings(config, reader)
    read = AutoModelForCausalLM.from_pretrained(path.parent, config=config, dtype=torch.float32, **keys)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, **keys)
    del read.config.quantization_config
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(read.config, dtype=torch.float32)
    plain.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=_stop_ids(reader), pad_token_id=tokenizer.pad_token_id
    )
    plain.save_pretrained(folder, state_dict=read.state_dict())
    tokenizer.save_pretrained(folder)
    _correct_tokenizer(folder / "tokenizer.json", plain.config.vocab_size, _split(reader))


def _value(reader: "GGUFReader", name: str) -> Any:
    """The value of a key of the file; None if it has none."""
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _correct_settings(config: Any, reader: "GGUFReader") -> None:
    """Corrects what transformers leaves out of a configuration: the size of a head, where that is no quotient of the
    others."""
    size = _value(reader, f"{_value(reader, 'general.architecture')}.attention.key_length")
    if size is not None and "head_dim" in type(config).__dataclass_fields__:
        config.head_dim = size


def _stop_ids(reader: "GGUFReader") -> list[int]:
    """Every token that ends an answer: of a text, of a turn, and of a message."""
    found = (_value(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    return sorted({token for token in found if token is not None})


def _split(reader: "GGUFReader") -> str | None:
    """llama.cpp's name of the rule by which a byte-level tokenizer first splits a text; None for other tokenizers."""
    split = _value(reader, "tokenizer.ggml.pre")
    return str(split) if split and _value(reader, "tokenizer.ggml.model") == "gpt2" else None


def _correct_tokenizer(path: Path, rows: int, split: str | None) -> None:
    """Corrects what transformers wrote into tokenizer.json.

    Its class for byte-level tokenizers adds `<|endoftext|>` where a vocabulary has no such token, and it does not know
    every way to split a text.

    Args:
        path: the file.
        rows: the number of the model's embeddings.
        split: see `_split`.
    """
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    content = read_json(path, 1 << 30)
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < rows]
    if split in _DIGITS_APART:
        digits = {"type": "Digits", "individual_digits": True}
        words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
        content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, words]}
    elif split is not None and split not in GGUF_PRE_TOKENIZER_SPLITS and split not in _AS_GPT2:
        raise HandoffError(
            f"its tokenizer splits texts by the rule {split!r}, which is not known here, so that the model would read "
            "other tokens than it was trained on; name the directory from which the file was made"
        )
    write_json(path, content)


if __name__ == "__main__":
    try:
        with named_errors(Path(sys.argv[1])):
            _convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except HandoffError as error:
        print(error)
        sys.exit(_REFUSED)
