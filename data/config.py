"""One entry of a recipe's `data:` list."""

from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

Format: TypeAlias = Literal[
    "text",
    "prompt_completion",
    "alpaca",
    "messages",
    "sharegpt",
    "preference",
    "hh_rlhf",
    "gsm8k",
    "svamp",
    "multiple_choice",
]


class SourceBase(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    weight: float = Field(default=1.0, gt=0)
    """Share of the source's rows to use, relative to the other entries of the list (> 0): `weight / largest weight` of
    its rows, chosen by a hash of the row. The source with the largest weight is used whole."""
    limit: int | None = Field(default=None, ge=1)
    """Read at most this many records, the first ones in the source's order that are in the wanted split and whose row
    is well-formed; all when absent. It counts before anything is encoded, so rows that are then dropped, such as those
    that are too long, are among them."""


class WorldSource(SourceBase):
    """The embedded world: a seeded generator, nothing to download."""

    source: Literal["world"]
    kind: Literal["documents", "chats", "preferences", "prompts"]
    """What to generate."""
    size: int = Field(default=1000, ge=1)
    """Number of records; for `documents`, number of documents."""
    split: Literal["train", "validation", "test"] = "train"
    """The splits are disjoint, by a hash of the content. Tune on `validation`, report on `test`."""
    families: list[str] | None = None
    """Use only these instruction families; all when absent."""
    seed: int = Field(default=0, ge=0)
    """Seed of the world; each seed gives different people, places and facts."""


class RowsSource(SourceBase):
    """Keys shared by files, hub data sets and published rows: how rows are read, and which are held out."""

    format: Literal["auto", Format] = "auto"
    """Format of the rows; `auto` chooses by the columns of each file's first row and reports its choice."""
    holdout: float = Field(default=0.0, ge=0, lt=1)
    """Share of rows set aside by a hash of the first user turn (of a document, its text), half for validation, half for
    test. Equal prompts are in the same part in every file. Give the same share wherever the rows are used."""
    split: Literal["all", "train", "validation", "test"] = "all"
    """Which part of the rows to use. Every value but `all` requires `holdout`; `all` forbids it."""

    rename: dict[str, str] = Field(default_factory=dict)
    """{column of the data: name under which it is read}. A row that already has the new name is left as it is."""
    ignore: list[str] = Field(default_factory=list)
    """Columns, and keys of turns, to leave out on purpose, e.g. `[tools, tool_calls]`. Otherwise a row that means
    something else without such a key is dropped."""

    @model_validator(mode="after")
    def _holdout_and_split_agree(self) -> Self:
        if self.split != "all" and self.holdout == 0:
            raise ValueError(f"split: {self.split} needs `holdout`, the share of rows that is set aside")
        if self.split == "all" and self.holdout > 0:
            raise ValueError("`holdout` needs `split: train`, `validation` or `test`, or it would set nothing aside")
        return self


class FileSource(RowsSource):
    """Local files: txt, jsonl, ndjson, json, csv, tsv, parquet or arrow, each also with .gz, .bz2, .xz or .zst."""

    source: Literal["file"]
    path: str
    """A file, a folder or a glob, relative to the recipe's `data_root` or, without one, to the working directory."""
    exclude: list[str] = Field(default_factory=list)
    """File names (globs) to leave out of a folder or glob, e.g. a held-out book."""


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
    """Commit or tag of the data set, so that a run can be repeated. When absent, the newest commit when the rows are
    encoded; later changes on the hub have no effect as long as the encoded rows exist (`<output_root>/.rows`)."""


class StageSource(RowsSource):
    """Rows that a stage has published, such as the answers that `generate` samples."""

    source: Literal["stage"]
    name: str
    """A section of this recipe whose stage publishes rows, or the directory of such a section in another run."""

    _folder: Path | None = PrivateAttr(default=None)

    def at(self, folder: Path) -> "StageSource":
        """A copy of this source with the folder of its rows, which depends on the run's directory."""
        located = self.model_copy()
        located._folder = folder
        return located

    @property
    def folder(self) -> Path:
        """Where the rows are."""
        assert self._folder is not None, "the run locates a stage's rows before they are read"
        return self._folder


SourceConfig = Annotated[WorldSource | FileSource | HubSource | StageSource, Field(discriminator="source")]
