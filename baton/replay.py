"""`baton replay`: repeats one training step of a run and compares it with the line that the run logged.

The stage's own code runs from the newest whole state before the step, in a copy of the stage's directory beside the
run. The copy has hard links to the states, copies of the logged lines, and symbolic links to the other stages. The
replay ends when it has logged the line, so it publishes nothing. It does not change the run's directory; the encoded
rows are shared with the run, and if the encoding has changed, new rows are added there.

A stage with a Trainer logs averages over `train.logging_steps`, so the step belongs to the first line at or after it. A
state saved between two lines includes the sums for the next one.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from handoff.errors import UserError
from handoff.files import check_writable, read_json, write_json
from handoff.journal import Journal
from handoff.manifest import EngineRecord, Inputs
from handoff.parent import HASH_CACHE
from handoff.stage import StageDir
from handoff.state import State, StateStore
from training.config import TrainConfig
from training.engines.protocol import Engine
from training.inputs import stage_inputs
from training.recipe import Recipe, Section, load_recipe
from training.registry import Registry
from training.run import ROWS, Run, run_section
from training.signals import Signals

# Another engine or number of processes adds the same numbers in another order.
_TOLERANCE = 1e-4
_MOST = 12


@dataclass(frozen=True)
class Replayed:
    """A repeated step."""

    section: str
    step: int
    line: int
    """Step of the logged line that includes it."""
    state: int
    """Step of the state from which the replay started."""
    logged: dict[str, float]
    again: dict[str, float]
    """Empty if the stage ended before the line."""
    elsewhere: bool
    """Whether the state was saved by another engine, number of processes or kind of device than the replay used."""
    changes: list[str]
    """What has changed since the run, among the things that the stage's result depends on."""

    @property
    def agrees(self) -> bool:
        """Whether the values are equal: to the last bit, or to 1e-4 if `elsewhere`."""
        if self.elsewhere and self.again.keys() == self.logged.keys():
            return all(
                math.isclose(value, self.again[key], rel_tol=_TOLERANCE, abs_tol=_TOLERANCE)
                for key, value in self.logged.items()
            )
        return self.again == self.logged

    def told(self) -> str:
        """The text for the terminal."""
        lines = [f"  {self.section}, step {self.step}: taken again from the state of step {self.state}"]
        if self.line != self.step:
            lines.append(f"  it is in the line of step {self.line}, whose loss is an average")
        lines += [f"  note: {change}" for change in self.changes]
        lines += [
            f"    {key:<16} logged {value!r:<24} again {self.again.get(key, 'nothing')!r}"
            for key, value in self.logged.items()
        ]
        exact = not self.elsewhere or self.again == self.logged
        where = "to the last bit" if exact else "to 1e-4, on another engine than the run's"
        lines.append(f"  equal {where}" if self.agrees else f"  not equal {where}")
        return "\n".join(lines)


class _LineCame(Exception):
    """Ends the replay: the stage has logged the line."""

    def __init__(self, metrics: dict[str, Any]) -> None:
        super().__init__()
        self.metrics = metrics


class _Replay(Run):
    """A run that ends when it logs the line of step `line` or the first one after it that has the metric `key`."""

    def __init__(self, line: int, key: str, recipe: Recipe, name: str, signals: Signals, engine: Engine) -> None:
        super().__init__(recipe, name, signals, engine)
        self._line, self._key = line, key

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Logs as in a run; raises _LineCame after that line."""
        super().log(step, metrics)
        if step >= self._line and self._key in metrics:
            raise _LineCame(metrics)


def replay_step(run_dir: Path, name: str, step: int) -> Replayed:
    """Repeats step `step` (counted from 1) of section `name`, on one process.

    Raises:
        UserError: no such section or line, no whole state before the step, a stage without steps, or a section,
            parents or data that have changed since the run.
        GateError: the stage fails a check before the line.
        Stopped: a signal ended the replay.
    """
    original = StageDir(run_dir / name)
    if not original.started_path.is_file():
        begun = sorted(path.parent.name for path in run_dir.glob("*/started.json"))
        raise UserError(f"{original.path}: no such stage; {run_dir} has {', '.join(begun) or 'none'}")
    origin = original.origin()
    if not origin:
        raise UserError(f"{original.started_path} does not say from which recipe the stage was begun; run it again")
    recipe = load_recipe(Path(origin["recipe"]), origin["overrides"], section=name)
    section = recipe.section(name)
    keys = Registry().declaration(section.stage).compared
    if not keys:
        raise UserError(f"{original.path}: the stage {section.stage} has no steps to take again")
    if section.config.training() is not None:  # the run has already sent these lines to its trackers
        recipe = load_recipe(recipe.path, [*recipe.overrides, f"{name}.train.report_to=none"], section=name)
        section = recipe.section(name)
    line, last, state = _choose(original, keys[0], step)
    recipe = _with_lines_as_logged(recipe, section, line["step"], last)
    logged = {key: line[key] for key in keys if key in line}
    check_writable(run_dir.absolute().parent)
    with tempfile.TemporaryDirectory(prefix=".replay-", dir=run_dir.absolute().parent) as folder:
        copied = replace(recipe, output_root=Path(folder))
        _copy(run_dir.absolute(), copied.run_dir, name, state)
        inputs = stage_inputs(copied, name)
        changes = _changes(original, inputs)
        started = {**read_json(original.started_path), "inputs": inputs.model_dump(mode="json")}
        write_json(StageDir(copied.run_dir / name).started_path, started)
        again: dict[str, Any] = {}
        try:
            run_section(copied, name, partial(_Replay, line["step"], keys[0]))
        except _LineCame as came:
            again = json.loads(json.dumps(came.metrics))
    return Replayed(
        section=name,
        step=step,
        line=line["step"],
        state=state.step,
        logged=logged,
        again={key: again[key] for key in keys if key in again},
        elsewhere=_elsewhere(state),
        changes=changes,
    )


def _choose(original: StageDir, key: str, step: int) -> tuple[dict[str, Any], int, State]:
    """The logged line that includes the step, the step of the line before it (0: none), and the state to start from.
    Raises UserError if line or state is missing."""
    lines = [line for line in Journal(original.metrics_path).lines() if key in line]
    store = StateStore(original.state_dir)
    there = f"steps with a line: {_listed([line['step'] for line in lines])}; states: {_listed(store.steps())}"
    line = next((line for line in lines if line["step"] >= step), None)
    if line is None:
        raise UserError(f"{original.path}: metrics.jsonl has no line of step {step} or after it ({there})")
    state = store.before(step)
    if state is None:
        raise UserError(
            f"{original.path}: no whole state is left from before step {step} ({there}); a step can be taken again "
            "from a state of an earlier one, and train.save_total_limit says how many are kept"
        )
    last = max((other["step"] for other in lines if other["step"] < line["step"]), default=0)
    return line, last, state


def _with_lines_as_logged(recipe: Recipe, section: Section, line: int, last: int) -> Recipe:
    """The recipe with the `train.logging_steps` that the run had between the lines of steps `last` and `line`; it may
    have been changed since then, or in an interruption."""
    train = next((value for _, value in section.config if isinstance(value, TrainConfig)), None)
    every = line - last
    if train is None or last == (line - 1) // train.logging_steps * train.logging_steps or last % every:
        return recipe
    return load_recipe(
        recipe.path, [*recipe.overrides, f"{section.name}.train.logging_steps={every}"], section=section.name
    )


def _listed(steps: Sequence[int]) -> str:
    shown = [str(step) for step in steps]
    if len(shown) > _MOST:
        shown = [*shown[: _MOST // 2], "...", *shown[-_MOST // 2 :]]
    return ", ".join(shown) or "none"


def _changes(original: StageDir, now: Inputs) -> list[str]:
    """Notes on changed code. Raises UserError if anything else changed: the step would not be the same one."""
    begun = original.started_inputs()
    if begun is None:
        raise UserError(f"{original.started_path} cannot be read; restore it, or run the stage again")
    if now.continues(begun):
        return []
    if now.model_copy(update={"code": begun.code, "functions": begun.functions}).continues(begun):
        changed = [f"stages/{now.recipe['stage']}"] if now.code != begun.code else []
        changed += [name for name in now.functions if now.functions[name] != begun.functions.get(name)]
        return [f"the code of {name} is not that of the run any more" for name in changed]
    raise UserError(
        f"{original.path}: its step cannot be taken again, since this has changed: {'; '.join(now.differences(begun))}"
    )


def _copy(run_dir: Path, copied: Path, name: str, state: State) -> None:
    """Copies the stage up to `state`, without its published files, and links the other stages."""
    copied.mkdir()
    for other in run_dir.iterdir():
        if other.name != name and (other / "started.json").is_file():
            (copied / other.name).symlink_to(other)
    if (run_dir.parent / ROWS).is_dir():
        (copied.parent / ROWS).symlink_to(run_dir.parent / ROWS)
    if (run_dir / HASH_CACHE).is_file():
        shutil.copyfile(run_dir / HASH_CACHE, copied / HASH_CACHE)
    stage, ours = StageDir(run_dir / name), StageDir(copied / name)
    ours.state_dir.mkdir(parents=True)
    for path in (stage.metrics_path, stage.samples_path):
        if path.is_file():
            shutil.copyfile(path, ours.path / path.name)
    # Earlier states are needed too: reinforcement learning may return to the state of its best policy.
    earlier = {f"step-{step}" for step in StateStore(stage.state_dir).steps() if step <= state.step}
    for path in stage.state_dir.iterdir():
        if path.name in earlier or path == state.path:
            shutil.copytree(path, ours.state_dir / path.name, copy_function=_link)
        elif not path.name.startswith((".", "step-")):  # other files that the stage keeps beside its states
            shutil.copytree(path, ours.state_dir / path.name)


def _link(source: str, target: str) -> None:
    """Hard-links a file, which is safe because a committed state is never written to."""
    try:
        Path(target).hardlink_to(source)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _elsewhere(state: State) -> bool:
    from training import engines

    return EngineRecord(**state.extra["engine"]) != engines.current().record()
