"""One entry of a recipe's `data:` list."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class SourceBase(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: float = Field(default=1.0, gt=0)
    """Share of this source in the mixture, relative to the other entries' weights (> 0). Only read when `limit` of the
    mixture or the number of steps asks for fewer rows than there are."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many records of the source, the first ones in its own order; all when absent."""


class WorldSource(SourceBase):
    """The embedded world: a seeded generator, nothing to download."""

    source: Literal["world"]
    kind: Literal["documents", "chats", "preferences", "prompts"]
    """What to generate."""
    size: int = Field(default=1000, ge=1)
    """Number of records (documents: number of documents)."""
    split: Literal["train", "validation", "test"] = "train"
    """Disjoint by a hash of the content. Tune on `validation`, report on `test`."""
    families: list[str] | None = None
    """Only these instruction families; all when absent."""
    seed: int = Field(default=0, ge=0)
    """Which world. Another seed, another set of people, places and facts."""


class FileSource(SourceBase):
    """Local files: txt, jsonl, json, csv or parquet, each also with .gz."""

    source: Literal["file"]
    path: str
    """A file, a folder or a glob, relative to the recipe's `data_root` (to the working directory without one)."""
    format: Literal[
        "auto", "text", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "hh_rlhf", "gsm8k"
    ] = "auto"
    """How a row is read; `auto` decides by the columns of the first row and says what it chose."""
    exclude: list[str] = Field(default_factory=list)
    """File names (globs) of a folder or glob that are left out, e.g. a held-out book."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows set aside by a hash of the prompt (of the text), half for validation, half for test."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Which part of the rows to use. Anything but `all` needs `holdout`."""


class HubSource(SourceBase):
    """A data set of the Hugging Face hub, by name."""

    source: Literal["hub"]
    name: str
    """`organisation/name`."""
    subset: str | None = None
    """Configuration name of the data set."""
    hub_split: str = "train"
    """Split of the data set as published, e.g. `train` or `train[:1000]`."""
    format: Literal[
        "auto", "text", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "hh_rlhf", "gsm8k"
    ] = "auto"
    """As for files."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """As for files."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """As for files."""


SourceConfig = Annotated[WorldSource | FileSource | HubSource, Field(discriminator="source")]
