"""Guards of a policy-gradient run: a probe before training, early stops during it, and the choice of the kept policy.

A reward is a proxy, and optimising a proxy too far makes the true objective worse (Gao et al. 2022, arXiv:2210.10760).
So the policy is evaluated on held-out prompts from time to time; such an evaluation is called a look. The kept policy
is the one of the best look. If the score rises while the monitor falls, the run stops or goes back to that policy.

Nothing here uses a model. `Watch` is plain data that is saved, so that a resumed run continues with the same history.
"""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from handoff.errors import GateError
from rollout.trajectory import TrajectoryBatch
from stages.ppo.advantages import length_controlled, slope_of, without_signal
from stages.ppo.config import GuardConfig, PPOTrainConfig
from stages.ppo.metrics import mean as mean_of
from stages.ppo.sampler import rewards_of

# Before the first optimizer step the policy equals the one that sampled, so a larger deviation from 1 is a bug.
_FIRST_RATIO_TOLERANCE = 0.01
# A difference of two means above this number of standard errors counts as significant.
_SIGNIFICANT = 2.0
_PROBE_ANSWERS = 4


def probe_size(t: PPOTrainConfig) -> int:
    """Answers to each prompt of the probe: `num_generations`, but at least enough to see whether they differ."""
    return max(_PROBE_ANSWERS, t.num_generations)


def probe(batch: TrajectoryBatch, t: PPOTrainConfig, guards: GuardConfig) -> dict[str, float]:
    """Checks before training that the rewards give a signal; returns metrics. `batch`: `probe_size` answers per prompt.

    Raises:
        GateError: too many answers are cut off, or too few prompts have answers with different rewards.
    """
    # Penalties for cut-off and long answers are left out: they differ whatever the rewards say.
    scores = batch.reward
    truncated = int((~batch.stopped).sum()) / len(batch)
    silent = without_signal(scores, probe_size(t)).float().mean().item()
    if truncated > guards.max_truncated:
        raise GateError(
            f"truncation: before training, {truncated:.0%} of {len(batch)} answers reach max_completion_length "
            f"{t.max_completion_length} without a stop token (guards.max_truncated {guards.max_truncated:.0%}), and "
            "what is cut off cannot be judged. Raise train.max_completion_length, or start from a model that was "
            "taught to stop."
        )
    if silent > guards.max_without_signal:
        prompts = len(batch) // probe_size(t)
        same = "all have the same reward" if scores.max() - scores.min() < 1e-6 else "have equal rewards"
        raise GateError(
            f"no learning signal: before training, the answers to {silent:.0%} of {prompts} prompts {same} "
            f"(guards.max_without_signal {guards.max_without_signal:.0%}). Take easier or harder prompts, a reward "
            "with more steps than right and wrong, or a higher train.temperature."
        )
    reward = rewards_of(batch, t, torch.device("cpu")).mean().item()
    return {"probe/truncated": truncated, "probe/frac_reward_zero_std": silent, "probe/reward": reward}


@dataclass
class Look:
    """An evaluation on held-out prompts after an iteration; `monitor_error` is the standard error of `monitor`."""

    step: int
    score: float
    kl: float
    length: float
    monitor: float
    """The monitor's mean; without a monitor, the estimated score at the mean length of the first look."""
    monitor_error: float

    def metrics(self) -> dict[str, float]:
        """Score, KL and length under the names of the log."""
        return {"eval/scores": self.score, "eval/kl": self.kl, "eval/mean_length": self.length}


@dataclass
class Watch:
    """What the guards have seen so far; part of every saved state."""

    looks: list[Look] = field(default_factory=list)
    score_per_token: float = 0.0
    """Slope of the score on length at the first look, for the length-controlled score; 0 without a reward model."""
    first_entropy: float | None = None
    constant: int = 0
    endless: int = 0
    blind_critic: int = 0
    divergent: int = 0
    """Number of consecutive looks that show over-optimisation."""
    rollbacks: int = 0
    alarms: list[str] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        """As plain values, for `from_state`."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Watch":
        """Restores a `Watch` from the result of `state`."""
        return cls(**{**state, "looks": [Look(**look) for look in state["looks"]]})

    def after_iteration(
        self, metrics: dict[str, float], rewards: torch.Tensor, iteration: int, guards: GuardConfig
    ) -> None:
        """Raises GateError, with cause and remedy, when training must stop. `rewards` (N,): without the penalties."""
        where = f"iteration {iteration}"
        if metrics["objective/kl"] > guards.kl_limit:
            raise GateError(
                f"{where}: an answer is {metrics['objective/kl']:.1f} nats from the reference, above guards.kl_limit "
                f"{guards.kl_limit}. Usual causes: learning_rate too high, kl_coef too low, a reward without bound."
            )
        deviation = metrics.get("val/first_ratio_deviation", 0.0)
        if deviation > _FIRST_RATIO_TOLERANCE:
            raise GateError(
                f"{where}: before any step the policy differs from the one that sampled by {deviation:.3f} on average. "
                "Sampling and training disagree on precision, positions or temperature; training on such ratios would "
                "mislead."
            )
        self.constant = self.constant + 1 if (rewards.max() - rewards.min()).item() < 1e-6 else 0
        if self.constant >= guards.patience:
            raise GateError(
                f"{where}: all answers of {self.constant} iterations in a row had one and the same reward, "
                f"{rewards[0].item():.4g}; nothing can be learned from it. Look at the rewards in samples.jsonl."
            )
        self.endless = self.endless + 1 if metrics["val/num_eos_tokens"] == 0 else 0
        if self.endless >= guards.patience:
            raise GateError(
                f"{where}: no answer of {self.endless} iterations in a row ended with a stop token. Raise "
                "train.missing_eos_penalty or train.max_completion_length, or start from a model that stops."
            )
        variance = metrics.get("val/explained_variance")
        if variance is not None:
            self.blind_critic = self.blind_critic + 1 if variance < 0 else 0
            if self.blind_critic >= guards.patience:
                raise GateError(
                    f"{where}: for {self.blind_critic} iterations the critic has predicted worse than a constant "
                    f"(explained variance {variance:.2f}). Raise critic_learning_rate or critic_warmup_iterations, or "
                    "take an advantage without a critic."
                )
        entropy = metrics.get("policy/entropy_avg")
        if entropy is None:  # every step of the iteration was skipped
            return
        if self.first_entropy is None:
            self.first_entropy = entropy
        if entropy < guards.entropy_floor * self.first_entropy:
            raise GateError(
                f"{where}: entropy is {entropy:.4f} nats a token, below {guards.entropy_floor:.0%} of the first "
                f"iteration's {self.first_entropy:.4f} (guards.entropy_floor): the policy says the same whatever it is "
                "asked. Raise kl_coef or entropy_coef, or lower learning_rate."
            )

    def look(self, step: int, batch: TrajectoryBatch, learned: bool) -> Look:
        """Adds a look from the answers to the held-out prompts; `over_optimized` takes it into account.

        `learned`: at least a part of the score comes from a reward model, which may prefer long answers as such.
        """
        scores, lengths = batch.reward, batch.action_count.double()
        if not self.looks and learned:
            self.score_per_token = slope_of(scores, lengths)
        if batch.monitor is not None:
            monitor, error = _mean(batch.monitor)
        else:
            at = self.looks[0].length if self.looks else lengths.mean().item()
            monitor = float(length_controlled(scores, lengths, self.score_per_token, at))
            error = _mean(scores - self.score_per_token * lengths)[1]
        mean = scores.mean().item()
        kl = mean_of(batch.kl)
        look = Look(step, mean, kl, lengths.mean().item(), monitor, error)
        best = self._peak() if self.looks else look
        fell = best.monitor - monitor > _SIGNIFICANT * math.hypot(error, best.monitor_error)
        self.divergent = self.divergent + 1 if fell and mean > best.score else 0
        self.looks.append(look)
        return look

    def held_out(self, step: int) -> dict[str, float]:
        """The metrics of the newest look at the policy of that iteration; empty if there was none."""
        return next((look.metrics() for look in reversed(self.looks) if look.step == step), {})

    def _peak(self) -> Look:
        """The look with the highest monitor."""
        return max(self.looks, key=lambda look: look.monitor)

    def over_optimized(self, guards: GuardConfig) -> str | None:
        """A description of the over-optimisation if enough consecutive looks show it, else None."""
        if self.divergent < guards.overoptimization_looks:
            return None
        best, last = self._peak(), self.looks[-1]
        return (
            f"over-optimisation: since iteration {best.step} the score at held-out prompts rose from {best.score:.3f} "
            f"to {last.score:.3f} and the monitor fell from {best.monitor:.3f} to {last.monitor:.3f}, at "
            f"{last.kl:.1f} nats from the reference. The policy exploits the reward: raise kl_coef, lower "
            "learning_rate, or train a better reward model."
        )

    def best(self, kl_coef: float, monitored: bool) -> int | None:
        """The iteration whose policy is kept: the one with the highest monitor, or without a monitor the highest
        score − β·KL (then no other look has both less KL and more reward); the first one of equals. None before the
        first look after training has begun."""
        trained = [look for look in self.looks if look.step > 0]
        best = max(
            trained, key=lambda look: look.monitor if monitored else look.score - kl_coef * look.kl, default=None
        )
        return best.step if best is not None else None


def _mean(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error."""
    error = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return values.mean().item(), error
