"""Whether a run is still what it published: every file of every stage hashed again, and every child's parents
compared."""

from dataclasses import dataclass
from pathlib import Path

from handoff.errors import HandoffError
from handoff.manifest import Manifest, ParentRecord, read_manifest
from handoff.parent import changes_since_publishing, open_parent


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: the stage, the file ("" when it is about no single one), and what, in words."""

    stage: str
    file: str
    message: str


def verify_run(run_dir: Path) -> list[Problem]:
    """Everything that differs from what the stages of `run_dir` published, parents before children; empty when
    nothing does.

    Unfinished stages have published nothing and are passed over. HandoffError when there is no such run.
    """
    manifests, problems = _manifests(run_dir)
    for name, manifest in manifests.items():
        for file, change in changes_since_publishing(run_dir / name, manifest):
            problems.append(Problem(name, file, f"{change} after publishing"))
        for role, record in manifest.parents.items():
            message = _lineage_fault(run_dir, role, record)
            if message:
                problems.append(Problem(name, "", message))
    return problems


def _manifests(run_dir: Path) -> tuple[dict[str, Manifest], list[Problem]]:
    """{stage: manifest} in the order of publishing, and the ones that cannot be read."""
    if not run_dir.is_dir():
        raise HandoffError(f"{run_dir}: no such run")
    manifests, problems = {}, []
    for folder in sorted(run_dir.iterdir()):
        if folder.name.startswith(".") or not folder.is_dir():
            continue
        try:
            manifest = read_manifest(folder / "stage.json")
        except HandoffError as error:
            problems.append(Problem(folder.name, "stage.json", str(error)))
            continue
        if manifest is not None:
            manifests[folder.name] = manifest
    return dict(sorted(manifests.items(), key=lambda item: item[1].created)), problems


def _lineage_fault(run_dir: Path, role: str, record: ParentRecord) -> str | None:
    """What is wrong with one edge of the lineage, or None."""
    path = run_dir / record.path  # an absolute path stays itself
    try:
        if (path / "stage.json").exists() or (path / "started.json").exists():
            manifest = read_manifest(path / "stage.json")
            present = None if manifest is None else manifest.fingerprint
        elif path.is_dir():
            present = open_parent(str(path), run_dir, {"tokenizer", "causal_lm", "reward_model"}).fingerprint
        else:
            return f"{role} {record.name}: {path} is gone"
    except HandoffError as error:
        return f"{role} {record.name}: {error}"
    if present is None:
        return f"{role} {record.name}: {path} is unfinished, it was begun again after this stage"
    if present != record.fingerprint:
        return f"{role} {record.name}: retrained since ({record.fingerprint[:12]} then, {present[:12]} now)"
    return None
