"""Computes the tables of results.json from the values of all items. Pure functions."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from stages.evaluate.statistics import Difference, Estimate, Items, difference, estimate, mean

Measured: TypeAlias = Mapping[str, Mapping[str, Items]]
"""{model: {metric: values of all items}}"""


def binary_metrics(measured: Measured) -> set[str]:
    """The metrics with no values other than 0 and 1, over all models."""
    found: dict[str, bool] = {}
    for each in measured.values():
        for name, items in each.items():
            shares = items.sizes is None and name != "length_tokens" and all(v in (0, 1, None) for v in items.values)
            found[name] = found.get(name, True) and shares
    return {name for name, shares in found.items() if shares}


def metrics(seed: int, measured: Measured) -> dict[str, dict[str, Estimate]]:
    """{model: {metric: estimate}}; a metric without a value is left out."""
    binary = binary_metrics(measured)
    found = {
        model: {name: estimate(items, seed, binary=name in binary) for name, items in each.items()}
        for model, each in measured.items()
    }
    return {model: {name: one for name, one in each.items() if one is not None} for model, each in found.items()}


def changes(seed: int, origins: Mapping[str, str], measured: Measured) -> dict[str, dict[str, Any]]:
    """{model: {"over": its parent, "metrics": {metric: the difference from the parent, item by item}}}."""
    out: dict[str, dict[str, Any]] = {}
    for model, origin in origins.items():
        after, before = measured[model], measured[origin]
        found: dict[str, Difference] = {}
        for name in after:
            # KL is itself measured from the parent.
            one = difference(after[name], before[name], seed) if name in before and name != "kl" else None
            if one is not None:
                found[name] = one
        out[model] = {"over": origin, "metrics": found}
    return out


def unscored(label: str, items_of: Mapping[str, Items]) -> list[str]:
    """What to say of the metrics that have no value for some of a model's answers. `label`: model and task."""
    lines = []
    for name, items in items_of.items():
        count = len(items.values)
        missing = count - len(items.known())
        if missing:
            rest = "it is left out" if missing == count else "its mean is that of the others"
            lines.append(f"{label}: {name} has no value for {missing} of {count} answers; {rest}")
    return lines


def groups(seed: int, metric: str, keys: Sequence[str | None], measured: Measured) -> dict[str, dict[str, Estimate]]:
    """{group: {model: estimate}} of one metric; groups are in the order of their first items.

    `keys`: the group of each item; None for an item without a group.
    """
    binary = metric in binary_metrics(measured)
    out: dict[str, dict[str, Estimate]] = {}
    for key in dict.fromkeys(key for key in keys if key is not None):
        rows = [i for i, other in enumerate(keys) if other == key]
        found = {
            model: estimate(Items([each[metric].values[i] for i in rows]), seed, binary=binary)
            for model, each in measured.items()
            if metric in each
        }
        known = {model: one for model, one in found.items() if one is not None}
        if known:
            out[key] = known
    return out


def win_rates(seed: int, metric: str, origins: Mapping[str, str], measured: Measured) -> dict[str, dict[str, Any]]:
    """Share of prompts where a model's answer scores higher than its parent's; a tie counts as half a win.

    `origins`: {model: its parent}, for models whose parent was evaluated too.
    """
    out: dict[str, dict[str, Any]] = {}
    for model, origin in origins.items():
        pairs = zip(measured[model][metric].values, measured[origin][metric].values, strict=True)
        wins = [0.5 if x == y else float(x > y) for x, y in pairs if x is not None and y is not None]
        if wins:
            out[model] = {"over": origin, "by": metric, **mean(wins, seed)}
    return out


def printed(results: Mapping[str, Any]) -> list[list[str]]:
    """The rows of a task's printed table: a heading with the metrics, one with what each is measured on, then the
    models. `results`: the task's entry in results.json."""
    on = results["on"]
    found = {model: results["metrics"][model] for model in results["models"]}
    names = list(dict.fromkeys(name for measured in found.values() for name in measured))
    rows = [["model", *names], ["", *(on[name] for name in names)]]
    return rows + [[model, *(_told(measured.get(name)) for name in names)] for model, measured in found.items()]


def printed_changes(results: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table of a task's differences from the parents; none if there are none."""
    changed: Mapping[str, Any] = results["changes"]
    if not changed:
        return []
    names = list(dict.fromkeys(name for one in changed.values() for name in one["metrics"]))
    rows = [["difference", *names]]
    rows += [
        [f"{model} - {one['over']}", *(_told(one["metrics"].get(name), signed=True) for name in names)]
        for model, one in changed.items()
    ]
    return rows


def comparisons(tasks: Mapping[str, Mapping[str, Any]]) -> int:
    """Number of differences from parents that an evaluation reports with an interval."""
    return sum(len(one["metrics"]) for task in tasks.values() for one in task["changes"].values())


def _told(estimate: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """`0.74 (0.71 to 0.78)`, or signed `+0.03 (+0.01 to +0.06)*`; `-` for what was not measured."""
    if estimate is None:
        return "-"
    value, low, high = (f"{estimate[key]:{'+' if signed else ''}.3g}" for key in ("value", "low", "high"))
    clear = signed and not estimate["low"] <= 0 <= estimate["high"]
    return f"{value} ({low} to {high}){'*' if clear else ''}"


def spread(keys: Sequence[str | None], count: int) -> list[int]:
    """Indices of `count` prompts to show: first one of each group, then a second one of each, and so on."""
    seen: dict[str | None, int] = {}
    ranked = []
    for i, key in enumerate(keys):
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], i))
    return sorted(i for _, i in sorted(ranked)[:count])
