"""Broken states and full disks (training/saving.py); the disk is a real tmpfs where one can be mounted."""

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from handoff.errors import HandoffError
from handoff.stage import StageDir
from handoff.state import StateStore
from tests.stage_chain import lines_of, result, stage_recipe
from training.config import OptimizerConfig
from training.engines import files
from training.recipe import load_recipe
from training.run import Run, run_section
from training.saving import SavedStates

pytestmark = pytest.mark.slow

KEYS = ("train.save_steps=2", "train.max_steps=7")


class Interrupted(BaseException):
    """Nothing catches it."""


def stop_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """The stage ends when that state has been saved."""
    commit = StateStore.commit

    def dying(self, at, *args):
        path = commit(self, at, *args)
        if at == step:
            raise Interrupted
        return path

    patch.setattr(StateStore, "commit", dying)


def interrupted(recipe, name, step):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, step)
        run_section(recipe, name)
    return recipe.run_dir / name


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ---- resume: weights


def test_starting_from_weights_alone_has_to_be_asked_for(tmp_path, caplog):
    whole = stage_recipe("sft", tmp_path / "whole", *KEYS)
    run_section(whole, "sft")
    reference = result(whole, "sft")

    folder = interrupted(stage_recipe("sft", tmp_path / "cut", *KEYS), "sft", 4)
    for state in (folder / "state").glob("step-*"):
        flip(state / files.OPTIMIZER)
    (folder / "state" / "step-4" / files.RNG).unlink()
    with pytest.raises(HandoffError, match=r"optimizer.*altered.*train\.resume=weights to go on after step 4"):
        run_section(stage_recipe("sft", tmp_path / "cut", *KEYS), "sft")

    asked = stage_recipe("sft", tmp_path / "cut", *KEYS, "train.resume=weights")
    run_section(asked, "sft")
    assert "going on after step 4 without what was lost" in caplog.text
    lines = lines_of(folder)
    assert {"step": 4, "resumed_without": [files.OPTIMIZER, files.RNG]} in lines
    ours = {line["step"]: line for line in lines if "loss" in line}
    theirs = {line["step"]: line for line in reference.lines if "loss" in line}
    assert sorted(ours) == [1, 2, 3, 4, 5, 6, 7]
    for step in (1, 2, 3, 4, 5):  # the loss of step 5 comes from the saved weights
        assert ours[step] == theirs[step]
    assert ours[7]["learning_rate"] == theirs[7]["learning_rate"] and ours[7]["loss"] != theirs[7]["loss"]


def test_without_whole_weights_no_restart_is_offered(tmp_path):
    recipe = stage_recipe("sft", tmp_path, *KEYS, "train.resume=weights")
    folder = interrupted(recipe, "sft", 2)
    flip(folder / "state" / "step-2" / files.MODEL)
    with pytest.raises(HandoffError, match=r"no valid state is left to resume from: .*model\.safetensors was altered"):
        run_section(recipe, "sft")


def test_a_whole_older_state_is_better_than_newer_weights(tmp_path):
    recipe = stage_recipe("sft", tmp_path, *KEYS, "train.resume=weights")
    folder = interrupted(recipe, "sft", 4)
    flip(folder / "state" / "step-4" / files.OPTIMIZER)
    run_section(recipe, "sft")
    assert not any("resumed_without" in line for line in lines_of(folder))


def test_rl_continues_from_its_weights(micro_recipe, tmp_path, caplog):
    published = micro_recipe.parent / "runs" / "micro"
    keys = [f"output_root={tmp_path}", "ppo.train.sync_ref_model=true", "ppo.train.ref_model_sync_steps=1"]
    for parent in ("tokenizer", "pretrain", "sft", "reward"):
        shutil.copytree(published / parent, tmp_path / "micro" / parent)
    folder = interrupted(load_recipe(micro_recipe, keys), "ppo", 2)
    flip(folder / "state" / "step-2" / files.OPTIMIZER)
    asked = load_recipe(micro_recipe, [*keys, "ppo.train.resume=weights"])
    run_section(asked, "ppo")
    assert "going on after step 2" in caplog.text and (folder / "stage.json").exists()

    shutil.rmtree(folder)
    interrupted(load_recipe(micro_recipe, keys), "ppo", 2)
    flip(folder / "state" / "step-2" / "reference.safetensors")  # it has been trained, so it cannot be replaced
    with pytest.raises(HandoffError, match="no valid state is left") as refused:
        run_section(asked, "ppo")
    assert "reference.safetensors was altered" in str(refused.value)


# ---- room


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of 80 MiB; a stage needs 64 MiB free to begin."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or subprocess.run([mount, "-t", "tmpfs", "-o", "size=80m", "test", folder]).returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def fill(folder: Path, leave: int = 0) -> None:
    """Fills the disk up to about this many free bytes."""
    with (folder / "filler").open("wb", buffering=0) as file:
        os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(folder).free - leave))


def test_too_small_a_disk_is_an_error_before_training(disk):
    recipe = stage_recipe("sft", disk, *KEYS, "train.save_total_limit=300")
    with pytest.raises(HandoffError, match=r"disk.*sft: 301 saved states of .* needs .* MiB, but .* MiB free") as told:
        run_section(recipe, "sft")
    assert "train.save_total_limit 300" in str(told.value)
    assert not list((recipe.run_dir / "sft").rglob("*.safetensors"))


def test_space_of_existing_states_counts_as_free(tmp_path, monkeypatch):
    """A run whose own states fill the disk can continue."""
    section, engine = SimpleNamespace(name="sft"), SimpleNamespace(on_main=lambda work: work())
    stage = StageDir(tmp_path / "run" / "sft")
    stage.state_dir.mkdir(parents=True)
    states = SavedStates(
        cast(Run, SimpleNamespace(dir=stage, section=section, engine=engine)), OptimizerConfig(learning_rate=0.01)
    )
    monkeypatch.setattr("handoff.files.free_bytes", lambda path: 150)
    for there in (0, 149):
        (stage.state_dir / "step-1").write_bytes(b"x" * there)
        with pytest.raises(HandoffError, match=r"needs (300|151) bytes, .* on another disk$"):
            states.check_room(3, 90, 30)
    (tmp_path / "run" / ".previous" / "dpo" / "1").mkdir(parents=True)
    (tmp_path / "run" / ".previous" / "dpo" / "1" / "model").write_bytes(b"x" * 77)
    with pytest.raises(
        HandoffError, match=r"\.previous has 77 bytes of what earlier recipes made, which may be removed"
    ):
        states.check_room(3, 90, 30)
    (stage.state_dir / "step-1").write_bytes(b"x" * 150)
    states.check_room(3, 90, 30)


@pytest.mark.parametrize("where", ["before a save", "in a save"])
@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_disk_that_is_full_for_a_while_costs_states_and_nothing_else(
    name, where, micro_recipe, disk, tmp_path, monkeypatch, caplog
):
    """The second of the saves finds no space; the first state stays until the third."""
    if name == "sft":
        recipe = stage_recipe("sft", disk, *KEYS, "train.save_total_limit=1")
        other = stage_recipe("sft", tmp_path / "other", *KEYS, "train.save_total_limit=1")
    else:
        published = micro_recipe.parent / "runs" / "micro"
        keys = ["ppo.train.iterations=7", "ppo.train.save_total_limit=1", "ppo.guards.keep=last"]
        recipe, other = (
            load_recipe(micro_recipe, [f"output_root={root}", *keys, f"ppo.parent={published / 'sft'}",
                                       f'ppo.reward=[{{"model": "{published / "reward"}"}}]'])
            for root in (disk, tmp_path / "other")
        )  # fmt: skip
    log, staging = Run.log, StateStore.staging

    def logged(self, step, metrics):
        if step == 3 and where == "before a save":
            fill(disk)
        if step == 5:
            (disk / "filler").unlink(missing_ok=True)
        log(self, step, metrics)

    def staged(self, step):
        path = staging(self, step)
        if step == 4 and where == "in a save":
            fill(disk, leave=20 << 10)
        return path

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        patch.setattr(StateStore, "staging", staged)
        run_section(recipe, name)
    assert "no room to save the state of step 4" in caplog.text and "step 6 (" not in caplog.text
    folder = recipe.run_dir / name
    assert [path.name for path in (folder / "state").glob("*step-*")] == ["step-7"]
    run_section(other, name)
    assert lines_of(folder) == lines_of(other.run_dir / name)
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (folder, other.run_dir / name))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_full_disk_at_the_end_loses_nothing(disk, tmp_path, monkeypatch):
    recipe = stage_recipe("sft", disk, *KEYS)
    log = Run.log

    def logged(self, step, metrics):
        log(self, step, metrics)
        if step == 7:
            fill(disk, leave=30 << 10)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        with pytest.raises(HandoffError, match="the disk is full, nothing was published; free some space and run"):
            run_section(recipe, "sft")
    folder = recipe.run_dir / "sft"
    assert not (folder / "stage.json").exists() and not (folder / ".writing").exists()
    (disk / "filler").unlink()
    run_section(recipe, "sft")
    other = stage_recipe("sft", tmp_path / "other", *KEYS)
    run_section(other, "sft")
    ours, theirs = result(recipe, "sft"), result(other, "sft")
    assert ours.lines == theirs.lines
    assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in theirs.weights)


@pytest.mark.parametrize("name", ["sft", "reward", "ppo"])
def test_a_publication_that_fails_costs_no_training(name, micro_recipe, tmp_path, monkeypatch):
    """The next start finds the trained weights: it takes no step, and its files are those of an undisturbed run."""
    if name == "ppo":
        published = micro_recipe.parent / "runs" / "micro"
        keys = ["ppo.train.iterations=3", "ppo.train.save_iterations=9", f"ppo.parent={published / 'sft'}"]
        keys.append(f'ppo.reward=[{{"model": "{published / "reward"}"}}]')
        recipe, other = (load_recipe(micro_recipe, [f"output_root={tmp_path / root}", *keys]) for root in "ab")
    else:
        recipe, other = (
            stage_recipe(name, tmp_path / root, "train.max_steps=3", "train.save_steps=9") for root in "ab"
        )
    folder = recipe.run_dir / name

    def denied(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with monkeypatch.context() as patch:
        patch.setattr("training.publishing.write_tensors", denied)
        with pytest.raises((PermissionError, HandoffError)):
            run_section(recipe, name)
    assert not (folder / "stage.json").exists() and (folder / "state" / "step-3").is_dir()

    def trained(*_, **__):
        raise AssertionError("a step was taken again")

    with monkeypatch.context() as patch:
        patch.setattr("training.trainer.StageTrainer.compute_loss", trained)
        patch.setattr("stages.ppo.train._loss", trained)
        run_section(recipe, name)
    run_section(other, name)
    assert lines_of(folder) == lines_of(other.run_dir / name)
    for file in ("samples.jsonl", "model/model.safetensors"):
        assert (folder / file).exists() == (other.run_dir / name / file).exists()
        if (folder / file).exists():
            assert (folder / file).read_bytes() == (other.run_dir / name / file).read_bytes()
    first, second = (StageDir(path).manifest() for path in (folder, other.run_dir / name))
    assert first is not None and second is not None
    assert {key: value for key, value in first.metrics.items() if not key.startswith("time/")} == {
        key: value for key, value in second.metrics.items() if not key.startswith("time/")
    }


def test_a_full_disk_for_a_required_file_is_a_user_error(tmp_path, monkeypatch):
    """The reward model's card is written after training: a user error, after which the same command continues."""
    recipe = stage_recipe("reward", tmp_path, *KEYS)

    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("stages.reward_model.train.write_json", full)
        with pytest.raises(
            HandoffError, match=r"reward: the disk is full .*card.json.* free some space and run the same"
        ):
            run_section(recipe, "reward")
    folder = recipe.run_dir / "reward"
    assert not (folder / "stage.json").exists() and (folder / "state" / "step-6").is_dir()
    run_section(recipe, "reward")
    assert (folder / "stage.json").exists()


# ---- disks that cannot be written, damaged journals, threads


def test_a_state_folder_that_cannot_be_written_costs_a_save(tmp_path, caplog, monkeypatch):
    """The folder of states becomes a file before the second of three saves, and comes back before the third."""
    recipe = stage_recipe("sft", tmp_path / "cut", *KEYS)
    states, log = recipe.run_dir / "sft" / "state", Run.log

    def logged(self, step, metrics):
        if step == 3:
            states.rename(states.with_name("away"))
            states.write_text("")
        if step == 5:
            states.unlink()
            states.with_name("away").rename(states)
        log(self, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", logged)
        run_section(recipe, "sft")
    assert caplog.text.count("cannot save the state of step 4 (") == 1 and "step 6 (" not in caplog.text
    assert "Make it possible to write to" in caplog.text
    assert sorted(path.name for path in states.glob("step-*")) == ["step-6", "step-7"]
    other = stage_recipe("sft", tmp_path / "whole", *KEYS)
    run_section(other, "sft")
    ours, theirs = result(recipe, "sft"), result(other, "sft")
    assert ours.lines == theirs.lines
    assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in theirs.weights)


def test_a_model_that_cannot_be_written_is_a_user_error(tmp_path, monkeypatch):
    recipe = stage_recipe("sft", tmp_path, *KEYS)

    def forbidden(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("handoff.stage.fsync_tree", forbidden)
        with pytest.raises(
            HandoffError, match=r"sft: it cannot be written \(.*Permission denied.*nothing was published"
        ):
            run_section(recipe, "sft")
    run_section(recipe, "sft")


def test_a_damaged_and_a_deleted_journal_do_not_block_a_resume(tmp_path, caplog):
    recipe = stage_recipe("sft", tmp_path / "cut", *KEYS)
    folder = interrupted(recipe, "sft", 4)
    lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_bytes(b"".join([lines[0], b"\0" * 8 + b"\n", *lines[2:]]))
    (folder / "samples.jsonl").unlink()
    run_section(recipe, "sft")
    assert "metrics.jsonl cannot be read in line 2;" in caplog.text
    assert "samples.jsonl is missing; its lines up to step 4 are lost, the training is not" in caplog.text
    other = stage_recipe("sft", tmp_path / "whole", *KEYS)
    run_section(other, "sft")
    ours, theirs = result(recipe, "sft"), result(other, "sft")
    assert ours.lines == theirs.lines[:1] + theirs.lines[2:]
    assert all(torch.equal(ours.weights[key], theirs.weights[key]) for key in theirs.weights)


def test_a_start_that_sets_a_training_aside_says_so_and_why(tmp_path, capsys):
    folder = interrupted(stage_recipe("sft", tmp_path, *KEYS), "sft", 2)
    run_section(stage_recipe("sft", tmp_path, *KEYS, "train.learning_rate=0.003"), "sft")
    said = " ".join(capsys.readouterr().out.split())
    assert "begins anew (changed: recipe)" in said
    aside = folder.parent / ".previous" / "sft" / "1"
    assert f"is kept in {aside}" in said and (aside / "state" / "step-2").is_dir()


def test_a_changed_number_of_threads_is_said(tmp_path, capsys, monkeypatch):
    recipe = stage_recipe("sft", tmp_path, *KEYS)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 5)
        folder = interrupted(recipe, "sft", 4)
    assert json.loads((folder / "state" / "step-4" / "state.json").read_text())["extra"]["engine"]["threads"] == 5
    capsys.readouterr()
    run_section(recipe, "sft")
    now = torch.get_num_threads()
    said = f"saved with 5 threads, goes on with {now}: numbers are added in another order"
    assert capsys.readouterr().out.count(said) == 1
    interrupted(stage_recipe("sft", tmp_path / "same", *KEYS), "sft", 4)
    run_section(stage_recipe("sft", tmp_path / "same", *KEYS), "sft")
    assert "threads" not in capsys.readouterr().out
