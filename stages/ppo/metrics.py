"""What is logged about an iteration, under TRL's names so that its dashboards go on working."""

from collections.abc import Sequence

from stages.ppo.config import Config, PPOTrainConfig
from stages.ppo.guards import repetition
from stages.ppo.sampler import Rollout


def iteration_metrics(
    batch: Sequence[Rollout], total: dict[str, float], t: PPOTrainConfig, kl_coef: float
) -> dict[str, float]:
    """Means over the answers of an iteration and over the tokens that it trained on.

    `total`: sums over those tokens, on all processes; without the ones that a loss has not, or that were skipped.
    """
    answers = len(batch)
    kl = sum(r.kl for r in batch) / answers
    metrics = {
        "objective/kl": kl,
        "objective/entropy": -sum(sum(r.old_logp) for r in batch) / answers,
        "objective/scores": sum(r.score for r in batch) / answers,
        "objective/non_score_reward": -kl_coef * kl if t.kl_in == "reward" else 0.0,
        "objective/kl_coef": kl_coef,
        "val/num_eos_tokens": sum(r.stopped for r in batch),
        "completions/mean_length": sum(len(r.ids) for r in batch) / answers,
        "completions/clipped_ratio": sum(not r.stopped for r in batch) / answers,
        "completions/repetition": sum(repetition(r.ids) for r in batch) / answers,
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
    disagreements = [r.disagreement for r in batch if r.disagreement is not None]
    if disagreements:
        metrics["objective/disagreement"] = sum(disagreements) / len(disagreements)
    return metrics


def part_means(batch: Sequence[Rollout], prefix: str) -> dict[str, float]:
    """Mean of each reward over the answers on which it had an opinion, and on how many it had none."""
    means = {}
    for name in batch[0].parts:
        values = [r.parts[name] for r in batch if r.parts[name] is not None]
        if values:
            means[f"{prefix}/{name}"] = sum(values) / len(values)
        if len(values) < len(batch):
            means[f"{prefix}_none/{name}"] = len(batch) - len(values)
    return means


def judged(config: Config) -> dict[str, float]:
    """What this process asked of judges since the last call: questions, tokens, cost, refusals."""
    if not any(entry.function == "judge" for entry in (*config.reward, *config.monitor)):
        return {}
    from reward.judge import judge_statistics, reset_judge_statistics

    found = {f"judge/{model}/{key}": n for (_, model), sums in judge_statistics().items() for key, n in sums.items()}
    reset_judge_statistics()
    return found
