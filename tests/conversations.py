"""Random conversations of several turns: as a batch of trajectories, and as lists of numbers."""

import numpy as np
import torch
from torch import Tensor

from rollout.trajectory import Trajectory, TrajectoryBatch, Turn

NUMBERS = ("engine_logp", "old_logp", "ref_logp", "values", "dense")


class Conversations:
    """Groups of `size` conversations. The environment's tokens have random numbers, too, which must not matter.

    `extra`: per-token numbers that are no column of a batch, e.g. log-probabilities after a step.
    """

    def __init__(self, groups: int, size: int, seed: int, most: int = 3) -> None:
        """`most`: maximum turns of the policy."""
        rng = np.random.default_rng(seed)
        self.size, self.rng = size, rng
        self.trajectories, self.extra = [], {"new_logp": [], "new_values": []}
        for row in range(groups * size):
            turns, end = [], 0
            for turn in range(int(rng.integers(1, most + 1))):
                if turn:
                    said = int(rng.integers(0, 4))
                    turns.append(Turn("environment", end, end + said))
                    end += said
                said = int(rng.integers(1, 5))
                turns.append(Turn("policy", end, end + said, reward=float(rng.normal()) if rng.random() < 0.7 else 0.0))
                end += said
            engine = torch.tensor(-rng.gamma(1.0, 2.0, end))
            old = engine + 0.01 * self._noise(end)
            self.trajectories.append(
                Trajectory(
                    row=row,
                    prompt_ids=torch.tensor(rng.integers(0, 50, int(rng.integers(1, 5))), dtype=torch.int32),
                    ids=torch.tensor(rng.integers(0, 50, end), dtype=torch.int32),
                    turns=tuple(turns),
                    end="stop" if rng.random() < 0.7 else "length",
                    engine_logp=engine,
                    old_logp=old,
                    ref_logp=old + 0.6 * self._noise(end),
                    values=self._noise(end),
                    dense=self._noise(end),
                    score=float(rng.normal()),
                )
            )
            self.extra["new_logp"].append(old + 0.4 * self._noise(end))
            self.extra["new_values"].append(self._noise(end))
        # A reward model scores tokens of the policy only.
        batch = TrajectoryBatch.pack(self.trajectories)
        self.batch = batch.with_columns(dense=torch.where(batch.actions, batch.dense, 0.0))

    def _noise(self, length: int) -> Tensor:
        return torch.tensor(self.rng.normal(size=length))

    def column(self, name: str) -> Tensor:
        """(ΣC,) float64."""
        return torch.cat(self.extra[name]) if name in self.extra else getattr(self.batch, name)

    def padded(self, name: str) -> Tensor:
        """(N, R) float64."""
        return self.batch.pad(self.column(name))

    def turns(self, name: str) -> list[list[tuple[bool, list[float]]]]:
        """For each turn of each conversation: whether it is the policy's, and the number of each token."""
        numbers = iter(self.column(name).tolist())
        return [
            [(turn.actor == "policy", [next(numbers) for _ in range(turn.start, turn.end)]) for turn in t.turns]
            for t in self.trajectories
        ]

    def scattered(self, actions: list[list[float]]) -> np.ndarray:
        """Spreads the actions' numbers to (N, R), with zeros everywhere else."""
        mask = self.batch.pad(self.batch.actions).numpy()
        out = np.zeros(mask.shape)
        for row, own, numbers in zip(out, mask, actions, strict=True):
            row[own] = numbers
        return out
