"""Opens and checks a stage's parent (a section of the same run, a checkpoint directory, or a model of the hub), or the
rows that a section of this or another run has published.

Whoever made a parent, only the files that the gate lets through are read (handoff/gate.py), and all of them are hashed.
"""

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from handoff.adapter import read_adapter
from handoff.contract import adapter_parts, check_foreign, check_foreign_adapter, check_published, kind_of
from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError
from handoff.files import HashCache, canonical_hash, changed_files, list_files, quoted, sha256_file
from handoff.gate import ADAPTER_CONFIG, check_directory, is_adapter, loaded_files
from handoff.gguf import folder_name, is_gguf, unpacked
from handoff.manifest import (
    KIND_WORDS,
    Kind,
    Manifest,
    ParentRecord,
    QuantizationRecord,
    TokenizerRecord,
    kinds_in_words,
    read_manifest,
)

_DOWNLOADED = ("*.safetensors", "*.json", "*.jinja", "*.txt")
HASH_CACHE = ".hashes.json"
UNPACKED = ".unpacked"
"""Folder under output_root with the models that came in one file."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Parent:
    """An opened parent."""

    path: Path
    """The stage's directory, or the foreign checkpoint's directory."""
    model_dir: Path
    """The directory of tokenizer, template and generation settings, and of configuration and weights unless the parent
    is an adapter; equal to `path` for a foreign checkpoint."""
    name: str
    """Section name, directory name, or hub id."""
    manifest: Manifest | None
    """None for a foreign checkpoint."""
    fingerprint: str
    kind: Kind
    tokenizer: TokenizerRecord
    files: dict[str, str]
    """{path relative to `path`: SHA-256} of the parent's files."""
    chat_template: str | None = None
    """Which of the tokenizer's chat templates is used, if the recipe chooses one."""
    adapter_dir: Path | None = None
    """The directory of the adapter, if the parent is one."""
    base: "Parent | None" = None
    """The whole model below the adapter."""

    @property
    def weights_dir(self) -> Path:
        """The directory of config.json and of whole weights: the base's if the parent is an adapter."""
        return self.model_dir if self.base is None else self.base.model_dir

    @property
    def stack(self) -> list[str]:
        """What the adapter holds, the oldest first; empty for a whole model."""
        if self.base is None:
            return []
        record = None if self.manifest is None else self.manifest.adapter
        return [self.name] if record is None else record.stack

    @property
    def quantization(self) -> QuantizationRecord | None:
        """How the base below the adapter was quantised when it was trained; None for a whole model."""
        record = None if self.manifest is None else self.manifest.adapter
        return None if record is None else record.quantization

    def record(self) -> ParentRecord:
        """The parent's entry in the manifest of a stage that starts from it."""
        return ParentRecord(path=str(self.path), fingerprint=self.fingerprint, name=self.name, files=self.files)


@dataclass(frozen=True)
class Dataset:
    """The rows that a stage has published, opened."""

    path: Path
    """Stage directory."""
    manifest: Manifest

    @property
    def data_dir(self) -> Path:
        """The directory of the files with rows."""
        return self.path / "data"

    def record(self) -> ParentRecord:
        """The data set's entry in the manifest of a stage that reads the rows."""
        made = self.manifest
        return ParentRecord(path=str(self.path), fingerprint=made.fingerprint, name=made.name, files=made.files)


@dataclass(frozen=True)
class Outline:
    """What can be known of a parent without its weights."""

    kind: Kind
    config_dir: Path
    """The directory of config.json: the base's if the parent is an adapter. A tokenizer's has none."""
    model_dir: Path
    """The directory of tokenizer, template and generation settings."""
    adapted: bool = False
    """Whether the parent is an adapter."""


def outline(ref: str, run_dir: Path) -> Outline:
    """Looks at a parent as `open_parent` does, but reads no weights; of a model of the hub, none are fetched.

    Raises:
        HandoffError: it is missing or unfinished, nothing can start from it, or the gate refuses one of its files.
    """
    directory, _ = _locate(ref, run_dir, weights=False)
    manifest = _manifest(directory)
    if manifest is not None:
        made = _open_published(directory, manifest.model_copy(update={"adapter": None}), sha256_file, verify=False)
        if manifest.adapter is None:
            return Outline(made.kind, made.model_dir, made.model_dir)
        beside = directory.parent / manifest.adapter.base.path
        base = outline(str(beside) if beside.is_dir() else manifest.adapter.base.name, run_dir)
        return Outline(made.kind, base.config_dir, made.model_dir, adapted=True)
    if is_adapter(directory):
        base = outline(_base_of(directory), directory)
        kind, model_dir = adapter_parts(directory, base.model_dir, base.kind)
        return Outline(kind, base.config_dir, model_dir, adapted=True)
    if "/" in ref and not Path(ref).expanduser().exists():
        check_directory(directory)
        return Outline(kind_of(directory), directory, directory)
    return Outline(check_foreign(directory)[0], directory, directory)


def open_parent(
    ref: str, run_dir: Path, kinds: Collection[Kind], *, verify: bool = True, chat_template: str | None = None
) -> Parent:
    """Opens `ref` and checks that a stage may start from it, before any weights are loaded.

    Args:
        ref: a section of the run, a directory or a GGUF file, or a hub id (`organisation/name`), tried in this order.
        run_dir: the run's directory.
        kinds: kinds that the stage can start from.
        verify: hash every published file again, compare with the manifest, and check the contract, before a published
            model is loaded; one process of a run is enough. A foreign checkpoint is always checked.
        chat_template: which of the tokenizer's chat templates is used; by default the one named `default`.

    Raises:
        HandoffError: the parent is missing (the message gives the command that makes it), unfinished, of the wrong
            kind, altered after publishing (the message names the files), or breaks the contract.
    """
    directory, name = _locate(ref, run_dir)
    manifest = _manifest(directory)
    sha256 = known_hashes(run_dir).sha256
    if manifest is None:
        parent = open_foreign(directory, name, sha256)
    else:
        parent = _open_published(directory, manifest, sha256, verify=verify)
    if parent.kind not in kinds:
        raise HandoffError(f"{directory} is {KIND_WORDS[parent.kind]}, and {kinds_in_words(kinds)} is needed here")
    if manifest is not None and verify:
        _check_unaltered(directory, manifest)
        check_published(parent.model_dir, parent.kind, parent.tokenizer)
    if chat_template is not None:
        record = read_tokenizer(parent.model_dir, choose_pad=manifest is None, template=chat_template)
        parent = replace(parent, tokenizer=record, chat_template=chat_template)
    return parent


def look(ref: str, run_dir: Path) -> tuple[Kind, str]:
    """(kind, name) of what `ref` names, as `open_parent` would open it, after a look at its directory: large files are
    not hashed, and a GGUF file is not unpacked.

    Raises:
        HandoffError: as `open_parent`.
    """
    if is_gguf(ref):
        return "causal_lm", Path(ref).stem
    directory, name = _locate(ref, run_dir)
    manifest = _manifest(directory)
    if manifest is not None:
        return manifest.kind, manifest.name
    return open_foreign(directory, name, lambda path: "").kind, name


def packed(ref: str, run_dir: Path) -> bool:
    """Whether `ref` is a GGUF file that has not been unpacked yet."""
    if not is_gguf(ref):
        return False
    store = run_dir.absolute().parent / UNPACKED
    # Without any unpacked model, the file need not be hashed.
    if not store.is_dir():
        return True
    digest = known_hashes(run_dir).sha256(Path(ref).expanduser())
    return not (store / folder_name(digest)).is_dir()


def is_hub_id(parent: Parent) -> bool:
    """Whether the parent was named by its id in the hub."""
    return _HUB_ID.fullmatch(parent.name) is not None


def open_dataset(ref: str, run_dir: Path, reader: str, *, verify: bool = True) -> Dataset:
    """Opens the rows that `ref` has published.

    Args:
        ref: a section of the run, or the directory of a stage.
        run_dir: the run's directory.
        reader: the section that reads them, for messages.
        verify: as for `open_parent`.

    Raises:
        HandoffError: the data set is missing, unfinished or altered after publishing, or `ref` is not a data set.
    """
    directory, _ = _locate(ref, run_dir)
    manifest = _manifest(directory)
    if manifest is None or manifest.kind != "dataset":
        found = "was not published by a stage" if manifest is None else f"is {KIND_WORDS[manifest.kind]}"
        raise HandoffError(
            f"{directory} {found}; `source: stage, name: {ref}` of {reader} has to name a stage that publishes rows. "
            "Files are read with `source: file`"
        )
    if verify:
        _check_unaltered(directory, manifest)
    return Dataset(directory, manifest)


def _manifest(directory: Path) -> Manifest | None:
    """A directory's manifest; None if no stage began there. Raises HandoffError if one began but did not publish."""
    manifest = read_manifest(directory / "stage.json")
    if manifest is None and (directory / "started.json").exists():
        raise HandoffError(f"{directory} is unfinished: it was started but not published; {_how_to_make(directory)}")
    return manifest


def _check_unaltered(directory: Path, manifest: Manifest) -> None:
    changes = changes_since_publishing(directory, manifest)
    if changes:
        told = ", ".join(f"{file} {change}" for file, change in changes[:3])
        raise HandoffError(
            f"{directory} was altered after publishing: {told}{' …' if len(changes) > 3 else ''}; "
            f"restore it, or {_how_to_make(directory)}"
        )


def changes_since_publishing(directory: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """(file, what happened) for every published file in `directory` that no longer matches the manifest."""
    changes = changed_files(directory, manifest.files)
    # An added file is a change too: transformers would load an adapter beside the weights; added rows would be read.
    present = {f"{folder}/{name}" for folder in ("model", "data") for name in list_files(directory / folder)}
    return changes + [(quoted(name), "was added") for name in sorted(present - manifest.files.keys())]


def damaged_since_publishing(directory: Path, manifest: Manifest) -> list[tuple[str, str]]:
    """As `changes_since_publishing`, at the cost of a look: only files that were written after stage.json are hashed.

    So a file is not noticed whose content changed and whose time did not; `baton verify` hashes everything.
    """
    published = (directory / "stage.json").stat().st_mtime_ns
    looked_at = {
        name: digest
        for name, digest in manifest.files.items()
        if not (directory / name).is_file() or (directory / name).stat().st_mtime_ns > published
    }
    return changed_files(directory, looked_at)


def known_hashes(run_dir: Path) -> HashCache:
    """Hashes of the large files that a run reads: foreign checkpoints, data, encoded rows."""
    return _hashes(run_dir.absolute())


def keep_hashes(run_dir: Path) -> None:
    """Saves the hashes that this process has computed in the run's directory, for later commands.

    Call it only when a stage of the run writes something, so that reading and a refused start leave the disk unchanged.
    """
    known_hashes(run_dir).save()


@cache
def _hashes(run_dir: Path) -> HashCache:
    """One cache per run and process, since a stage opens its parents more than once."""
    return HashCache(run_dir / HASH_CACHE)


def _open_published(directory: Path, manifest: Manifest, sha256: Callable[[Path], str], *, verify: bool) -> Parent:
    if manifest.tokenizer is None:
        way = (
            f"; `data: [{{source: stage, name: {manifest.name}}}]` reads its rows" if manifest.kind == "dataset" else ""
        )
        raise HandoffError(f"{directory} is {KIND_WORDS[manifest.kind]}: nothing can start from it{way}")
    adapted = manifest.adapter is not None
    return Parent(
        path=directory,
        model_dir=directory / "model",
        name=manifest.name,
        manifest=manifest,
        fingerprint=manifest.fingerprint,
        kind=manifest.kind,
        tokenizer=manifest.tokenizer,
        files=manifest.files,
        adapter_dir=directory / "model" if adapted else None,
        base=_recorded_base(directory, manifest.adapter.base, sha256, verify=verify) if manifest.adapter else None,
    )


def open_foreign(directory: Path, name: str, sha256: Callable[[Path], str]) -> Parent:
    """Opens and checks what no stage has published: a checkpoint, or an adapter and its base.

    The fingerprint depends on the bytes of the files that are read, on the tokenizer's record, and on an adapter's
    base.

    Raises:
        HandoffError: it breaks the contract (handoff/contract.py), or an adapter's base is not there.
    """
    base = None
    model_dir = directory
    if is_adapter(directory):
        base = _named_base(directory, sha256)
        kind, tokenizer, model_dir = check_foreign_adapter(directory, base.model_dir, base.kind)
    else:
        kind, tokenizer = check_foreign(directory)
    files = {file: sha256(path) for file, path in loaded_files(directory).items()}
    content = [kind, files, tokenizer.model_dump(mode="json"), *([] if base is None else [base.fingerprint])]
    return Parent(
        path=directory,
        model_dir=model_dir,
        name=name,
        manifest=None,
        fingerprint=canonical_hash(content),
        kind=kind,
        tokenizer=tokenizer,
        files=files,
        adapter_dir=None if base is None else directory,
        base=base,
    )


def _recorded_base(directory: Path, record: ParentRecord, sha256: Callable[[Path], str], *, verify: bool) -> Parent:
    """The base of a published adapter. Raises HandoffError if it is gone or is no longer the one that was adapted."""
    path = directory.parent / record.path  # an absolute path stays itself
    if not path.is_dir():
        if not _HUB_ID.fullmatch(record.name):
            raise HandoffError(
                f"{path}, the base of the adapter {directory}, is gone; put it there, or train the adapter again"
            )
        path = _download(record.name)
    base = _open_base(path, record.name, sha256, verify=verify)
    if base.fingerprint != record.fingerprint:
        changed = sorted({name for name, _ in record.files.items() ^ base.files.items()})
        raise HandoffError(
            f"{path} is not the base that the adapter {directory} was trained on"
            + (f" ({', '.join(changed[:3])}{' …' if len(changed) > 3 else ''})" if changed else "")
            + f"; bring that one back, or {_how_to_make(directory)}"
        )
    return base


def _open_base(path: Path, name: str, sha256: Callable[[Path], str], *, verify: bool) -> Parent:
    manifest = _manifest(path)
    if manifest is None:
        return open_foreign(path, name, sha256)
    if verify:
        _check_unaltered(path, manifest)
    return _open_published(path, manifest, sha256, verify=verify)


def _named_base(directory: Path, sha256: Callable[[Path], str]) -> Parent:
    """The base that a foreign adapter names: a directory, seen from here or from the adapter, or a model of the hub."""
    file = directory / ADAPTER_CONFIG
    try:
        path, name = _locate(_base_of(directory), directory)
        base = _open_base(path, name, sha256, verify=True)
    except HandoffError as error:
        raise HandoffError(
            f"{file}: base_model_name_or_path: {error}; write the directory of the base there"
        ) from error
    if base.base is not None or base.kind == "tokenizer":
        what = "an adapter itself" if base.base is not None else "no model"
        raise HandoffError(f"{file}: base_model_name_or_path: {path} is {what}; merge it first, and name that model")
    return base


def _base_of(directory: Path) -> str:
    """The reference to the base that a foreign adapter names."""
    file = directory / ADAPTER_CONFIG
    check_directory(directory)
    ref = read_adapter(directory).settings.base_model_name_or_path
    if not ref:
        raise HandoffError(f"{file}: base_model_name_or_path is missing; write the directory or hub id of the base")
    beside = directory / ref
    if Path(ref).is_file() or beside.is_file():
        raise HandoffError(f"{file}: base_model_name_or_path: {ref} is a file; write the directory of the base there")
    return str(beside) if beside.is_dir() else ref if "/" in ref else f"./{ref}"


def _locate(ref: str, run_dir: Path, *, weights: bool = True) -> tuple[Path, str]:
    """(directory, name) of a reference. `weights`: fetch those of a model of the hub, too."""
    if "/" not in ref and (run_dir / ref).is_dir():
        return run_dir / ref, ref
    directory = Path(ref).expanduser()
    if directory.is_dir():
        # If `ref` is a stage's model/ or data/ directory, the manifest is one level up.
        if directory.name in ("model", "data") and (directory.parent / "started.json").exists():
            directory = directory.parent
        return directory, directory.resolve().name
    if directory.is_file():
        if not is_gguf(directory):
            raise HandoffError(f"{ref} is a file; a parent is a directory with a model, or a .gguf file")
        digest = known_hashes(run_dir).sha256(directory)
        return unpacked(directory.absolute(), run_dir.absolute().parent / UNPACKED, digest), directory.stem
    if "/" not in ref:
        raise HandoffError(
            f"{run_dir / ref} does not exist; {_how_to_make(run_dir / ref)} "
            "(a model of the hub is written organisation/name)"
        )
    if directory.is_absolute() or ref.startswith(("./", "../", "~")) or not _HUB_ID.fullmatch(ref):
        raise HandoffError(f"{ref}: no such directory")
    return _download(ref, weights=weights), ref


def _download(ref: str, *, weights: bool = True) -> Path:
    """The newest available snapshot of a hub model, without its pickles and code, or also without its weights."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        # `*/*` leaves out subdirectories, which hold other formats of the same weights (fnmatch's * matches slashes).
        snapshot_download(ref, allow_patterns=["additional_chat_templates/*.jinja"])
        left_out = ["*/*", "consolidated*", *([] if weights else ["*.safetensors", "*.safetensors.index.json"])]
        return Path(snapshot_download(ref, allow_patterns=list(_DOWNLOADED), ignore_patterns=left_out))
    except GatedRepoError as error:
        raise HandoffError(
            f"{ref}: its owner grants access on request; ask on its page, then `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise HandoffError(f"{ref}: neither a directory here nor a model of the hub that you can see") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise HandoffError(
            f"{ref}: not a directory here, and the hub cannot be reached ({type(error).__name__}); download it "
            f"where there is a network (`hf download {ref}`), or name a directory"
        ) from error


def _how_to_make(directory: Path) -> str:
    return f"make it with `baton run <recipe> --to {directory.name}`"
