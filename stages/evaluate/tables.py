"""Computes the tables of results.json from the models' answers and scores. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rollout.sampling import Completion
from stages.evaluate.statistics import Estimate, estimate, mean, proportion

Scores = Mapping[str, Sequence[float | None]]
"""{metric: one value for each prompt; None where the score function gives none}."""


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


def binary_metrics(answered: Mapping[str, Answered]) -> set[str]:
    """The metrics with no values other than 0 and 1, over all models."""
    names = {name for a in answered.values() for name in a.scores}
    return {
        name
        for name in names
        if all(value in (0, 1, None) for a in answered.values() for value in a.scores.get(name, ()))
    }


def metrics(seed: int, answered: Mapping[str, Answered]) -> dict[str, dict[str, Estimate]]:
    """{model: {metric: estimate}}; a score that is None for all answers is left out."""
    binary = binary_metrics(answered)
    out: dict[str, dict[str, Estimate]] = {}
    for model, a in answered.items():
        out[model] = {
            "stop_rate": proportion([c.end == "stop" for c in a.greedy]),
            "length_tokens": mean([float(len(c.ids)) for c in a.sampled], seed),
        }
        for name, values in a.scores.items():
            found = estimate(values, seed, binary=name in binary)
            if found is not None:
                out[model][name] = found
        if a.kl is not None:
            out[model]["kl"] = mean(a.kl, seed)
    return out


def unscored(model: str, scores: Scores) -> list[str]:
    """What to say of the metrics that have no value for some of a model's answers."""
    lines = []
    for name, values in scores.items():
        missing = sum(value is None for value in values)
        if missing:
            rest = "it is left out" if missing == len(values) else "its mean is that of the others"
            lines.append(f"{model}: {name} has no value for {missing} of {len(values)} answers; {rest}")
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
            model: estimate([a.scores[metric][i] for i in rows], seed, binary=binary) for model, a in answered.items()
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
        on: {metric: `greedy` or `sampled` answers, `documents`, or `choices`}.
    """
    found = {model: dict(results["metrics"][model]) for model in results["models"]}
    for model, bits in results["bits_per_byte"].items():
        found[model]["bits_per_byte"] = bits
    names = list(dict.fromkeys(name for measured in found.values() for name in measured))
    rows = [["model", *names], ["", *(on[name] for name in names)]]
    return rows + [[model, *(_told(measured.get(name)) for name in names)] for model, measured in found.items()]


def _told(estimate: Mapping[str, Any] | None) -> str:
    """`0.74 (0.71 to 0.78)`; `-` for what was not measured."""
    if estimate is None:
        return "-"
    value = f"{estimate['value']:.3g}"
    return value if estimate.get("low") is None else f"{value} ({estimate['low']:.3g} to {estimate['high']:.3g})"


def spread(keys: Sequence[str | None], count: int) -> list[int]:
    """Indices of `count` prompts to show: first one of each group, then a second one of each, and so on."""
    seen: dict[str | None, int] = {}
    ranked = []
    for i, key in enumerate(keys):
        seen[key] = seen.get(key, 0) + 1
        ranked.append((seen[key], i))
    return sorted(i for _, i in sorted(ranked)[:count])
