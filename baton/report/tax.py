"""The alignment tax: what the stages did to the tasks that a base model can do, as a curve over all models.

These are the tasks that need no answers: choices by likelihood, and bits a byte of held-out text.
"""

from collections.abc import Mapping

from baton.report.charts import Chart, Point, tree_chart
from baton.report.collect import Results

_MEASURED = {"choices": ("accuracy", "higher is better"), "documents": ("bits_per_byte", "lower is better")}


def charts(key: str, results: Results, palette: Mapping[str, str]) -> list[Chart]:
    """A chart for each such task, with a line from every model to those that were trained from it.

    Args:
        key: unique on the page.
        palette: {model: colour of the style sheet}.
    """
    found = []
    for i, task in enumerate(results.tasks.values()):
        metric, better = _MEASURED.get(task.kind, ("", ""))
        points = []
        for model in results.models:
            estimate = task.metrics.get(model, {}).get(metric)
            if estimate is not None:
                over = task.changes[model].over if model in task.changes else None
                low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
                points.append(Point(model, over, estimate.value, low, high, palette.get(model, "muted")))
        if len(points) > 1:
            title = f"{task.name}: {metric.replace('_', ' ')}"
            found.append(tree_chart(f"{key}-{i}", title, points, note=f"95 % intervals; {better}"))
    return found
