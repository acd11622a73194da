"""Tiny model directories for the tests of handoff/: a few hundred bytes each, in the layout of the hub, no torch.

Special tokens have the first ids, then follow `a b c d`. A test overwrites the files that it needs to differ.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from handoff.manifest import EngineRecord, Inputs, Manifest
from handoff.stage import StageDir

SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|reserved_0|>")
TEMPLATE = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
ENGINE = EngineRecord(name="single")


def write_tokenizer(
    directory: Path,
    special: Sequence[str] = SPECIAL,
    *,
    bos: str | None = "<|bos|>",
    eos: str | None = "<|eos|>",
    pad: str | None = "<|pad|>",
    template: str | None = TEMPLATE,
) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    words = {word: len(special) + n for n, word in enumerate("abcd")}
    added = [{"id": n, "content": text, "special": True} for n, text in enumerate(special)]
    write(directory / "tokenizer.json", {"added_tokens": added, "model": {"type": "BPE", "vocab": words, "merges": []}})
    named = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    write(directory / "tokenizer_config.json", {key: value for key, value in named.items() if value is not None})
    if template is not None:
        (directory / "chat_template.jinja").write_text(template)


def write_model(
    directory: Path,
    *,
    rows: int = 11,
    value: float = 1.0,
    stops: Any = (1, 5),
    architecture: str = "LlamaForCausalLM",
    **tokenizer: Any,
) -> None:
    """A causal language model with one tensor. `stops` None: without generation_config.json."""
    write_tokenizer(directory, **tokenizer)
    write(directory / "config.json", {"architectures": [architecture], "vocab_size": rows})
    if stops is not None:
        write(
            directory / "generation_config.json", {"eos_token_id": list(stops) if isinstance(stops, tuple) else stops}
        )
    save_file({"model.embed_tokens.weight": np.full((rows, 2), value, np.float32)}, directory / "model.safetensors")


def write_rows(directory: Path, *, value: float = 1.0, rows: int = 2) -> None:
    """What a stage that publishes rows writes."""
    lines = [json.dumps({"prompt": str(n), "completion": str(value)}) for n in range(rows)]
    (directory / "rows.jsonl").write_text("".join(f"{line}\n" for line in lines))


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def inputs(**recipe: Any) -> Inputs:
    return Inputs(recipe={"stage": "sft", **recipe}, parents={}, data={}, code="code", seed=1)


def publish(stage: StageDir, write_files: Any = write_model, given: Inputs | None = None, **fields: Any) -> Manifest:
    """`publish` with default fields that no test reads."""
    defaults: dict[str, Any] = {
        "name": stage.path.name,
        "stage": "sft",
        "kind": "causal_lm",
        "inputs": inputs() if given is None else given,
        "parents": {},
        "recipe": {},
        "data": {},
        "seed": 1,
        "engine": ENGINE,
        "versions": {},
        "metrics": {},
    }
    return stage.publish(write_files, **{**defaults, **fields})


def published(path: Path, write_files: Any = write_model, **fields: Any) -> StageDir:
    """Publishes a stage at `path` and closes it."""
    stage = StageDir(path)
    stage.begin(inputs())
    try:
        publish(stage, write_files, **fields)
    finally:
        stage.close()
    return stage
