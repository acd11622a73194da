"""A model's window: the number of tokens that it was made to read at once, whatever its architecture calls it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handoff.files import read_json

# Names in config.json; the first that a configuration has counts, since models read the earlier ones. GPT-2 and GPT-J
# have n_positions beside an unread n_ctx, DBRX and MPT max_seq_len, Bloom and ChatGLM seq_length.
_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "n_ctx",
)
# Kinds of rotary scaling whose window, as published, is already the scaled one.
_SCALED = ("default", "longrope", "su", "llama3", "proportional")


@dataclass(frozen=True)
class Window:
    """A window and where it is written."""

    tokens: int
    key: str
    """The key in config.json."""


def window(config: Mapping[str, Any]) -> Window | None:
    """The window of a configuration, given as the content of config.json; None if the architecture has none.

    Rotary positions that are scaled (`linear`, `dynamic`, `yarn`) reach further than the number that is written.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return window(inner)
    key = next((key for key in _KEYS if isinstance(config.get(key), int) and config[key] > 0), None)
    if key is None:
        return None
    tokens: int = config[key]
    return Window(max(tokens, _scaled(config, tokens)), key)


def model_window(model_dir: Path) -> Window | None:
    """The window of the model in a directory."""
    return window(read_json(model_dir / "config.json", infinity=True))


def _scaled(config: Mapping[str, Any], tokens: int) -> int:
    """The window after the scaling of rotary positions, 0 if there is none."""
    scaling = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(scaling, Mapping):
        return 0
    # Architectures with several kinds of layers have the parameters of each kind; the widest are those of the model.
    kinds = [value for value in scaling.values() if isinstance(value, Mapping)] or [scaling]
    return max(_reach(kind, tokens) for kind in kinds)


def _reach(scaling: Mapping[str, Any], tokens: int) -> int:
    if scaling.get("rope_type", scaling.get("type", "default")) in _SCALED:
        return 0
    factor = scaling.get("factor")
    original = scaling.get("original_max_position_embeddings") or tokens
    return int(original * factor) if isinstance(factor, int | float) else 0
