"""`baton run`: runs the stages of a recipe that are not up to date, one after the other, each in its own process.

Parents run before their children. A stage that is up to date is skipped; a stage whose recipe, parent, data or code
changed is run again; an interrupted stage resumes. A child is checked after its parents have run: if a parent was run
again with the same result, the child is still up to date. This module needs no torch.

Without a launch file, stages are forked from a server that has already imported the large libraries
(`baton/worker.py`). With a launch file, `accelerate launch` starts each stage that trains or generates.
"""

import re
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from rich.text import Text

from baton.launched import LaunchedStage
from baton.status import InputsOf, Standing, State, overview, standing
from baton.supervisor import Ended, Running, Start, Supervisor
from baton.together import Others, digest, follow
from data.config import StageSource
from data.fingerprint import fingerprint
from handoff.errors import UserError
from handoff.files import check_writable
from handoff.lock import RunLock
from handoff.parent import known_hashes, open_dataset, packed
from handoff.previous import PREVIOUS
from handoff.stage import StageDir
from reward.check import Use, check_functions
from training.engines.launch_file import check_launch_file
from training.engines.machines import Place
from training.inputs import stage_inputs
from training.recipe import Recipe, Section
from training.references import check_compared, check_gates, check_models
from training.registry import Registry
from training.signals import ENDING
from training.terminal import Screen, same_reader
from training.trackers import check_trackers

LOGS = "logs"
SHOWN = 20
"""How many of a stage's last lines are shown again when it fails."""


def start_of(
    recipe: Recipe,
    section: Section,
    launch: Path | None,
    *,
    preload: bool,
    place: Place | None = None,
    others: Others | None = None,
) -> Start:
    """How to start a section. A stage that is not distributed runs on one process, whatever the launch file says.

    Args:
        preload: whether to import the large libraries once for all stages.
        place: this machine's place among several.
        others: the other machines, if this one is the first.
    """
    arguments = [str(recipe.path), *recipe.overrides, "--section", section.name]
    module = f"stages.{section.stage}"
    if launch is None or not Registry().declaration(section.stage).distributed:
        from baton.worker import WarmStage

        return Start(
            [_program("python"), "-m", module, *arguments],
            lambda descriptor: WarmStage(section.stage, arguments, descriptor, preload=preload),
        )
    options = [] if place is None else place.arguments(launch)
    rest = ["--config_file", str(launch), *options, "-m", module, *arguments]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *rest]
    command = [_program("accelerate"), "launch", *rest]

    def begin(descriptor: int) -> Running:
        return LaunchedStage(launcher, descriptor)

    if others is None:
        return Start(command, begin)
    return Start(command, partial(others.started, section.name, begin), others.settled)


def _program(name: str) -> str:
    """Path of a program in this Python's environment, as a user would type it in the current folder."""
    path = Path(sys.executable).with_name(name)
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


StartOf = Callable[[Recipe, Section], Start]


class Runner:
    """One run of a recipe's stages.

    `start` starts a stage; `inputs_of` gives what its result depends on; `kept` says whether the run's folder stays;
    `others` are the other machines of a run on several; `max_restarts` says how often a stage that breaks is started
    again.
    """

    def __init__(
        self,
        recipe: Recipe,
        start: StartOf,
        console: Screen,
        inputs_of: InputsOf = stage_inputs,
        *,
        kept: bool = True,
        others: Others | None = None,
        max_restarts: int = 0,
    ) -> None:
        self.recipe = recipe
        self.start = start
        self.console = console
        self.inputs_of = inputs_of
        self.kept = kept
        self.others = others
        self.max_restarts = max_restarts
        self.supervisor = Supervisor()

    def run(self, names: Sequence[str], force: Sequence[str] = ()) -> int:
        """Brings the sections up to date, in the given order. Returns 0, or the exit code of the stage that failed."""
        check_writable(self.recipe.run_dir)
        with RunLock(self.recipe.run_dir, "baton run"), self.supervisor.forwarding():
            for name in names:
                for ref in self.recipe.sections[name].references.values():
                    if packed(ref, self.recipe.run_dir):
                        _say(self.console, names, name, f"unpacks {ref}, once")
                found = standing(self.recipe, name, self.inputs_of)
                if name in force:
                    # A stage without a record of its start moves its old directory away for good.
                    StageDir(self.recipe.run_dir / name).started_path.unlink(missing_ok=True)
                    found = Standing(name, State.STALE, ("forced",), found.manifest)
                else:
                    found = self._brought_back(found)
                skipped = found.state is State.UP_TO_DATE
                _say(self.console, names, name, f"{found}, skipped" if skipped else str(found))
                if skipped:
                    continue
                if self.others is not None and (code := self.others.gone()) is not None:
                    return code
                code = self._stage(self.recipe.sections[name])
                for restart in range(1, self.max_restarts + 1):
                    if not _broke(code) or (self.others is not None and self.others.gone() is not None):
                        break
                    self.console.print(f"{name} is started again ({restart} of {self.max_restarts})")
                    code = self._stage(self.recipe.sections[name])
                if code:
                    return code
        return 0

    def _brought_back(self, found: Standing) -> Standing:
        """The standing after content of an earlier start with the same inputs, if there is any, was brought back."""
        name = found.section
        if found.state not in (State.STALE, State.NEW):
            return found
        if not StageDir(self.recipe.run_dir / name).bring_back(self.inputs_of(self.recipe, name)):
            return found
        back = standing(self.recipe, name, self.inputs_of)
        return replace(back, reasons=(f"brought back from {PREVIOUS}", *back.reasons))

    def _stage(self, section: Section) -> int:
        log_path = self.recipe.run_dir / LOGS / f"{section.name}.log"
        ended = self.supervisor.run(self.start(self.recipe, section), log_path)
        signals, code = self.supervisor.signals, ended.code
        tail = ended.tail
        if tail == ended.lines and same_reader():
            tail = []  # they were the last that the reader saw
        published = StageDir(self.recipe.run_dir / section.name).manifest() is not None
        if signals and code in (0, 1) and not published:
            code = 128 + signals[0]
        elif code == 0 and not published:
            code = 1
            tail = [*tail, f"the stage ended without publishing {self.recipe.run_dir / section.name}"]
        if code == 0:
            self.console.print(f"  done in {ended.seconds:.0f} s")
            return 128 + signals[0] if signals else 0
        self._failed(section.name, code, ended, tail, log_path)
        return code

    def _failed(self, name: str, code: int, ended: Ended, tail: Sequence[str], log_path: Path) -> None:
        said = Screen(stderr=True)
        if self.supervisor.signals or code - 128 in ENDING:
            said.print(f"{name} was stopped; the same command goes on with it", style="yellow")
            return
        took = f"after {ended.seconds:.0f} s"
        if code == 128 + signal.SIGKILL:
            why = "by the system for lack of memory, or by someone; the same command goes on with it"
            words = Text.assemble((f"{name} was killed", "bold red"), f" {took}: {why}")
        else:
            words = Text.assemble((f"{name} failed", "bold red"), f" with exit code {code} {took}")
        said.print(words.append("; its last lines:") if tail else words)
        for line in tail[-SHOWN:]:
            said.print(f"  | {line}")
        if self.kept:
            said.print(f"log:    {log_path}")
            said.print(f"repeat: {ended.command}")


def _broke(code: int) -> bool:
    """Whether a stage ended in a way that another start may not: by an error of its own, or killed."""
    return code not in (0, 2, 3) and code - 128 not in ENDING


def run_pipeline(
    recipe: Recipe,
    targets: Sequence[str],
    force: Sequence[str],
    launch: Path | None,
    *,
    dry_run: bool,
    kept: bool = True,
    place: Place | None = None,
    max_restarts: int = 0,
) -> int:
    """The command `baton run` (see `baton.cli.run`). Returns the exit code.

    Args:
        kept: whether the run's folder stays.
        place: this machine's place, if several run this command together.
        max_restarts: how often a stage that breaks is started again.
    """
    names = recipe.order(targets or None)
    for name in force:
        if recipe.section(name).name not in names:
            raise UserError(f"--force {name}: this section is not among those to be run ({', '.join(names)})")
    if launch is not None:
        check_launch_file(launch)
    run = partial(_run, recipe, names, force, launch, dry_run=dry_run, kept=kept, max_restarts=max_restarts)
    if launch is None or place is None or dry_run:
        return run()
    place.arguments(launch)
    command = digest(recipe, launch)
    if place.number > 0:
        start = partial(start_of, recipe, launch=launch, preload=False, place=place)
        return follow(recipe, place, command, lambda name: start(recipe.sections[name]), recipe.run_dir / LOGS)
    with Others(place, command, Screen()) as others:
        others.code = run(place=place, others=others)
        return others.code


def _run(
    recipe: Recipe,
    names: Sequence[str],
    force: Sequence[str],
    launch: Path | None,
    *,
    dry_run: bool,
    kept: bool,
    max_restarts: int,
    place: Place | None = None,
    others: Others | None = None,
) -> int:
    check_compared(recipe, names, shlex.join(["baton", "run", str(recipe.path), *recipe.overrides]))
    check_data(recipe, names)
    check_functions(reward_functions(recipe, names))
    check_trackers(recipe, names)
    check_gates(recipe, names)
    console = Screen()
    if dry_run:
        return _print_plan(recipe, names, force, console)
    check_models(recipe, names, fetch=True)
    registry = Registry()
    preload = launch is None and any(registry.declaration(recipe.sections[name].stage).distributed for name in names)
    start = partial(start_of, launch=launch, preload=preload, place=place, others=others)
    return Runner(recipe, start, console, kept=kept, others=others, max_restarts=max_restarts).run(names, force)


def check_data(recipe: Recipe, names: Sequence[str]) -> None:
    """Checks the data of every section before the first one runs, so that a wrong path shows at once, not hours later.

    Raises:
        UserError: `data_root` is no folder.
        DataError: a source does not exist.
        HandoffError: a source names a directory of another run that has published no rows.
    """
    if recipe.data_root is not None and not recipe.data_root.is_dir():
        page = re.search(r"docs/[\w./-]+\.md", recipe.path.read_text(encoding="utf-8"))
        where = f"; {page.group()} says what belongs there" if page else ""
        raise UserError(
            f"{recipe.provenance['data_root']}: data_root: there is no folder {recipe.data_root}{where}. "
            "Another place: data_root=<folder> on the command line"
        )
    for name in names:
        for source in recipe.sections[name].config.sources():
            if not isinstance(source, StageSource):
                fingerprint(source, recipe.data_root, known_hashes(recipe.run_dir).sha256)
            elif source.name not in recipe.sections:
                open_dataset(source.name, recipe.run_dir, name, verify=False)


def reward_functions(recipe: Recipe, names: Sequence[str]) -> list[Use]:
    """The reward functions that these sections name, with their places in the recipe."""
    uses = []
    for name in names:
        section = recipe.sections[name]
        for key, entry in section.config.rewards().items():
            if entry.function is not None:
                place = f"{section.provenance[f'{key}.function']}: {name}.{key}.function"
                uses.append(Use(place, entry.name, entry.function, entry.args))
    return uses


def _print_plan(recipe: Recipe, names: Sequence[str], force: Sequence[str], console: Screen) -> int:
    """Returns the exit code: 2 if a section cannot be run."""
    found = overview(recipe)
    for name in names:
        _say(console, names, name, "forced" if name in force else str(found[name]))
    return 2 if any(found[name].state is State.BLOCKED for name in names) else 0


def _say(console: Screen, names: Sequence[str], name: str, words: str) -> None:
    """Prints a section's name, in a column as wide as the longest of `names`, and words about it."""
    console.print(Text.assemble((f"{name:{max(map(len, names))}}", "bold"), "  ", words))
