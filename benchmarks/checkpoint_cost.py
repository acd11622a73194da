"""The cost of resumable states: seconds per save and per resumption, and their share of the training time.

    python -m benchmarks.checkpoint_cost [--json FILE] [--sections pretrain sft ...] [--sizes 5M 25M 100M] [--threads N]

The first table runs a few steps of each section of recipes/tiny.yaml. From the seconds per step and per save it
computes the share of a whole training at the recipe's own interval (a tenth of the run). The limit is 3 %, given as
`peer`. A resumption is timed by the steps in which it differs from a first start: finding, checking and loading the
state.

The second table shows the growth with the model: PPO without a critic at the sizes in benchmarks/rl_setup.py. Ours
writes the parts, hashes them, flushes them to the disk (fsync) and renames; resuming hashes them again before loading.
`peer` is the common practice: torch.save and torch.load of the same weights and moments. The ratio shows the cost of
the promises in docs/reliability.md; it is below 1 where ours is slower.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.rl_setup import SIZES, make, recipe
from benchmarks.table import Row, report
from handoff import state as handoff_state
from handoff.files import fsync_tree, sha256_file, tree_bytes
from stages.ppo.config import PPOTrainConfig
from stages.ppo.saves import Saves
from training.callbacks import FlowCallback
from training.engines import files
from training.recipe import Recipe, load_recipe
from training.run import run_section
from training.saving import SavedStates

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.03
"""Limit on the share of training time that saving may take."""
SECTIONS = ("pretrain", "sft", "reward", "dpo", "ppo", "grpo")
GROWTH = ("5M", "25M", "100M")
_STEPS, _EVERY = 24, 6  # steps of a Trainer-based section, and steps between its saves
_ITERATIONS = 4  # iterations of reinforcement learning, each saved except the last


@dataclass
class Clock:
    """Records when steps ended, and the time spent on states between them."""

    steps: list[float] = field(default_factory=list)
    spent: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """{what: (begin, end) of each call}."""

    def seconds(self, what: str) -> float:
        """Median seconds of a call; 0 if there was none."""
        return statistics.median([end - begin for begin, end in self.spent.get(what, [])] or [0.0])

    def total(self, what: str) -> float:
        """Of all calls."""
        return sum(end - begin for begin, end in self.spent.get(what, []))

    def step(self) -> float:
        """Median seconds of a step without saves; the first step is a warm-up and does not count."""
        saves = self.spent.get("save", [])
        spans = [
            end - begin - sum(b - a for a, b in saves if begin <= a and b <= end)
            for begin, end in zip(self.steps[1:], self.steps[2:], strict=False)
        ]
        return statistics.median(spans)


class _Interrupted(BaseException):
    """Ends a section before it publishes, so that it can be resumed."""


@contextmanager
def watched(clock: Clock, last: int) -> Iterator[None]:
    """Times all operations on states, and interrupts the section after step `last`."""

    def timed(what: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begin = time.perf_counter()
            try:
                return method(*args, **kwargs)
            finally:
                clock.spent.setdefault(what, []).append((begin, time.perf_counter()))

        return call

    def marks(method: Callable[..., Any], step_of: Callable[..., int]) -> Callable[..., Any]:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            clock.steps.append(time.perf_counter())
            if step_of(*args) == last:
                raise _Interrupted
            return method(self, *args, **kwargs)

        return call

    with (
        patch.object(SavedStates, "save", timed("save", SavedStates.save)),
        patch.object(SavedStates, "newest", timed("find", SavedStates.newest)),
        patch.object(files, "save_state", timed("write", files.save_state)),
        patch.object(files, "load_state", timed("load", files.load_state)),
        patch.object(handoff_state, "sha256_file", timed("hash", sha256_file)),
        patch.object(handoff_state, "fsync_tree", timed("fsync", fsync_tree)),
        patch.object(FlowCallback, "on_step_end", marks(FlowCallback.on_step_end, lambda a, s, *_: s.global_step)),
        patch.object(Saves, "after_iteration", marks(Saves.after_iteration, lambda at, *_: at.iteration)),
    ):
        yield


def interrupted(recipe: Recipe, section: str, last: int) -> Clock:
    """Starts a section and interrupts it after step `last`."""
    clock = Clock()
    try:
        with watched(clock, last):
            quietly(recipe, section)
    except _Interrupted:
        return clock
    raise AssertionError(f"{section} ended before step {last}")


def quietly(recipe: Recipe, section: str) -> None:
    """Runs a section without its output."""
    with redirect_stdout(io.StringIO()):
        run_section(recipe, section)


# ---- the tiny recipe


def shares(path: Path, names: Sequence[str]) -> list[Row]:
    """A row for each section. Its parents train for only a few steps, since speed does not depend on their quality."""
    whole = load_recipe(ROOT / "recipes" / "tiny.yaml")
    tokenizer, *needed = whole.order(names)
    parents = {ref for name in needed for ref in whole.needs(name)}
    keys = [f"output_root={path}"]
    for name in needed:
        reinforcement = isinstance(whole.sections[name].config.train, PPOTrainConfig)
        if reinforcement:
            keys += [f"{name}.train.iterations={_ITERATIONS}", f"{name}.train.save_iterations=1"]
            keys += [f"{name}.guards={{max_truncated: 1, max_without_signal: 1, patience: 100, keep: last}}"]
        else:
            keys += [f"{name}.train.max_steps={_STEPS}", f"{name}.train.save_steps={_EVERY}"]
    keys += ["reward.gate={}"]
    short = load_recipe(whole.path, keys)
    print(f"{'section':<12}{'step':>9}{'save':>9}{'resume':>9}{'state':>10}{'every':>7}{'share':>9}")
    rows = []
    quietly(short, tokenizer)
    for name in needed:
        reinforcement = isinstance(whole.sections[name].config.train, PPOTrainConfig)
        last = _ITERATIONS - 1 if reinforcement else _STEPS - 1
        first = interrupted(short, name, last)
        again = interrupted(short, name, last)
        if name in parents:
            quietly(short, name)
        if name not in names:
            continue
        every = interval(whole, name)
        share = first.seconds("save") / (every * first.step() + first.seconds("save"))
        size = tree_bytes(newest(short.run_dir / name / "state"))
        resume = again.total("find") + again.total("load")
        print(
            f"{name:<12}{first.step():>8.3f}s{first.seconds('save'):>8.3f}s{resume:>8.3f}s{size / 1e6:>7.1f} MB"
            f"{every:>7.1f}{share:>9.2%}",
            flush=True,
        )
        rows.append(
            Row(row=f"checkpoint_{name}", ours=100 * share, peer=100 * LIMIT, unit="% of time", ratio=LIMIT / share)
        )
    return rows


def interval(recipe: Recipe, name: str) -> float:
    """Steps per save at the recipe's own settings. In reinforcement learning every evaluation may add a save."""
    config = recipe.sections[name].config
    if isinstance(config.train, PPOTrainConfig):
        every = config.train.save_iterations or max(1, config.train.iterations // 10)
        return 1 / (1 / every + 1 / config.train.sample_iterations)
    rows = sum(source.size for source in config.data)
    steps = config.train.max_steps if config.train.max_steps > 0 else rows / config.train.global_batch_size
    return float(config.train.save_steps or steps / 10)


def newest(states: Path) -> Path:
    """The folder of the newest state."""
    return max(states.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


# ---- growth


def growth(folder: Path, size: str) -> list[Row]:
    """Two rows for a model: saving and resuming, in MB of state per second."""
    material = make(folder, size, (16, 16), 64, 0.0)
    section = {
        "advantage": "group",
        "reward": [{"function": "benchmarks.rl_setup:score"}],
        "guards": {"probe_prompts": 0, "patience": 10**6, "keep": "last"},
        "train": {
            "iterations": _ITERATIONS + 1,
            "rollout_batch_size": 4,
            "num_generations": 2,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "max_completion_length": 8,
            "learning_rate": 1e-6,
            "save_iterations": 1,
        },
    }
    short = load_recipe(recipe(folder, material, section))
    first = interrupted(short, "rl", _ITERATIONS)
    again = interrupted(short, "rl", _ITERATIONS)
    state = newest(short.run_dir / "rl" / "state")
    size_mb = tree_bytes(state) / 1e6
    saved, resumed = first.seconds("save"), again.total("find") + again.total("load")
    plain_saved, plain_loaded = plainly(state, folder / "plain.pt")
    whole = first.total("save")
    parts = "  ".join(f"{what} {first.total(what) / whole:.0%}" for what in ("write", "hash", "fsync"))
    print(
        f"{size:<12}{size_mb:>7.0f} MB{saved:>9.2f}s{resumed:>9.2f}s"
        f"{plain_saved:>12.2f}s{plain_loaded:>9.2f}s  {parts}",
        flush=True,
    )
    return [
        Row(row=f"checkpoint_save_{size}", ours=size_mb / saved, peer=size_mb / plain_saved, unit="MB/s",
            ratio=plain_saved / saved),
        Row(row=f"checkpoint_resume_{size}", ours=size_mb / resumed, peer=size_mb / plain_loaded, unit="MB/s",
            ratio=plain_loaded / resumed),
    ]  # fmt: skip


def plainly(state: Path, path: Path, turns: int = 3) -> tuple[float, float]:
    """Median seconds of torch.save and of torch.load of a state's content."""
    from safetensors.torch import load_file

    content = {part.name: load_file(part) for part in sorted(state.glob("*.safetensors"))}
    spans = []
    for _ in range(turns):
        begin = time.perf_counter()
        torch.save(content, path)
        middle = time.perf_counter()
        torch.load(path, weights_only=True)
        spans.append((middle - begin, time.perf_counter() - middle))
    path.unlink()
    return statistics.median(a for a, _ in spans), statistics.median(b for _, b in spans)


def main(
    path: Path | None,
    sections: Sequence[str] = SECTIONS,
    sizes: Sequence[str] = GROWTH,
    threads: int | None = None,
) -> None:
    """Prints both tables, and writes the rows to `path`."""
    torch.set_num_threads(threads or len(os.sched_getaffinity(0)))
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-") as name:
        rows += shares(Path(name) / "tiny", sections) if sections else []
    if sizes:
        print(f"\n{'model':<12}{'state':>10}{'save':>10}{'resume':>10}{'torch.save':>13}{'load':>10}  of a save")
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="benchmark-checkpoint-") as name:
            rows += growth(Path(name), size)
    print()
    report(rows, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sections", nargs="*", choices=SECTIONS, default=list(SECTIONS), help="of the tiny recipe")
    parser.add_argument("--sizes", nargs="*", choices=tuple(SIZES), default=list(GROWTH), help="models")
    parser.add_argument("--threads", type=int, help="by default one for each core")
    options = parser.parse_args()
    main(options.json, options.sections, options.sizes, options.threads)
