"""The gate: every model directory is opened through it, whether a stage published it or somebody else made it.

Loading a model with transformers reads the files of `LIMITS`, the weights and the named chat templates, and nothing
else: the gate refuses by name whatever would make it read another file, fetch something or run code. The files that
`loaded_files` returns are the ones that are hashed, so a change of any file that has an effect is noticed.

The gate opens no FIFO and no device, follows no link out of the directory, and reads nothing of unbounded size.
handoff/settings.py checks the contents of the JSON files.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from handoff.errors import HandoffError, UserError
from handoff.files import disk_is_full, quoted, what_is_wrong_with
from handoff.settings import check_settings
from handoff.weights import INDEX_NAME, SINGLE_NAME, read_tensors, weight_files

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
"""Files that a stage takes over from its parent byte for byte, as far as the parent has them."""
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MIB = 1 << 20
LIMITS = {
    ADAPTER_CONFIG: 16 * _MIB,
    "config.json": 16 * _MIB,
    "generation_config.json": _MIB,
    INDEX_NAME: 64 * _MIB,
    "tokenizer.json": 256 * _MIB,
    "tokenizer_config.json": 64 * _MIB,
    "chat_template.jinja": _MIB,
    "special_tokens_map.json": 16 * _MIB,
    "added_tokens.json": 64 * _MIB,
    # Read where a tokenizer's class asks for them, although tokenizer.json has the same.
    **dict.fromkeys(("vocab.json", "vocab.txt", "merges.txt", "normalizer.json"), 64 * _MIB),
    **dict.fromkeys(("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model"), 64 * _MIB),
    # Of models that also read images, sound or video.
    **dict.fromkeys(("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"), _MIB),
    **dict.fromkeys(("audio_tokenizer_config.json", "chat_template.json"), _MIB),
}
"""{file that has an effect on loading, beside the weights: its largest size in bytes}"""
_TEMPLATES = "additional_chat_templates"
# transformers would load these instead of the model's own weights.
_SHARD = re.compile(r"shard-.*\.safetensors\s*", re.DOTALL)


def is_adapter(model_dir: Path) -> bool:
    """Whether the directory holds a LoRA adapter and no model.

    Raises:
        HandoffError: it holds an adapter beside the weights of a model, or an adapter without safetensors.
    """
    if not os.path.lexists(model_dir / ADAPTER_CONFIG):
        return False
    if any(os.path.lexists(model_dir / name) for name in (SINGLE_NAME, INDEX_NAME)):
        raise HandoffError(
            f"{model_dir} has an adapter ({ADAPTER_CONFIG}) beside the weights of a model, and it is unclear which of "
            "them is meant; move one of them to another folder"
        )
    if not os.path.lexists(model_dir / ADAPTER_WEIGHTS):
        raise HandoffError(
            f"{model_dir} is an adapter ({ADAPTER_CONFIG}) without {ADAPTER_WEIGHTS}; where it has only pickles, load "
            "it once with peft, which can run their code, and save it with save_pretrained"
        )
    return True


def loaded_files(model_dir: Path) -> dict[str, Path]:
    """{name: path} of the files that loading the model reads, as far as they are there, weights included.

    Raises:
        HandoffError: one of them is a link out of the directory, no regular file, or too large; an index names a file
            outside; or there is a file that would be loaded in place of the model.
    """
    try:
        names = sorted(path.name for path in model_dir.iterdir())
    except OSError as error:
        raise HandoffError(f"{quoted(model_dir)} cannot be read ({error.strerror})") from error
    for name in names:
        if _SHARD.fullmatch(name):
            raise HandoffError(
                f"{quoted(model_dir / name)} is a piece of a distributed checkpoint, which would be loaded instead of "
                "the model; move it to another folder"
            )
    limits: dict[str, int | None] = {name: LIMITS[name] for name in names if name in LIMITS}
    if _TEMPLATES in names and (model_dir / _TEMPLATES).is_dir():
        if (model_dir / _TEMPLATES).is_symlink():
            raise HandoffError(f"{model_dir / _TEMPLATES} is a link; put the folder itself there")
        for path in sorted((model_dir / _TEMPLATES).glob("*.jinja")):
            limits[f"{_TEMPLATES}/{path.name}"] = LIMITS["chat_template.jinja"]
    if is_adapter(model_dir):
        limits[ADAPTER_WEIGHTS] = None
    elif any(name == INDEX_NAME or name.endswith(".safetensors") for name in names):
        limits |= dict.fromkeys((path.name for path in weight_files(model_dir)), None)
    for name, limit in limits.items():
        fault = what_is_wrong_with(model_dir / name, model_dir, limit)
        if fault:
            raise HandoffError(f"{quoted(model_dir / name)} {fault}")
    return {name: model_dir / name for name in sorted(limits)}


def check_directory(model_dir: Path) -> None:
    """Checks all files that loading the model reads, and what they say. The weights themselves are not read.

    Raises:
        HandoffError: as `loaded_files`; a file has another form than it should have, or a setting that would make
            loading read another file, fetch something or run code. The message names file, key and what to do.
    """
    files = loaded_files(model_dir)
    whole = any(name.endswith(".safetensors") for name in files) and ADAPTER_WEIGHTS not in files
    tensors = len(read_tensors(model_dir)) if whole else None
    check_settings(files, LIMITS, tensors)
    for name, path in files.items():
        if name.endswith(".jinja"):
            try:
                path.read_bytes().decode("utf-8")
            except UnicodeDecodeError as error:
                raise HandoffError(
                    f"{quoted(path)} is not UTF-8 (byte {error.start}): save the template as UTF-8"
                ) from error


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Inside, transformers loads something of a checked directory: an error of its classes becomes a HandoffError.

    transformers checks most settings only while it builds a model, and raises errors of many types.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except BaseException as error:
        # A panic of a library in Rust is no Exception.
        if not (isinstance(error, Exception) or type(error).__name__ == "PanicException"):
            raise
        if disk_is_full(error) or type(error).__name__ == "OutOfMemoryError":
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines[:3]) or "no reason given"
        if "ignore_mismatched_sizes" in told:  # transformers names the tensors in a table that it logs
            told = "the weights have other shapes than config.json says"
        raise HandoffError(
            f"{quoted(path)}: transformers cannot load it: {type(error).__name__}: {quoted(told)}; compare the files "
            "with their publisher's, or save the model again with save_pretrained"
        ) from error
