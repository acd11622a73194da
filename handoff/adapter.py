"""Reads the settings and the names of a LoRA adapter's directory, as peft writes it, without loading a tensor.

    adapter_config.json         rank, α and form of the update, and the name of the base
    adapter_model.safetensors   {base_model.model.<layer>.lora_A.weight: (r, in), ...lora_B.weight: (out, r)}, for DoRA
                                ...lora_magnitude_vector: (out,), and base_model.model.<module>.weight of modules that
                                were trained as a whole

What the settings ask for must be an update of weight matrices, so that it can be merged; anything else is refused by
name.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handoff.errors import HandoffError
from handoff.files import quoted, read_json
from handoff.gate import ADAPTER_CONFIG, ADAPTER_WEIGHTS, LIMITS
from handoff.weights import TensorInfo, read_header

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<layer>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_magnitude_vector)")
_Rank = Annotated[int, Field(strict=True, ge=1)]
# Settings that have no effect on what the stored tensors mean.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "lora_ga_config",
    "loftq_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "target_modules",
    "task_type",
    "velora_config",
}
_NEUTRAL: tuple[Any, ...] = (None, False, "", [], {}, "none")


class AdapterSettings(BaseModel):
    """adapter_config.json."""

    model_config = ConfigDict(extra="allow")
    peft_type: Literal["LORA"]
    base_model_name_or_path: str | None = None
    r: _Rank
    lora_alpha: float
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, _Rank] = Field(default_factory=dict)
    alpha_pattern: dict[str, float] = Field(default_factory=dict)
    init_lora_weights: bool | str | None = True

    def scaling(self, layer: str, r: int) -> float:
        """The factor of a layer's update, whose matrices have rank `r`."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, layer), self.lora_alpha)
        return alpha / math.sqrt(r) if self.use_rslora else alpha / r


def _pattern(patterns: dict[str, Any], layer: str) -> str:
    """The first pattern that fits a layer's name, as peft chooses it; empty if there is none."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", layer)), "")


@dataclass(frozen=True)
class AdapterFiles:
    """An adapter's settings, and its tensors by the model's own names."""

    path: Path
    settings: AdapterSettings
    layers: dict[str, dict[str, TensorInfo]]
    """{layer: {"lora_A.weight" | "lora_B.weight" | "lora_magnitude_vector": tensor}}."""
    saved: dict[str, TensorInfo]
    """{parameter: tensor} of the modules that were trained as a whole."""

    @property
    def weights(self) -> Path:
        """The file of the tensors."""
        return self.path / ADAPTER_WEIGHTS


def read_adapter(path: Path) -> AdapterFiles:
    """Reads the headers of an adapter that the gate has let through.

    Raises:
        HandoffError: the settings ask for something that cannot be merged into weights, or the tensors are not those
            of such an adapter.
    """
    settings = _settings(path / ADAPTER_CONFIG)
    layers: dict[str, dict[str, TensorInfo]] = {}
    saved: dict[str, TensorInfo] = {}
    file = path / ADAPTER_WEIGHTS
    for key, info in read_header(file).items():
        name = key.removeprefix(_PREFIX)
        if name == key:
            raise HandoffError(f"{file}: {quoted(key)} is no tensor of an adapter; peft writes {_PREFIX}<layer>")
        found = _PART.fullmatch(name)
        if found is not None:
            layers.setdefault(found["layer"], {})[found["part"]] = info
        elif "lora_" in name:
            raise HandoffError(f"{file}: {quoted(key)}: only adapters of linear layers can be read; merge it with peft")
        else:
            saved[name] = info
    for layer, parts in layers.items():
        _check_layer(file, settings, layer, parts)
    return AdapterFiles(path, settings, layers, saved)


def stored_name(name: str) -> str:
    """The name in the file of a tensor of the model, or of a layer's part."""
    return _PREFIX + name


def _settings(path: Path) -> AdapterSettings:
    content = read_json(path, LIMITS[ADAPTER_CONFIG])
    kind = content.get("peft_type") if isinstance(content, dict) else None
    if kind != "LORA":
        raise HandoffError(
            f"{path}: peft_type is {quoted(repr(kind))}; an adapter is LORA. Merge another kind into its base with "
            "peft (merge_and_unload), and name the merged model"
        )
    try:
        settings = AdapterSettings.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = quoted(".".join(map(str, first["loc"])))
        raise HandoffError(f"{path}: {where}: {first['msg']}; write the value of the adapter's publisher") from error
    for key, value in (settings.model_extra or {}).items():
        if key not in _WITHOUT_EFFECT and value not in _NEUTRAL:
            raise HandoffError(
                f"{path}: {quoted(key)} is {quoted(repr(value))[:60]}: with it, an adapter is no plain update of "
                "weights; merge it into its base with peft (merge_and_unload), and name the merged model"
            )
    init = settings.init_lora_weights
    if isinstance(init, str) and init not in ("gaussian", "orthogonal", "eva", "mica"):
        raise HandoffError(
            f"{path}: init_lora_weights is {quoted(init)}, which changes the base's weights; merge the adapter into "
            "its base with peft (merge_and_unload), and name the merged model"
        )
    return settings


def _check_layer(file: Path, settings: AdapterSettings, layer: str, parts: dict[str, TensorInfo]) -> None:
    a, b = parts.get("lora_A.weight"), parts.get("lora_B.weight")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
        raise HandoffError(f"{file}: {quoted(layer)} has not the two matrices of an adapter; copy or download it again")
    r = settings.rank_pattern.get(_pattern(settings.rank_pattern, layer), settings.r)
    if a.shape[0] != r:
        raise HandoffError(
            f"{file}: {quoted(layer)} has rank {a.shape[0]}, {ADAPTER_CONFIG} says {r}: they are not of one adapter"
        )
    if settings.use_dora != ("lora_magnitude_vector" in parts):
        raise HandoffError(
            f"{file}: {quoted(layer)} {'lacks' if settings.use_dora else 'has'} the lengths of DoRA, and "
            f"{ADAPTER_CONFIG} says use_dora {str(settings.use_dora).lower()}: they are not of one adapter"
        )
