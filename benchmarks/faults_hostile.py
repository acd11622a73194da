"""The hostile parents of the fault campaign.

Each is a way in which a model directory from elsewhere tries to run a program, to read a file outside of itself, or to
hang the stage that opens it.
"""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

from handoff.weights import INDEX_NAME

WEIGHTS = "model.safetensors"


class _Touches:
    """Its pickle creates a file when it is read."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return os.mkdir, (str(self._mark),)


def _settings(folder: Path, name: str = "config.json", **keys: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_bytes()) | keys), encoding="utf-8")


def _pickled(folder: Path, mark: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Touches(mark)))


def _named_weights(folder: Path, mark: Path) -> None:
    (folder / "other.bin").write_bytes(pickle.dumps(_Touches(mark)))
    _settings(folder, transformers_weights="other.bin")


def _own_code(folder: Path, mark: Path) -> None:
    (folder / "code.py").write_text(f"import os\nos.mkdir({str(mark)!r})\n", encoding="utf-8")
    _settings(folder, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})


def _kernel(folder: Path, mark: Path) -> None:
    _settings(folder, _attn_implementation="org/kernel")


def _link_outside(folder: Path, mark: Path) -> None:
    outside = folder.with_name("outside.safetensors")
    (folder / WEIGHTS).rename(outside)
    (folder / WEIGHTS).symlink_to(outside)


def _index_outside(folder: Path, mark: Path) -> None:
    (folder / WEIGHTS).rename(folder.with_name("outside.safetensors"))
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../outside.safetensors"}}
    (folder / INDEX_NAME).write_text(json.dumps(index), encoding="utf-8")


def _pipe(folder: Path, mark: Path) -> None:
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")


def _nested(folder: Path, mark: Path) -> None:
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")


def _endless_template(folder: Path, mark: Path) -> None:
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abcd")
    (folder / "chat_template.jinja").write_text(loops + "{% endfor %}" * 4, encoding="utf-8")


HOSTILE: dict[str, Callable[[Path, Path], None]] = {
    "pickled weights": _pickled,
    "weights named in the settings": _named_weights,
    "code of its own": _own_code,
    "a kernel to download": _kernel,
    "a link out of the folder": _link_outside,
    "an index that leaves the folder": _index_outside,
    "a pipe in place of a file": _pipe,
    "deeply nested settings": _nested,
    "a template that does not end": _endless_template,
}
"""{what it does: changes a good directory; `mark` exists afterwards if a program of the directory was run}"""
