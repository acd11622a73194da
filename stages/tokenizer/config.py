"""The section of a recipe that the tokenizer stage reads."""

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
    """A byte-level BPE of its own; a pipeline that starts from a checkpoint has no such section."""

    data: list[SourceConfig] = Field(min_length=1)
    """What it is trained on. Conversations and pairs give the texts of their messages; a file source is read as
    documents when its `format` is `text` (or `auto` and it is named .txt), as conversations otherwise."""
    eval_data: list[SourceConfig] = Field(default_factory=list)
    """Held-out texts, for bytes per token."""
    vocab_size: int = Field(default=4096, ge=288)
    """Entries, with the 256 bytes and the special tokens; fewer when the texts do not give that many."""
    split_digits: bool = True
    """Each digit is a token of its own, so that numbers are written in one way."""
    min_frequency: int = Field(default=2, ge=1)
    """Times that a pair has to occur before it is merged."""


def parents(config: Config) -> dict[str, str]:
    """None: a tokenizer is a beginning."""
    return {}
