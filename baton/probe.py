"""Measures what a section takes: its first steps on its longest rows, by the stage's own code, in a child process.

    python -m baton.probe RECIPE SECTION FOLDER [KEY=VALUE]...      (started by `baton plan --probe`, not by hand)

The child works in a copy of the run's directory that links the finished sections, so that it changes nothing there. It
takes three steps, evaluates before and after them, saves a state, and ends where the section would be published. On a
CPU the peak is that of the resident memory above its level after the imports, on a GPU that of torch's allocator.
"""

import importlib
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from baton.plan import Plan, PlannedSection
from handoff.errors import UserError
from handoff.files import check_writable
from training import engines
from training.engines.protocol import Engine
from training.recipe import Recipe, load_recipe
from training.run import ROWS, Run, run_section
from training.signals import Signals

STEPS = 3
_PEAK = "peak"


class _Seen(Exception):
    """Ends the probe: the section would be published now."""

    def __init__(self, peak: float) -> None:
        super().__init__()
        self.peak = peak


class _Probe(Run):
    """A run that begins with its longest rows and publishes nothing."""

    tries_longest = True

    def __init__(self, before: int, recipe: Recipe, name: str, signals: Signals, engine: Engine) -> None:
        super().__init__(recipe, name, signals, engine)
        self._before = before

    def publish(self, *args: Any, **kwargs: Any) -> None:
        """Ends the probe. Every process calls it."""
        (peak,) = self.engine.largest(float(self.engine.peak() - self._before))
        raise _Seen(peak)


def probed(plan: Plan, launch: Path | None) -> Plan:
    """The plan, corrected by the measured peak of every section that trains and whose parents are published; the others
    are named. Raises UserError as `probe`."""
    sections = []
    for section in plan.sections:
        missing = _missing(plan.recipe, section)
        if not section.work.step_keys:
            sections.append(section)
        elif missing:
            print(f"{section.name} is not probed: {missing[0]} is not published yet", file=sys.stderr)
            sections.append(section)
        else:
            sections.append(section.probed(probe(plan.recipe, section, launch)))
    return replace(plan, sections=sections)


def _missing(recipe: Recipe, section: PlannedSection) -> list[str]:
    """The section's parents that are not published."""
    return [name for name in recipe.needs(section.name) if not (recipe.run_dir / name / "stage.json").is_file()]


def probe(recipe: Recipe, section: PlannedSection, launch: Path | None) -> float:
    """The peak of a section, in bytes of the process that takes most.

    Raises:
        UserError: the section fails; the message has the end of its output.
    """
    run_dir = recipe.run_dir.absolute()
    check_writable(run_dir.parent)
    with tempfile.TemporaryDirectory(prefix=".probe-", dir=_existing(run_dir.parent)) as name:
        folder = Path(name)
        copied = folder / recipe.name
        copied.mkdir()
        for other in run_dir.iterdir() if run_dir.is_dir() else ():
            if other.name != section.name and (other / "started.json").is_file():
                (copied / other.name).symlink_to(other)
        if (run_dir.parent / ROWS).is_dir():
            (folder / ROWS).symlink_to(run_dir.parent / ROWS)
        changed = {**dict.fromkeys(section.work.step_keys, STEPS), "train.report_to": "none"}
        overrides = [*recipe.overrides, *(f"{section.name}.{key}={value}" for key, value in changed.items())]
        own = ["-m", "baton.probe", str(recipe.path), section.name, name, *overrides]
        start = [] if launch is None else ["-m", "accelerate.commands.launch", "--config_file", str(launch)]
        done = subprocess.run([sys.executable, *start, *own], capture_output=True, text=True, check=False)
        result = folder / _PEAK
        peak = float(result.read_text(encoding="ascii")) if result.is_file() else None
    if done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL):
        raise UserError(
            f"{section.name}: its probe was killed, most likely because it needs more memory than there is; "
            "`baton plan --fit` says what to change"
        )
    if done.returncode != 0 or peak is None:
        raise UserError(f"{section.name}: its probe ended with {done.returncode}:\n{_end(done.stdout, done.stderr)}")
    return peak


def _existing(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _end(*outputs: str) -> str:
    return "\n".join("".join(outputs).strip().splitlines()[-20:])


def main(arguments: Sequence[str]) -> None:
    """Takes the steps, and writes the peak into the folder."""
    path, name, folder, *overrides = arguments
    recipe = replace(load_recipe(Path(path), overrides, section=name), output_root=Path(folder))
    engine = engines.start()
    importlib.import_module(f"stages.{recipe.section(name).stage}.train")
    before = engine.forget_peak()
    try:
        run_section(recipe, name, partial(_Probe, before))
    except _Seen as seen:
        if engine.is_main:
            (Path(folder) / _PEAK).write_text(str(seen.peak), encoding="ascii")


if __name__ == "__main__":
    main(sys.argv[1:])
