"""Charts as inline SVG, drawn by matplotlib and coloured by the page's style sheet.

matplotlib writes placeholder colours (`#0101xx`), which are then replaced by CSS variables, so that one drawing serves
light and dark pages. Text stays text, in the page's font. Ids get the chart's prefix, since several drawings share a
page. A chart includes its title, a description for screen readers and a table of its numbers.
"""

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from markupsafe import Markup, escape
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

from baton.report.text import NOTHING, number, short, visible

T = TypeVar("T")

SERIES_COLORS = 8
RAMP_COLORS = 7
_TOKENS = [
    "ink",
    "muted",
    "line",
    "paper",
    *(f"s{i}" for i in range(SERIES_COLORS)),
    *(f"q{i}" for i in range(RAMP_COLORS)),
]
_STAND_IN = {token: f"#0101{index:02x}" for index, token in enumerate(_TOKENS)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",  # used to measure text; the page's own font replaces it
    "font.size": 11,
    "text.color": _STAND_IN["ink"],
    "axes.edgecolor": _STAND_IN["line"],
    "axes.labelcolor": _STAND_IN["muted"],
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": _STAND_IN["line"],
    "grid.linewidth": 0.8,
    "xtick.color": _STAND_IN["line"],
    "xtick.labelcolor": _STAND_IN["muted"],
    "ytick.color": _STAND_IN["line"],
    "ytick.labelcolor": _STAND_IN["muted"],
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "lines.solid_capstyle": "round",
}
_SIZE = (4.5, 2.45)  # inches at 72 units each: drawn at the width of one column, so that its 11-unit text is 11 pixels
_TABLE_ROWS = 40


@dataclass(frozen=True)
class Series:
    """One line of a chart: `values[i]` at step `steps[i]`, in the style sheet's colour `color` (`s0`, `muted`, ...)."""

    label: str
    color: str
    steps: Sequence[float]
    values: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True)
class Legend:
    """An entry of a chart's legend, with the first and the last value in words."""

    label: str
    color: str
    dashed: bool
    summary: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its texts and numbers on the page."""

    title: str
    svg: Markup
    legend: list[Legend]
    columns: list[str]
    rows: list[list[str]]
    rows_note: str
    ramp: str = ""
    """The meaning of the ends of the colour ramp, if the chart uses one."""
    note: str = ""


def line_chart(key: str, title: str, series: Sequence[Series], *, x_label: str = "step", note: str = "") -> Chart:
    """Lines over steps. A series of many points is shown pale with its running mean on top.

    key: unique on the page; it prefixes the ids of the drawing.
    """
    assert series and all(s.steps for s in series), title
    legend = [Legend(s.label, s.color, s.dashed, _summary(s.values)) for s in series]
    with rc_context(_STYLE | {"svg.hashsalt": key, "svg.id": key}):
        figure, axes = _figure()
        for one in series:
            _draw_line(axes, one)
        axes.set_xlabel(x_label)
        axes.margins(x=0.02, y=0.08)
        svg = _svg(figure, key, title, "; ".join(f"{entry.label}: {entry.summary}" for entry in legend))
    steps = sorted({step for s in series for step in s.steps})
    lookup = [dict(zip(s.steps, s.values)) for s in series]
    shown, rows_note = _thin(steps)
    rows = [[number(step), *(number(values.get(step)) for values in lookup)] for step in shown]
    return Chart(title, svg, legend, [x_label, *(s.label for s in series)], rows, rows_note, note=note)


def path_chart(
    key: str,
    title: str,
    points: Sequence[tuple[float, float, float]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
) -> Chart:
    """A path in the plane, `points` = (step, x, y), coloured along the ramp from the first step to the last."""
    assert points, title
    steps, xs, ys = zip(*points)
    span = max(steps) - min(steps) or 1
    colors = [_STAND_IN[f"q{round((step - min(steps)) / span * (RAMP_COLORS - 1))}"] for step in steps]
    with rc_context(_STYLE | {"svg.hashsalt": key, "svg.id": key, "axes.grid.axis": "both"}):
        figure, axes = _figure()
        axes.plot(xs, ys, color=_STAND_IN["line"], linewidth=1.2, zorder=2)
        axes.scatter(xs, ys, c=colors, s=26, linewidths=0, zorder=3)
        axes.scatter(xs[:1], ys[:1], s=54, facecolors=_STAND_IN["paper"], edgecolors=_STAND_IN["muted"], zorder=4)
        axes.scatter(xs[-1:], ys[-1:], s=70, c=[colors[-1]], edgecolors=_STAND_IN["ink"], linewidths=1.2, zorder=5)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.margins(x=0.06, y=0.12)
        description = (
            f"from {y_label} {number(ys[0])} at {x_label} {number(xs[0])} "
            f"to {y_label} {number(ys[-1])} at {x_label} {number(xs[-1])}"
        )
        svg = _svg(figure, key, title, description)
    shown, rows_note = _thin(points)
    rows = [[number(value) for value in point] for point in shown]
    ramp = f"step {number(min(steps))} → {number(max(steps))}"
    return Chart(title, svg, [], ["step", x_label, y_label], rows, rows_note, ramp=ramp, note=note)


@dataclass(frozen=True)
class Point:
    """A value with its interval of one model in `tree_chart`."""

    label: str
    parent: str | None
    """Label of the point from which a line is drawn; None: none."""
    value: float
    low: float
    high: float
    color: str


def tree_chart(key: str, title: str, points: Sequence[Point], *, note: str = "") -> Chart:
    """Points with intervals beside each other, and a line from each one's parent to it."""
    places = {point.label: place for place, point in enumerate(points)}
    with rc_context(_STYLE | {"svg.hashsalt": key, "svg.id": key}):
        figure, axes = _figure()
        for point in points:
            x = places[point.label]
            if point.parent is not None and point.parent in places:
                before = points[places[point.parent]].value
                axes.plot(
                    [places[point.parent], x], [before, point.value], color=_STAND_IN["line"], linewidth=1.4, zorder=2
                )
            color = _STAND_IN[point.color]
            axes.plot([x, x], [point.low, point.high], color=color, linewidth=1.8, zorder=3)
            axes.plot([x], [point.value], "o", color=color, markersize=5.5, zorder=4)
        axes.set_xticks(range(len(points)), [str(visible(point.label))[:14] for point in points])
        axes.margins(x=0.08, y=0.12)
        described = "; ".join(f"{point.label}: {number(point.value)}" for point in points)
        svg = _svg(figure, key, title, described)
    rows = [[one.label, one.parent or NOTHING, number(one.value), number(one.low), number(one.high)] for one in points]
    return Chart(title, svg, [], ["model", "from", "value", "low", "high"], rows, "", note=note)


def histogram(
    key: str,
    title: str,
    edges: Sequence[float],
    counts: Sequence[tuple[str, str, Sequence[int]]],
    *,
    x_label: str,
    note: str = "",
) -> Chart:
    """A histogram over the bins between neighbouring `edges`; `counts` = (label, colour, a count per bin)."""
    assert counts and all(len(values) == len(edges) - 1 for _, _, values in counts), title
    legend = [Legend(label, color, False, number(sum(values))) for label, color, values in counts]
    with rc_context(_STYLE | {"svg.hashsalt": key, "svg.id": key}):
        figure, axes = _figure()
        for _, color, values in counts:
            axes.stairs(values, edges, color=_STAND_IN[color], fill=True, alpha=0.25, linewidth=0)
            axes.stairs(values, edges, color=_STAND_IN[color], linewidth=1.6)
        axes.set_xlabel(x_label)
        axes.margins(x=0.02)
        axes.set_ylim(bottom=0)
        middles = [(edges[i] + edges[i + 1]) / 2 for i in range(len(edges) - 1)]
        means = [math.fsum(n * at for n, at in zip(values, middles)) / (sum(values) or 1) for _, _, values in counts]
        described = "; ".join(f"{label}: mean about {number(mean)}" for (label, _, _), mean in zip(counts, means))
        svg = _svg(figure, key, title, described)
    rows = [
        [number(edges[i]), number(edges[i + 1]), *(number(values[i]) for _, _, values in counts)]
        for i in range(len(edges) - 1)
    ]
    shown, rows_note = _thin(rows)
    return Chart(title, svg, legend, ["from", "to", *(label for label, _, _ in counts)], shown, rows_note, note=note)


def _figure() -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    FigureCanvasSVG(figure)
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(_tick))
    return figure, axes


def _tick(value: float, _position: int) -> str:
    """A tick's label without rounding noise: 0.30000000000000004 becomes 0.3."""
    return f"{value:,.6g}".replace("-", "−")


def _draw_line(axes: Axes, series: Series) -> None:
    color = _STAND_IN[series.color]
    style = (0, (4, 2.5)) if series.dashed else "-"
    if len(series.steps) == 1:
        axes.plot(series.steps, series.values, "o", color=color, markersize=5)
    elif len(series.steps) <= 24:
        axes.plot(series.steps, series.values, color=color, linewidth=1.8, linestyle=style, marker="o", markersize=3.2)
    else:
        axes.plot(series.steps, series.values, color=color, linewidth=1.0, alpha=0.35)
        axes.plot(series.steps, _running_mean(series.values), color=color, linewidth=1.9, linestyle=style)


def _running_mean(values: Sequence[float]) -> list[float]:
    """Centred mean over about a fifteenth of the points; the window shrinks at both ends."""
    half = max(1, len(values) // 30)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        out.append(math.fsum(window) / len(window))
    return out


def _summary(values: Sequence[float]) -> str:
    return short(values[0]) if len(values) == 1 else f"{short(values[0])} → {short(values[-1])}"


def _thin(rows: Sequence[T]) -> tuple[list[T], str]:
    """At most `_TABLE_ROWS` evenly spaced `rows`, with the first and the last, and a note if some are left out."""
    if len(rows) <= _TABLE_ROWS:
        return list(rows), ""
    picked = sorted({round(i * (len(rows) - 1) / (_TABLE_ROWS - 1)) for i in range(_TABLE_ROWS)})
    return [rows[i] for i in picked], f"{len(picked)} of {len(rows)} points; all are in metrics.jsonl"


def _svg(figure: Figure, key: str, title: str, description: str) -> Markup:
    """The drawing as an SVG element for a page: no prolog, no metadata, no fixed size, unique ids."""
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"#0101([0-9a-f]{2})", lambda found: f"var(--{_TOKENS[int(found[1], 16)]})", text)
    text = re.sub(r'\bid="', f'id="{key}-', text)
    text = re.sub(r'((?:href="|url\()#)', rf"\1{key}-", text)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    head, body = text.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None, head
    # No namespace declarations: inside HTML the parser supplies them.
    opening = f'<svg class="plot" {box[0]} role="img" aria-labelledby="{key}-title {key}-text">'
    labels = f'<title id="{key}-title">{_label(title)}</title><desc id="{key}-text">{_label(description)}</desc>'
    return Markup(opening + labels + body)


def _label(text: str) -> Markup:
    return escape(visible(text))
