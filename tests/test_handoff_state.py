"""Resumable states (handoff/state.py): a committed state is found again; a broken one is skipped or refused by name."""

import errno
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import handoff.state
from handoff.errors import HandoffError
from handoff.state import BrokenStates, StateStore


def save(store: StateStore, step: int, keep: int = 2, content: str = "weights") -> Path:
    staged = store.staging(step)
    (staged / "rank0").mkdir()
    (staged / "rank0" / "rng.json").write_text("{}")
    (staged / "model.safetensors").write_text(f"{content} {step}")
    return store.commit(step, staged, keep, {"step": step})


def steps(store: StateStore) -> list[str]:
    return sorted(path.name for path in store.directory.iterdir())


def test_the_newest_state_is_returned_with_its_extra(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    assert store.latest() is None
    save(store, 9)
    path = save(store, 10)
    state = store.latest()
    assert state is not None
    assert (state.step, state.path, state.extra) == (10, path, {"step": 10})
    assert (path / "model.safetensors").read_text() == "weights 10"


def test_rotation_keeps_the_newest(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for step in (1, 2, 3, 10, 20):
        save(store, step, keep=2)
    assert steps(store) == ["step-10", "step-20"]


def test_a_rotation_that_a_kill_prevented_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its protected state, and only while the newest state is whole."""
    store = StateStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step, keep=3)
    staged = store.staging(4)
    (staged / "model.safetensors").write_text("weights 4")
    with monkeypatch.context() as patch:
        patch.setattr(StateStore, "_rotate", lambda *_: None)  # killed right before it
        path = store.commit(4, staged, 1, {}, protect=2)
    store.staging(5)
    newest = store.latest()
    store.clean(None)
    assert steps(store) == ["step-1", "step-2", "step-3", "step-4"]
    weights = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(b"damaged")
    store.clean(store.latest())
    assert steps(store) == ["step-1", "step-2", "step-3", "step-4"]
    (path / "model.safetensors").write_bytes(weights)
    store.clean(newest)
    assert steps(store) == ["step-2", "step-4"]


def test_a_state_is_saved_even_if_an_older_one_cannot_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(tmp_path)
    save(store, 1)

    def forbidden(*_: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "step-1")

    monkeypatch.setattr(StateStore, "_rotate", forbidden)
    save(store, 2, keep=1)
    assert "state step-2 is saved, but older ones cannot be removed" in caplog.text
    found = store.latest()
    assert found is not None and found.step == 2


def test_later_states_of_an_abandoned_course_are_removed(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for step in (1, 2, 3):
        save(store, step, keep=3)
    (tmp_path / "step-3" / "model.safetensors").write_text("broken")
    (tmp_path / "step-2" / "model.safetensors").write_text("broken")
    state = store.latest()
    assert state is not None and state.step == 1
    save(store, 2, keep=3, content="new")
    assert steps(store) == ["step-1", "step-2"]
    state = store.latest()
    assert state is not None and (state.path / "model.safetensors").read_text() == "new 2"


def test_nothing_rotates_before_the_new_one_is_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = StateStore(tmp_path)
    save(store, 1, keep=1)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(handoff.state, "fsync_tree", full)
    with pytest.raises(OSError, match="No space left"):
        save(store, 2, keep=1)
    assert steps(store) == ["step-1"]  # the staged files are removed, which frees their space
    monkeypatch.undo()
    save(store, 3, keep=1)
    assert steps(store) == ["step-3"]


def break_part(path: Path, how: str) -> None:
    part = path / "model.safetensors"
    content = bytearray(part.read_bytes())
    match how:
        case "flip":
            content[3] ^= 1
            part.write_bytes(content)
        case "truncate":
            part.write_bytes(content[:-1])
        case "missing":
            part.unlink()
        case "nested":
            (path / "rank0" / "rng.json").unlink()
        case "manifest":
            (path / "state.json").unlink()
        case "json":
            (path / "state.json").write_text("{")
        case "version":
            (path / "state.json").write_text('{"format_version": 7}')
        case "extra":
            manifest = (path / "state.json").read_text()
            (path / "state.json").write_text(manifest.replace('"step": 4', '"step": 6'))
        case "step":
            shutil.rmtree(path)
            save(StateStore(path.parent), 3)
            (path.parent / "step-3").rename(path)


BREAKS = [
    ("flip", "model.safetensors was altered"),
    ("truncate", "model.safetensors has 8 bytes instead of 9"),
    ("missing", "model.safetensors is missing"),
    ("nested", "rng.json is missing"),
    ("manifest", "state.json is missing"),
    ("json", "state.json, line 1: not JSON"),
    ("version", "state.json is not of format version 1"),
    ("extra", "state.json was altered"),
    ("step", "state.json is of step 3, but its directory is of step 4"),
]


@pytest.mark.parametrize(("how", "reason"), BREAKS, ids=[how for how, _ in BREAKS])
def test_a_broken_state_is_skipped_with_its_reason(
    tmp_path: Path, how: str, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(tmp_path)
    save(store, 2)
    break_part(save(store, 4), how)
    with caplog.at_level(logging.WARNING):
        state = store.latest()
    assert state is not None and state.step == 2
    assert "state step-4 is skipped" in caplog.text
    assert reason in caplog.text


@pytest.mark.parametrize(("how", "reason"), BREAKS, ids=[how for how, _ in BREAKS])
def test_when_every_state_is_broken_resuming_is_refused(tmp_path: Path, how: str, reason: str) -> None:
    store = StateStore(tmp_path)
    break_part(save(store, 4), how)
    with pytest.raises(HandoffError, match="no valid state is left") as raised:
        store.latest()
    assert reason in str(raised.value)
    assert f"delete {tmp_path}" in str(raised.value)


def test_a_state_saved_without_a_part_that_the_stage_needs_is_refused_by_its_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(StateStore(tmp_path), 4)
    with pytest.raises(HandoffError, match=r"optimizer\.safetensors was not saved: state\.json does not list it"):
        StateStore(tmp_path, ["model.safetensors", "optimizer.safetensors"]).latest()
    assert "state step-4 is skipped" in caplog.text
    with pytest.raises(AssertionError, match="has only"):
        save(StateStore(tmp_path, ["optimizer.safetensors"]), 5)


@pytest.mark.parametrize(("how", "usable"), [("flip", False), ("nested", True), ("manifest", False)])
def test_what_is_left_of_broken_states_is_offered_only_when_its_weights_are_whole(
    tmp_path: Path, how: str, usable: bool
) -> None:
    store = StateStore(tmp_path, weights=["model.safetensors"])
    for step in (2, 4):
        break_part(save(store, step), how)
    with pytest.raises(BrokenStates) as raised:
        store.latest()
    found = raised.value.weights
    assert (found is not None) is usable
    if found is not None:
        assert (found.step, found.extra, list(found.lost)) == (4, {"step": 4}, ["rank0/rng.json"])


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    save(store, 1)
    save(store, 2, content="first")
    path = save(store, 2, content="second")
    assert (path / "model.safetensors").read_text() == "second 2"
    assert steps(store) == ["step-1", "step-2"]


def test_between_the_two_renames_of_a_replacement_the_old_one_is_found(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    save(store, 2).rename(tmp_path / ".replaced-step-2")
    state = store.latest()
    assert state is not None and (state.path / "model.safetensors").read_text() == "weights 2"
    save(store, 3)
    assert steps(store) == ["step-3"]


def test_staging_starts_empty_and_clean_removes_leftovers(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    save(store, 1)
    (store.staging(5) / "half").write_text("x")
    assert list(store.staging(5).iterdir()) == []
    (store.staging_path(5) / "half").write_text("x")
    assert store.latest() is not None
    store.clean(store.latest())
    assert steps(store) == ["step-1"]
