"""Answers for the policy-gradient loop, with everything that training asks of them.

Each process samples, scores and annotates its share; afterwards every process holds all answers, in the same order.
The answers to one prompt stay on one process, so that the engine reads their prompt once.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from data.encode import EncodedPrompt, Encoder
from reward.compose import Answers, Composition
from rollout.batch import PaddedBatch, pad_batch
from rollout.engine import generate
from rollout.logprobs import completion_logprobs
from rollout.sampling import Completion, SamplingSpec
from rollout.vllm import VLLMEngine
from stages.ppo.advantages import overlong_penalty, without_signal
from stages.ppo.config import PPOTrainConfig
from training.engines.protocol import Engine
from training.model import Model, several


@dataclass
class Rollout:
    """One answer and everything that is known of it. Lists of tokens' values are as long as `ids`."""

    row: int
    prompt: EncodedPrompt
    ids: list[int]
    stopped: bool
    text: str
    engine_logp: list[float]
    """Log-probabilities as the engine sampled with them."""
    old_logp: list[float]
    """The same as the trainer computes them; these, where nothing makes the two differ."""
    ref_logp: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    score: float = 0.0
    parts: dict[str, float | None] = field(default_factory=dict)
    dense: list[float] | None = None
    """That part of the score which a reward model gave to single tokens."""
    disagreement: float | None = None
    """Standard deviation over the members of an ensemble."""
    monitor: float | None = None

    @property
    def kl(self) -> float:
        """Sum over the answer of log π/π_ref, nats."""
        return sum(self.old_logp) - sum(self.ref_logp)


class Phases:
    """Where the time of an iteration goes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[f"time/{name}"] += time.perf_counter() - started

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, and as `time/iteration` all that have gone by since then."""
        now = time.perf_counter()
        seconds = {**self.seconds, "time/iteration": now - self._since}
        self.seconds, self._since = defaultdict(float), now
        return seconds


def rewards_of(batch: Sequence[Rollout], t: PPOTrainConfig, device: torch.device) -> Tensor:
    """Scores less the penalties for not ending and for coming near the longest length. (N,) fp32."""
    rewards = torch.tensor([r.score - t.missing_eos_penalty * (not r.stopped) for r in batch], device=device)
    if t.overlong_buffer:
        lengths = torch.tensor([len(r.ids) for r in batch], device=device)
        rewards = rewards + t.overlong_penalty * overlong_penalty(lengths, t.max_completion_length, t.overlong_buffer)
    return rewards


class Sampler:
    """Answers prompts with the policy that is being trained."""

    def __init__(
        self,
        seed: int,
        t: PPOTrainConfig,
        encoder: Encoder,
        reference: Model,
        rewards: Composition,
        monitor: Composition | None,
        frozen: Sequence[Model],
        engine: Engine,
        model: nn.Module,
        vllm: VLLMEngine | None,
    ) -> None:
        """`monitor`: scores that are measured at held-out prompts only. `frozen`: the models that the rewards read."""
        self.phases = Phases()
        self.spec = SamplingSpec(t.max_completion_length, tuple(encoder.stop_ids), encoder.pad_id, t.temperature)
        self._seed, self._t, self._encoder, self._engine, self._model = seed, t, encoder, engine, model
        self._reference, self._rewards, self._monitor, self._vllm = reference, rewards, monitor, vllm
        self._frozen = frozen
        self.recomputes = vllm is not None or engine.bf16
        """Whether the trainer's log-probabilities may differ from the engine's, and are computed by themselves."""
        self._version, self._pushed = 0, -1
        self._together = vllm.together if vllm is not None else 1

    def weights_moved(self) -> None:
        """An engine with weights of its own has to be given the policy's before it answers again."""
        self._version += 1

    def _push_weights(self) -> None:
        assert self._vllm is not None
        if self._pushed < self._version:
            with self.phases("sync"), self._engine.whole(self._model) as actor:
                self._vllm.update_weights(actor.policy.named_parameters(), self._version)
            self._pushed = self._version

    def batch(
        self, prompts_from: Callable[[int, int], list[EncodedPrompt]], cursor: int, iteration: int
    ) -> tuple[list[Rollout], int, dict[str, float]]:
        """The answers of one iteration, whole groups side by side, annotated.

        Groups whose answers all have the same reward teach nothing. In up to `dynamic_sampling_rounds` further rounds
        other prompts take their place (DAPO, section 3.2); where no more rounds are left, they fill the batch.

        Args:
            prompts_from: (cursor, count) -> so many prompts of the endless stream, from that position on.
            cursor: position in the stream.
            iteration: keys the random numbers.

        Returns:
            The answers, the position in the stream behind their prompts, and metrics of the sampling.
        """
        t, size = self._t, self._t.num_generations
        wanted = t.rollout_batch_size // size
        kept: list[Rollout] = []
        spare: list[Rollout] = []
        begun, sampled, silent = cursor, 0, 0
        for round_ in range(1 + t.dynamic_sampling_rounds):
            missing = wanted - len(kept) // size
            if missing == 0:
                break
            new = self.answer(prompts_from(cursor, missing), ("ppo", iteration), size, first=(cursor - begun) * size)
            cursor += missing
            sampled += missing
            rounds = round_ + 1
            flat = without_signal(rewards_of(new, t, torch.device("cpu")), size).tolist() if size > 1 else []
            silent += sum(flat)
            for group in range(missing):
                rows = new[group * size : (group + 1) * size]
                (spare if t.dynamic_sampling_rounds and flat[group] else kept).extend(rows)
        chosen = [*kept, *spare[: wanted * size - len(kept)]]
        self.annotate(chosen)
        metrics = {}
        if size > 1:
            metrics = {"frac_reward_zero_std": silent / sampled}
        if t.dynamic_sampling_rounds:
            metrics |= {"sampling/rounds": float(rounds), "sampling/discarded_groups": float(sampled - wanted)}
        return chosen, cursor, metrics

    def answer(
        self,
        prompts: Sequence[EncodedPrompt],
        key: tuple[int | str, ...],
        group_size: int,
        first: int = 0,
        monitor: bool = False,
    ) -> list[Rollout]:
        """`group_size` scored answers to each prompt, side by side, in the prompts' order; the same on every process.

        The random numbers of a row follow from `key` and its number, which starts at `first`.
        """
        if self._vllm is not None:
            self._push_weights()
        rank, world = self._engine.data_rank // self._together, self._engine.data_world // self._together
        rows = [(p * group_size + s, prompt) for p, prompt in enumerate(prompts) for s in range(group_size)]
        mine = [(row, prompt) for row, prompt in rows if row // group_size % world == rank]
        with self.phases("generate"):
            if self._vllm is not None and self._vllm.central:
                found = self._engine.from_main(self._complete(rows, key, first) if self._engine.is_main else None)
                completions = [found[row] for row, _ in mine]
            else:
                completions = self._complete(mine, key, first)
            batch = [
                Rollout(row, prompt, c.ids, c.end == "stop", self._encoder.decode(c.ids), c.logprobs, c.logprobs)
                for (row, prompt), c in zip(mine, completions, strict=True)
            ]
        with self.phases("score"):
            answers = Answers(
                prompts=[r.prompt.record.messages for r in batch],
                prompt_ids=[r.prompt.ids for r in batch],
                texts=[r.text for r in batch],
                ids=[r.ids for r in batch],
                stopped=[r.stopped for r in batch],
                columns=[r.prompt.record.columns for r in batch],
            )
            with several(self._frozen), self._engine.autocast():
                scores = self._rewards(answers)
                watched = self._monitor(answers).total if monitor and self._monitor is not None else None
            for i, row in enumerate(batch):
                row.score = scores.total[i]
                row.parts = {name: values[i] for name, values in (scores.parts | scores.members).items()}
                row.dense = scores.dense[i] if scores.dense is not None else None
                row.disagreement = scores.disagreement[i] if scores.disagreement is not None else None
                row.monitor = watched[i] if watched is not None else None
        with self.phases("exchange"):
            shares = self._engine.of_all(batch)[:: self._together]
        return sorted((row for share in shares for row in share), key=lambda r: r.row)

    def _complete(
        self, rows: Sequence[tuple[int, EncodedPrompt]], key: tuple[int | str, ...], first: int
    ) -> list[Completion]:
        """One completion for each (row, prompt), by the engine."""
        ids, keys = [prompt.ids for _, prompt in rows], [(*key, first + row) for row, _ in rows]
        if self._vllm is not None:
            return self._vllm.generate(ids, self.spec, keys, self._seed)
        with self._inference() as actor:
            return generate(actor.policy, ids, self.spec, keys, self._seed, self._t.rollout_micro_batch_size)

    def annotate(self, batch: list[Rollout], values: bool = True) -> None:
        """Fills in the reference's log-probabilities, the values where there is a critic, and the policy's own
        log-probabilities where the engine's are not the trainer's."""
        rank, world, t = self._engine.data_rank, self._engine.data_world, self._t
        share = range(rank, len(batch), world)
        mine = [batch[i] for i in share]
        with self._inference() as actor:
            if values and actor.critic is not None:
                with self.phases("value"):
                    for rows, padded in self._padded(mine):
                        _fill(rows, "values", actor.critic(padded))
            if self.recomputes:
                with self.phases("policy"):
                    for rows, padded in self._padded(mine):
                        _fill(rows, "old_logp", completion_logprobs(actor.policy, padded, t.temperature)[0])
            with self.phases("reference"), self._reference.whole() as reference:
                for rows, padded in self._padded(mine):
                    _fill(rows, "ref_logp", completion_logprobs(reference, padded, t.temperature)[0])
        with self.phases("exchange"):
            if world > 1:
                known = [(i, r.values, r.old_logp, r.ref_logp) for i, r in zip(share, mine, strict=True)]
                for i, row_values, old_logp, ref_logp in (
                    entry for part in self._engine.of_all(known) for entry in part
                ):
                    batch[i].values, batch[i].old_logp, batch[i].ref_logp = row_values, old_logp, ref_logp

    def move_reference(self, alpha: float) -> None:
        """reference ← α·policy + (1 − α)·reference. Every process calls it."""
        with self.phases("sync"):
            self._engine.mix(self._reference.module, self._model, "policy", alpha)

    @contextmanager
    def _inference(self) -> Iterator[nn.Module]:
        with torch.no_grad(), self._engine.whole(self._model) as actor, self._engine.autocast():
            yield actor

    def _padded(self, batch: list[Rollout]) -> Iterator[tuple[list[Rollout], PaddedBatch]]:
        """Micro-batches of like length."""
        ordered = sorted(batch, key=lambda r: -len(r.prompt.ids) - len(r.ids))
        for start in range(0, len(ordered), self._t.rollout_micro_batch_size):
            rows = ordered[start : start + self._t.rollout_micro_batch_size]
            prompts, completions = [r.prompt.ids for r in rows], [r.ids for r in rows]
            yield rows, pad_batch(prompts, completions, self.spec.pad_id, self._engine.device)


def _fill(rows: Sequence[Rollout], name: str, values: Tensor) -> None:
    """Gives each row its own part of (B, R)."""
    for row, line in zip(rows, values.float().tolist(), strict=True):
        setattr(row, name, line[: len(row.ids)])
