"""A stage's directory: `begin` records the inputs and moves stale content away, or content of the same inputs back;
`publish` commits the result.

    <run>/<stage>/started.json   what the stage depends on (`Inputs`), written by `begin`
    <run>/<stage>/model/         the published model, moved into place by `publish`
    <run>/<stage>/data/          the published rows, instead of model/, if the stage makes rows (`kind: dataset`)
    <run>/<stage>/stage.json     the manifest, written last: without it the stage is unfinished

A result that does not pass its gate goes to `<run>/.failed/<stage>/` instead, and what was published before is current
again.

A kill at any line of `begin` or `publish` leaves the previous published state, or a directory without stage.json, which
the next `begin` resumes or moves away. With several processes, only the main one calls these methods.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn
from uuid import uuid4

from handoff.contract import check_files, check_model, check_rows, write_pad_token
from handoff.encoding import read_tokenizer
from handoff.errors import GateError, HandoffError
from handoff.files import (
    cannot_write,
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
from handoff.lock import RunLock
from handoff.manifest import (
    AdapterRecord,
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
from handoff.previous import MANIFEST, STARTED, Previous, read_inputs
from handoff.refused import Verdict, forget, keep
from handoff.state import StateStore

MINIMUM_FREE = 64 << 20  # bytes; room for logs and metrics, whatever the model's size

TRACKERS = "trackers"
"""Name of the folder in which each tracker has its own."""
_WRITING, _NEXT, _OLD, _MADE = ".writing", ".stage.json.next", ".old", ".made"


class StageDir:
    """The directory of one stage of a run: `<run>/<stage>`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest_path = path / MANIFEST
        self.started_path = path / STARTED
        self.model_dir = path / "model"
        self.data_dir = path / "data"
        self.state_dir = path / "state"
        self.metrics_path = path / "metrics.jsonl"
        self.samples_path = path / "samples.jsonl"
        self.trackers_dir = path / TRACKERS
        self._lock = RunLock(path, f"stage {path.name}")
        self._inputs: Inputs | None = None
        self._fresh = False  # whether `begin` wrote started.json
        self._previous = Previous(path)
        self._refused = False  # whether the result did not pass its gate
        self._set_aside: int | None = None  # number of the content that `begin` also moved away

    def manifest(self) -> Manifest | None:
        """The published manifest, or None. Raises HandoffError when it cannot be read."""
        return read_manifest(self.manifest_path)

    # ---- beginning

    def begin(
        self,
        inputs: Inputs,
        need_bytes: int = MINIMUM_FREE,
        origin: Mapping[str, Any] | None = None,
    ) -> bool:
        """Locks the directory for a start with `inputs`. Returns True if it resumes an earlier start with equal inputs,
        and keeps its content.

        Otherwise the existing content moves to `<run>/.previous/<stage>`. If content of an earlier start with equal
        inputs lies there, it moves back and is resumed; if not, the directory starts empty. If a check fails, the disk
        is unchanged.

        Args:
            inputs: everything that the result depends on.
            need_bytes: free space that the stage needs, in bytes.
            origin: where the recipe came from; the method `origin` returns it.

        Raises:
            HandoffError: the directory is not writable, on another disk than the run or in use by another process, or
                the disk has too little space.
        """
        check_writable(self.path)
        self._check_disk()
        check_free_space(self.path, need_bytes, f"stage {self.path.name}")
        self._open()
        self._inputs = inputs
        given = {"inputs": inputs.model_dump(mode="json"), "origin": dict(origin or {})}
        if self._started_with(inputs) or self._bring_back(inputs):
            started = read_json(self.started_path)
            if started | given != started:  # keys without effect on the result may have changed
                write_json(self.started_path, started | given)
            return True
        self._set_aside = self._put_aside()
        begun, run_id = datetime.now(UTC).isoformat(timespec="seconds"), uuid4().hex[:16]
        write_json(self.started_path, {**given, "begun": begun, "run_id": run_id})
        self._fresh = True
        return False

    def _check_disk(self) -> None:
        """Results move between the stage's folder and the run's by renaming, which works within one disk alone."""
        run = self.path.parent
        if self.path.is_dir() and self.path.stat().st_dev != run.stat().st_dev:
            raise HandoffError(
                f"{self.path}: this folder is on another disk than {run}, so that results could not be moved between "
                "them; put the whole run there: set output_root to a folder on that disk, or make it a link to one"
            )

    def started_inputs(self) -> Inputs | None:
        """The inputs of the last `begin`; None if there was none or its record is unreadable."""
        return read_inputs(self.started_path)

    def set_aside(self) -> Path | None:
        """Where the last `begin` moved the content of an earlier start; None if there was nothing to keep."""
        return None if self._set_aside is None else self._previous.folder / str(self._set_aside)

    def has_aside(self, inputs: Inputs) -> bool:
        """Whether content of an earlier start with equal inputs was set aside; the next `begin` brings it back."""
        return self._previous.find(inputs) is not None

    def bring_back(self, inputs: Inputs) -> bool:
        """Brings content of an earlier start with equal inputs back, as `begin` does. Returns whether there was any.

        Raises:
            HandoffError: the directory is not writable or in use by another process.
        """
        if self._started_with(inputs) or not self.has_aside(inputs):
            return False
        self._open()
        try:
            return self._bring_back(inputs)
        finally:
            self._lock.release()

    def origin(self) -> dict[str, Any]:
        """The `origin` that `begin` recorded; empty if there was none."""
        return dict(read_json(self.started_path).get("origin", {}))

    def begun(self) -> datetime:
        """When the last `begin` that did not resume was called, in UTC. It is the time that chat templates see."""
        return datetime.fromisoformat(read_json(self.started_path)["begun"])

    def run_id(self) -> str:
        """The run id for trackers: random, drawn by `begin` and kept when the stage resumes."""
        return str(read_json(self.started_path)["run_id"])

    def made(self, name: str) -> Path:
        """The path under which a stage writes a file that `publish` moves into place."""
        (self.path / _MADE).mkdir(exist_ok=True)
        return self.path / _MADE / name

    def _started_with(self, inputs: Inputs) -> bool:
        started = self.started_inputs()
        return started is not None and inputs.continues(started)

    def _sweep(self) -> None:
        """Removes the leftovers of writes that were killed."""
        for name in (_WRITING, _NEXT, _OLD, _MADE):
            remove_tree(self.path / name)
        for path in self.path.glob(".*.tmp"):
            remove_tree(path)

    def _holds_only(self, *paths: Path) -> bool:
        """Whether the stage was started and the directory holds nothing but `paths`, and no saved state."""
        if not self.started_path.exists() or StateStore(self.state_dir).has_states():
            return False
        return set(self._previous.content()) <= {*paths, self.state_dir}

    def _open(self) -> None:
        """Locks the directory, completes interrupted moves, and removes leftovers."""
        try:
            self._lock.acquire()
        except OSError as error:
            raise HandoffError(f"{self.path}: cannot be written to ({error.strerror})") from error
        self._previous.finish()
        self._previous.rotate()
        self._sweep()

    def _put_aside(self) -> int | None:
        """Empties the directory. Returns the number of the content in `.previous`, None if there was none to keep."""
        content = self._previous.content()
        if not content:
            return None
        if self._holds_only(self.started_path, self.metrics_path, self.samples_path, self.trackers_dir):
            # A start that produced nothing is not worth keeping.
            for path in content:
                remove_tree(path)
            return None
        return self._previous.put_aside()

    def _bring_back(self, inputs: Inputs) -> bool:
        number = self._previous.find(inputs)
        if number is None:
            return False
        self._put_aside()
        self._previous.bring_back(number)
        return True

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
        adapter: AdapterRecord | None = None,
        judge: Callable[[], Sequence[Verdict]] = tuple,
        advice: str = "",
    ) -> Manifest:
        """Publishes the stage's result atomically.

        Args:
            write: writes the model, or the rows of a `dataset`, into the empty directory that it receives. It returns
                {file: SHA-256} of files that it hashed while writing, or None. `write` is None if the stage makes
                neither model nor rows.
            files: names of other files that are published too, e.g. results.json; they were written to `made`.
            tokenizer: the record that the written model must have: what `rehearse` returned.
            judge: called when everything is written; gives the conditions of the stage's gate.
            advice: what helps if one of them is not met, for the message.

        The other arguments are the manifest's fields.

        Raises:
            HandoffError: the written model breaks the contract or has another encoding than `tokenizer`, or the disk
                is full or cannot be written. The stage stays unfinished, or keeps its earlier publication.
            GateError: a condition of the gate is not met. The result is kept in `<run>/.failed`.
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
                fsync_path(self.made(file))
                hashes[file] = sha256_file(self.made(file))
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
                adapter=adapter and adapter.model_copy(update={"base": self._relative(adapter.base)}),
                seed=seed,
                engine=engine,
                versions=dict(versions),
                metrics=dict(metrics),
                extra=dict(extra or {}),
                files=hashes,
            )
            verdicts = judge()
            if not all(verdict.passed for verdict in verdicts):
                self._refuse(manifest, verdicts, {target.name: writing} if write else {}, files, advice)
            # Written before the old publication is removed, so that no later step needs disk space.
            write_json(self.path / _NEXT, sealed(manifest))
        except Exception as error:  # `write` may raise any type of error for a full disk
            if not cannot_write(error):
                remove_tree(writing)
                remove_tree(self.path / _MADE)
                raise
            with suppress(OSError):
                remove_tree(writing)
            why = "the disk is full" if disk_is_full(error) else f"it cannot be written ({error})"
            mend = "free some space" if disk_is_full(error) else "mend that"
            raise HandoffError(
                f"{self.path}: {why}, nothing was published; {mend} and run the same command again"
            ) from error
        self._switch(writing if write else None, target, files)
        forget(self.path.parent, self.path.name)
        return manifest

    def _refuse(
        self,
        manifest: Manifest,
        verdicts: Sequence[Verdict],
        folders: Mapping[str, Path],
        files: Sequence[str],
        advice: str,
    ) -> NoReturn:
        """Keeps the result in `<run>/.failed`. Raises GateError."""
        kept = keep(self.path.parent, manifest, verdicts, folders, {file: self.made(file) for file in files})
        self._refused = True
        reasons = "".join(f"\n  - {verdict.said}" for verdict in verdicts if not verdict.passed)
        raise GateError(
            f"{manifest.name}: the result is below its gate and is not published:{reasons}\nIt is kept in {kept}, "
            f"`baton report` shows it, and what was published before stays. {advice}Another `gate` in the recipe costs "
            "no training: the same command goes on from the last saved state."
        )

    def rehearse(self, write: Callable[[Path], None], kind: Kind, expected: TokenizerRecord | None) -> TokenizerRecord:
        """Writes a publication without weights, checks it as `publish` will, and removes it.

        Called before training. Returns the record of the tokenizer that `publish` will find: that of the parent, and
        the ids that end an answer in the chat template among its stop ids.

        Args:
            write: writes everything but the weights into the empty directory that it receives.
            kind: kind of the publication.
            expected: the parent's record.

        Raises:
            HandoffError: what would be published breaks the contract, has another encoding than `expected`, or cannot
                be written.
        """
        writing = self.path / _WRITING
        try:
            remove_tree(writing)
            writing.mkdir()
            write(writing)
            write_pad_token(writing, read_tokenizer(writing))
            record = check_files(writing, kind)
        except OSError as error:
            raise HandoffError(f"{writing}: cannot be written ({error.strerror}); nothing was trained") from error
        finally:
            remove_tree(writing)
        if expected is not None:
            if set(expected.stop_ids) < set(record.stop_ids):
                more = {"stop_ids": record.stop_ids, "template_fingerprint": record.template_fingerprint}
                expected = expected.model_copy(update=more)
            self._check_encoding(expected, record)
        return record

    def _check_encoding(self, expected: TokenizerRecord, found: TokenizerRecord) -> None:
        if found != expected:
            raise HandoffError(
                f"{self.path}: the encoding changed during training: it began with {expected.model_dump()}, "
                f"but the model was written with {found.model_dump()}"
            )

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
        if expected is not None:
            self._check_encoding(expected, record)
        fsync_tree(writing)
        return record, hashes

    def _switch(self, written: Path | None, target: Path, files: Sequence[str]) -> None:
        """Moves `written` to `target`, and the files into place. The old stage.json is removed first and the new one is
        written last, so that it never describes other files."""
        old = self.path / _OLD
        remove_tree(old)
        self.manifest_path.unlink(missing_ok=True)
        fsync_path(self.path)
        if target.exists():
            target.rename(old)
        if written is not None:
            written.rename(target)
        for file in files:
            self.made(file).replace(self.path / file)
        fsync_path(self.path)
        (self.path / _NEXT).rename(self.manifest_path)
        fsync_path(self.path)
        remove_tree(old)
        remove_tree(self.path / _MADE)

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
            if self._refused and not self.manifest_path.exists():
                self._restore()
            self._previous.rotate()
            keep_hashes(self.path.parent)
        self._lock.release()
        self._inputs = None

    def _restore(self) -> None:
        """Makes the newest earlier publication current again; the present content comes back with its recipe."""
        number = self._previous.newest(MANIFEST)
        if number is not None:
            self._put_aside()
            self._previous.bring_back(number)

    def _undo(self) -> None:
        remove_tree(self.state_dir)
        self.started_path.unlink()
        if self._set_aside is not None:
            self._previous.bring_back(self._set_aside)
