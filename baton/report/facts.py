"""The report's content other than the curves: headline, figures, stages, data, and what is missing.

All of it is derived from the manifests and metrics.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.report import evaluation
from baton.report.collect import RunData, Stage, TaskResults
from baton.report.lineage import Node
from baton.report.text import NOTHING, compact, duration, number, percent, short
from handoff.manifest import MODEL_KINDS, Kind
from training.registry import Registry


@dataclass(frozen=True)
class Tile:
    """One of the large figures at the top."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class StageRow:
    """A row of the stage table, as text."""

    name: str
    kind: str
    color: str
    results: list[tuple[str, str]]
    """(value, what it is), the most telling first."""
    done: bool
    parents: str = NOTHING
    time: str = NOTHING
    tokens: str = NOTHING
    parameters: str = NOTHING
    engine: str = NOTHING
    fingerprint: str = NOTHING


@dataclass(frozen=True)
class Account:
    """How many rows of one data set a stage used and dropped: rows_in = used + sum of `dropped`."""

    stage: str
    label: str
    rows_in: int
    used: int
    dropped: list[tuple[str, int]]
    aside: list[tuple[str, int]]
    """Rows that were read but do not belong to the data set, such as another split's; not included in `rows_in`."""

    @property
    def used_percent(self) -> float:
        """Share of the rows that the stage used, in percent."""
        return 100 * self.used / self.rows_in if self.rows_in else 0.0


@dataclass(frozen=True)
class Gap:
    """Something that is missing from the report, and the command that makes it."""

    what: str
    command: str


def colors(run: RunData) -> dict[str, str]:
    """A colour of the style sheet for each model; stages that publish no model are grey."""
    names = [stage.name for stage in run.stages if _publishes(stage) in MODEL_KINDS]
    palette = {name: f"s{index % 8}" for index, name in enumerate(names)}
    return {stage.name: palette.get(stage.name, "muted") for stage in run.stages}


def _publishes(stage: Stage) -> Kind:
    return stage.manifest.kind if stage.manifest else stage.declared.publishes


def lineage_nodes(run: RunData, palette: Mapping[str, str]) -> list[Node]:
    """The run's stages and the checkpoints outside of it that they started from."""
    nodes: list[Node] = []
    names = {stage.name for stage in run.stages}
    drawn: set[str] = set()
    for stage in run.stages:
        parents = []
        for parent in dict.fromkeys(stage.parents.values()):
            if parent in names and parent not in drawn:  # a checkpoint outside the run that has the name of a stage
                parent += " (outside)"
            if parent not in drawn:
                drawn.add(parent)
                nodes.append(Node(parent, "from outside", "muted", (), outside=True))
            parents.append(parent)
        caption = stage.declared.caption if stage.manifest else "not finished"
        unfinished = stage.manifest is None
        nodes.append(Node(stage.name, caption, palette[stage.name], tuple(parents), unfinished=unfinished))
        drawn.add(stage.name)
    return nodes


def stage_rows(run: RunData, palette: Mapping[str, str]) -> list[StageRow]:
    """One row for each stage."""
    return [_stage_row(stage, palette[stage.name]) for stage in run.stages]


def _stage_row(stage: Stage, color: str) -> StageRow:
    kind = stage.declared.caption
    if stage.manifest is None:
        steps = max((row["step"] for row in stage.metrics), default=None)
        progress = [] if steps is None else [(number(steps), "steps so far")]
        return StageRow(stage.name, kind, color, progress, done=False)
    manifest = stage.manifest
    engine = manifest.engine
    return StageRow(
        name=stage.name,
        kind=kind,
        color=color,
        parents=evaluation.named(list(dict.fromkeys(stage.parents.values()))) or NOTHING,
        time=duration(seconds(stage)),
        tokens=compact(tokens(stage)),
        parameters=compact(stage.parameters),
        engine=f"{engine.label}, {engine.processes} × {engine.device}",
        results=headline(stage),
        fingerprint=manifest.fingerprint[:10],
        done=True,
    )


def headline(stage: Stage) -> list[tuple[str, str]]:
    """The stage's one or two most important metrics, as (value, what it is). Empty if it has none."""
    assert stage.manifest is not None
    metrics = stage.manifest.metrics
    found = [
        (number(metrics[metric]), label)
        for metric, label in stage.declared.headline
        if isinstance(metrics.get(metric), int | float)
    ]
    if not found and stage.has("loss"):  # trained without held-out data
        found = [(number(stage.series("loss")[1][-1]), "training loss")]
    return found[:2]


def seconds(stage: Stage) -> float | None:
    """Wall-clock seconds from the stage's last start to its publication."""
    assert stage.manifest is not None
    value = stage.manifest.metrics.get("time/total")
    return float(value) if isinstance(value, int | float) else None


def tokens(stage: Stage) -> float | None:
    """Tokens on which the stage trained; for reinforcement learning, the tokens that the policy sampled."""
    assert stage.manifest is not None
    value = stage.manifest.metrics.get("train_tokens")
    if isinstance(value, int | float):
        return float(value)
    _, counted = stage.series("num_tokens")
    if counted:
        return counted[-1]
    lengths = dict(zip(*stage.series("completions/mean_length")))
    total, before = 0.0, 0.0
    for step, episode in zip(*stage.series("episode")):
        total += (episode - before) * lengths.get(step, 0.0)
        before = episode
    return total or None


def sentences(run: RunData) -> list[str]:
    """The verdict, headline first. Without an evaluation, it says how many stages are done."""
    verdicts = [(task.name, found) for task in all_results(run) if (found := evaluation.verdict(run, task))]
    if verdicts:
        several = len(verdicts) > 1
        return [f"On {name}, {said}" if several else said for name, found in verdicts for said in found]
    done = run.published
    if not done:
        return ["No stage of this run has been published yet."]
    last = done[-1]
    told = "".join(f": {value} {label}" for value, label in headline(last)[:1])
    count = "One stage is" if len(done) == 1 else f"{len(done)} stages are"
    return [f"{count} done, the last is {last.name}{told}."] + (
        [] if all_results(run) else ["Nothing has been evaluated yet."]
    )


def all_results(run: RunData) -> list[TaskResults]:
    """The results of every task of every evaluation of the run."""
    return [task for stage in run.stages if stage.results for task in stage.results.tasks.values()]


def tiles(run: RunData) -> list[Tile]:
    """The large figures: gain, KL and wins of each aligned model, then the run's time and the newest model's size."""
    found = []
    for results in all_results(run):
        for stage, parent in evaluation.gains(run, results):
            after, before = results.metrics[stage.name], results.metrics[parent]
            metric = evaluation.main_score(results, stage.name, parent)
            if metric is not None:
                gain = after[metric].value - before[metric].value
                kl = f", {short(after['kl'].value)} nats away" if "kl" in after else ""
                name = evaluation.score_name(metric, results.kind)
                where = f" in {results.name}" if metric == "accuracy" and results.kind != "answers" else ""
                label = f"{name[0].upper()}{name[1:]}{where}, {stage.name}"
                found.append(Tile(label, short(gain, signed=True), f"over {parent}{kl}"))
            win = results.win_rates.get(stage.name)
            if win:
                found.append(Tile(f"Wins, {stage.name}", percent(win.value), f"over {win.over}"))
    spent = [s for stage in run.published if (s := seconds(stage)) is not None]
    if spent:
        count = len(spent)
        found.append(Tile("Time", duration(sum(spent)), "one stage" if count == 1 else f"{count} stages together"))
    sizes = [stage.parameters for stage in run.published if stage.parameters]
    if sizes:
        found.append(Tile("Parameters", compact(sizes[-1]), "of the newest model"))
    return found


def accounts(run: RunData) -> list[Account]:
    """Every data set whose rows a stage counted: each label in a manifest's `data` except `fingerprints`."""
    found = []
    for stage in run.published:
        assert stage.manifest is not None
        for label, counted in stage.manifest.data.items():
            if label != "fingerprints" and "data/rows_in" in counted:
                found.append(
                    Account(
                        stage.name,
                        label,
                        counted["data/rows_in"],
                        counted["data/rows_used"],
                        _reasons(counted, "data/dropped/"),
                        _reasons(counted, "data/set_aside/"),
                    )
                )
    return found


def _reasons(counted: Mapping[str, int], prefix: str) -> list[tuple[str, int]]:
    """(reason, rows) under `prefix`, the most frequent first."""
    found = [
        (key.removeprefix(prefix).replace("_", " "), n) for key, n in counted.items() if key.startswith(prefix) and n
    ]
    return sorted(found, key=lambda pair: -pair[1])


def gaps(run: RunData) -> list[Gap]:
    """The parts of the report for which this run has no data."""
    found = [
        Gap(f"{stage.name} was started and is not finished", stage.origin.run(stage.name))
        for stage in run.stages
        if stage.manifest is None
    ]
    started = {stage.package for stage in run.stages}
    return found + [
        Gap(declared.missing, run.origin.make(declared.targets[0]))
        for stage, declared in Registry().declarations().items()
        if declared.missing and stage not in started
    ]
