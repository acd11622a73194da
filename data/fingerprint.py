"""What a stage was fed, as hashes: a stage is stale when one of them changes."""

import json
from collections.abc import Sequence
from pathlib import Path

from data.config import FileSource, HubSource, SourceConfig, StageSource, WorldSource
from data.sources import source_files
from handoff.files import canonical_hash, sha256_file, write_json

_seen: dict[str, str] = {}
"""Hashes of files already read by this process, by path, size and time of change."""


def label(source: SourceConfig) -> str:
    """How messages and manifests name a source: `world:chats[train]`, `file:sft/*.jsonl`,
    `hub:some/name[train]`, `stage:generate`.

    Two entries of a recipe that have the same name have the same bytes to read, if not the same settings.
    """
    if isinstance(source, WorldSource):
        return f"world:{source.kind}[{source.split}]"
    if isinstance(source, HubSource):
        return f"hub:{source.name}{f'/{source.subset}' if source.subset else ''}[{source.hub_split}]"
    if isinstance(source, StageSource):
        return f"stage:{source.name}"
    return f"file:{source.path}"


def fingerprint(source: SourceConfig, root: Path | None, cache: Path | None = None) -> tuple[str, str]:
    """(label, sha256 hex) of one source.

    Files and a stage's rows: names and bytes. The world: its own settings and the generator's source files. The hub:
    name, subset, split and revision; without a revision a change on the hub is not seen. `cache`: a JSON file that
    keeps hashes of files between processes, for data that takes long to read.

    Raises:
        DataError: the files that the source names are not there.
    """
    if isinstance(source, WorldSource):
        return label(source), canonical_hash([source.model_dump(mode="json"), _world_code()])
    if isinstance(source, HubSource):
        return label(source), canonical_hash([source.name, source.subset, source.hub_split, source.revision])
    return label(source), _files_hash(source, root, cache)


def fingerprints(sources: Sequence[SourceConfig], root: Path | None, cache: Path | None = None) -> dict[str, str]:
    """The same for a list; a label that is met again (two parts of one file) gets `#2`, `#3`, ... behind it."""
    result: dict[str, str] = {}
    for source in sources:
        name, digest = fingerprint(source, root, cache)
        times = sum(known.partition("#")[0] == name for known in result)
        result[f"{name}#{times + 1}" if times else name] = digest
    return result


def _world_code() -> list[str]:
    folder = Path(__file__).parent / "world"
    return [sha256_file(path) for path in sorted(folder.glob("*.py"))]


def _files_hash(source: FileSource | StageSource, root: Path | None, cache: Path | None) -> str:
    paths = source_files(source, root)
    known = dict(_seen)
    if cache is not None and cache.is_file():
        known |= json.loads(cache.read_text(encoding="utf-8"))
    hashes: list[tuple[str, str]] = []
    fresh: dict[str, str] = {}
    for path in paths:
        status = path.stat()
        key = f"{path.absolute()}|{status.st_size}|{status.st_mtime_ns}"
        digest = known.get(key) or sha256_file(path)
        if key not in known:
            fresh[key] = digest
        hashes.append((path.name, digest))
    _seen.update(fresh)
    if cache is not None and fresh:
        write_json(cache, known | fresh)
    return canonical_hash(hashes)
