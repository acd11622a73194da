"""What the report says beside the curves: headline, figures, stages, data, warnings, and what is missing.

Everything is derived from the manifests and metrics; nothing is said that they do not hold.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from baton.report import evaluation
from baton.report.collect import Results, RunData, Stage
from baton.report.lineage import Node
from baton.report.text import NOTHING, compact, duration, moment, number, percent, short

KINDS = {
    "tokenizer": "tokenizer",
    "pretrain": "pretraining",
    "sft": "instruction tuning",
    "reward_model": "reward model",
    "ppo": "policy gradient",
    "dpo": "preference tuning",
    "evaluate": "evaluation",
}
# Stage -> what its row shows, first come first shown: (metric, label).
_HEADLINE = {
    "tokenizer": [("bytes_per_token", "bytes per token"), ("vocab_size", "entries")],
    "pretrain": [("bits_per_byte", "bits per byte"), ("eval_loss", "held-out loss"), ("train_loss", "loss")],
    "sft": [("eval_loss", "held-out loss"), ("train_loss", "loss")],
    "reward_model": [("eval_accuracy", "of held-out pairs right"), ("accuracy", "of pairs right")],
    "dpo": [("eval_rewards/accuracies", "of held-out pairs right"), ("eval_loss", "held-out loss")],
    "ppo": [("objective/scores", "score"), ("objective/kl", "nats of KL")],
}
_TOKENS = ("tokens", "num_tokens", "num_input_tokens_seen")
_DROPS_WORTH_A_WARNING = 0.1
_STOPS_WORTH_A_WARNING = 0.9


@dataclass(frozen=True)
class Tile:
    """One of the large figures at the top."""

    label: str
    value: str
    note: str


@dataclass(frozen=True)
class StageRow:
    """A row of the stage table, all in words."""

    name: str
    kind: str
    color: str
    parents: str
    time: str
    tokens: str
    parameters: str
    engine: str
    headline: str
    headline_label: str
    fingerprint: str
    created: str
    done: bool


@dataclass(frozen=True)
class Account:
    """What became of the rows of one data set of one stage: rows_in = used + all that was dropped."""

    stage: str
    label: str
    rows_in: int
    used: int
    dropped: list[tuple[str, int]]

    @property
    def used_percent(self) -> float:
        """Share of the rows that the stage used, in percent."""
        return 100 * self.used / self.rows_in if self.rows_in else 0.0


@dataclass(frozen=True)
class Gap:
    """Something that the report would show, and the command that makes it."""

    what: str
    command: str


def colors(run: RunData) -> dict[str, str]:
    """A colour of the style sheet for each model; stages that make no model of language are grey."""
    names = [s.name for s in run.stages if s.kind not in ("tokenizer", "evaluate")]
    palette = {name: f"s{index % 8}" for index, name in enumerate(names)}
    return {stage.name: palette.get(stage.name, "muted") for stage in run.stages}


def lineage_nodes(run: RunData, palette: Mapping[str, str]) -> list[Node]:
    """The run's stages and the checkpoints outside of it that they started from."""
    nodes: list[Node] = []
    names = {stage.name for stage in run.stages}
    drawn: set[str] = set()
    for stage in run.stages:
        parents = []
        for parent in dict.fromkeys(stage.parents.values()):
            if parent in names and parent not in drawn:  # a checkpoint elsewhere that happens to have a stage's name
                parent += " (outside)"
            if parent not in drawn:
                drawn.add(parent)
                nodes.append(Node(parent, "from outside", "muted", (), outside=True))
            parents.append(parent)
        caption = KINDS.get(stage.kind, stage.kind) if stage.manifest else "not finished"
        unfinished = stage.manifest is None
        nodes.append(Node(stage.name, caption, palette[stage.name], tuple(parents), unfinished=unfinished))
        drawn.add(stage.name)
    return nodes


def stage_rows(run: RunData, palette: Mapping[str, str]) -> list[StageRow]:
    """One row a stage."""
    return [_stage_row(stage, palette[stage.name]) for stage in run.stages]


def _stage_row(stage: Stage, color: str) -> StageRow:
    kind = KINDS.get(stage.kind, stage.kind)
    if stage.manifest is None:
        steps = max((row["step"] for row in stage.metrics), default=None)
        progress = "" if steps is None else f"{number(steps)} steps so far"
        return StageRow(
            stage.name, kind, color, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING, progress, "", NOTHING, NOTHING, False
        )
    manifest = stage.manifest
    engine = manifest.engine
    words = [engine.name if engine.zero_stage is None else f"{engine.name} ZeRO-{engine.zero_stage}"]
    words.append(f"{engine.processes} × {engine.device}")
    metric, label = headline(stage)
    return StageRow(
        name=stage.name,
        kind=kind,
        color=color,
        parents=evaluation.named(list(dict.fromkeys(stage.parents.values()))) or NOTHING,
        time=duration(seconds(stage)),
        tokens=compact(tokens(stage)),
        parameters=compact(stage.parameters),
        engine=", ".join(words),
        headline=metric,
        headline_label=label,
        fingerprint=manifest.fingerprint[:10],
        created=moment(manifest.created),
        done=True,
    )


def headline(stage: Stage) -> tuple[str, str]:
    """The stage's most telling metric and its name; two empty strings where it has none."""
    assert stage.manifest is not None
    if stage.results:
        return str(len(stage.results.models)), "models compared"
    for metric, label in _HEADLINE.get(stage.kind, []):
        value = stage.manifest.metrics.get(metric)
        if isinstance(value, int | float):
            return number(value), label
    return "", ""


def seconds(stage: Stage) -> float | None:
    """Wall-clock time of the stage's last start to its publication."""
    return _figure(stage, ("time/total",))


def tokens(stage: Stage) -> float | None:
    """Tokens that the stage was fed."""
    return _figure(stage, _TOKENS)


def _figure(stage: Stage, names: tuple[str, ...]) -> float | None:
    if stage.manifest is None:
        return None
    values = (stage.manifest.metrics.get(name) for name in names)
    return next((float(value) for value in values if isinstance(value, int | float)), None)


def sentences(run: RunData) -> list[str]:
    """The verdict: headline first. Without an evaluation it says how far the run is."""
    found = [sentence for results in all_results(run) for sentence in evaluation.verdict(run, results)]
    if found:
        return found
    done = run.published
    if not done:
        return ["No stage of this run has been published yet."]
    last = done[-1]
    value, label = headline(last)
    told = f": {value} {label}" if value else ""
    count = "One stage is" if len(done) == 1 else f"{len(done)} stages are"
    return [f"{count} done, the last is {last.name}{told}."] + (
        [] if all_results(run) else ["Nothing has been evaluated yet."]
    )


def all_results(run: RunData) -> list[Results]:
    """The results of every evaluation of the run."""
    return [stage.results for stage in run.stages if stage.results]


def tiles(run: RunData) -> list[Tile]:
    """The large figures: for each aligned model its gain and its KL, then wins, then the cost of it all."""
    found = []
    for results in all_results(run):
        for stage, parent in evaluation.gains(run, results):
            after, before = results.metrics[stage.name], results.metrics[parent]
            if "gold" in after and "gold" in before:
                gain = after["gold"].value - before["gold"].value
                kl = f", {short(after['kl'].value)} nats away" if "kl" in after else ""
                found.append(Tile(f"Gold score, {stage.name}", short(gain, signed=True), f"over {parent}{kl}"))
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
    """Every data set that a stage counted; a manifest keeps them beside the fingerprints, by label."""
    found = []
    for stage in run.published:
        assert stage.manifest is not None
        for label, counted in stage.manifest.data.items():
            if label != "fingerprints" and "data/rows_in" in counted:
                prefix = "data/dropped/"
                dropped = [(k.removeprefix(prefix), v) for k, v in counted.items() if k.startswith(prefix) and v]
                dropped.sort(key=lambda pair: -pair[1])
                found.append(Account(stage.name, label, counted["data/rows_in"], counted["data/rows_used"], dropped))
    return found


def gaps(run: RunData) -> list[Gap]:
    """The parts of the report that this run has no data for."""
    recipe = f"RECIPE=recipes/{run.name}.yaml"
    kinds = {stage.kind for stage in run.published}
    found = [
        Gap(f"{stage.name} was started and is not finished", f"baton run recipes/{run.name}.yaml --to {stage.name}")
        for stage in run.stages
        if stage.manifest is None
    ]
    started = {stage.kind for stage in run.stages}
    for kind, what, target in (
        ("sft", "no instruction tuning", "sft"),
        ("reward_model", "no reward model", "reward"),
        ("ppo", "no PPO curves", "ppo"),
        ("dpo", "no DPO to compare with", "dpo"),
    ):
        if kind not in started:
            found.append(Gap(what, f"make {target} {recipe}"))
    if "evaluate" not in kinds:
        found.append(Gap("no evaluation, so no intervals, win rates or answers side by side", f"make eval {recipe}"))
    return found


def warnings(run: RunData) -> list[str]:
    """What a reader of the figures should know."""
    found = list(run.problems)
    prints = {stage.name: stage.manifest.fingerprint for stage in run.stages if stage.manifest}
    for stage in run.published:
        assert stage.manifest is not None
        for parent in stage.manifest.parents.values():
            if parent.name in prints and parent.fingerprint != prints[parent.name]:
                found.append(
                    f"{stage.name} was made from another {parent.name} than the one that is here now; "
                    f"`baton run recipes/{run.name}.yaml --to {stage.name}` makes it again"
                )
        for name in sorted({key for row in stage.metrics for key, value in row.items() if value != value}):
            found.append(f"{stage.name}: {name} was not a number in at least one step")
    for account in accounts(run):
        lost = sum(count for _, count in account.dropped)
        if account.used + lost != account.rows_in:
            found.append(f"{account.stage}, {account.label}: rows in are not rows used plus rows dropped")
        if account.rows_in and lost / account.rows_in > _DROPS_WORTH_A_WARNING:
            found.append(
                f"{account.stage}, {account.label}: {percent(lost / account.rows_in)} of the rows were dropped, "
                f"most because of: {account.dropped[0][0]}"
            )
    found += _version_changes(run)
    for results in all_results(run):
        found += _evaluation_warnings(run, results)
    return found


def _version_changes(run: RunData) -> list[str]:
    seen: dict[str, set[str]] = {}
    for stage in run.published:
        assert stage.manifest is not None
        for package, version in stage.manifest.versions.items():
            seen.setdefault(package, set()).add(version)
    return [
        f"the stages ran with different versions of {package}: {', '.join(sorted(versions))}"
        for package, versions in seen.items()
        if len(versions) > 1
    ]


def _evaluation_warnings(run: RunData, results: Results) -> list[str]:
    found = []
    for model, metrics in results.metrics.items():
        stage = run.stage(model)
        tuned = stage is not None and stage.kind != "pretrain"
        if tuned and "stop_rate" in metrics and metrics["stop_rate"].value < _STOPS_WORTH_A_WARNING:
            share = percent(1 - metrics["stop_rate"].value)
            found.append(f"{model} does not stop by itself in {share} of its answers")
    for stage, parent in evaluation.gains(run, results):
        after, before = results.metrics[stage.name], results.metrics[parent]
        if {"reward", "gold"} <= after.keys() & before.keys():
            higher = after["reward"].value > before["reward"].value
            if higher and after["gold"].value < before["gold"].value:
                found.append(
                    f"{stage.name} raised the learned reward over {parent} but not the gold score: "
                    "it has found the reward model's mistakes (over-optimisation)"
                )
    return found
