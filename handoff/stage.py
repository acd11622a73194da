"""A stage's directory: begun with what it depends on, published in one step, set aside when it is stale.

    <run>/<stage>/started.json   what the stage depends on (`Inputs`), written by `begin`
    <run>/<stage>/model/         what anyone can load, moved into place by `publish`
    <run>/<stage>/stage.json     the manifest, written last: without it the directory is unfinished

A kill between any two lines of `begin` and `publish` leaves the previous published state, or a directory without
stage.json, which the next `begin` resumes or sets aside. Under several processes only the main one calls these methods.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from handoff.contract import check_model, write_pad_token
from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError
from handoff.files import (
    check_free_space,
    check_writable,
    disk_is_full,
    fsync_path,
    fsync_tree,
    hash_tree,
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

_WRITING, _NEXT, _OLD = ".model-writing", ".stage.json.next", ".model-old"


class StageDir:
    """The directory of one stage of a run: `<run>/<stage>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / "stage.json"
        self.started_path = path / "started.json"
        self.model_dir = path / "model"
        self.state_dir = path / "state"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.tracker_dir = path / "wandb"
        self._lock = RunLock(path, f"stage {path.name}")
        self._inputs: Inputs | None = None
        self._fresh = False  # begin wrote started.json
        self._set_aside = False  # ... and moved earlier content away for it

    def manifest(self) -> Manifest | None:
        """The published manifest, None while there is none. HandoffError when it cannot be read."""
        return read_manifest(self.manifest_path)

    # ---- beginning

    def begin(
        self,
        inputs: Inputs,
        resume: bool = True,
        need_bytes: int = MINIMUM_FREE,
        origin: Mapping[str, Any] | None = None,
    ) -> bool:
        """Takes the directory for a run with `inputs`. True: an earlier start had the same ones, its content is kept.

        Otherwise what is there is set aside to `<run>/.previous/<stage>` (one generation) and the directory starts
        empty. A check that fails leaves the disk untouched.

        Args:
            inputs: everything the result depends on.
            resume: False: start anew even when the inputs are the same.
            need_bytes: free space that the stage will need at least.
            origin: where the recipe came from; `origin` reads it again.

        Raises:
            HandoffError: not writable, too little space, or in use by another process.
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
        """What the last `begin` was given, None when there was none or its record is unreadable."""
        if not self.started_path.exists():
            return None
        with suppress(ValueError, KeyError, TypeError):
            return Inputs.model_validate(read_json(self.started_path)["inputs"])
        return None

    def origin(self) -> dict[str, Any]:
        """What this course was begun with as `origin`; empty where it was begun without."""
        return dict(read_json(self.started_path).get("origin", {}))

    def run_id(self) -> str:
        """Name of this course for trackers: drawn when it was begun, kept when it is resumed."""
        return str(read_json(self.started_path)["run_id"])

    def _started_with(self, inputs: Inputs) -> bool:
        started = self.started_inputs()
        return started is not None and inputs.continues(started)

    def _sweep(self) -> None:
        """Removes what a kill in the middle of a write left behind."""
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
        """Everything but the lock. stage.json comes first, so that what is half moved never passes as published."""
        paths = [path for path in self.path.iterdir() if path.name != LOCK_NAME]
        return sorted(paths, key=lambda path: (path != self.manifest_path, path.name))

    def _holds_only(self, *paths: Path) -> bool:
        """Whether this was started and holds nothing but `paths`, and no saved state."""
        if not self.started_path.exists() or StateStore(self.state_dir).has_states():
            return False
        return set(self._content()) <= {*paths, self.state_dir}

    def _put_aside(self) -> bool:
        if not self._content():
            return False
        if self._holds_only(self.started_path, self.metrics_path, self.samples_path, self.tracker_dir):
            # A start that came to nothing must not push out a generation that did.
            for path in self._content():
                remove_tree(path)
            return False
        self._moving.mkdir(parents=True, exist_ok=True)
        self._finish_setting_aside()
        return True

    def _finish_setting_aside(self) -> None:
        """Also completes what a killed `begin` started; the name of the target says that it did."""
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
        write_model: Callable[[Path], None] | None,
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
        """Makes the stage's result visible to its children, in one step.

        Args:
            write_model: writes the model into the empty directory that it is given; None when the stage makes none.
            files: names of other files in the stage's directory that are published too, e.g. results.json.
            tokenizer: the record that the written model must have, usually its parent's.

        The other arguments are the manifest's fields.

        Raises:
            HandoffError: what was written breaks the contract, has another encoding than `tokenizer`, or the disk is
                full. The stage stays unfinished, or published as it was.
        """
        assert self._inputs == inputs, "publish belongs to the inputs that begin was given"
        writing = self.path / _WRITING
        try:
            record = None if write_model is None else self._written(writing, write_model, kind, tokenizer)
            hashes = {f"model/{file}": digest for file, digest in hash_tree(writing).items()} if record else {}
            for file in files:
                fsync_path(self.path / file)
                hashes[file] = sha256_file(self.path / file)
            manifest = Manifest(
                name=name,
                stage=stage,
                kind=kind,
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
            # Written before the old one goes: from here on nothing needs space on the disk.
            write_json(self.path / _NEXT, sealed(manifest))
        except Exception as error:  # whoever writes the model has errors of its own for a full disk
            remove_tree(writing)
            if not disk_is_full(error):
                raise
            raise HandoffError(
                f"{self.path}: the disk is full, nothing was published; free some space and run the same command again"
            ) from error
        self._switch(writing if record else None)
        return manifest

    def _written(
        self, writing: Path, write_model: Callable[[Path], None], kind: Kind, expected: TokenizerRecord | None
    ) -> TokenizerRecord:
        remove_tree(writing)
        writing.mkdir()
        write_model(writing)
        write_pad_token(writing, read_tokenizer(writing))
        record = check_model(writing, kind)
        if expected is not None and record != expected:
            raise HandoffError(
                f"{self.path}: the encoding drifted while training: it began with {expected.model_dump()} "
                f"and the model was written with {record.model_dump()}"
            )
        fsync_tree(writing)
        return record

    def _switch(self, written: Path | None) -> None:
        """stage.json goes first and comes last, so that at no instant it stands beside a model that is not its own."""
        old = self.path / _OLD
        remove_tree(old)
        self.manifest_path.unlink(missing_ok=True)
        fsync_path(self.path)
        if self.model_dir.exists():
            self.model_dir.rename(old)
        if written is not None:
            written.rename(self.model_dir)
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
        """Whether the stage wrote nothing since `begin` gave it an empty directory."""
        return self._fresh and self._holds_only(self.started_path)

    def close(self) -> None:
        """Releases the directory. When the stage wrote nothing since `begin`, that is undone: an error in the data
        or in a parent costs neither the published stage that was set aside nor leaves an empty directory."""
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
            # stage.json last: what is half restored does not pass as published.
            for path in sorted(self._aside.iterdir(), key=lambda path: path.name == self.manifest_path.name):
                path.rename(self.path / path.name)
            remove_tree(self._aside)
            with suppress(OSError):
                self._aside.parent.rmdir()
