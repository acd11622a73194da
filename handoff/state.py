"""Resumable states in `state/step-N/`, each with a list of its parts and their hashes. A kill never damages one.

The trainer writes a state into a `.tmp-step-N` directory, and this module commits it: hash every part, write
state.json, fsync, rename, and only then remove older states. "Latest" is the newest whole state: all its parts are
present and unaltered. The stage says which parts a state must have.
"""

import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from handoff.errors import HandoffError
from handoff.files import (
    canonical_hash,
    fsync_path,
    fsync_tree,
    list_files,
    read_json,
    remove_tree,
    sha256_file,
    write_json,
)

FORMAT_VERSION = 1
STATE_MANIFEST = "state.json"

_log = logging.getLogger(__name__)
_NAME = re.compile(r"(?:step|\.replaced-step)-(\d+)")


@dataclass(frozen=True)
class State:
    """A saved state: the optimizer step after which it was saved, its directory, and the `extra` given to `commit`."""

    step: int
    path: Path
    extra: dict[str, Any]
    lost: dict[str, str] = field(default_factory=dict)
    """{part: what is wrong with it}; empty except in a state that `BrokenStates` offers."""
    rotation: dict[str, Any] = field(default_factory=dict)
    """`keep` and `protect` of its `commit`."""


class BrokenStates(HandoffError):
    """There are states, but none is whole. `weights`: the newest state whose weights can still be used, or None."""

    def __init__(self, message: str, weights: State | None = None) -> None:
        super().__init__(message)
        self.weights = weights


class StateStore:
    """The states of one stage. Only the main process uses it."""

    def __init__(self, directory: Path, parts: Collection[str] = (), weights: Collection[str] = ()) -> None:
        """`parts`: files that every state must have. `weights`: those needed to start from its weights alone."""
        self.directory = directory
        self._parts, self._weights = parts, weights

    def staging_path(self, step: int) -> Path:
        """The directory into which the parts of a state are written before `commit`."""
        return self.directory / f".tmp-step-{step}"

    def staging(self, step: int) -> Path:
        """An empty directory for the parts of the state of `step`."""
        path = self.staging_path(step)
        remove_tree(path)
        if not self.directory.exists():
            self.directory.mkdir(parents=True)
            fsync_path(self.directory.parent)
        path.mkdir()
        return path

    def commit(
        self, step: int, staged: Path, keep: int, extra: Mapping[str, Any] | None = None, protect: int | None = None
    ) -> Path:
        """Makes `staged` the state of `step` and keeps the `keep` (>= 1) newest states. Returns its directory.

        `protect`: an earlier step whose state is kept whatever its age.

        States of later steps are removed too: they belong to a course that was abandoned when an earlier state was
        resumed. On OSError (a full disk) the earlier states are unchanged, and `staged` is removed to free its space.
        """
        assert keep >= 1, "a rotation that keeps nothing would lose the state just saved"
        assert staged == self.staging_path(step), f"{staged} is not the staging directory of step {step}"
        names = list_files(staged)
        assert names and set(self._parts) <= set(names), f"{staged} has only {names}"
        try:
            parts = {
                name: {"sha256": sha256_file(staged / name), "bytes": (staged / name).stat().st_size} for name in names
            }
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "extra": dict(extra or {}),
                "parts": parts,
                "rotation": {"keep": keep, "protect": protect},
            }
            write_json(staged / STATE_MANIFEST, {**manifest, "sha256": canonical_hash(manifest)})
            fsync_tree(staged)
        except OSError:
            remove_tree(staged)
            raise
        final = self.directory / f"step-{step}"
        replaced = self.directory / f".replaced-step-{step}"
        if final.exists():
            # rename cannot replace a directory that has content. `latest` also reads the other name, so a valid state
            # can be found at every moment.
            remove_tree(replaced)
            final.rename(replaced)
        staged.rename(final)
        fsync_path(self.directory)
        try:
            self._rotate(step, keep, protect)
        except OSError as error:
            _log.warning("state %s is saved, but older ones cannot be removed: %s", final.name, error)
        return final

    def _rotate(self, newest: int, keep: int, protect: int | None) -> None:
        kept = 0
        for step, path in self._candidates():
            if step <= newest and path.name.startswith("step-") and (kept < keep or step == protect):
                kept += 1
            else:
                # Renamed first, so that a kill during the removal leaves no partial state.
                going = self.directory / f".tmp-gone-{path.name}"
                remove_tree(going)
                path.rename(going)
                remove_tree(going)

    def _candidates(self) -> list[tuple[int, Path]]:
        """(step, directory), newest first; for each step the current directory before the replaced one."""
        if not self.directory.is_dir():
            return []
        found = [
            (int(match[1]), path)
            for path in self.directory.iterdir()
            if (match := _NAME.fullmatch(path.name)) is not None
        ]
        return sorted(found, key=lambda item: (item[0], item[1].name.startswith("step-")), reverse=True)

    def has_states(self) -> bool:
        """Whether any state was ever committed, valid or not."""
        return bool(self._candidates())

    def latest(self) -> State | None:
        """The newest whole state, or None if none was ever saved. A broken state is skipped, and the log names its
        damaged parts.

        Raises:
            BrokenStates: there are states, but none is whole. To train from the start would discard work, and a new
                optimizer changes the training, so the user has to request either one.
        """
        reasons, weights = [], None
        for step, path in self._candidates():
            state = self._examined(step, path)
            if not state.lost:
                return state
            reason = "; ".join(state.lost.values())
            _log.warning("state %s is skipped: %s", path.name, reason)
            reasons.append(reason)
            if weights is None and self._weights and not state.lost.keys() & {STATE_MANIFEST, *self._weights}:
                weights = state
        if reasons:
            raise BrokenStates(
                f"no valid state is left to resume from: {'; '.join(reasons)}. "
                f"Restore the file, or delete {self.directory} to train from the start",
                weights,
            )
        return None

    def steps(self) -> list[int]:
        """The steps that have states, whole or not, ascending."""
        return sorted({step for step, _ in self._candidates()})

    def before(self, step: int) -> State | None:
        """The newest whole state of an earlier step."""
        older = (self._examined(earlier, path) for earlier, path in self._candidates() if earlier < step)
        return next((state for state in older if not state.lost), None)

    def at(self, step: int) -> State | None:
        """The state of that step, if it exists and is whole."""
        path = self.directory / f"step-{step}"
        state = self._examined(step, path)
        if not state.lost:
            return state
        _log.warning("state %s cannot be used: %s", path.name, "; ".join(state.lost.values()))
        return None

    def damages(self) -> list[tuple[str, str]]:
        """(part, relative to the directory; what happened) for every part that is not as it was saved, in any state."""
        found = []
        for step, path in self._candidates():
            for name, what in self._examined(step, path).lost.items():
                found.append((f"{path.name}/{name}", what.removeprefix(f"{path / name} ")))
        return found

    def _examined(self, step: int, path: Path) -> State:
        """The state, with everything that is wrong with it. If its list is damaged, no other part can be trusted."""
        try:
            manifest = self._manifest(step, path)
        except HandoffError as error:
            return State(step, path, {}, {STATE_MANIFEST: str(error)})
        lost = {
            name: f"{path / name} was not saved: {STATE_MANIFEST} does not list it"
            for name in self._parts
            if name not in manifest["parts"]
        }
        for name, part in manifest["parts"].items():
            file = path / name
            if not file.is_file():
                lost[name] = f"{file} is missing"
            elif (size := file.stat().st_size) != part["bytes"]:
                lost[name] = f"{file} has {size} bytes instead of {part['bytes']}"
            elif sha256_file(file) != part["sha256"]:
                lost[name] = f"{file} was altered: it does not match its saved hash"
        return State(step, path, manifest["extra"], lost, manifest.get("rotation", {}))

    def _manifest(self, step: int, path: Path) -> dict[str, Any]:
        manifest_path = path / STATE_MANIFEST
        if not manifest_path.is_file():
            raise HandoffError(f"{manifest_path} is missing")
        manifest = read_json(manifest_path)
        if not isinstance(manifest, dict) or manifest.get("format_version") != FORMAT_VERSION:
            raise HandoffError(f"{manifest_path} is not of format version {FORMAT_VERSION}")
        digest = manifest.pop("sha256", None)
        if digest != canonical_hash(manifest):
            raise HandoffError(f"{manifest_path} was altered: its content does not match its saved hash")
        if manifest["step"] != step:
            raise HandoffError(f"{manifest_path} is of step {manifest['step']}, but its directory is of step {step}")
        return manifest

    def clean(self, newest: State | None) -> None:
        """Removes what interrupted saves have left: unfinished states, and older ones that the save of the `newest`
        state was to remove. None: there is no whole state, so all stay."""
        if not self.directory.is_dir():
            return
        for path in self.directory.glob(".tmp-*"):
            remove_tree(path)
        # A damaged state after `newest` may still be restored by hand. After one that was being replaced, all is done.
        if (
            newest is not None
            and newest.rotation
            and newest.path == self._candidates()[0][1]
            and newest.path.name.startswith("step-")
        ):
            self._rotate(newest.step, newest.rotation["keep"], newest.rotation["protect"])
