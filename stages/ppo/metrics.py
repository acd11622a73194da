"""Metrics of an iteration, under TRL's names, so that dashboards made for TRL work."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from data.encode import EncodedPrompt, Encoder
from rollout.trajectory import TrajectoryBatch
from stages.ppo.config import Config, PPOTrainConfig

PUBLISHED = ("objective/scores", "objective/kl", "completions/mean_length")
"""The metrics of the kept iteration that are published with its policy."""
_SHOWN = 8


def iteration_metrics(
    batch: TrajectoryBatch, total: dict[str, float], t: PPOTrainConfig, kl_coef: float
) -> dict[str, float]:
    """Means over the trajectories of an iteration and over the actions trained on.

    `total`: sums over those actions, on all processes. A sum is absent if the chosen losses do not compute it or all
    steps were skipped.
    """
    assert batch.old_logp is not None
    stopped = int(batch.stopped.sum())
    kl = mean(batch.kl)
    metrics = {
        "objective/kl": kl,
        "objective/entropy": -mean(batch.total(batch.old_logp)),
        "objective/scores": mean(batch.reward),
        "objective/non_score_reward": -kl_coef * kl if t.kl_in == "reward" else 0.0,
        "objective/kl_coef": kl_coef,
        "val/num_eos_tokens": stopped,
        "completions/mean_length": mean(batch.action_count),
        "completions/clipped_ratio": (len(batch) - stopped) / len(batch),
        "completions/repetition": mean_repetition(batch),
        **part_means(batch, "rewards"),
    }
    means = {
        "policy/approxkl_avg": ("approxkl", "tokens"),
        "policy/clipfrac_avg": ("clipfrac", "tokens"),
        "policy/entropy_avg": ("entropy", "tokens"),
        "loss/policy_avg": ("policy", "tokens"),
        "loss/value_avg": ("value", "tokens"),
        "val/clipfrac_avg": ("vf_clipfrac", "tokens"),
        "val/ratio": ("ratio", "tokens"),
        "val/first_ratio_deviation": ("first_deviation", "first_tokens"),
    }
    metrics |= {name: total[key] / max(total[n], 1.0) for name, (key, n) in means.items() if key in total}
    if batch.disagreement is not None:
        metrics["objective/disagreement"] = mean(batch.disagreement)
    return metrics


def mean(values: Tensor) -> float:
    """(N,) -> the mean. Summed in order, so that the number of threads does not change the result."""
    return values.double().cumsum(0)[-1].item() / len(values)


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of a text's token n-grams that already occurred earlier in the text.

    >>> repetition([1, 2, 1, 2, 1, 2], n=2)
    0.6
    """
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else 0.0


def mean_repetition(batch: TrajectoryBatch) -> float:
    """Mean over the trajectories of `repetition`, computed on the tokens that the policy chose."""
    ids = batch.ids[batch.actions].split(batch.action_count.tolist())
    return sum(repetition(own.tolist()) for own in ids) / len(batch)


def part_means(batch: TrajectoryBatch, prefix: str) -> dict[str, float]:
    """Mean of each reward over the trajectories that it scored, and the number of those that it did not score."""
    assert batch.parts is not None
    means = {}
    for name, values in zip(batch.part_names, batch.parts.T, strict=True):
        scored = values[~values.isnan()]
        if len(scored):
            means[f"{prefix}/{name}"] = mean(scored)
        if len(scored) < len(batch):
            means[f"{prefix}_none/{name}"] = len(batch) - len(scored)
    return means


def sample_rows(batch: TrajectoryBatch, prompts: Sequence[EncodedPrompt], encoder: Encoder) -> list[dict[str, Any]]:
    """The first answers to `prompts`, for samples.jsonl. A completion contains all the policy's turns."""
    assert batch.parts is not None
    rows = []
    for i in range(min(_SHOWN, len(batch))):
        trajectory = batch[i]
        said = [encoder.decode(trajectory.ids[turn.start : turn.end].tolist()) for turn in trajectory.turns]
        parts = [None if math.isnan(value) else value for value in batch.parts[i].tolist()]
        rows.append(
            {
                "prompt": prompts[i].record.messages[-1].content,
                "completion": "\n".join(said),
                "score": batch.reward[i].item(),
                "parts": dict(zip(batch.part_names, parts, strict=True)),
            }
        )
    return rows


def judged(config: Config) -> dict[str, float]:
    """This process's requests to judges since the last call: counts, tokens, cost, refusals."""
    if not any(entry.function == "judge" for entry in (*config.reward, *config.monitor)):
        return {}
    from reward.judge import judge_statistics, reset_judge_statistics

    found = {f"judge/{model}/{key}": n for (_, model), sums in judge_statistics().items() for key, n in sums.items()}
    reset_judge_statistics()
    return found
