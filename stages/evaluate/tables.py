"""Computes the tables of results.json from the models' answers and scores. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.sampling import Completion
from stages.evaluate.statistics import Difference, Estimate, Items, difference, estimate, mean


@dataclass
class Answered:
    """One model's answers to all prompts, in the prompts' order, and their scores."""

    greedy: list[Completion]
    greedy_texts: list[str]
    sampled: list[Completion]
    texts: list[str]
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    kl: list[float] | None = None
    """KL from the model's parent, nats per answer; None if the parent was not evaluated."""
    beside: dict[str, Items] = field(default_factory=dict)
    """The metrics that need none of these answers."""

    def items(self) -> dict[str, Items]:
        """Every metric, item by item."""
        own = {
            "stop_rate": Items([float(c.end == "stop") for c in self.greedy]),
            "length_tokens": Items([float(len(c.ids)) for c in self.sampled]),
        }
        kl = {} if self.kl is None else {"kl": Items(self.kl)}
        return own | {name: Items(values) for name, values in self.scores.items()} | self.beside | kl


def binary_metrics(answered: Mapping[str, Answered]) -> set[str]:
    """The metrics with no values other than 0 and 1, over all models."""
    found: dict[str, bool] = {}
    for a in answered.values():
        for name, items in a.items().items():
            shares = items.sizes is None and name != "length_tokens" and all(v in (0, 1, None) for v in items.values)
            found[name] = found.get(name, True) and shares
    return {name for name, shares in found.items() if shares}


def metrics(seed: int, answered: Mapping[str, Answered]) -> dict[str, dict[str, Estimate]]:
    """{model: {metric: estimate}}; a metric without a value is left out."""
    binary = binary_metrics(answered)
    found = {
        model: {name: estimate(items, seed, binary=name in binary) for name, items in a.items().items()}
        for model, a in answered.items()
    }
    return {model: {name: one for name, one in each.items() if one is not None} for model, each in found.items()}


def changes(seed: int, origins: Mapping[str, str], answered: Mapping[str, Answered]) -> dict[str, dict[str, Any]]:
    """{model: {"over": its parent, "metrics": {metric: the difference from the parent, item by item}}}."""
    out: dict[str, dict[str, Any]] = {}
    for model, origin in origins.items():
        after, before = answered[model].items(), answered[origin].items()
        found: dict[str, Difference] = {}
        for name in after:
            # KL is itself measured from the parent.
            one = difference(after[name], before[name], seed) if name in before and name != "kl" else None
            if one is not None:
                found[name] = one
        out[model] = {"over": origin, "metrics": found}
    return out


def unscored(model: str, answered: Answered) -> list[str]:
    """What to say of the metrics that have no value for some of a model's answers."""
    lines = []
    for name, items in answered.items().items():
        count = len(items.values)
        missing = count - len(items.known())
        if missing:
            rest = "it is left out" if missing == count else "its mean is that of the others"
            lines.append(f"{model}: {name} has no value for {missing} of {count} answers; {rest}")
    return lines


def groups(
    seed: int, metric: str, keys: Sequence[str | None], answered: Mapping[str, Answered]
) -> dict[str, dict[str, Estimate]]:
    """{group: {model: estimate}} of one metric; groups are in the order of their first prompts.

    `keys`: the group of each prompt; None for a prompt without a group.
    """
    binary = metric in binary_metrics(answered)
    out: dict[str, dict[str, Estimate]] = {}
    for key in dict.fromkeys(key for key in keys if key is not None):
        rows = [i for i, other in enumerate(keys) if other == key]
        found = {
            model: estimate(Items([a.scores[metric][i] for i in rows]), seed, binary=binary)
            for model, a in answered.items()
        }
        known = {model: one for model, one in found.items() if one is not None}
        if known:
            out[key] = known
    return out


def win_rates(
    seed: int, metric: str, origins: Mapping[str, str], answered: Mapping[str, Answered]
) -> dict[str, dict[str, Any]]:
    """Share of prompts where a model's answer scores higher than its parent's; a tie counts as half a win.

    `origins`: {model: its parent}, for models whose parent was evaluated too.
    """
    out: dict[str, dict[str, Any]] = {}
    for model, origin in origins.items():
        pairs = zip(answered[model].scores[metric], answered[origin].scores[metric], strict=True)
        wins = [0.5 if x == y else float(x > y) for x, y in pairs if x is not None and y is not None]
        if wins:
            out[model] = {"over": origin, "by": metric, **mean(wins, seed)}
    return out


def printed(results: Mapping[str, Any], on: Mapping[str, str]) -> list[list[str]]:
    """The rows of the printed table: a heading with the metrics, one with what each is measured on, then the models.

    Args:
        results: as in results.json.
        on: {metric: `greedy` or `sampled` answers, `documents`, `references`, or `choices`}.
    """
    found = {model: results["metrics"][model] for model in results["models"]}
    names = list(dict.fromkeys(name for measured in found.values() for name in measured))
    rows = [["model", *names], ["", *(on[name] for name in names)]]
    return rows + [[model, *(_told(measured.get(name)) for name in names)] for model, measured in found.items()]


def printed_changes(results: Mapping[str, Any]) -> tuple[str | None, list[list[str]]]:
    """What to say of the differences from the parents, and the rows of their table; neither if there are none."""
    changed: Mapping[str, Any] = results["changes"]
    if not changed:
        return None, []
    names = list(dict.fromkeys(name for one in changed.values() for name in one["metrics"]))
    rows = [["difference", *names]]
    rows += [
        [f"{model} - {one['over']}", *(_told(one["metrics"].get(name), signed=True) for name in names)]
        for model, one in changed.items()
    ]
    count = sum(len(one["metrics"]) for one in changed.values())
    said = (
        f"Differences from the parent, item by item, with 95 % intervals; * leaves 0 out. Of {count} such intervals, "
        f"about {count * 0.05:.1f} leave out the true value by chance"
    )
    return said, rows


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
