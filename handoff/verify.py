"""Whether a run is still what it published: every file of its whole lineage hashed again, every edge compared.

The lineage may lead out of the run, to a stage of another run or to a checkpoint made elsewhere; those are followed
too. Saved states are hashed as well, those of unfinished stages included: they are what a run goes on from.
"""

from dataclasses import dataclass
from pathlib import Path

from handoff.contract import check_foreign
from handoff.errors import HandoffError
from handoff.files import sha256_file
from handoff.manifest import Manifest, ParentRecord, read_manifest
from handoff.parent import changes_since_publishing, foreign_identity
from handoff.state import StateStore


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the stage (its path, when it is of another run), the file ("" when it is about no single
    one), and what, in words."""

    stage: str
    file: str
    message: str


@dataclass(frozen=True)
class Ancestry:
    """One published stage and what it was made from."""

    stage: str
    kind: str
    created: str
    fingerprint: str
    parents: dict[str, ParentRecord]
    """{role: parent}, each with the fingerprint that it had then."""


def lineage(run_dir: Path) -> list[Ancestry]:
    """The published stages of a run in the order of their publishing. HandoffError: no such run, or a damaged
    manifest."""
    manifests = [(folder.name, read_manifest(folder / "stage.json")) for folder in _stage_dirs(run_dir)]
    published = [
        Ancestry(name, manifest.kind, manifest.created, manifest.fingerprint, manifest.parents)
        for name, manifest in manifests
        if manifest is not None
    ]
    return sorted(published, key=lambda ancestry: ancestry.created)


def verify_run(run_dir: Path) -> list[Problem]:
    """Everything that differs from what the stages of `run_dir` and their ancestors published; empty when nothing does.

    Of an unfinished stage there are only states to look at. HandoffError when there is no such run.
    """
    problems: list[Problem] = []
    waiting = [(folder, folder.name) for folder in _stage_dirs(run_dir)]
    seen = {folder.resolve() for folder, _ in waiting}
    while waiting:
        directory, label = waiting.pop(0)
        states = StateStore(directory / "state").damages()
        problems += [Problem(label, f"state/{part}", what) for part, what in states]
        try:
            manifest = read_manifest(directory / "stage.json")
        except HandoffError as error:
            problems.append(Problem(label, "stage.json", str(error)))
            continue
        if manifest is None:
            continue
        problems += [
            Problem(label, file, f"{change} after publishing")
            for file, change in changes_since_publishing(directory, manifest)
        ]
        for role, record in manifest.parents.items():
            path = directory.parent / record.path  # an absolute path stays itself
            fault = _fault(path, record)
            if fault:
                problems.append(Problem(label, "", f"{role} {record.name}: {fault}"))
            if _is_stage(path) and path.resolve() not in seen:
                seen.add(path.resolve())
                waiting.append((path, str(path)))
    return problems


def _stage_dirs(run_dir: Path) -> list[Path]:
    if not run_dir.is_dir():
        raise HandoffError(f"{run_dir}: no such run")
    return sorted(folder for folder in run_dir.iterdir() if folder.is_dir() and _is_stage(folder))


def _is_stage(path: Path) -> bool:
    return (path / "stage.json").exists() or (path / "started.json").exists()


def _fault(path: Path, record: ParentRecord) -> str | None:
    """What is wrong between a stage and one of its parents, None when the parent is as it was."""
    if not path.is_dir():
        return f"{path} is gone"
    try:
        if _is_stage(path):
            manifest: Manifest | None = read_manifest(path / "stage.json")
            if manifest is None:
                return f"{path} is unfinished: it was begun again after this stage"
            present, files = manifest.fingerprint, manifest.files
        else:
            present, files = foreign_identity(path, *check_foreign(path), sha256_file)
    except HandoffError as error:
        return str(error)
    if present == record.fingerprint:
        return None
    names = sorted({name for name, _ in record.files.items() ^ files.items()})
    told = ", ".join(names[:3]) + (" …" if len(names) > 3 else "") if names else "what belongs to it, not its files"
    return f"it is another one now: {told} (fingerprint {record.fingerprint[:12]} then, {present[:12]} now)"
