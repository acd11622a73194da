"""What a stage was fed, as hashes: a stage is stale when one of them changes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data.config import FileSource, HubSource, SourceConfig, StageSource, WorldSource
from data.sources import source_files
from handoff.files import canonical_hash, sha256_file


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


def fingerprint(
    source: SourceConfig, root: Path | None, sha256: Callable[[Path], str] = sha256_file
) -> tuple[str, str]:
    """(label, sha256 hex) of one source.

    Files and a stage's rows: names and bytes. The world: its own settings and the generator's source files. The hub:
    name, subset, split and revision; without a revision a change on the hub is not seen. `sha256`: the hash of a file;
    with `HashCache.sha256` an unchanged file is not read again.

    Raises:
        DataError: the files that the source names are not there.
    """
    if isinstance(source, WorldSource):
        return label(source), canonical_hash([source.model_dump(mode="json"), _world_code()])
    if isinstance(source, HubSource):
        return label(source), canonical_hash([source.name, source.subset, source.hub_split, source.revision])
    return label(source), _files_hash(source, root, sha256)


def fingerprints(
    sources: Sequence[SourceConfig], root: Path | None, sha256: Callable[[Path], str] = sha256_file
) -> dict[str, str]:
    """The same for a list; a label that is met again (two parts of one file) gets `#2`, `#3`, ... behind it."""
    result: dict[str, str] = {}
    for source in sources:
        name, digest = fingerprint(source, root, sha256)
        times = sum(known.partition("#")[0] == name for known in result)
        result[f"{name}#{times + 1}" if times else name] = digest
    return result


def _world_code() -> list[str]:
    folder = Path(__file__).parent / "world"
    return [sha256_file(path) for path in sorted(folder.glob("*.py"))]


def _files_hash(source: FileSource | StageSource, root: Path | None, sha256: Callable[[Path], str]) -> str:
    return canonical_hash([(path.name, sha256(path)) for path in source_files(source, root)])
