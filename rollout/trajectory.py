"""Trajectories: conversations of a policy, with all the data that training needs, as tensors.

Legend: N trajectories, P tokens of a prompt, C tokens of a trajectory after its prompt, S turns of a trajectory, R the
largest C of a batch, G answers to one prompt. ΣP, ΣC and ΣS are sums over a batch.

A trajectory begins with a prompt. Turns of the policy and of an environment (a tool's output, a user's next message)
follow it without gaps. The model reads all tokens. Only the tokens of the policy's turns are actions: training, token
counts and the KL use these alone. A single answer is a trajectory of one turn.

`Trajectory` is one conversation. `TrajectoryBatch` holds many in columns, concatenated without padding; this is the
form that processes exchange. `pad` converts a column to an (N, R) tensor whose column 0 is the first token after the
prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data.records import Message
from rollout.batch import PaddedBatch, pad_batch

Actor = Literal["policy", "environment"]
End = Literal["stop", "length", "refused"]
"""Why a trajectory ended. `stop`: the last answer ended with a stop token, and no environment message followed.
`length`: an answer reached the maximum length. `refused`: the encoder cannot express the conversation."""
ENDS: tuple[End, ...] = get_args(End)


@dataclass(frozen=True)
class Turn:
    """Tokens `start` to `end` (exclusive), counted from the end of the prompt, and who produced them."""

    actor: Actor
    start: int
    end: int
    reward: float = 0.0
    """The environment's reward for a turn of the policy."""


@dataclass(frozen=True)
class Trajectory:
    """One conversation. Per-token numbers are (C,) float32, 0 at the environment's tokens; None: not computed."""

    row: int
    """Number of this answer in the batch; with G answers to each prompt, it answers prompt row // G."""
    prompt_ids: Tensor
    """(P,) int32."""
    ids: Tensor
    """(C,) int32, everything after the prompt; an answer that stopped ends with its stop token."""
    turns: tuple[Turn, ...]
    """The turns, which cover the C tokens without gaps. The last turn is the policy's."""
    end: End
    engine_logp: Tensor
    """Log-probabilities, nats, under the sampling engine."""
    messages: tuple[Message, ...] = ()
    """The conversation as text, up to the policy's last answer. Only the process that sampled it has this."""
    old_logp: Tensor | None = None
    """Log-probabilities under the trainer before any step on this trajectory."""
    ref_logp: Tensor | None = None
    """Log-probabilities under the reference."""
    values: Tensor | None = None
    """The critic's value of the tokens before each token."""
    dense: Tensor | None = None
    """The part of `score` that a reward model gave to single tokens."""
    score: float | None = None
    """The reward at the end. It includes `dense`, but not the environment's rewards for turns."""


@dataclass(frozen=True)
class TrajectoryBatch:
    """N trajectories in concatenated columns on the CPU; None: not computed. Columns mean the same as in Trajectory."""

    row: Tensor  # (N,) int64
    end: Tensor  # (N,) int8, index into ENDS
    prompt_length: Tensor  # (N,) int64, P
    length: Tensor  # (N,) int64, C
    turn_count: Tensor  # (N,) int64, S
    turn_action: Tensor  # (ΣS,) bool, whether the turn is the policy's
    turn_length: Tensor  # (ΣS,) int64
    turn_reward: Tensor  # (ΣS,) float64
    prompt_ids: Tensor  # (ΣP,) int32
    ids: Tensor  # (ΣC,) int32
    engine_logp: Tensor  # (ΣC,) float32
    old_logp: Tensor | None = None  # (ΣC,) float32
    ref_logp: Tensor | None = None  # (ΣC,) float32
    values: Tensor | None = None  # (ΣC,) float32
    dense: Tensor | None = None  # (ΣC,) float32
    score: Tensor | None = None  # (N,) float64
    parts: Tensor | None = None  # (N, rewards) float64; NaN: the reward does not apply
    disagreement: Tensor | None = None  # (N,) float64, standard deviation over an ensemble's members
    monitor: Tensor | None = None  # (N,) float64, the monitor's score
    part_names: tuple[str, ...] = ()
    """Names of the rewards in `parts`."""

    @classmethod
    def pack(cls, trajectories: Sequence[Trajectory]) -> "TrajectoryBatch":
        """Packs trajectories of at least one token each. All must have the same optional fields."""
        turns = [turn for t in trajectories for turn in t.turns]
        assert all(t.turns and t.turns[-1].end == len(t.ids) for t in trajectories)
        some: dict[str, Any] = {
            name: torch.cat([getattr(t, name) for t in trajectories])
            for name in ("old_logp", "ref_logp", "values", "dense")
            if trajectories and getattr(trajectories[0], name) is not None
        }
        if trajectories and trajectories[0].score is not None:
            some["score"] = torch.tensor([t.score for t in trajectories], dtype=torch.float64)
        return cls(
            row=torch.tensor([t.row for t in trajectories], dtype=torch.int64),
            end=torch.tensor([ENDS.index(t.end) for t in trajectories], dtype=torch.int8),
            prompt_length=torch.tensor([len(t.prompt_ids) for t in trajectories], dtype=torch.int64),
            length=torch.tensor([len(t.ids) for t in trajectories], dtype=torch.int64),
            turn_count=torch.tensor([len(t.turns) for t in trajectories], dtype=torch.int64),
            turn_action=torch.tensor([turn.actor == "policy" for turn in turns], dtype=torch.bool),
            turn_length=torch.tensor([turn.end - turn.start for turn in turns], dtype=torch.int64),
            turn_reward=torch.tensor([turn.reward for turn in turns], dtype=torch.float64),
            prompt_ids=torch.cat([torch.empty(0, dtype=torch.int32), *(t.prompt_ids for t in trajectories)]),
            ids=torch.cat([torch.empty(0, dtype=torch.int32), *(t.ids for t in trajectories)]),
            engine_logp=torch.cat([torch.empty(0), *(t.engine_logp for t in trajectories)]),
            **some,
        )

    def __len__(self) -> int:
        return len(self.row)

    def __getitem__(self, i: int) -> Trajectory:
        """Trajectory i; its tensors are views of the columns."""
        own = {name: c.split(self.lengths(name).tolist())[i] for name, c in self.columns().items()}
        ends = own["turn_length"].cumsum(0).tolist()
        turns = zip(own["turn_action"].tolist(), [0, *ends], ends, own["turn_reward"].tolist(), strict=False)
        numbers = ("prompt_ids", "ids", "engine_logp", "old_logp", "ref_logp", "values", "dense")
        return Trajectory(
            row=int(own["row"]),
            end=ENDS[int(own["end"])],
            turns=tuple(Turn("policy" if action else "environment", *rest) for action, *rest in turns),
            score=own["score"].item() if "score" in own else None,
            **{name: own[name] for name in numbers if name in own},
        )

    # ---- quantities derived from the columns

    @property
    def stopped(self) -> Tensor:
        """(N,) bool: the last answer ended with a stop token."""
        return self.end == ENDS.index("stop")

    @cached_property
    def actions(self) -> Tensor:
        """(ΣC,) bool, true at the tokens that the policy chose."""
        return self.turn_action.repeat_interleave(self.turn_length)

    @cached_property
    def action_count(self) -> Tensor:
        """(N,) int64: tokens that the policy chose."""
        return self._sums(torch.where(self.turn_action, self.turn_length, 0))

    @property
    def reward(self) -> Tensor:
        """(N,) float64: the score at the end and the rewards of all turns."""
        assert self.score is not None
        return self.score + self._sums(self.turn_reward)

    @property
    def token_reward(self) -> Tensor | None:
        """(ΣC,) float32: the part of `reward` that belongs to single tokens; None if there is none.

        It is `dense` plus each turn's reward at the last token of that turn.
        """
        if not self.turn_reward.any():
            return self.dense
        found = torch.zeros(self.ids.shape) if self.dense is None else self.dense.clone()
        paid = self.turn_reward != 0
        found[self.turn_length.cumsum(0)[paid] - 1] += self.turn_reward[paid].float()
        return found

    def total(self, column: Tensor) -> Tensor:
        """(ΣC,) -> (N,) float64: sums over each trajectory's actions, from the first to the last.

        The fixed order gives the same sum with any number of threads, so that logged figures can be compared.
        """
        return self.pad(torch.where(self.actions, column.double(), 0.0)).cumsum(-1)[:, -1]

    @property
    def kl(self) -> Tensor:
        """(N,) float64: sum over the actions of log π/π_ref, nats."""
        assert self.old_logp is not None and self.ref_logp is not None
        return self.total(self.old_logp) - self.total(self.ref_logp)

    # ---- other forms

    def pad(self, column: Tensor) -> Tensor:
        """(ΣC,) -> (N, R), with zeros after a trajectory's end."""
        return pad_sequence(list(self._tokens(column)), batch_first=True)

    def padded(self, rows: Sequence[int], pad_id: int, device: torch.device) -> PaddedBatch:
        """The given rows as the input of a model."""
        prompts, ids, actions = self._model_rows
        return pad_batch([prompts[i] for i in rows], [ids[i] for i in rows], pad_id, device, [actions[i] for i in rows])

    def last_answers(self) -> tuple[list[list[int]], list[list[int]]]:
        """Token ids, for each trajectory: everything before the policy's last turn, and that turn."""
        prompts, ids, _ = self._model_rows
        cuts = (self.length - self._last_length).tolist()
        contexts = [
            [*prompt.tolist(), *own[:cut].tolist()] for prompt, own, cut in zip(prompts, ids, cuts, strict=True)
        ]
        return contexts, [own[cut:].tolist() for own, cut in zip(ids, cuts, strict=True)]

    def at_last_answers(self, numbers: Sequence[Sequence[float]]) -> Tensor:
        """A column (ΣC,) float32 with `numbers` at the tokens of each trajectory's last turn, 0 before."""
        cuts = (self.length - self._last_length).tolist()
        pieces = [
            part for cut, row in zip(cuts, numbers, strict=True) for part in (torch.zeros(cut), torch.tensor(row))
        ]
        return torch.cat([torch.empty(0), *pieces])

    def columns(self) -> dict[str, Tensor]:
        """The columns that are not None, by name."""
        found = {column.name: getattr(self, column.name) for column in fields(self)}
        return {name: column for name, column in found.items() if isinstance(column, Tensor)}

    def with_columns(self, **columns: Any) -> "TrajectoryBatch":
        """A copy with these columns replaced."""
        return replace(self, **columns)

    def select(self, rows: Tensor) -> "TrajectoryBatch":
        """The trajectories at the indices `rows`, in that order."""
        return self.with_columns(**{name: reordered(c, self.lengths(name), rows) for name, c in self.columns().items()})

    @staticmethod
    def join(batches: Sequence["TrajectoryBatch"]) -> "TrajectoryBatch":
        """Concatenates batches, which all have the same columns."""
        columns = [batch.columns() for batch in batches]
        return batches[0].with_columns(**{name: torch.cat([c[name] for c in columns]) for name in columns[0]})

    @cached_property
    def _model_rows(self) -> tuple[tuple[Tensor, ...], ...]:
        prompts = self.prompt_ids.split(self.prompt_length.tolist())
        return prompts, self._tokens(self.ids), self._tokens(self.actions)

    @property
    def _last_length(self) -> Tensor:
        """(N,) int64: tokens of the last turn."""
        return self.turn_length[self.turn_count.cumsum(0) - 1]

    def lengths(self, name: str) -> Tensor:
        """(N,): number of entries of each trajectory in the column `name`."""
        by_unit = {"turn": self.turn_count, "prompt": self.prompt_length, "token": self.length}
        return by_unit[_UNITS[name]] if name in _UNITS else torch.ones_like(self.length)

    def _tokens(self, column: Tensor) -> tuple[Tensor, ...]:
        """(ΣC,) -> each trajectory's (C,), views."""
        pieces: tuple[Tensor, ...] = column.split(self.length.tolist())
        return pieces

    def _sums(self, column: Tensor) -> Tensor:
        """(ΣS,) -> (N,)."""
        which = torch.arange(len(self)).repeat_interleave(self.turn_count)
        return column.new_zeros(len(self)).index_add(0, which, column)


# The unit for which a column has one entry, if that is not a trajectory.
_UNITS = dict.fromkeys(("turn_action", "turn_length", "turn_reward"), "turn")
_UNITS |= dict.fromkeys(("ids", "engine_logp", "old_logp", "ref_logp", "values", "dense"), "token")
_UNITS |= {"prompt_ids": "prompt"}


def reordered(column: Tensor, lengths: Tensor, order: Tensor) -> Tensor:
    """Cuts a column into pieces of these lengths and concatenates the pieces at the indices `order`."""
    if len(column) == len(lengths) and bool((lengths == 1).all()):
        return column[order]
    pieces = column.split(lengths.tolist())
    # The empty first piece sets type and shape if `order` is empty.
    return torch.cat([column[:0], *(pieces[i] for i in order.tolist())])
