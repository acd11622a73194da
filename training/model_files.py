"""Writes the files of a published model besides its weights: configuration, tokenizer, generation settings."""

import logging
import shutil
from collections.abc import Mapping
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PretrainedConfig

from data.encode import Encoder
from handoff.errors import HandoffError
from handoff.files import read_json, write_json
from handoff.gate import TOKENIZER_FILES, named_errors

PROCESSOR_FILES = (
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "audio_tokenizer_config.json",
    "chat_template.json",
)
"""Files with which models of images, videos or sound prepare them."""
# Settings of generation_config.json that transformers reads only where it samples.
_SAMPLING = ("temperature", "top_p", "min_p", "top_h", "typical_p", "top_k", "epsilon_cutoff", "eta_cutoff")

_log = logging.getLogger(__name__)


def write_configuration(
    path: Path,
    module_config: PretrainedConfig,
    dtype: torch.dtype,
    class_name: str,
    encoder: Encoder,
    chat_template: str | None,
) -> None:
    """Writes config.json, the tokenizer, generation_config.json and, for a model of images or sound, its processor.

    Args:
        path: an existing directory.
        module_config: the configuration of the module whose weights are published.
        dtype: the precision of most of its published weights.
        class_name: the module's class.
        encoder: its tokenizer's directory has the files to copy.
        chat_template: name of the chosen chat template, which becomes the only one; None: the default one.

    Raises:
        HandoffError: transformers refuses to save a configuration; the message names the parent's file.
    """
    source = Path(encoder.tokenizer.name_or_path)
    config = deepcopy(module_config)
    config.dtype, config.architectures = dtype, [class_name]
    vars(config).pop("auto_map", None)  # code of the parent, which is not published
    try:
        config.save_pretrained(path)
    except OSError:
        raise
    except Exception as error:  # each class raises its own errors
        raise HandoffError(f"{source / 'config.json'}: transformers cannot save it: {in_words(error)}") from error
    copy_tokenizer(source, path)
    if chat_template is not None:
        (path / "chat_template.jinja").write_text(encoder.tokenizer.chat_template, encoding="utf-8")
    if config.get_text_config() is not config:  # it has the parent's parts for images or sound, too
        for name in PROCESSOR_FILES:
            _copy(source / name, path / name)
    try:
        generation_config(source, encoder).save_pretrained(path)
    except ValueError as error:
        raise HandoffError(
            f"{source / 'generation_config.json'}: transformers cannot save it: {in_words(error)}"
        ) from error


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copies the tokenizer's files byte for byte. Loading and saving them could change their hashes."""
    for name in TOKENIZER_FILES:
        _copy(source / name, target / name)


def _copy(source: Path, target: Path) -> None:
    """Copies a file if it exists: byte for byte, unless it names code of the parent, which is not published."""
    if not source.is_file():
        return
    if source.suffix == ".json" and b'"auto_map"' in source.read_bytes():
        content = read_json(source)
        if "auto_map" in content:
            del content["auto_map"]
            write_json(target, content)
            return
    shutil.copyfile(source, target)


def generation_config(model_dir: Path, encoder: Encoder) -> GenerationConfig:
    """The directory's generation settings, if it has any, with the encoder's stop ids, pad and bos.

    transformers does not save settings that only sampling reads where sampling is off. So they switch it on, or, if
    the directory says that it is off, are left out.
    """
    path = model_dir / "generation_config.json"
    with named_errors(path):
        here = path.is_file()
        config = GenerationConfig.from_pretrained(model_dir, local_files_only=True) if here else GenerationConfig()
    config.eos_token_id = sorted(encoder.stop_ids)
    config.pad_token_id = encoder.pad_id
    config.bos_token_id = encoder.bos_id
    sampling = {key: getattr(config, key) for key in _SAMPLING if getattr(config, key) is not None}
    if sampling and config.do_sample is None:
        config.do_sample = True
        warn(f"{path}: {_listed(sampling)} without do_sample; the published model's settings say do_sample true")
    elif sampling and not config.do_sample:
        for key in sampling:
            setattr(config, key, None)
        warn(f"{path}: do_sample is false, so the published model's settings leave out {_listed(sampling)}")
    return config


def _listed(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in settings.items())


@cache
def warn(text: str) -> None:
    """Warns; the same text only once in a process."""
    _log.warning(text)


def in_words(error: Exception) -> str:
    """An error's kind and message on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
