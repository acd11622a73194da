"""Hashes of a stage's data sources: a stage is stale when one of them changes."""

from collections.abc import Callable, Sequence
from pathlib import Path

from data.config import FileSource, HubSource, SourceConfig, StageSource, WorldSource
from data.sources import source_files
from handoff.files import canonical_hash, list_files, sha256_file


def label(source: SourceConfig) -> str:
    """A source's name in messages and manifests: `world:chats[train]`, `file:sft/*.jsonl`,
    `hub:some/name[train]`, `stage:generate`.

    Two entries of a recipe with the same name read the same bytes, but their settings may differ.
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

    The hash covers, for files and a stage's rows, names and bytes; for the world, its settings and the generator's
    source files; for the hub, name, subset, split and revision (without one, changes on the hub go unnoticed), and,
    where the name is that of a local folder, which `datasets` reads too, the names and bytes of its files.
    `sha256` hashes a file; `HashCache.sha256` does not read an unchanged file again.

    Raises:
        DataError: the files that the source names do not exist.
    """
    if isinstance(source, WorldSource):
        return label(source), canonical_hash([source.model_dump(mode="json"), _world_code()])
    if isinstance(source, HubSource):
        keys = [source.name, source.subset, source.hub_split, source.revision]
        folder = Path(source.name)
        if folder.is_dir():
            files = {name: sha256(folder / name) for name in list_files(folder)}
            return label(source), canonical_hash([*keys, files])
        return label(source), canonical_hash(keys)
    return label(source), _files_hash(source, root, sha256)


def fingerprints(
    sources: Sequence[SourceConfig], root: Path | None, sha256: Callable[[Path], str] = sha256_file
) -> dict[str, str]:
    """`fingerprint` of each source; a repeated label (two parts of one file) gets the suffix `#2`, `#3`, ..."""
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
