"""The status of each stage of a recipe: new, unfinished, up to date, or stale with the reason. No torch here.

The inputs in a stage's manifest are compared with the present recipe, parents, data and code. If a parent has to run
again, this view shows the stage as stale too. The runner decides again after the parent has run, since a parent with an
equal result leaves the stage up to date.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

from handoff.errors import UserError
from handoff.files import quoted
from handoff.journal import Journal
from handoff.manifest import Inputs, Manifest
from handoff.parent import damaged_since_publishing, packed
from handoff.refused import read_refused
from handoff.stage import StageDir
from training.inputs import stage_inputs
from training.recipe import Recipe
from training.references import check_models
from training.registry import Registry
from training.terminal import Screen, shown


class State(Enum):
    """The status of a stage, which decides what the runner does."""

    UP_TO_DATE = "up to date"
    STALE = "stale"
    UNFINISHED = "unfinished"
    NEW = "new"
    BLOCKED = "blocked"


@dataclass(frozen=True)
class Standing:
    """A stage's state and the reasons, in words."""

    section: str
    state: State
    reasons: tuple[str, ...] = ()
    manifest: Manifest | None = None

    def __str__(self) -> str:
        return f"{self.state.value}: {'; '.join(self.reasons)}" if self.reasons else self.state.value


InputsOf = Callable[[Recipe, str], Inputs]


def standing(recipe: Recipe, name: str, inputs_of: InputsOf = stage_inputs) -> Standing:
    """The standing of a section whose parents are all published. Raises the errors of `inputs_of`."""
    stage = StageDir(recipe.run_dir / name)
    manifest = stage.manifest()
    now = inputs_of(recipe, name)
    failed = read_refused(recipe.run_dir, name)
    below: tuple[str, ...] = ()
    if failed is not None and now.continues(failed.manifest.inputs):
        below = (f"its last result was below its gate: {'; '.join(failed.reasons)} (kept in {failed.path})",)
    aside = ("what an earlier start with this recipe made comes back",) if stage.has_aside(now) else ()
    if manifest is not None:
        changes = now.differences(manifest.inputs)
        damaged = damaged_since_publishing(stage.path, manifest)
        changes += [f"{quoted(file)} {change}" for file, change in damaged]
        if not changes:
            return Standing(name, State.UP_TO_DATE, (), manifest)
        return Standing(name, State.STALE, (*changes, *aside, *below), manifest)
    started = stage.started_inputs()
    if started is None:
        return Standing(name, State.NEW, (*aside, *below))
    changes = now.differences(started)
    if changes:
        return Standing(name, State.STALE, ("was not finished", *changes, *aside, *below))
    return Standing(name, State.UNFINISHED, (_continuation(stage, recipe.sections[name].stage), *below))


def _continuation(stage: StageDir, package: str) -> str:
    """How an interrupted stage goes on."""
    step = saved_step(stage)
    if step is not None:
        return f"resumes from step {step}"
    journal = Registry().declaration(package).journal
    if journal and (lines := Journal(stage.path / journal).lines()):
        return f"continues after the {len(lines)} line{'s' * (len(lines) > 1)} of {journal}"
    return "starts again"


def saved_step(stage: StageDir) -> int | None:
    """The step of the newest saved state, without checking its hashes; the stage checks them before it resumes."""
    steps = [int(path.name.removeprefix("step-")) for path in stage.state_dir.glob("step-*")]
    return max(steps, default=None)


def overview(recipe: Recipe, inputs_of: InputsOf = stage_inputs) -> dict[str, Standing]:
    """The standing of every section, in running order. A mistake in one section does not hide the others."""
    result: dict[str, Standing] = {}
    for name in recipe.order():
        section = recipe.sections[name]
        looked_at = [ref for ref in section.soft_parents.values() if ref in result and result[ref].manifest]
        before = dict.fromkeys([*recipe.needs(name), *looked_at])
        waiting = [parent for parent in before if result[parent].state is not State.UP_TO_DATE]
        try:
            check_models(recipe, [name], fetch=False)
            unread = [ref for ref in dict.fromkeys(section.references.values()) if packed(ref, recipe.run_dir)]
            if unread or any(result[parent].manifest is None for parent in waiting):
                stage = StageDir(recipe.run_dir / name)
                manifest = stage.manifest()
                state = State.NEW if manifest is None and stage.started_inputs() is None else State.STALE
                reasons = (*_waits(waiting, result), *(f"{ref} is unpacked first" for ref in unread))
                result[name] = Standing(name, state, reasons, manifest)
                continue
            found = standing(recipe, name, inputs_of)
            if waiting and found.state is State.UP_TO_DATE:
                found = Standing(name, State.STALE, _waits(waiting, result), found.manifest)
            result[name] = found
        except UserError as error:
            result[name] = Standing(name, State.BLOCKED, (str(error),))
    return result


def _waits(parents: list[str], known: Mapping[str, Standing]) -> tuple[str, ...]:
    return tuple(f"parent {parent} is {known[parent].state.value}" for parent in parents)


def print_overview(recipe: Recipe) -> None:
    """`baton status`: a table of all stages."""
    from rich.table import Table
    from rich.text import Text

    from baton.report.collect import Stage
    from baton.report.facts import headline, seconds
    from baton.report.text import duration

    styles = {
        State.UP_TO_DATE: "green",
        State.STALE: "yellow",
        State.UNFINISHED: "cyan",
        State.NEW: "default",
        State.BLOCKED: "red",
    }
    table = Table("stage", "state", "why", "made", "took", "headline", box=None)
    for name, found in overview(recipe).items():
        made, took, metric = "", "", ""
        if found.manifest is not None:
            stage = Stage(name, found.manifest, [], [], None, None)
            made, took = ago(found.manifest.created), duration(seconds(stage))
            metric = ", ".join(f"{value} {label}" for value, label in headline(stage))
        style = styles[found.state]
        table.add_row(name, Text(found.state.value, style), shown("\n".join(found.reasons)), made, took, metric)
    console = Screen()
    console.print(f"{recipe.path} → {recipe.run_dir}")
    console.print(table)


def ago(created: str) -> str:
    """The time since `created` (ISO 8601), in one unit."""
    passed = (datetime.now(UTC) - datetime.fromisoformat(created)).total_seconds()
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        count = int(passed // length)
        if count:
            return f"{count} {unit}{'' if count == 1 else 's'} ago"
    return "just now"
