"""The lineage of a run as an SVG diagram: a layer per generation, an arrow from each parent to its child.

The layout is a minimal version of Sugiyama's. A stage's layer is the length of the longest path to it from a root. An
edge that skips layers passes through invisible points in them; all edges into one stage share these points, so that the
many models of an evaluation arrive as one line. The order inside a layer follows the mean position of the neighbours.
There are two drawings: from left to right for wide pages, from top to bottom for narrow ones.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from baton.report.text import visible


@dataclass(frozen=True)
class Node:
    """A box: `parents` are the names of other nodes; `color` is a variable of the style sheet."""

    name: str
    caption: str
    color: str
    parents: tuple[str, ...]
    outside: bool = False
    """Whether it is not a stage of this run but a checkpoint from which the run started."""
    unfinished: bool = False


@dataclass(frozen=True)
class _Point:
    """A node (`skips` is None), or the point where edges to the node `name` cross the layer `layer`."""

    name: str
    layer: int
    skips: bool = False


_WIDTH, _HEIGHT, _GAP = 132, 48, 16


def draw(nodes: Sequence[Node], *, vertical: bool) -> Markup:
    """The diagram of `nodes`, which are in topological order (parents before children)."""
    assert nodes
    layers = _layers(nodes)
    points, edges = _points(nodes, layers)
    _order(points, edges)
    along_gap = 30 if vertical else 48
    node_along, node_across = (_HEIGHT, _WIDTH) if vertical else (_WIDTH, _HEIGHT)
    across = _place(points, edges, node_across)
    length = len(points) * (node_along + along_gap) - along_gap
    breadth = max(across[p] + _breadth(p, node_across) / 2 for p in across)

    def xy(along: float, across: float) -> tuple[float, float]:
        return (across + 2, along + 2) if vertical else (along + 2, across + 2)

    kind = "tall" if vertical else "wide"
    key = f"lineage-{kind}"
    parts = []
    for start, end in edges:
        leave = start.layer * (node_along + along_gap) + node_along
        arrive = end.layer * (node_along + along_gap) - (0 if end.skips else 1)
        middle = (leave + arrive) / 2
        parts.append(
            _curve(
                xy(leave, across[start]),
                xy(middle, across[start]),
                xy(middle, across[end]),
                xy(arrive, across[end]),
                "" if end.skips else f"{key}-arrow",
            )
        )
    by_name = {node.name: node for node in nodes}
    for point, centre in across.items():
        begin = point.layer * (node_along + along_gap)
        if point.skips:  # straight past the boxes of its layer
            (a, b), (c, d) = xy(begin, centre), xy(begin + node_along, centre)
            parts.append(f'<path class="edge" d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}"/>')
        else:
            parts.append(_box(by_name[point.name], *xy(begin + node_along / 2, centre)))
    width, height = (breadth, length) if vertical else (length, breadth)
    words = (
        "; ".join(f"{n.name} from {' and '.join(n.parents)}" for n in nodes if n.parents) or "stages without parents"
    )
    head = (
        f'<svg class="lineage {kind}" viewBox="0 0 {width + 4:.0f} {height + 4:.0f}" '
        f'style="max-width:{width + 4:.0f}px" role="img" aria-labelledby="{key}-title {key}-text">'
        f'<title id="{key}-title">Lineage of the run</title><desc id="{key}-text">{escape(visible(words))}</desc>'
        f'<defs><marker id="{key}-arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
        'orient="auto"><path d="M0 0.8 7.4 4 0 7.2z" class="head"/></marker></defs>'
    )
    return Markup(head + "".join(parts) + "</svg>")


def _layers(nodes: Sequence[Node]) -> dict[str, int]:
    layers: dict[str, int] = {}
    for node in nodes:
        layers[node.name] = max((layers[parent] + 1 for parent in node.parents), default=0)
    return layers


def _points(nodes: Sequence[Node], layers: Mapping[str, int]) -> tuple[list[list[_Point]], list[tuple[_Point, _Point]]]:
    points: list[list[_Point]] = [[] for _ in range(max(layers.values()) + 1)]
    for node in nodes:
        points[layers[node.name]].append(_Point(node.name, layers[node.name]))
    edges: dict[tuple[_Point, _Point], None] = {}
    for node in nodes:
        for parent in node.parents:
            last = _Point(parent, layers[parent])
            for layer in range(layers[parent] + 1, layers[node.name]):
                through = _Point(node.name, layer, skips=True)
                if through not in points[layer]:
                    points[layer].append(through)
                edges[last, through] = None
                last = through
            edges[last, _Point(node.name, layers[node.name])] = None
    return points, list(edges)


def _order(points: list[list[_Point]], edges: Sequence[tuple[_Point, _Point]]) -> None:
    """Sorts each layer by the mean position of its neighbours, in a few sweeps in both directions."""
    for sweep in range(6):
        place = {p: (i - (len(layer) - 1) / 2) for layer in points for i, p in enumerate(layer)}
        forward = sweep % 2 == 0
        for layer in points if forward else reversed(points):
            mean = {}
            for point in layer:
                near = [place[a if forward else b] for a, b in edges if (b if forward else a) == point]
                mean[point] = sum(near) / len(near) if near else place[point]
            layer.sort(key=lambda point: mean[point])
            place |= {p: (i - (len(layer) - 1) / 2) for i, p in enumerate(layer)}


def _breadth(point: _Point, node_across: float) -> float:
    return 12.0 if point.skips else node_across


def _place(
    points: Sequence[Sequence[_Point]], edges: Sequence[tuple[_Point, _Point]], node_across: float
) -> dict[_Point, float]:
    """The centre of each point across its layer: near its neighbours, in the layer's order, without overlap."""
    centre = {p: index * (node_across + _GAP) for layer in points for index, p in enumerate(layer)}
    for sweep in range(60):
        for layer in points if sweep % 2 == 0 else reversed(points):
            wish = {}
            for point in layer:
                near = [a if b == point else b for a, b in edges if point in (a, b)]
                # Boxes align with boxes, so that a chain is straight; lines take the remaining space.
                if not point.skips:
                    near = [other for other in near if not other.skips] or near
                wish[point] = sum(centre[other] for other in near) / len(near) if near else centre[point]
            placed: list[float] = []
            for index, point in enumerate(layer):
                least = -float("inf")
                if index:
                    both = _breadth(layer[index - 1], node_across) + _breadth(point, node_across)
                    least = placed[-1] + both / 2 + _GAP
                placed.append(max(wish[point], least))
            off = [wish[p] - at for p, at in zip(layer, placed)]
            off = [value for p, value in zip(layer, off) if not p.skips] or off
            shift = sum(off) / len(off)
            centre |= {p: at + shift for p, at in zip(layer, placed)}
    first = min(at - _breadth(p, node_across) / 2 for p, at in centre.items())
    return {p: at - first for p, at in centre.items()}


def _curve(
    start: tuple[float, float],
    leave: tuple[float, float],
    arrive: tuple[float, float],
    end: tuple[float, float],
    arrow: str,
) -> str:
    """A cubic Bézier curve; `arrow` is the id of the marker at its end, empty for none."""
    (a, b), (c, d), (e, f), (g, h) = start, leave, arrive, end
    marker = f' marker-end="url(#{arrow})"' if arrow else ""
    return f'<path class="edge" d="M{a:.1f} {b:.1f}C{c:.1f} {d:.1f} {e:.1f} {f:.1f} {g:.1f} {h:.1f}"{marker}/>'


def _box(node: Node, x: float, y: float) -> str:
    left, top = x - _WIDTH / 2, y - _HEIGHT / 2
    state = " outside" if node.outside else " unfinished" if node.unfinished else ""
    return (
        f'<g class="node{state}"><rect x="{left:.1f}" y="{top:.1f}" width="{_WIDTH}" height="{_HEIGHT}" rx="8"/>'
        f'<rect class="tab" x="{left + 10:.1f}" y="{top + 11:.1f}" width="4" height="{_HEIGHT - 22}" rx="2" '
        f'style="fill:var(--{node.color})"/>'
        f'<text x="{left + 23:.1f}" y="{y - 3:.1f}" class="name">{_fit(node.name, 14)}</text>'
        f'<text x="{left + 23:.1f}" y="{y + 13:.1f}" class="caption">{_fit(node.caption, 18)}</text></g>'
    )


def _fit(text: str, length: int) -> Markup:
    return escape(visible(text if len(text) <= length else text[: length - 1] + "…"))
