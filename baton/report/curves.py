"""Draws a run's curves, from the charts that its stages declare and the metrics that they logged.

A stage that declares no charts (for example, of a package that is not installed here) gets one chart for each metric. A
metric that was not logged gets no chart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.report.charts import SERIES_COLORS, Chart, Series, line_chart, path_chart
from baton.report.collect import Stage
from baton.report.text import duration
from training import declaration
from training.declaration import Line, held_out

_HELD_OUT = ("eval_", "eval/")
# Counters and times, which say nothing about how the training went.
_NO_CURVES = ("step", "epoch", "episode", "num_tokens", "time/")


@dataclass(frozen=True)
class Phase:
    """Share of a stage's time that one phase took, in percent; `text` is its duration."""

    name: str
    percent: float
    text: str
    color: str


@dataclass(frozen=True)
class StageCurves:
    """The report section of a stage that declares its own section."""

    stage: Stage
    lede: str
    path: Chart | None
    charts: list[Chart]
    phases: list[Phase]


def training_charts(stages: Sequence[Stage], colors: Mapping[str, str]) -> list[Chart]:
    """The charts of the stages without a section of their own, grouped by title."""
    drawn: dict[str, list[Chart]] = {}
    for index, stage in enumerate(stages):
        if stage.declared.section is not None:
            continue
        for wanted in stage.declared.charts or _charts_of_metrics(stage):
            key = f"t{index}-{wanted.title.replace(' ', '-').replace('/', '-')}"
            chart = _chart(key, f"{stage.name} · {wanted.title}", stage, wanted, colors[stage.name])
            if chart is not None:
                drawn.setdefault(wanted.title, []).append(chart)
    return [chart for charts in drawn.values() for chart in charts]


def _charts_of_metrics(stage: Stage) -> list[declaration.Chart]:
    """A chart for each metric that the stage logged at two steps or more, with the held-out curve of the same name."""
    logged = {key for row in stage.metrics for key in row if not key.startswith(_NO_CURVES)}
    curves = {key for key in logged if len(stage.series(key)[0]) > 1}
    names = {key.removeprefix("eval_").removeprefix("eval/") for key in curves}
    charts = []
    for name in sorted(names):
        held = [held_out(key) for prefix in _HELD_OUT if (key := prefix + name) in logged]
        charts.append(declaration.Chart(name, (Line(name, "train"), *held)))
    return charts


def sections(stages: Sequence[Stage], colors: Mapping[str, str]) -> list[StageCurves]:
    """The curves of every stage that declares its own section and logged at least one of the section's metrics."""
    found = []
    for index, stage in enumerate(stages):
        section = stage.declared.section
        if section is None:
            continue
        drawn = [
            _chart(f"p{index}-{number}", wanted.title, stage, wanted, colors[stage.name], section.x_label)
            for number, wanted in enumerate(stage.declared.charts)
        ]
        drawn.append(_parts(f"p{index}-parts", stage, section))
        charts = [chart for chart in drawn if chart is not None]
        lede = section.lede.replace("{parent}", stage.parents.get("parent", "its parent"))
        if charts:
            path = _path(f"p{index}-path", stage, section)
            found.append(StageCurves(stage, lede, path, charts, _phases(stage, section)))
    return found


def _chart(
    key: str, title: str, stage: Stage, wanted: declaration.Chart, color: str, x_label: str = "step"
) -> Chart | None:
    lines = []
    for line in wanted.lines:
        steps, values = stage.series(line.metric)
        if steps:
            lines.append(Series(line.label, line.color or color, steps, values, dashed=bool(line.color)))
    return line_chart(key, title, lines, x_label=x_label, note=wanted.note) if lines else None


def _parts(key: str, stage: Stage, section: declaration.Section) -> Chart | None:
    parts = section.parts
    if parts is None:
        return None
    names = sorted({name for row in stage.metrics for name in row if name.startswith(parts.prefix) and stage.has(name)})
    if len(names) < 2:
        return None
    lines = [
        Series(name.removeprefix(parts.prefix), f"s{index % SERIES_COLORS}", *stage.series(name))
        for index, name in enumerate(names)
    ]
    return line_chart(key, parts.title, lines, x_label=section.x_label, note=parts.note)


def _path(key: str, stage: Stage, section: declaration.Section) -> Chart | None:
    path = section.path
    if path is None:
        return None
    xs, ys = dict(zip(*stage.series(path.x))), dict(zip(*stage.series(path.y)))
    points = [(step, xs[step], ys[step]) for step in sorted(xs.keys() & ys.keys())]
    if len(points) < 2:
        return None
    return path_chart(key, path.title, points, x_label=path.x_label, y_label=path.y_label, note=path.note)


def _phases(stage: Stage, section: declaration.Section) -> list[Phase]:
    sums = {name: sum(stage.series(f"time/{name}")[1]) for name in section.phases}
    total = sum(sums.values())
    if total <= 0:
        return []
    return [
        Phase(name, 100 * seconds / total, duration(seconds), f"s{index % SERIES_COLORS}")
        for index, (name, seconds) in enumerate(sums.items())
        if seconds > 0
    ]
