"""Trajectories for the policy-gradient loop, with rewards, log-probabilities and values.

Each process samples, scores and annotates its share. Then every process gets all trajectories, in the same order. The
answers to one prompt are sampled on one process, so that the engine processes the prompt once. Processes exchange only
tensors; texts stay on the process that scores them.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.records import Message
from reward.compose import Answers, Composition
from rollout.batch import PaddedBatch
from rollout.environment import Environment, play
from rollout.logprobs import completion_logprobs
from rollout.trajectory import TrajectoryBatch
from stages.ppo.advantages import overlong_penalty, without_signal
from stages.ppo.config import PPOTrainConfig
from stages.ppo.generation import Generator
from training.engines.exchange import join_columns, join_trajectories
from training.engines.protocol import Engine
from training.model import Model, WithoutAdapter, several


class Phases:
    """Measures the seconds that each phase of an iteration takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and in `time/iteration` the whole time since then."""
        now = time.perf_counter()
        seconds = {**self.seconds, "time/iteration": now - self._since}
        self.seconds, self._since = defaultdict(float), now
        return seconds


def rewards_of(batch: TrajectoryBatch, t: PPOTrainConfig, device: torch.device) -> Tensor:
    """Rewards minus the penalties for a missing stop token and for nearly reaching the maximum length. (N,) fp32."""
    rewards = (batch.reward - t.missing_eos_penalty * (~batch.stopped).double()).float().to(device)
    if t.overlong_buffer:
        lengths = batch.action_count.to(device)
        rewards = rewards + t.overlong_penalty * overlong_penalty(lengths, t.max_completion_length, t.overlong_buffer)
    return rewards


class Sampler:
    """Answers prompts with the policy that is being trained."""

    def __init__(
        self,
        t: PPOTrainConfig,
        encoder: Encoder,
        engine: Engine,
        generator: Generator,
        reference: Model | WithoutAdapter,
        rewards: Composition,
        monitor: Composition | None,
        frozen: Sequence[Model] = (),
        environment: Callable[[], Environment] | None = None,
    ) -> None:
        """`monitor`: scores for held-out prompts only. `frozen`: the models that rewards and monitor use.
        `environment`: makes an environment for one conversation; without it every prompt is answered once."""
        self.phases = Phases()
        self.encoder = encoder
        self._t, self._engine, self._generator, self._reference = t, engine, generator, reference
        self._frozen = frozen
        self._rewards, self._monitor, self._environment = rewards, monitor, environment

    def batch(
        self, prompts_from: Callable[[int, int], list[EncodedPrompt]], cursor: int, iteration: int
    ) -> tuple[TrajectoryBatch, int, dict[str, float]]:
        """The annotated trajectories of one iteration; those of one group are adjacent.

        A group whose trajectories all have the same reward gives no gradient. Up to `dynamic_sampling_rounds` further
        rounds replace such groups by those of other prompts (DAPO, section 3.2). If that is not enough, they fill the
        batch.

        Args:
            prompts_from: (cursor, count) -> `count` prompts of the endless stream from position `cursor`.
            cursor: position in the stream.
            iteration: keys the random numbers.

        Returns:
            The trajectories, the position in the stream after their prompts, and metrics of the sampling.
        """
        t, size = self._t, self._t.num_generations
        wanted = t.rollout_batch_size // size
        rounds: list[TrajectoryBatch] = []
        kept: list[int] = []  # groups, counted over all rounds
        spare: list[int] = []
        sampled, silent = 0, 0
        while len(kept) < wanted and len(rounds) <= t.dynamic_sampling_rounds:
            missing = wanted - len(kept)
            new = self.answer(prompts_from(cursor + sampled, missing), ("ppo", iteration), size, first=sampled * size)
            flat = [False] * missing
            if size > 1:
                flat = without_signal(rewards_of(new, t, torch.device("cpu")), size).tolist()
            for group, same in enumerate(flat, start=sampled):
                (spare if t.dynamic_sampling_rounds and same else kept).append(group)
            rounds.append(new)
            sampled += missing
            silent += sum(flat)
        chosen = [*kept, *spare[: wanted - len(kept)]]
        rows = torch.tensor(chosen)[:, None] * size + torch.arange(size)
        batch = TrajectoryBatch.join(rounds).select(rows.flatten())
        metrics = {}
        if size > 1:
            metrics = {"frac_reward_zero_std": silent / sampled}
        if t.dynamic_sampling_rounds:
            metrics |= {
                "sampling/rounds": float(len(rounds)),
                "sampling/discarded_groups": float(sampled - wanted),
            }
        return self.annotate(batch), cursor + sampled, metrics

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        key: tuple[int | str, ...],
        group_size: int,
        first: int = 0,
        monitor: bool = False,
    ) -> TrajectoryBatch:
        """`group_size` scored answers to each prompt, adjacent, in the prompts' order; the same on every process.

        A row's random numbers are keyed by `key` and the row's number; numbers start at `first`.
        """
        engine, generator = self._engine, self._generator
        if generator.stale:
            with self.phases("sync"):
                generator.push_weights()
        every = range(len(prompts) * group_size)
        mine = [row for row in every if engine.owns(row // group_size, generator.together)]
        with self.phases("generate"):
            asked = mine if not generator.central else every if engine.is_main else []
            with generator.engine() as actor:
                played = play(
                    [prompts[row // group_size] for row in asked],
                    asked,
                    [(*key, first + row) for row in asked],
                    partial(generator.complete, actor),
                    self.encoder,
                    self._environment,
                )
            share, conversations = TrajectoryBatch.pack(played), [t.messages for t in played]
            if generator.central:
                engine.barrier()  # the main process has asked for all answers
                share = join_trajectories(engine, share, prompts, group_size).select(
                    torch.tensor(mine, dtype=torch.int64)
                )
                found = engine.from_main(conversations)
                conversations = [found[row] for row in mine]
        with self.phases("score"):
            share = self._scored(share, conversations, prompts, group_size, monitor)
        with self.phases("exchange"):
            if not engine.leads(generator.together):  # another process of the same vLLM has these trajectories
                share = share.select(torch.empty(0, dtype=torch.int64))
            return join_trajectories(engine, share, prompts, group_size)

    def _scored(
        self,
        batch: TrajectoryBatch,
        conversations: Sequence[tuple[Message, ...]],
        prompts: Sequence[EncodedPrompt],
        size: int,
        monitor: bool,
    ) -> TrajectoryBatch:
        """The batch with rewards. Each trajectory's last answer is scored in the context of its conversation."""
        contexts, ids = batch.last_answers()
        answers = Answers(
            prompts=[messages[:-1] for messages in conversations],
            prompt_ids=contexts,
            texts=[messages[-1].content for messages in conversations],
            ids=ids,
            stopped=batch.stopped.tolist(),
            columns=[prompts[row // size].record.columns for row in batch.row.tolist()],
        )
        with several(self._frozen), self._generator.autocast():
            scores = self._rewards(answers)
            watched = self._monitor(answers).total if monitor and self._monitor is not None else None
        parts = scores.parts | scores.members
        dense = scores.dense
        return batch.with_columns(
            score=_float64(scores.total),
            part_names=tuple(parts),
            parts=_float64([[float("nan") if v is None else v for v in values] for values in parts.values()]).T,
            dense=None if dense is None else batch.at_last_answers(dense),
            disagreement=None if scores.disagreement is None else _float64(scores.disagreement),
            monitor=None if watched is None else _float64(watched),
        )

    def annotate(self, batch: TrajectoryBatch, values: bool = True) -> TrajectoryBatch:
        """The batch with the log-probabilities of reference and policy and, with a critic, its values. The policy's
        are the engine's, unless the trainer's may differ from them (`Generator.recomputes`)."""
        engine, temperature, vocab_size = self._engine, self._t.temperature, self.encoder.vocab_size

        def logprobs(policy: PreTrainedModel, padded: PaddedBatch) -> Tensor:
            return completion_logprobs(policy, padded, temperature, vocab_size=vocab_size)[0]

        mine = batch.select(torch.tensor(list(engine.share(len(batch))), dtype=torch.int64))
        found = {}
        with self._generator.inference() as actor:
            if values and actor.critic is not None:
                with self.phases("value"):
                    found["values"] = self._computed(mine, actor.critic)
            if self._generator.recomputes:
                with self.phases("policy"):
                    found["old_logp"] = self._computed(mine, partial(logprobs, actor.policy))
            with self.phases("reference"), self._reference.whole() as reference:
                found["ref_logp"] = self._computed(mine, partial(logprobs, reference))
        with self.phases("exchange"):
            found = join_columns(engine, found, batch)
        return batch.with_columns(**{"old_logp": batch.engine_logp, **found})

    def _computed(self, batch: TrajectoryBatch, compute: Callable[[PaddedBatch], Tensor]) -> Tensor:
        """The results of `compute` (padded rows -> (B, R)) as one column (ΣC,) fp32. Rows of a micro-batch have
        similar lengths."""
        size, lengths = self._t.rollout_micro_batch_size, (batch.prompt_length + batch.length).tolist()
        ordered = sorted(range(len(batch)), key=lambda i: -lengths[i])
        pieces: list[Tensor] = [torch.empty(0)] * len(batch)
        for start in range(0, len(ordered), size):
            rows = ordered[start : start + size]
            padded = batch.padded(rows, self._generator.spec.pad_id, self._engine.device)
            values = torch.where(padded.completion_mask, compute(padded).float(), 0.0).cpu()
            for i, line in zip(rows, values, strict=True):
                pieces[i] = line[: batch.length[i]]
        return torch.cat([torch.empty(0), *pieces])

    def move_reference(self, alpha: float) -> None:
        """reference ← α·policy + (1 − α)·reference. Every process calls it."""
        assert isinstance(self._reference, Model), "the recipe refuses a moving reference with an adapter"
        with self.phases("sync"):
            self._generator.mix_into(self._reference, alpha)


def _float64(values: Sequence[float] | Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
