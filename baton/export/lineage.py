"""The stages and checkpoints from which a model comes. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from baton.export.record import Ancestor
from handoff.manifest import Manifest, ParentRecord, read_manifest
from handoff.parent import Parent


@dataclass(frozen=True)
class Line:
    """One of them, with its manifest if that is still the one it had then."""

    ancestor: Ancestor
    manifest: Manifest | None


def line_of(parent: Parent) -> list[Line]:
    """What the model comes from, the oldest first; the last one is the model itself.

    A stage that has been trained again since then stands there as it is recorded, without its manifest.
    """
    found: dict[str, Line] = {}
    record = parent.record()
    for line in _walk(record, parent.path, parent.manifest, parent.path.parent, seen=set()):
        found.setdefault(line.ancestor.fingerprint, line)
    if parent.base is not None and parent.base.fingerprint not in found:
        base = parent.base.record()
        lines = list(_walk(base, parent.base.path, parent.base.manifest, parent.base.path.parent, seen=set(found)))
        found = {line.ancestor.fingerprint: line for line in lines} | found
    return list(found.values())


def _walk(record: ParentRecord, path: Path, manifest: Manifest | None, run_dir: Path, seen: set[str]) -> Iterator[Line]:
    if record.fingerprint in seen:
        return
    seen.add(record.fingerprint)
    known = manifest if manifest is not None and manifest.fingerprint == record.fingerprint else None
    for parent in () if known is None else known.parents.values():
        place = run_dir / parent.path  # an absolute path stays itself
        below = read_manifest(place / "stage.json")
        yield from _walk(parent, place, below, place.parent, seen)
    yield Line(
        Ancestor(
            name=record.name,
            stage=None if known is None else known.stage,
            kind=None if known is None else known.kind,
            fingerprint=record.fingerprint,
            created=None if known is None else known.created,
            parents={} if known is None else {role: one.fingerprint for role, one in known.parents.items()},
        ),
        known,
    )
