"""export.json: what was exported, from what, and how it was checked. Imports no torch."""

import sys
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from handoff.errors import HandoffError
from handoff.files import canonical_hash, changed_files, list_files, quoted, read_json, write_json
from training.terminal import shown

NAME = "export.json"
FORMAT_VERSION = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Ancestor(_Record):
    """A stage or a checkpoint from which the model comes."""

    name: str
    stage: str | None
    """The stage package; None for what no stage has published."""
    kind: str | None
    fingerprint: str
    created: str | None = None
    parents: dict[str, str] = Field(default_factory=dict)
    """{role: fingerprint}."""


class CheckRecord(_Record):
    """How the export was compared with the stage's model."""

    by: str
    said: list[str]
    numbers: dict[str, float | int | bool]


class ExportRecord(_Record):
    """What export.json holds."""

    format_version: Literal[1] = 1
    form: str
    """hf, gguf, ollama, onnx or vllm."""
    dtype: str
    created: str
    """UTC, ISO 8601."""
    source: str
    """Name of the stage or model."""
    fingerprint: str
    """Of the exported model, as its stage published it."""
    lineage: list[Ancestor]
    """What it comes from, the oldest first; the last one is the model itself."""
    check: CheckRecord | None
    """None: not checked."""
    notes: list[str]
    """What the reader of the export should know."""
    versions: dict[str, str]
    files: dict[str, str]
    """{path relative to the folder: SHA-256} of all other files."""


def write_record(folder: Path, record: ExportRecord) -> None:
    """Writes export.json, with its own hash."""
    content = record.model_dump(mode="json")
    write_json(folder / NAME, {**content, "sha256": canonical_hash(content)})


def read_record(folder: Path) -> ExportRecord:
    """Reads export.json. Raises HandoffError if it is missing, damaged or altered."""
    path = folder / NAME
    if not path.is_file():
        raise HandoffError(f"{quoted(folder)} is no export: it has no {NAME}; `baton export` makes one")
    content: dict[str, Any] = read_json(path)
    digest = content.pop("sha256", None)
    try:
        record = ExportRecord.model_validate(content)
    except ValidationError as error:
        raise HandoffError(f"{quoted(path)}: {error.errors()[0]['msg']}; export the model again") from error
    if digest != canonical_hash(content):
        raise HandoffError(f"{quoted(path)} was altered: its content does not match its hash; export the model again")
    return record


def is_export(folder: Path) -> bool:
    """Whether the folder is that of an export."""
    return folder.is_dir() and (folder / NAME).is_file()


def verify_export(folder: Path) -> None:
    """Hashes every file of an export again, says each that is not as it was exported, and exits with 1 if there is one.

    Raises:
        HandoffError: the record itself is damaged or altered.
    """
    record = read_record(folder)
    added = sorted(set(list_files(folder)) - record.files.keys() - {NAME})
    changes = changed_files(folder, record.files) + [(quoted(name), "was added") for name in added]
    for file, what in changes:
        print(shown(f"{folder}/{file}: {what} after the export"), file=sys.stderr)
    if changes:
        sys.exit(1)
