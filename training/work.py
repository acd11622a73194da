"""How much a section computes at once, as its stage declares it: what memory and time are computed from. No torch here.

A stage's `config.py` may define `work(config) -> Work`. Numbers of rows and tokens are the most that the recipe allows.
"""

from dataclasses import dataclass
from typing import Literal

from training.declaration import Role


@dataclass(frozen=True)
class Batch:
    """The rows of one forward pass of one process."""

    rows: int
    length: int
    """Most tokens of a sequence."""
    sequences: int = 1
    """Sequences of a row: 2 where rows are pairs."""
    scored: int | None = None
    """Tokens of a sequence whose predictions are scored; None: all; 0: there is no output head."""
    head: Literal["tiles", "loss", "actions"] = "tiles"
    """How logits are computed: tile by tile; of all tokens at once, for the model's own loss; or of all scored tokens
    at once, with their entropies."""
    padded: bool = True
    """Whether rows are padded to the longest, and attention has a mask."""

    @property
    def tokens(self) -> int:
        """Tokens of the pass."""
        return self.rows * self.sequences * self.length

    @property
    def logits(self) -> int:
        """Tokens whose logits are computed."""
        return self.tokens if self.scored is None else self.rows * self.sequences * self.scored


@dataclass(frozen=True)
class Rollout:
    """Answers that are sampled at once by one process."""

    rows: int
    prompt: int
    """Most tokens of a prompt."""
    answer: int
    """Most tokens of an answer."""
    group: int = 1
    """Answers to one prompt."""


@dataclass(frozen=True)
class Work:
    """What a section computes."""

    train: Batch | None = None
    """The largest micro-batch; None: nothing is trained."""
    measure: Batch | None = None
    """The largest forward pass without gradients."""
    rollout: Rollout | None = None
    batch: int = 1
    """Rows of an optimizer step, over all processes."""
    measure_key: str = "train.per_device_eval_batch_size"
    """The recipe's key of `measure.rows` and `rollout.rows`."""
    rows: int | None = None
    """Rows of the whole training, repeated ones counted once; None: those of the data."""
    passes: float = 1.0
    """How often the training reads each of them."""
    looks: int = 0
    """Forward passes without gradients of every model over each of them."""
    step_keys: tuple[str, ...] = ()
    """The recipe's keys that limit the steps of the training."""
    states: int = 0
    """Saved states that are on the disk at once; 0: none is saved."""
    countable: bool = True
    """Whether a row of the data is a row of the training. Documents and packed conversations are cut into others."""
    bf16_on_cpu: bool = False
    """Whether `train.bf16: auto` may choose bfloat16 on a CPU."""
    checkpointed: tuple[Role, ...] = ("policy", "reward", "critic")
    """Models whose activations `train.gradient_checkpointing` recomputes."""

    @property
    def row_tokens(self) -> int:
        """Most tokens of a row."""
        if self.train is not None:
            return self.train.length * self.train.sequences
        if self.rollout is not None:
            return self.rollout.prompt + self.rollout.answer
        return 0 if self.measure is None else self.measure.length
