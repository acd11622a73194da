"""Answers for PPO, with everything that training asks of them: log-probabilities, values, reference, scores.

Each process samples and scores its share; afterwards every process holds all of them, in the same order.
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from reward.compose import Answers, Composition
from rollout.batch import PaddedBatch, pad_batch
from rollout.engine import SamplingSpec, generate
from rollout.logprobs import completion_logprobs
from stages import runtime
from stages.ppo.actor_critic import completion_values
from stages.ppo.config import PPOTrainConfig


@dataclass
class Rollout:
    """One answer and everything that is known of it. Lists are as long as `ids`."""

    row: int
    prompt: EncodedPrompt
    ids: list[int]
    stopped: bool
    old_logp: list[float]
    ref_logp: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    text: str = ""
    score: float = 0.0
    parts: dict[str, float | None] = field(default_factory=dict)

    @property
    def kl(self) -> float:
        """Sum over the answer of log π/π_ref, nats."""
        return sum(self.old_logp) - sum(self.ref_logp)


class Phases:
    """Where the time of an iteration goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        seconds, self.seconds = self.seconds, defaultdict(float)
        return dict(seconds)


class Sampler:
    """Answers for prompts, with everything that training asks of them: each process its share, then all of them."""

    def __init__(
        self,
        seed: int,
        t: PPOTrainConfig,
        encoder: Encoder,
        spec: SamplingSpec,
        reference: PreTrainedModel,
        rewards: Composition,
        accelerator: Accelerator,
        model: nn.Module,
    ) -> None:
        self.phases = Phases()
        self._seed, self._t, self._encoder, self._spec = seed, t, encoder, spec
        self._reference, self._rewards, self._accelerator, self._model = reference, rewards, accelerator, model

    def __call__(self, prompts: Sequence[EncodedPrompt], key: tuple[int | str, ...]) -> list[Rollout]:
        """One answer a prompt, in the order of `prompts`, the same list on every process."""
        rank, world, t = runtime.rank(), runtime.world_size(), self._t
        mine = list(range(rank, len(prompts), world))
        with torch.no_grad(), runtime.gathered(self._accelerator, self._model) as actor, self._accelerator.autocast():
            with self.phases("generate"):
                completions = generate(
                    actor.policy,
                    [prompts[i].ids for i in mine],
                    self._spec,
                    [(*key, i) for i in mine],
                    self._seed,
                    t.rollout_micro_batch_size,
                )
                batch = [
                    Rollout(i, prompts[i], c.ids, c.end == "stop", c.logprobs, text=self._encoder.decode(c.ids))
                    for i, c in zip(mine, completions, strict=True)
                ]
            with self.phases("value"):
                for rows, padded in self._padded(batch):
                    values = completion_values(actor.critic, padded)
                    again = None
                    if self._accelerator.mixed_precision != "no":
                        again, _ = completion_logprobs(actor.policy, padded, t.temperature)
                    for i, row in enumerate(rows):
                        row.values = values[i, : len(row.ids)].tolist()
                        if again is not None:
                            row.old_logp = again[i, : len(row.ids)].tolist()
            with self.phases("reference"):
                for rows, padded in self._padded(batch):
                    logp, _ = completion_logprobs(self._reference, padded, t.temperature)
                    for i, row in enumerate(rows):
                        row.ref_logp = logp[i, : len(row.ids)].tolist()
            with self.phases("score"):
                scores = self._rewards(
                    Answers(
                        prompts=[r.prompt.record.messages for r in batch],
                        prompt_ids=[r.prompt.ids for r in batch],
                        texts=[r.text for r in batch],
                        ids=[r.ids for r in batch],
                        stopped=[r.stopped for r in batch],
                        columns=[r.prompt.record.columns for r in batch],
                    )
                )
                for i, row in enumerate(batch):
                    row.score = scores.total[i]
                    row.parts = {name: values[i] for name, values in scores.parts.items()}
        with self.phases("exchange"):
            shares = runtime.all_gather_object(batch)
        return sorted((row for share in shares for row in share), key=lambda r: r.row)

    def _padded(self, batch: list[Rollout]) -> Iterator[tuple[list[Rollout], PaddedBatch]]:
        """Micro-batches of like length."""
        ordered = sorted(batch, key=lambda r: -len(r.prompt.ids) - len(r.ids))
        for start in range(0, len(ordered), self._t.rollout_micro_batch_size):
            rows = ordered[start : start + self._t.rollout_micro_batch_size]
            prompts, completions = [r.prompt.ids for r in rows], [r.ids for r in rows]
            yield rows, pad_batch(prompts, completions, self._spec.pad_id, runtime.device())
