"""Verifies a run: hashes every file in its lineage again, and compares every stage's record of its parents.

The lineage may include a stage of another run or a foreign checkpoint; those are verified too. Saved states are hashed
as well, including those of unfinished stages, since a run resumes from them.
"""

from dataclasses import dataclass
from pathlib import Path

from handoff.contract import check_published
from handoff.errors import HandoffError
from handoff.files import sha256_file
from handoff.manifest import Manifest, ParentRecord, read_manifest
from handoff.parent import changes_since_publishing, open_foreign
from handoff.refused import FAILED, read_refused, refused_sections
from handoff.state import StateStore


@dataclass(frozen=True)
class Problem:
    """One fault: the stage (its path, if it belongs to another run), the file ("" if no single file is concerned), and
    a description."""

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
    """{role: parent}, each with its fingerprint at that time."""


def lineage(run_dir: Path) -> list[Ancestry]:
    """The published stages of a run, in the order in which they were published. Raises HandoffError if there is no such
    run or a manifest is damaged."""
    manifests = [(folder.name, read_manifest(folder / "stage.json")) for folder in _stage_dirs(run_dir)]
    published = [
        Ancestry(name, manifest.kind, manifest.created, manifest.fingerprint, manifest.parents)
        for name, manifest in manifests
        if manifest is not None
    ]
    return sorted(published, key=lambda ancestry: ancestry.created)


def verify_run(run_dir: Path) -> list[Problem]:
    """All differences from what the stages of `run_dir` and their ancestors published; empty if there are none.

    Of an unfinished stage only the states are checked. Raises HandoffError if there is no such run.
    """
    problems: list[Problem] = []
    waiting = [(folder, folder.name) for folder in _stage_dirs(run_dir)]
    seen = {folder.resolve() for folder, _ in waiting}
    for section in refused_sections(run_dir):
        try:
            failed = read_refused(run_dir, section)
        except HandoffError as error:
            problems.append(Problem(section, "", str(error)))
            continue
        changes = [] if failed is None else changes_since_publishing(failed.path, failed.manifest)
        problems += [Problem(f"{FAILED}/{section}", file, f"{change} since it was kept") for file, change in changes]
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
        changes = changes_since_publishing(directory, manifest)
        problems += [Problem(label, file, f"{change} after publishing") for file, change in changes]
        if not changes and manifest.tokenizer is not None:
            try:
                check_published(directory / "model", manifest.kind, manifest.tokenizer)
            except HandoffError as error:
                problems.append(Problem(label, "", str(error)))
        records = dict(manifest.parents)
        if manifest.adapter is not None and manifest.adapter.base not in records.values():
            records["the adapter's base"] = manifest.adapter.base
        for role, record in records.items():
            path = directory.parent / record.path  # an absolute path stays itself
            fault = _fault(path, record)
            if fault:
                problems.append(Problem(label, "", f"{_told(role, record)}: {fault}"))
            if _is_stage(path) and path.resolve() not in seen:
                seen.add(path.resolve())
                waiting.append((path, str(path)))
    return problems


def _told(role: str, record: ParentRecord) -> str:
    """The role and the name of a parent; once, where the role has the name (`data:samples`)."""
    return role if role.rpartition(":")[2] == record.name else f"{role} {record.name}"


def _stage_dirs(run_dir: Path) -> list[Path]:
    if not run_dir.is_dir():
        raise HandoffError(f"{run_dir}: no such run")
    return sorted(folder for folder in run_dir.iterdir() if folder.is_dir() and _is_stage(folder))


def _is_stage(path: Path) -> bool:
    return (path / "stage.json").exists() or (path / "started.json").exists()


def _fault(path: Path, record: ParentRecord) -> str | None:
    """How a parent differs from the stage's record of it; None if it is unchanged."""
    if not path.is_dir():
        return f"{path} is gone"
    try:
        if _is_stage(path):
            manifest: Manifest | None = read_manifest(path / "stage.json")
            if manifest is None:
                return f"{path} is unfinished: it was started again after this stage"
            present, files = manifest.fingerprint, manifest.files
        else:
            found = open_foreign(path, record.name, sha256_file)
            present, files = found.fingerprint, found.files
    except HandoffError as error:
        return str(error)
    if present == record.fingerprint:
        return None
    names = sorted({name for name, _ in record.files.items() ^ files.items()})
    changed = (
        ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        if names
        else "its kind, encoding or extra values, but no file"
    )
    return f"it has changed: {changed} (fingerprint {record.fingerprint[:12]} then, {present[:12]} now)"
