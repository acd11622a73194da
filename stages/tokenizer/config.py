"""The section of a recipe that the tokenizer stage reads."""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from data.config import SourceConfig
from training.config import StageConfig
from training.declaration import Declaration

DECLARATION = Declaration(
    "tokenizer",
    targets=("tokenizer",),
    publishes="tokenizer",
    distributed=False,
    headline=(
        ("eval_bytes_per_token", "bytes per held-out token"),
        ("vocab_size", "entries"),
        ("train_bytes_per_token", "bytes per token"),
    ),
)


class Config(StageConfig):
    """A new byte-level BPE; a pipeline that starts from a checkpoint needs no such section."""

    published: ClassVar[Sequence[str]] = (
        "vocab_size",
        "train_bytes_per_token",
        "eval_bytes_per_token",
    )

    data: list[SourceConfig] = Field(min_length=1)
    """Training texts. Of conversations and pairs, the messages are used. A file source is read as documents if its
    `format` is `text` (or `auto`, and its path contains .txt), else as conversations."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out texts, for bytes per token."""
    vocab_size: int = Field(default=4096, ge=288)
    """Number of entries, including the 256 bytes and special tokens; fewer if the texts give too few pairs to merge."""
    split_digits: bool = True
    """Make each digit a separate token, so that a number is always split in the same way."""
    min_frequency: int = Field(default=2, ge=1)
    """Minimum number of occurrences of a pair that is merged."""

    def vocabulary(self) -> int | None:
        """Entries of the tokenizer that the section makes."""
        return self.vocab_size


def parents(config: Config) -> dict[str, str]:
    """A tokenizer has no parent."""
    return {}
