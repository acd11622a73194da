"""Checks what a model's JSON files say, before anything is loaded by them.

Three kinds of settings are told apart:

- Those with a fixed form (ids, tokens, templates, names of classes): their types and ranges are checked.
- Those that make transformers read another file, fetch something, run code or replace its own methods: refused by name.
  `auto_map` (code beside the model) is passed over if transformers has the architecture itself, since Baton never lets
  it run; otherwise it is refused.
- All others describe the architecture. They have no effect but on the network that is built from them.
  `_attn_implementation` and `_experts_implementation` are among them: the recipe's choice replaces theirs
  (training/architecture.py), and only a name with a slash, which would be fetched from the hub, is refused.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handoff.errors import HandoffError
from handoff.files import quoted, read_json
from handoff.weights import INDEX_NAME

_MAX_ID = 1 << 31
Id = Annotated[int, Field(strict=True, ge=0, lt=_MAX_ID)]
Text = Annotated[str, Field(strict=True)]


class _Keys(BaseModel):
    model_config = ConfigDict(extra="allow")


class _AddedToken(_Keys):
    content: Text
    special: bool = False


class _TokenWithId(_AddedToken):
    id: Id


class _NamedTemplate(_Keys):
    name: Text
    template: Text


Token = Text | _AddedToken | None


class _Config(_Keys):
    """config.json."""

    architectures: list[Text] | None = None
    model_type: Text | None = None
    vocab_size: Id | None = None
    text_config: dict[str, Any] = Field(default_factory=dict)
    eos_token_id: Id | list[Id] | None = None
    tokenizer_class: Text | None = None
    auto_map: dict[str, Any] | None = None
    id2label: dict[str, Any] | None = None


class _GenerationConfig(_Keys):
    """generation_config.json."""

    eos_token_id: Id | list[Id] | None = None
    pad_token_id: Id | list[Id] | None = None
    bos_token_id: Id | list[Id] | None = None


class _Vocabulary(_Keys):
    vocab: Annotated[dict[str, Id], Field(min_length=1)] | Annotated[list[tuple[Text, float]], Field(min_length=1)]


class _Tokenizer(_Keys):
    """tokenizer.json."""

    model: _Vocabulary
    added_tokens: list[_TokenWithId] = Field(default_factory=list)


class _TokenizerConfig(_Keys):
    """tokenizer_config.json."""

    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None
    chat_template: Text | list[_NamedTemplate] | None = None
    tokenizer_class: Text | None = None
    added_tokens_decoder: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], _AddedToken] | None = None
    auto_map: dict[str, Any] | list[Any] | None = None
    trust_remote_code: Literal[False] | None = None


class _SpecialTokens(_Keys):
    """special_tokens_map.json."""

    bos_token: Token = None
    eos_token: Token = None
    pad_token: Token = None
    unk_token: Token = None


_FORMS: dict[str, type[_Keys]] = {
    "config.json": _Config,
    "generation_config.json": _GenerationConfig,
    "tokenizer.json": _Tokenizer,
    "tokenizer_config.json": _TokenizerConfig,
    "special_tokens_map.json": _SpecialTokens,
}

_OTHER_FILE = "would have another file read than the ones that are checked; remove it"
_OVERRIDES = "would replace a part of transformers' own classes; remove it"
REFUSED: dict[str, dict[str, str]] = {
    "config.json": {
        "transformers_weights": _OTHER_FILE + ", and name the weights model.safetensors",
        "configuration_files": _OTHER_FILE,
        "gguf_file": _OTHER_FILE,
        "checkpoint_path": _OTHER_FILE,
        "pretrained_cfg": _OTHER_FILE,
        "pretrained_cfg_overlay": _OTHER_FILE,
        "fusion_config": _OVERRIDES,
    },
    "tokenizer_config.json": {
        "fast_tokenizer_files": _OTHER_FILE + ", and name the tokenizer tokenizer.json",
        "gguf_file": _OTHER_FILE,
        "init_inputs": _OVERRIDES,
        "tokenizer_object": _OVERRIDES,
        "slow_tokenizer": _OVERRIDES,
        "__slow_tokenizer": _OVERRIDES,
        "from_slow": _OVERRIDES,
        "vocab": _OVERRIDES,
        "merges": _OVERRIDES,
        "vocab_file": _OTHER_FILE,
        "merges_file": _OTHER_FILE,
        "spm_file": _OTHER_FILE,
    },
    "generation_config.json": {},
}
"""{file: {key: what it would do}}. In config.json, at any depth."""
_PRETRAINED = ("use_pretrained_backbone", "use_timm_backbone", "pretrained")  # true: fetches weights from a hub
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
_SPECIAL = re.compile(r"[a-z0-9_]+_token|additional_special_tokens|extra_special_tokens|model_specific_special_tokens")
_TOKENIZER_CLASS = re.compile(r"(?!(Auto|Rag)Tokenizer)[A-Za-z0-9]+Tokenizer(Fast)?|TokenizersBackend")
_TIMM = re.compile(r"[\w.-]+")
_DTYPE = re.compile(r"(torch\.)?(auto|float|half|double|b?float\d+(_e\d+m\d+(fn)?(uz)?)?|u?int\d+)")
_FOR_BROWSERS = "transformers.js_config."  # what another program reads, whose types have names of their own
_LAYERS = re.compile(r"(num_(hidden_)?layers|n_layers?|(num_)?(encoder|decoder)_layers|depth)")
OWN_NAMES = re.compile(
    r"__\w+|_\w+_internal|_(auto_class|output_attentions|post_init_done)"
    r"|_(check_received_keys|(de|en)code_special_floats|dict_from_json_file|get_config_dict|get_files_timestamps)"
    r"|_(get_default_generation_params|get_generation_parameters|iter_config_keys_with_heterogeneous_adjustment)"
    r"|_(get|has)attr_without_heterogeneous_validation|_(remove_keys_not_serialized|upload_modified_files)"
    r"|_update_heterogeneous_to_dict_output|_validate_\w+_rope_parameters"
    r"|allow_global_per_layer_attribute_access|attribute_map|base_config_key|base_model_(ep|fsdp|pp|tp)_plan"
    r"|convert_rope_params_to_dict|default_(config_fields|rope_type|theta)|dict_dtype_to_str|extra_(config_)?files"
    r"|extra_output_flags|from_(dict|json_file|model_config|pretrained)"
    r"|get_(config_dict|generation_mode|mtp_config|text_config)|ignore_keys_at_rope_validation"
    r"|is_(custom_code|heterogeneous|remote_code)|nested_rope_parameter_keys|per_layer_attributes|push_to_hub"
    r"|register_for_auto_class|save_pretrained|serialize_explicit_per_layer_config|standardize_rope_params"
    r"|sub_configs(_defaults)?|to_(dict|diff_dict|json_file|json_string)|update(_from_string)?"
    r"|validate(_(architecture|layer_type|output_attentions|rope|token_ids))?"
)
"""Names that transformers' classes for config.json and generation_config.json have and that are no settings. A key of
such a name would replace what the class has. A test compares this with the installed version."""


def check_settings(files: Mapping[str, Path], limits: Mapping[str, int], tensors: int | None) -> None:
    """Checks the JSON files among `files`, and that transformers has the architecture if code lies beside the model.

    Args:
        files: {name: path} of a model's files.
        limits: {name: largest size in bytes}.
        tensors: number of stored tensors; None if there are no weights.

    Raises:
        HandoffError: naming file, key and what to do.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, path in files.items():
        if name.endswith(".json") and name != INDEX_NAME:
            content = read_json(path, limits[name], infinity=name == "config.json")
            if not isinstance(content, dict):
                raise HandoffError(f"{path} holds no object {{...}}: the file is damaged, copy or download it again")
            found[name] = content
            if name in _FORMS:
                _check_form(path, content, _FORMS[name])
            for key, fault in _faults(name, content, tensors):
                raise HandoffError(f"{path}: {quoted(key)}: {fault}")
    _check_code(files, found)


def _check_form(path: Path, content: dict[str, Any], form: type[_Keys]) -> None:
    try:
        form.model_validate(content)
    except ValidationError as error:
        first = max(error.errors(), key=lambda found: len(found["loc"]))  # of the forms allowed, the one that fits best
        place = [str(part) for part in first["loc"]]
        key = place[0] if len(place) < 3 or path.name != "tokenizer.json" else ".".join(place[:3])
        got = repr(first["input"])
        raise HandoffError(
            f"{path}: {quoted(key)}: {first['msg']}, but it is {quoted(got[:60])}{'…' if len(got) > 60 else ''}; "
            "write the value of the model's publisher"
        ) from error


def _faults(name: str, content: dict[str, Any], tensors: int | None) -> Iterator[tuple[str, str]]:
    """(key, what is wrong and what to do) of each setting that is refused in the file `name`."""
    if name == "config.json":
        yield from _config_faults(content, "", tensors)
    elif name == "special_tokens_map.json":
        for key in content:
            if not _SPECIAL.fullmatch(key):
                yield key, f"{_OVERRIDES} (special_tokens_map.json names tokens only)"
    elif name in REFUSED:
        for key, value in content.items():
            if key in REFUSED[name] and value not in (None, [], False):
                yield key, REFUSED[name][key]
            elif name == "generation_config.json" and OWN_NAMES.fullmatch(key):
                yield key, _OVERRIDES
    if name == "tokenizer_config.json" or name == "config.json":
        kind = content.get("tokenizer_class")
        if kind is not None and not _TOKENIZER_CLASS.fullmatch(kind):
            yield "tokenizer_class", f"{quoted(repr(kind))} is no tokenizer's class; write PreTrainedTokenizerFast"


def _config_faults(node: dict[str, Any], place: str, tensors: int | None) -> Iterator[tuple[str, str]]:
    for key, value in node.items():
        where = f"{place}{key}"
        plain = key.lstrip("_")
        if key in REFUSED["config.json"] and value is not None:
            yield where, REFUSED["config.json"][key]
        elif key == "configuration_files":  # null counts, too
            yield where, _OTHER_FILE
        elif key == "auto_map" and place:
            yield where, "requests remote code for a part of the model, which Baton never runs; remove it"
        elif (not place or place.endswith("_config.")) and OWN_NAMES.fullmatch(key):
            yield where, _OVERRIDES
        elif plain in _IMPLEMENTATIONS and not (value is None or (isinstance(value, str) and value.isidentifier())):
            yield (
                where,
                f"{quoted(repr(value))} would be fetched from the hub and run; remove it, the recipe says what is used",
            )
        elif key in _PRETRAINED and value is True:
            yield where, "would fetch weights from a hub; write false"
        elif key == "model_type" and isinstance(value, str) and value.startswith("timm"):
            yield (
                where,
                f"{quoted(repr(value))} would fetch a model from a hub; use one whose parts transformers has itself",
            )
        elif key in ("architecture", "backbone") and isinstance(value, str) and not _TIMM.fullmatch(value):
            yield (
                where,
                f"{quoted(repr(value))} would be fetched from a hub; write the plain name of an architecture",
            )
        elif key in ("dtype", "torch_dtype") and place != _FOR_BROWSERS and not (value is None or _is_dtype(value)):
            yield where, f"{quoted(repr(value))} is no type of numbers; write float32"
        elif key in ("quantization_config", "compression_config") and value not in (None, {}):
            method = value.get("quant_method") if isinstance(value, dict) else None
            if not isinstance(method, str) or method == "gguf":
                yield (
                    where,
                    f"quant_method is {quoted(repr(method))}; write the name of a method with safetensors files",
                )
        elif tensors is not None and _LAYERS.fullmatch(key) and _is_number(value) and not 0 <= value <= tensors:
            yield where, f"is {quoted(value)}, but the files have {tensors} tensors; write the number of layers"
        elif isinstance(value, dict):
            yield from _config_faults(value, f"{where}.", tensors)


def _is_dtype(value: Any) -> bool:
    if isinstance(value, dict):  # a type for each part of the model
        return all(_is_dtype(part) for part in value.values())
    return isinstance(value, str) and _DTYPE.fullmatch(value) is not None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_code(files: Mapping[str, Path], found: Mapping[str, dict[str, Any]]) -> None:
    """Raises HandoffError if the model needs the code that its publisher put beside it."""
    for name, key in (("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")):
        content = found.get(name, {})
        kind = content.get(key)
        if "auto_map" in content and not _has(key, kind):
            raise HandoffError(
                f"{files[name]} requests remote code (auto_map, trust_remote_code), which Baton never runs, and "
                f"transformers has no {key} {quoted(repr(kind))} itself; use a checkpoint of an architecture that it "
                "has"
            )


def _has(key: str, kind: Any) -> bool:
    """Whether transformers has the `model_type` or `tokenizer_class` of that name."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    if not isinstance(kind, str):
        return False
    return kind in CONFIG_MAPPING if key == "model_type" else tokenizer_class_from_name(kind) is not None
