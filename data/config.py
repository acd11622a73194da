"""One entry of a recipe's `data:` list."""

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator


class SourceBase(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: float = Field(default=1.0, gt=0)
    """How densely this source is used, relative to the other entries of the list (> 0): of the source with the largest
    weight all rows, of the others `weight / largest weight` of their rows, chosen by a hash of the row."""
    limit: int | None = Field(default=None, ge=1)
    """At most this many usable records of the source, the first ones in its own order; all when absent."""


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


class RowsSource(SourceBase):
    """What files, hub data sets and published rows share: how rows are read, and which are held out."""

    format: Literal[
        "auto", "text", "prompt_completion", "alpaca", "messages", "sharegpt", "preference", "hh_rlhf", "gsm8k"
    ] = "auto"
    """How a row is read; `auto` decides by the columns of each file's first row and says what it chose."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows set aside by a hash of the first user turn (of the text), half for validation, half for test. Equal
    prompts fall on the same side in every file. Give the same share wherever the rows are used."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Which part of the rows to use. Anything but `all` needs `holdout`, and `holdout` needs anything but `all`."""

    @model_validator(mode="after")
    def _holdout_and_split_agree(self) -> Self:
        if self.split != "all" and self.holdout == 0:
            raise ValueError(f"split: {self.split} needs `holdout`, the share of rows that is set aside")
        if self.split == "all" and self.holdout > 0:
            raise ValueError("`holdout` needs `split: train`, `validation` or `test`, or it would set nothing aside")
        return self


class FileSource(RowsSource):
    """Local files: txt, jsonl, json, csv or parquet, each also with .gz."""

    source: Literal["file"]
    path: str
    """A file, a folder or a glob, relative to the recipe's `data_root` (to the working directory without one)."""
    exclude: list[str] = Field(default_factory=list)
    """File names (globs) of a folder or glob that are left out, e.g. a held-out book."""


class HubSource(RowsSource):
    """A data set of the Hugging Face hub, by name."""

    source: Literal["hub"]
    name: str
    """`organisation/name`."""
    subset: str | None = None
    """Configuration name of the data set."""
    hub_split: str = "train"
    """Split of the data set as published, e.g. `train` or `train[:1000]`."""
    revision: str | None = None
    """Commit or tag of the data set, so that a run can be repeated. When absent, what is the newest when its rows are
    encoded; a later change on the hub is not seen while the encoded rows are there (`<output_root>/.rows`)."""


class StageSource(RowsSource):
    """Rows that a stage has published, such as the answers that `generate` samples."""

    source: Literal["stage"]
    name: str
    """A section of this recipe whose stage publishes rows, or the directory of such a stage of another run."""

    _folder: Path | None = PrivateAttr(default=None)

    def at(self, folder: Path) -> "StageSource":
        """The same source with the folder of its rows. Only the run knows where its sections publish."""
        located = self.model_copy()
        located._folder = folder
        return located

    @property
    def folder(self) -> Path:
        """Where the rows are."""
        assert self._folder is not None, "the run locates a stage's rows before they are read"
        return self._folder


SourceConfig = Annotated[WorldSource | FileSource | HubSource | StageSource, Field(discriminator="source")]
