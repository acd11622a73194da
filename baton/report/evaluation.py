"""The evaluation's tables and verdict, made from results.json: values with 95 % intervals, on one scale per column.

Every number in the verdict is also in the tables. A difference from the parent is called clear only if the interval of
the differences, item by item, leaves 0 out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.report.collect import Estimate, Grouped, RunData, Stage, TaskResults, WinRate
from baton.report.text import number, percent, short

_NO_SCORES = (
    "stop_rate",
    "length_tokens",
    "kl",
    "bits_per_byte",
    "perplexity",
    "reference_bits_per_byte",
    "likelihood",
    "accuracy_norm",
)

# metric -> (heading, what it is, better: 1 higher, -1 lower, 0 neither)
_METRICS = {
    "accuracy": ("Exact accuracy", "share of held-out items answered exactly", 1),
    "accuracy_sampled": ("Accuracy, sampled", "of answers drawn as training draws them", 1),
    "stop_rate": ("Stops by itself", "share of answers that end at a stop token", 1),
    "gold": ("Gold score", "the hidden score, from −1 to 1, that no stage trains on", 1),
    "gold_greedy": ("Gold score, greedy", "of the most likely answers", 1),
    "reward": ("Learned reward", "mean score of the reward model", 0),
    "kl": ("KL from parent", "nats per answer", 0),
    "length_tokens": ("Length", "tokens per answer", 0),
    "bits_per_byte": ("Bits per byte", "on held-out text; lower is better", -1),
    "perplexity": ("Perplexity", "of a token of held-out text; lower is better", -1),
    "reference_bits_per_byte": ("Bits per byte of answers", "on the answers of the held-out rows; lower is better", -1),
}
# Metrics that mean something else in a task of that kind.
_OF_KIND = {
    ("choices", "accuracy"): ("Accuracy", "share of right choices, by their likelihoods", 1),
    ("choices", "accuracy_norm"): ("Accuracy, by length", "by the likelihood a character", 1),
    ("preferences", "accuracy"): ("Accuracy", "pairs put in order, by the reward", 1),
    ("preferences", "likelihood"): ("By likelihood", "pairs put in order, by the likelihood of the answers", 0),
}


@dataclass(frozen=True)
class Cell:
    """A value with its interval; `left`, `width` and `dot` are percent of the column's common scale."""

    value: str
    interval: str
    left: float
    width: float
    dot: float
    scaled: bool
    """Whether the column has a scale: more than one number."""
    best: bool
    """Whether it is the best of its column, or its interval overlaps that of the best; of differences, whether 0 is
    outside of the interval."""


@dataclass(frozen=True)
class Column:
    """A column of the table: one metric."""

    heading: str
    about: str


@dataclass(frozen=True)
class Row:
    """A row of the table: one model. A cell is None if that metric was not measured for the model."""

    model: str
    cells: list[Cell | None]
    over: str = ""
    """In a table of differences, the model from which."""


@dataclass(frozen=True)
class Table:
    """A table with a row for each model and a column for each metric."""

    columns: list[Column]
    rows: list[Row]


@dataclass(frozen=True)
class Heat:
    """One group of prompts, with a cell for each model. The cell's percent on the table's scale gives its colour."""

    group: str
    cells: list[tuple[str, str, float] | None]
    """(value, interval, percent)"""


@dataclass(frozen=True)
class Win:
    """How often `model` beats `over`."""

    model: str
    over: str
    cell: Cell
    sentence: str


def metric_table(results: TaskResults) -> Table:
    """The table of all metrics and models."""
    measured = {model: results.metrics.get(model, {}) for model in results.models}
    names = [n for n in _METRICS if any(n in m for m in measured.values())]
    names += sorted({name for metrics in measured.values() for name in metrics} - set(_METRICS))
    about = {name: _metric(name, results.kind) for name in names}
    cells = {
        name: _column(about[name][2], {model: m[name] for model, m in measured.items() if name in m}) for name in names
    }
    columns = [Column(*about[name][:2]) for name in names]
    rows = [Row(model, [cells[name].get(model) for name in names]) for model in results.models]
    return Table(columns, rows)


def change_table(results: TaskResults) -> Table:
    """The differences of each model from its parent; bold where 0 is outside of the interval."""
    changed = results.changes
    names = [n for n in _METRICS if any(n in one.metrics for one in changed.values())]
    names += sorted({name for one in changed.values() for name in one.metrics} - set(_METRICS))
    cells = {name: _changed(name, results) for name in names}
    rows = [Row(model, [cells[name].get(model) for name in names], one.over) for model, one in changed.items()]
    return Table([Column(_metric(name, results.kind)[0], "") for name in names], rows)


def _changed(metric: str, results: TaskResults) -> dict[str, Cell]:
    found = {model: one.metrics[metric] for model, one in results.changes.items() if metric in one.metrics}
    ends = [end for e in found.values() for end in (e.value, e.low, e.high) if end is not None]
    return {model: _cell(e, min(ends), max(ends), _is_clear(e), signed=True) for model, e in found.items()}


def _is_clear(change: Estimate) -> bool:
    """Whether the interval of a difference leaves 0 out."""
    return change.low is not None and change.high is not None and not change.low <= 0 <= change.high


def _metric(name: str, kind: str) -> tuple[str, str, int]:
    """(heading, what it is, better). An unknown metric is a score defined by the recipe, for which higher is better.

    `kind`: of the task.
    """
    return _OF_KIND.get((kind, name)) or _METRICS.get(name, (name, "a score of the recipe", 1))


def _column(sign: int, found: Mapping[str, Estimate]) -> dict[str, Cell]:
    """`sign`: 1 where higher is better, -1 where lower is."""
    ends = [end for e in found.values() for end in (e.value, e.low, e.high) if end is not None]
    low, high = min(ends), max(ends)
    if sign and len(found) > 1:
        top = max(found.values(), key=lambda e: sign * e.value)
        best = {model for model, e in found.items() if e.value == top.value or _overlap(e, top)}
    else:
        best = set()
    return {model: _cell(e, low, high, model in best) for model, e in found.items()}


def _cell(estimate: Estimate, low: float, high: float, best: bool, *, signed: bool = False) -> Cell:
    span = high - low or 1.0
    left, right = (estimate.value if end is None else end for end in (estimate.low, estimate.high))

    def place(value: float) -> float:
        return round(100 * (value - low) / span, 2)

    return Cell(
        number(estimate.value, signed=signed),
        interval(estimate),
        place(left),
        round(place(right) - place(left), 2),
        place(estimate.value),
        high > low,
        best,
    )


def interval(estimate: Estimate) -> str:
    """`0.71 to 0.79`; empty if no interval was computed."""
    if estimate.low is None or estimate.high is None:
        return ""
    return f"{number(estimate.low)} to {number(estimate.high)}"


def heat_title(results: TaskResults) -> str:
    """The heat table's title, e.g. `Exact accuracy by family`."""
    grouped = results.grouped or Grouped()
    return f"{_metric(grouped.metric, results.kind)[0]} by {grouped.column}"


def heat_table(results: TaskResults) -> list[Heat]:
    """One metric of each model in each group of prompts, with the groups in the evaluation's order.

    The colour scale goes from 0 to 1, and is extended to include values outside that range.
    """
    values = [e.value for models in results.families.values() for e in models.values()]
    low, high = min([0.0, *values]), max([1.0, *values])
    rows = []
    for group, models in results.families.items():
        found = [models.get(model) for model in results.models]
        rows.append(
            Heat(
                group,
                [
                    (number(e.value), interval(e), round(100 * (e.value - low) / (high - low), 1)) if e else None
                    for e in found
                ],
            )
        )
    return rows


def wins(results: TaskResults) -> list[Win]:
    """Win rates on a scale from 0 to 1."""
    return [
        Win(model, win.over, _cell(win, 0.0, 1.0, best=False), _win_sentence(model, win))
        for model, win in results.win_rates.items()
    ]


def judges(results: TaskResults) -> str:
    """Names of the scores that decided the win rates."""
    return named(sorted({score_name(win.by, results.kind) for win in results.win_rates.values() if win.by}))


def score_name(metric: str, kind: str) -> str:
    """The name of a score, as used within a sentence. `kind`: of the task."""
    if metric == "accuracy" and kind != "answers":
        return "accuracy"
    return {"gold": "gold score", "reward": "learned reward", "accuracy": "exact accuracy"}.get(metric, metric)


def main_score(results: TaskResults, model: str, parent: str) -> str | None:
    """The score for comparing a model with its parent: the first that both have, in the order gold score, score that
    decided the win rate, learned reward, accuracy, other scores of the recipe. None if they have none in common."""
    shared = results.metrics[model].keys() & results.metrics[parent].keys()
    judged = [results.win_rates[model].by] if model in results.win_rates else []
    others = [name for name in results.metrics[model] if name not in _NO_SCORES]
    return next((name for name in ("gold", *judged, "reward", "accuracy", *others) if name in shared), None)


def _win_sentence(model: str, win: WinRate) -> str:
    if win.low is None or win.high is None:
        return ""
    if win.low <= 0.5 <= win.high:
        return "no clear difference"
    return f"{model if win.low > 0.5 else win.over} is better"


def _win_report(model: str, win: WinRate) -> str:
    """`ppo beats sft on 74 % of the prompts (70 % to 78 %).`"""
    sentence = f"{model} beats {win.over} on {percent(win.value)} of the prompts"
    if win.low is not None and win.high is not None:
        sentence += f" ({percent(win.low)} to {percent(win.high)})"
    unclear = _win_sentence(model, win) == "no clear difference"
    return sentence + (", no clear difference." if unclear else ".")


def gains(run: RunData, results: TaskResults) -> list[tuple[Stage, str]]:
    """(stage, parent's name) of each aligned model that was evaluated together with its parent, largest gain first."""
    found = []
    for model in results.models:
        stage = run.stage(model)
        if stage and stage.manifest and stage.declared.answers == "aligned":
            parent = stage.parents.get("parent", "")
            if parent in results.metrics and model in results.metrics:
                found.append((stage, parent))

    def gain(pair: tuple[Stage, str]) -> float:
        metric = main_score(results, pair[0].name, pair[1])
        if metric is None:
            return 0.0
        return results.metrics[pair[0].name][metric].value - results.metrics[pair[1]][metric].value

    return sorted(found, key=gain, reverse=True)


def verdict(run: RunData, results: TaskResults) -> list[str]:
    """The effect of alignment and tuning in one task, in one or two sentences per model; the first one is the headline.

    Empty if the task has no score.
    """
    sentences = []
    for stage, parent in gains(run, results):
        metric = main_score(results, stage.name, parent)
        if metric is None:
            continue
        after, before = results.metrics[stage.name], results.metrics[parent]
        change = results.changes.get(stage.name)
        moved = change.metrics.get(metric) if change is not None else None
        name = score_name(metric, results.kind)
        sentences.append(_gain_sentence(stage, metric, name, after, parent, before, moved))
        win = results.win_rates.get(stage.name)
        if win:
            sentences.append(_win_report(stage.name, win))
    for model in results.models:
        tuned = run.stage(model)
        metrics = results.metrics.get(model, {})
        exact = "accuracy" in metrics and results.kind == "answers"
        if tuned and tuned.declared.answers == "tuned" and exact:
            sentences.append(_tuning_sentence(tuned, metrics, results))
    return sentences


def _gain_sentence(
    stage: Stage,
    metric: str,
    name: str,
    after: Mapping[str, Estimate],
    parent: str,
    before: Mapping[str, Estimate],
    moved: Estimate | None,
) -> str:
    new, old = after[metric], before[metric]
    change = f"from {short(old.value)} to {short(new.value)} ({short(new.value - old.value, signed=True)})"
    if new.value == old.value:
        sentence = f"{stage.name} left the {name} of {parent} at {short(old.value)}"
    elif moved is None or not _is_clear(moved):
        sentence = f"{stage.name} moved the {name} of {parent} {change}, no clear difference"
    else:
        verb = "raised" if new.value > old.value else "lowered"
        sentence = f"{stage.name} {verb} the {name} of {parent} {change}"
    if "kl" in after:
        sentence += f", at {short(after['kl'].value)} nats of KL"
    if metric != "accuracy" and "accuracy" in after and "accuracy" in before:
        accuracies = short(before["accuracy"].value), short(after["accuracy"].value)
        way = (
            f"stayed at {accuracies[0]}" if accuracies[0] == accuracies[1] else "went from {} to {}".format(*accuracies)
        )
        sentence += f"; exact accuracy {way}"
    return sentence + "."


def _tuning_sentence(stage: Stage, metrics: Mapping[str, Estimate], results: TaskResults) -> str:
    base = results.metrics.get(stage.parents.get("parent", ""), {}).get("accuracy")
    accuracy = metrics["accuracy"]
    start = f" ({stage.parents['parent']}: {percent(base.value)})" if base else ""
    sentence = f"{stage.name} answers {percent(accuracy.value)} of the held-out items exactly{start}"
    if "stop_rate" in metrics:
        sentence += f" and stops by itself in {percent(metrics['stop_rate'].value)} of its answers"
    return sentence + "."


def _overlap(a: Estimate, b: Estimate) -> bool:
    """Whether the two intervals overlap; false if one has no interval."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return False
    return a.low <= b.high and b.low <= a.high


def named(models: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(models[:-1]), models[-1] if models else ""]))
