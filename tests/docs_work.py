"""A working folder in which the commands of the documentation run as they are printed, in seconds each.

It has the Makefile, the recipes and a `.venv` whose programs are this Python's. `recipes/tiny.yaml` is there under its
own name with less data, a smaller model and fewer steps.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from training.recipe_text import read_document

_COPIED = ("Makefile", "pyproject.toml", "requirements.lock", "recipes")
_PROGRAMS = {"baton": "-m baton", "python": "", "accelerate": "-m accelerate.commands.launch"}
_SIZES = {"documents": 200, "chats": 300, "preferences": 64, "prompts": 26}
_KEYS: dict[str, Any] = {
    "vocab_size": 600,
    "max_steps": 10,
    "max_new_tokens": 12,
    "hidden_size": 32,
    "head_dim": 8,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "rollout_batch_size": 16,
    "num_generations": 4,
    "max_completion_length": 12,
}
_ITERATIONS = {"ppo": 30, "grpo": 2, "rloo": 2}
"""Those of PPO stay what they are: the documentation takes its last one again."""


def make_folder(root: Path, folder: Path) -> None:
    """Fills `folder` from the repository at `root`."""
    for name in _COPIED:
        copy = shutil.copytree if (root / name).is_dir() else shutil.copyfile
        copy(root / name, folder / name)
    tiny = folder / "recipes" / "tiny.yaml"
    tiny.write_text(yaml.safe_dump(shrunk(read_yaml(tiny.read_text(encoding="utf-8"))), sort_keys=False))
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, arguments in _PROGRAMS.items():
        program = programs / name
        path = f'PYTHONPATH="${{PYTHONPATH:+$PYTHONPATH:}}{root}"'
        program.write_text(f'#!/bin/sh\n{path} exec "{sys.executable}" {arguments} "$@"\n')
        program.chmod(0o755)
    (folder / ".venv" / ".ready").touch()  # newer than the lock file: `make setup` has nothing to do


def read_yaml(text: str) -> Any:
    """Text as recipes are read, where `on` and `yes` are words. Raises ValueError with what is wrong with it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "text.yaml"
        path.write_text(text, encoding="utf-8")
        document = read_document(path)
    if document.problems:
        raise ValueError("; ".join(str(problem).removeprefix(f"{path}:") for problem in document.problems))
    return document.value


def shrunk(recipe: dict[str, Any]) -> dict[str, Any]:
    """The tiny recipe with the same sections, of a size that trains in a second each. Gates and guards demand nothing:
    such models learn nothing worth a gate."""
    small: dict[str, Any] = _smaller(recipe)
    for name, section in small["stages"].items():
        section.pop("gate", None)
        if name in _ITERATIONS:
            section["guards"] = {"probe_prompts": 0, "patience": 100}
            section["train"] |= {"iterations": _ITERATIONS[name], "sample_iterations": 30}
        elif "num_train_epochs" in section.get("train", {}):
            section["train"].pop("num_train_epochs")
            section["train"]["max_steps"] = _KEYS["max_steps"]
        elif section.get("stage", name) in ("reward_model", "dpo"):
            section["train"]["max_steps"] = 4
    return small


def _smaller(value: Any) -> Any:
    if isinstance(value, list):
        return [_smaller(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    out = {key: _KEYS.get(key, _smaller(inner)) for key, inner in value.items()}
    if out.get("source") == "world":
        out["size"] = _SIZES[out["kind"]]
    return out


def run(command: str, folder: Path, root: Path, seconds: float) -> subprocess.CompletedProcess[str]:
    """A shell command in the folder, with nothing on its standard input; `stdout` has both outputs.

    Raises TimeoutExpired when it takes longer than so many seconds.
    """
    environment: Mapping[str, str] = {
        **os.environ,
        "PATH": f"{folder / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # models of this size gain nothing from a second thread
    }
    with subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as started:
        try:
            output, _ = started.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGTERM)  # the runner, which ends its stage
            raise
    return subprocess.CompletedProcess(command, started.returncode, output)
