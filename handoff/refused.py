"""A result that does not pass its gate: it is kept whole in `<run>/.failed/<section>/`, and is not published.

    model/ or data/, and other files   as they would have been published
    stage.json                         the manifest that they would have had
    gate.json                          every condition of the gate, and what was measured

The newest one of a section is kept, until the section publishes a result. No torch here.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from handoff.errors import HandoffError
from handoff.files import fsync_path, fsync_tree, read_json, remove_tree, write_json
from handoff.manifest import Manifest, read_manifest, sealed

FAILED = ".failed"
_GATE, _MANIFEST, _NEW = "gate.json", "stage.json", ".new-"


class Verdict(BaseModel):
    """One condition of a gate, and whether it is met."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str
    passed: bool
    said: str
    """The condition and what was measured, in a sentence."""
    value: float | None = None
    task: str | None = None
    model: str | None = None


@dataclass(frozen=True)
class Refused:
    """A result that was not published."""

    path: Path
    manifest: Manifest
    verdicts: list[Verdict]

    @property
    def reasons(self) -> list[str]:
        """The conditions that are not met."""
        return [verdict.said for verdict in self.verdicts if not verdict.passed]


def failed_dir(run_dir: Path, section: str) -> Path:
    """Where the refused result of a section is kept."""
    return run_dir / FAILED / section


def keep(
    run_dir: Path,
    manifest: Manifest,
    verdicts: Sequence[Verdict],
    folders: Mapping[str, Path],
    files: Mapping[str, Path],
) -> Path:
    """Keeps a refused result, in place of an earlier one of its section. Returns its folder.

    Args:
        folders: {name: folder that is moved there}.
        files: {name: file that is moved there}.
    """
    target = failed_dir(run_dir, manifest.name)
    new = target.with_name(f"{_NEW}{target.name}")
    remove_tree(new)
    new.mkdir(parents=True)
    for name, path in {**folders, **files}.items():
        path.rename(new / name)
    write_json(new / _MANIFEST, sealed(manifest))
    write_json(new / _GATE, [verdict.model_dump(exclude_none=True) for verdict in verdicts])
    fsync_tree(new)
    remove_tree(target)
    new.rename(target)
    fsync_path(target.parent)
    return target


def forget(run_dir: Path, section: str) -> None:
    """Removes the refused result of a section, which has published one now."""
    target = failed_dir(run_dir, section)
    if target.is_dir():
        remove_tree(target)
        with suppress(OSError):
            target.parent.rmdir()  # if it was the last one


def read_refused(run_dir: Path, section: str) -> Refused | None:
    """The refused result of a section; None if there is none.

    Raises:
        HandoffError: it cannot be read.
    """
    path = failed_dir(run_dir, section)
    manifest = read_manifest(path / _MANIFEST)
    if manifest is None:
        return None
    try:
        verdicts = [Verdict.model_validate(entry) for entry in read_json(path / _GATE)]
    except (ValidationError, TypeError) as error:
        raise HandoffError(f"{path / _GATE} is damaged; remove {path} and run the stage again") from error
    return Refused(path, manifest, verdicts)


def refused_sections(run_dir: Path) -> list[str]:
    """The sections with a refused result."""
    return sorted(path.parent.name for path in run_dir.glob(f"{FAILED}/*/{_MANIFEST}"))
