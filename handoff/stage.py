"""A stage's directory: `begin` records the inputs and moves stale content away; `publish` commits the result.

    <run>/<stage>/started.json   what the stage depends on (`Inputs`), written by `begin`
    <run>/<stage>/model/         the published model, moved into place by `publish`
    <run>/<stage>/data/          the published rows, instead of model/, if the stage makes rows (`kind: dataset`)
    <run>/<stage>/stage.json     the manifest, written last: without it the stage is unfinished

A kill at any line of `begin` or `publish` leaves the previous published state, or a directory without stage.json, which
the next `begin` resumes or moves away. With several processes, only the main one calls these methods.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from handoff.contract import check_model, check_rows, write_pad_token
from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError
from handoff.files import (
    check_free_space,
    check_writable,
    disk_is_full,
    fsync_path,
    fsync_tree,
    list_files,
    read_json,
    remove_tree,
    sha256_file,
    write_json,
)
from handoff.lock import LOCK_NAME, RunLock
from handoff.manifest import (
    EngineRecord,
    Inputs,
    Kind,
    Manifest,
    Metric,
    ParentRecord,
    TokenizerRecord,
    read_manifest,
    sealed,
)
from handoff.parent import keep_hashes
from handoff.state import StateStore

PREVIOUS = ".previous"
MINIMUM_FREE = 64 << 20  # bytes; room for logs and metrics, whatever the model's size

_WRITING, _NEXT, _OLD = ".writing", ".stage.json.next", ".old"


class StageDir:
    """The directory of one stage of a run: `<run>/<stage>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "stage.json"
        self.started_path = path / "started.json"
        self.model_dir = path / "model"
        self.data_dir = path / "data"
        self.state_dir = path / "state"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.tracker_dir = path / "wandb"
        self._lock = RunLock(path, f"stage {path.name}")
        self._inputs: Inputs | None = None
        self._fresh = False  # whether `begin` wrote started.json
        self._set_aside = False  # whether `begin` also moved earlier content away

    def manifest(self) -> Manifest | None:
        """The published manifest, or None. Raises HandoffError when it cannot be read."""
        return read_manifest(self.manifest_path)

    # ---- beginning

    def begin(
        self,
        inputs: Inputs,
        resume: bool = True,
        need_bytes: int = MINIMUM_FREE,
        origin: Mapping[str, Any] | None = None,
    ) -> bool:
        """Locks the directory for a start with `inputs`. Returns True if it resumes an earlier start with equal inputs,
        and keeps its content.

        Otherwise the existing content moves to `<run>/.previous/<stage>` (one generation is kept), and the directory
        starts empty. If a check fails, the disk is unchanged.

        Args:
            inputs: everything that the result depends on.
            resume: if False, start again even if the inputs are equal.
            need_bytes: free space that the stage needs, in bytes.
            origin: where the recipe came from; the method `origin` returns it.

        Raises:
            HandoffError: the directory is not writable or in use by another process, or the disk has too little space.
        """
        check_writable(self.path)
        check_free_space(self.path, need_bytes, f"stage {self.path.name}")
        try:
            self._lock.acquire()
        except OSError as error:
            raise HandoffError(f"{self.path}: cannot be written to ({error.strerror})") from error
        self._inputs = inputs
        self._finish_setting_aside()
        self._sweep()
        if resume and self._started_with(inputs):
            return True
        self._set_aside = self._put_aside()
        write_json(
            self.started_path,
            {
                "inputs": inputs.model_dump(mode="json"),
                "begun": datetime.now(UTC).isoformat(timespec="seconds"),
                "run_id": uuid4().hex[:16],
                "origin": dict(origin or {}),
            },
        )
        self._fresh = True
        return False

    def started_inputs(self) -> Inputs | None:
        """The inputs of the last `begin`; None if there was none or its record is unreadable."""
        if not self.started_path.exists():
            return None
        with suppress(ValueError, KeyError, TypeError):
            return Inputs.model_validate(read_json(self.started_path)["inputs"])
        return None

    def origin(self) -> dict[str, Any]:
        """The `origin` that `begin` recorded; empty if there was none."""
        return dict(read_json(self.started_path).get("origin", {}))

    def begun(self) -> datetime:
        """When the last `begin` that did not resume was called, in UTC. It is the time that chat templates see."""
        return datetime.fromisoformat(read_json(self.started_path)["begun"])

    def run_id(self) -> str:
        """The run id for trackers: random, drawn by `begin` and kept when the stage resumes."""
        return str(read_json(self.started_path)["run_id"])

    def _started_with(self, inputs: Inputs) -> bool:
        started = self.started_inputs()
        return started is not None and inputs.continues(started)

    def _sweep(self) -> None:
        """Removes the leftovers of writes that were killed."""
        for name in (_WRITING, _NEXT, _OLD):
            remove_tree(self.path / name)
        for path in self.path.glob(".*.tmp"):
            remove_tree(path)

    @property
    def _aside(self) -> Path:
        return self.path.parent / PREVIOUS / self.path.name

    @property
    def _moving(self) -> Path:
        return self.path.parent / PREVIOUS / f".{self.path.name}.moving"

    def _content(self) -> list[Path]:
        """All paths except the lock. stage.json comes first, so that half-moved content never counts as published."""
        paths = [path for path in self.path.iterdir() if path.name != LOCK_NAME]
        return sorted(paths, key=lambda path: (path != self.manifest_path, path.name))

    def _holds_only(self, *paths: Path) -> bool:
        """Whether the stage was started and the directory holds nothing but `paths`, and no saved state."""
        if not self.started_path.exists() or StateStore(self.state_dir).has_states():
            return False
        return set(self._content()) <= {*paths, self.state_dir}

    def _put_aside(self) -> bool:
        if not self._content():
            return False
        if self._holds_only(self.started_path, self.metrics_path, self.samples_path, self.tracker_dir):
            # A start that produced nothing must not replace a previous generation.
            for path in self._content():
                remove_tree(path)
            return False
        self._moving.mkdir(parents=True, exist_ok=True)
        self._finish_setting_aside()
        return True

    def _finish_setting_aside(self) -> None:
        """Completes the move to `.previous`. The target's temporary name shows a move that a killed `begin` started."""
        if not self._moving.is_dir():
            return
        for path in self._content():
            path.rename(self._moving / path.name)
        fsync_path(self.path)
        remove_tree(self._aside)
        self._moving.rename(self._aside)
        fsync_path(self._aside.parent)

    # ---- publishing

    def publish(
        self,
        write: Callable[[Path], Mapping[str, str] | None] | None,
        *,
        name: str,
        stage: str,
        kind: Kind,
        inputs: Inputs,
        parents: Mapping[str, ParentRecord],
        recipe: Mapping[str, Any],
        data: Mapping[str, Any],
        seed: int,
        engine: EngineRecord,
        versions: Mapping[str, str],
        metrics: Mapping[str, Metric],
        extra: Mapping[str, Any] | None = None,
        files: Sequence[str] = (),
        tokenizer: TokenizerRecord | None = None,
    ) -> Manifest:
        """Publishes the stage's result atomically.

        Args:
            write: writes the model, or the rows of a `dataset`, into the empty directory that it receives. It returns
                {file: SHA-256} of files that it hashed while writing, or None. `write` is None if the stage makes
                neither model nor rows.
            files: names of other files in the stage's directory that are published too, e.g. results.json.
            tokenizer: the record that the written model must have, usually its parent's.

        The other arguments are the manifest's fields.

        Raises:
            HandoffError: the written model breaks the contract or has another encoding than `tokenizer`, or the disk
                is full. The stage stays unfinished, or keeps its earlier publication.
        """
        assert self._inputs == inputs, "publish must get the inputs that begin got"
        writing = self.path / _WRITING
        try:
            record, hashes = None, {}
            target = self.data_dir if kind == "dataset" else self.model_dir
            if write is not None:
                record, known = self._written(writing, write, kind, tokenizer)
                names = list_files(writing)
                hashes = {f"{target.name}/{name}": known.get(name) or sha256_file(writing / name) for name in names}
            for file in files:
                fsync_path(self.path / file)
                hashes[file] = sha256_file(self.path / file)
            manifest = Manifest(
                name=name,
                stage=stage,
                kind=kind,
                begun=self.begun().isoformat(),
                created=datetime.now(UTC).isoformat(),
                parents={role: self._relative(parent) for role, parent in parents.items()},
                inputs=inputs,
                recipe=dict(recipe),
                data=dict(data),
                tokenizer=record,
                seed=seed,
                engine=engine,
                versions=dict(versions),
                metrics=dict(metrics),
                extra=dict(extra or {}),
                files=hashes,
            )
            # Written before the old publication is removed, so that no later step needs disk space.
            write_json(self.path / _NEXT, sealed(manifest))
        except Exception as error:  # `write` may raise any type of error for a full disk
            remove_tree(writing)
            if not disk_is_full(error):
                raise
            raise HandoffError(
                f"{self.path}: the disk is full, nothing was published; free some space and run the same command again"
            ) from error
        self._switch(writing if write else None, target)
        return manifest

    def _written(
        self,
        writing: Path,
        write: Callable[[Path], Mapping[str, str] | None],
        kind: Kind,
        expected: TokenizerRecord | None,
    ) -> tuple[TokenizerRecord | None, Mapping[str, str]]:
        """Writes, checks and flushes the files. Returns the tokenizer's record (None for rows) and the known hashes."""
        remove_tree(writing)
        writing.mkdir()
        hashes = write(writing) or {}
        if kind == "dataset":
            check_rows(writing)
            fsync_tree(writing)
            return None, hashes
        write_pad_token(writing, read_tokenizer(writing))
        record = check_model(writing, kind)
        if expected is not None and record != expected:
            raise HandoffError(
                f"{self.path}: the encoding changed during training: it began with {expected.model_dump()}, "
                f"but the model was written with {record.model_dump()}"
            )
        fsync_tree(writing)
        return record, hashes

    def _switch(self, written: Path | None, target: Path) -> None:
        """Moves `written` to `target`. Removes the old stage.json first and writes the new one last, so that it never
        describes other files."""
        old = self.path / _OLD
        remove_tree(old)
        self.manifest_path.unlink(missing_ok=True)
        fsync_path(self.path)
        if target.exists():
            target.rename(old)
        if written is not None:
            written.rename(target)
        fsync_path(self.path)
        (self.path / _NEXT).rename(self.manifest_path)
        fsync_path(self.path)
        remove_tree(old)

    def _relative(self, parent: ParentRecord) -> ParentRecord:
        path, run = Path(parent.path).absolute(), self.path.parent.absolute()
        return parent.model_copy(update={"path": str(path.relative_to(run) if path.is_relative_to(run) else path)})

    # ---- ending

    @property
    def untouched(self) -> bool:
        """Whether `begin` started with an empty directory and the stage has written nothing since."""
        return self._fresh and self._holds_only(self.started_path)

    def close(self) -> None:
        """Releases the lock. If the stage has written nothing since `begin`, undoes `begin`: after an error in the data
        or a parent, the content that was moved away is restored, and no empty directory remains."""
        if self._inputs is None:
            return
        if self.untouched:
            self._undo()
        else:
            keep_hashes(self.path.parent)
        self._lock.release()
        self._inputs = None

    def _undo(self) -> None:
        remove_tree(self.state_dir)
        self.started_path.unlink()
        if self._set_aside:
            # stage.json comes last, so that half-restored content does not count as published.
            for path in sorted(self._aside.iterdir(), key=lambda path: path.name == self.manifest_path.name):
                path.rename(self.path / path.name)
            remove_tree(self._aside)
            with suppress(OSError):
                self._aside.parent.rmdir()
