"""Tools of the fault campaign: a pipeline whose stages take two seconds, its undisturbed result, stages as processes
that can be killed, and the bit-for-bit comparison of two stages' folders.

Also used by the tests of resuming.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from handoff.files import hash_tree
from training.recipe import load_recipe

NAME = "faults"
RECIPE = """
name: faults
output_root: {root}
seed: 7
stages:
  tokenizer:
    vocab_size: 600
    data: [{{source: world, kind: documents, size: 200}}, {{source: world, kind: chats, size: 200}}]
  pretrain:
    parent: tokenizer
    model:
      {{architecture: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}}
    data: [{{source: world, kind: documents, size: 100}}]
    eval_data: [{{source: world, kind: documents, size: 20, split: validation}}]
    block_size: 128
    train: {{optim: muon, learning_rate: 3.0e-3, max_steps: 24, global_batch_size: 8, per_device_train_batch_size: 4,
             logging_steps: 2, save_steps: 3}}
  sft:
    parent: pretrain
    data: [{{source: world, kind: chats, size: 80}}]
    eval_data: [{{source: world, kind: chats, size: 16, split: validation}}]
    eval_answers: 4
    max_new_tokens: 8
    max_length: 128
    train: {{learning_rate: 5.0e-3, max_steps: 24, global_batch_size: 8, per_device_train_batch_size: 4,
             logging_steps: 2, save_steps: 3, eval_steps: 8}}
  reward:
    stage: reward_model
    parent: sft
    data: &pairs [{{source: world, kind: preferences, size: 40}}]
    eval_data: &held_pairs [{{source: world, kind: preferences, size: 16, split: validation}}]
    max_length: 128
    train: &short {{learning_rate: 1.0e-3, max_steps: 12, global_batch_size: 8, per_device_train_batch_size: 4,
             logging_steps: 2, save_steps: 2}}
  dpo:
    parent: sft
    data: *pairs
    eval_data: *held_pairs
    eval_answers: 4
    max_new_tokens: 8
    max_length: 128
    train: *short
  ppo:
    parent: sft
    guards: &guards {{max_truncated: 1, max_without_signal: 1, patience: 100, entropy_floor: 0, keep: last}}
    reward: [{{model: reward}}, {{function: length_penalty, weight: 0.5, args: {{free: 8}}}}]
    data: &prompts [{{source: world, kind: prompts, size: 20}}]
    eval_data: &held [{{source: world, kind: prompts, size: 8, split: validation}}]
    train: {{iterations: 8, rollout_batch_size: 16, max_completion_length: 16, sample_iterations: 3, save_iterations: 2,
             learning_rate: 1.0e-3, critic_learning_rate: 1.0e-4, adam_epsilon: 1.0e-4, per_device_train_batch_size: 8,
             kl_controller: adaptive, kl_horizon: 200, sync_ref_model: true, ref_model_sync_steps: 3}}
  grpo:
    stage: ppo
    advantage: group
    parent: sft
    guards: *guards
    reward: [{{function: length_penalty, args: {{free: 4}}}}]
    data: *prompts
    eval_data: *held
    train: {{iterations: 10, rollout_batch_size: 16, num_generations: 4, max_completion_length: 16,
             sample_iterations: 4, save_iterations: 2, learning_rate: 1.0e-3, adam_epsilon: 1.0e-4,
             per_device_train_batch_size: 8, kl_in: loss, dynamic_sampling_rounds: 2}}
"""
SECTIONS = {
    "tokenizer": "tokenizer",
    "pretrain": "pretrain",
    "sft": "sft",
    "reward": "reward_model",
    "dpo": "dpo",
    "ppo": "ppo",
    "grpo": "ppo",
}
"""The sections in order, with the stage package of each."""
PARENTS = {
    "tokenizer": (),
    "pretrain": ("tokenizer",),
    "sft": ("pretrain",),
    "reward": ("sft",),
    "dpo": ("sft",),
    "ppo": ("sft", "reward"),
    "grpo": ("sft",),
}
IDLE, BUSY = 300.0, 900.0
"""A stage counts as hanging when it has used no processor time for IDLE seconds, or BUSY seconds of it in all."""


# ---- stages as processes


class Patience:
    """Tells a process that hangs from one that is slow, by its processor time, whatever the load of the machine."""

    def __init__(self, pid: int, idle: float = IDLE, busy: float = BUSY) -> None:
        self._pid, self._idle, self._busy = pid, idle, busy
        self._used, self._since = 0.0, time.monotonic()

    def hung(self) -> bool:
        """Whether the process has hung until now; False once it has ended."""
        try:
            times = psutil.Process(self._pid).cpu_times()
        except psutil.NoSuchProcess:
            return False
        used, now = times.user + times.system, time.monotonic()
        if used - self._used > 0.05:
            self._used, self._since = used, now
        return used > self._busy or now - self._since > self._idle


class Child:
    """A process that runs one stage as `python -m stages.<stage> <recipe> ...` would, forked from a server that has
    already imported everything."""

    def __init__(self, stage: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str] = {}) -> None:
        """`log` receives its output."""
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["baton.preload"])
        self.log = log
        self._process = context.Process(target=_stage, args=(stage, list(arguments), str(log), dict(environment)))
        self.began = time.monotonic()
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid
        self.patience = Patience(self.pid)

    @property
    def running(self) -> bool:
        """Whether it is still running."""
        return self._process.is_alive()

    def send(self, signum: int) -> None:
        """Sends a signal, unless it has ended."""
        if self._process.is_alive():
            os.kill(self.pid, signum)

    def wait(self) -> int:
        """Waits for its exit code, negative for a signal. A hanging process is killed.

        Raises:
            TimeoutError: it hung.
        """
        while self._process.exitcode is None:
            self._process.join(1.0)
            if self._process.exitcode is None and self.patience.hung():
                self._process.kill()
                self._process.join()
                raise TimeoutError("it hung")
        return self._process.exitcode

    def kill(self) -> None:
        """Sends SIGKILL and waits for its end."""
        self.send(signal.SIGKILL)
        self.wait()

    def said(self) -> str:
        """What it has printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _stage(stage: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Runs the stage in the forked process."""
    os.setsid()
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))  # the server's OpenMP has read the variable already
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    import_module("training.run").main(stage, arguments)


# ---- the pipeline, undisturbed


@dataclass
class Scene:
    """The recipe, and each section's undisturbed result."""

    folder: Path
    recipe: Path
    seconds: dict[str, float]
    """Seconds of each section's process."""

    @property
    def reference(self) -> Path:
        """The run's folder."""
        return self.folder / "reference" / NAME

    def child(self, root: Path, section: str, log: Path, *overrides: str, **environment: str) -> Child:
        """Starts a section in a copy below `root`; what it prints is added to `log`."""
        arguments = [str(self.recipe), "--section", section, f"output_root={root}", *overrides]
        return Child(SECTIONS[section], arguments, log, environment)

    def copy(self, root: Path, section: str) -> Path:
        """A run's folder below `root` with copies of the section's published ancestors, which may be damaged."""
        run = root / NAME
        run.mkdir(parents=True)
        for name in ancestors(section):
            shutil.copytree(self.reference / name, run / name)
        return run


def ancestors(section: str) -> list[str]:
    """The sections that must exist before this one, in order."""
    found = {name for parent in PARENTS[section] for name in (*ancestors(parent), parent)}
    return [name for name in SECTIONS if name in found]


def prepare(folder: Path, sections: Sequence[str] = tuple(SECTIONS)) -> Scene:
    """Runs the pipeline once.

    Raises:
        RuntimeError: a section failed; the message has its output.
    """
    recipe = folder / "faults.yaml"
    recipe.write_text(RECIPE.format(root=folder / "reference"), encoding="utf-8")
    load_recipe(recipe)
    scene = Scene(folder, recipe, {})
    scene.reference.parent.mkdir()
    for section in sections:
        child = scene.child(scene.reference.parent, section, folder / "reference.log")
        code = child.wait()
        if code:
            raise RuntimeError(f"{section} ended with {code}:\n{child.said()[-4000:]}")
        scene.seconds[section] = time.monotonic() - child.began
    return scene


# ---- comparing


def metrics_of(stage: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without values that depend on the clock."""
    lines = (json.loads(line) for line in (stage / "metrics.jsonl").open("rb"))
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def differences(stage: Path, reference: Path, *, same_states: bool = True) -> list[str]:
    """Descriptions of all unexpected differences between two folders of a stage: published files, lines of metrics and
    samples, and tensors and values of the saved states.

    `same_states`: the same steps must have a state. Not so after a preemption, which saves at the step of the signal.
    """
    found = []
    if not (stage / "stage.json").exists():
        return ["it is not published"]
    ours, theirs = hash_tree(stage / "model"), hash_tree(reference / "model")
    found += [f"model/{name} differs" for name in sorted({name for name, _ in ours.items() ^ theirs.items()})]
    mine, other = metrics_of(stage), metrics_of(reference)
    if mine != other:
        at = next((n for n, (a, b) in enumerate(zip(mine, other)) if a != b), min(len(mine), len(other)))
        found.append(f"metrics.jsonl differs from line {at + 1} on ({len(mine)} lines, {len(other)} in the reference)")
    samples = [path / "samples.jsonl" for path in (stage, reference)]
    said, expected = (path.read_bytes() if path.exists() else b"" for path in samples)
    if said != expected:
        found.append("samples.jsonl differs")
    here, there = ({path.name: path for path in (folder / "state").glob("step-*")} for folder in (stage, reference))
    if same_states and here.keys() != there.keys():
        found.append(f"states {sorted(here)} instead of {sorted(there)}")
    for name in sorted(here.keys() & there.keys()):
        found += state_differences(here[name], there[name])
    left = [path.name for path in stage.rglob(".*") if path.name != ".lock" and path.is_file()]
    return found + [f"{name} was left behind" for name in left]


def state_differences(state: Path, reference: Path) -> list[str]:
    """Descriptions of the tensors and values in which two saved states differ, and of parts that only one has.

    The number of threads that a state names is not compared.
    """
    parts, expected = hash_tree(state).keys(), hash_tree(reference).keys()
    found = [f"state {state.name}: only one has {name}" for name in sorted(parts ^ expected)]
    for name in sorted(parts & expected):
        ours, theirs = _content(state / name), _content(reference / name)
        unequal = [place for place in _unequal(ours, theirs, "") if place != "/engine/threads"]
        found += [f"state {state.name}, {name}: {place}" for place in unequal]
    return found


def _content(path: Path) -> Any:
    """The content of a part of a state; None for an unknown kind of file."""
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=False)
    if path.suffix == ".json":
        content = json.loads(path.read_bytes())
        if path.name == "state.json":
            # The rest are hashes of parts; `journals` are hashes of lines, which have times.
            return {key: value for key, value in content["extra"].items() if key != "journals"}
        return content
    return None


def _unequal(a: Any, b: Any, place: str) -> Iterator[str]:
    """Places where two nested values differ, except times."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield place
    elif isinstance(a, dict) and isinstance(b, dict):
        if a.keys() != b.keys():
            yield f"{place}: keys"
        for key in a.keys() & b.keys():
            if not str(key).startswith("time/"):
                yield from _unequal(a[key], b[key], f"{place}/{key}")
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b)):
            yield from _unequal(x, y, f"{place}/{index}")
    elif type(a) is not type(b) or str(a) != str(b):  # numpy arrays and NaN are compared by their text
        yield place
