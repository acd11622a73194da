"""Signals to a stage: it saves a state after its step and exits; the same command then reaches the same result."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from stages.ppo.sampler import Sampler
from tests.launching import grouped
from tests.stage_chain import lines_of, result, run_stage, stage_recipe
from training import engines
from training.recipe import load_recipe
from training.run import Run, run_section
from training.signals import Signals, Stopped
from training.trainer import StageTrainer

slow = pytest.mark.slow

ALONE = engines.current().largest


def states(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "state").glob("step-*"))


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, *signals: int) -> None:
    """Sends signals to this process in the forward pass of an optimizer step, counted from 1, on its first run."""
    original, left = StageTrainer.training_step, list(signals)

    def training_step(self, *args, **kwargs):
        if self.state.global_step == step - 1:
            while left:
                os.kill(os.getpid(), left.pop(0))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


# ---- the handlers alone


def test_without_a_running_step_a_signal_ends_the_stage_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="sft: stopped by SIGTERM with no step under way") as stopped, Signals("sft"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_during_a_step_a_signal_is_remembered(signum):
    if signal.getsignal(signum) is signal.SIG_IGN:
        pytest.skip("the tests were started with this signal ignored, and a stage leaves it so")
    with Signals("sft") as signals:
        signals.finish_steps(60)
        assert signals.asked(ALONE) == (0, False)
        os.kill(os.getpid(), signum)
        os.kill(os.getpid(), signum)  # a launcher forwards a signal that its group also received
        assert signals.asked(ALONE) == (signum, False)


def test_a_save_request_is_reported_once():
    with Signals("sft") as signals:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.asked(ALONE) == (0, True)
        assert signals.asked(ALONE) == (0, False)


def test_an_ignored_signal_stays_ignored():
    """`nohup` starts its command with SIGHUP ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Signals("sft") as signals:
            os.kill(os.getpid(), signal.SIGHUP)
            assert signals.asked(ALONE) == (0, False)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_forked_child_ends_when_it_is_told_to_and_does_not_tell_its_parent():
    with Signals("sft") as signals:
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
        assert signals.asked(ALONE) == (0, False)


# ---- stages, in this process


@slow
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo"])
def test_a_stage_stopped_between_two_lines_and_two_saves_ends_bit_for_bit_the_same(name, tmp_path, monkeypatch):
    keys = ("train.max_steps=9", "train.logging_steps=4", "train.save_steps=3", "train.per_device_train_batch_size=4")
    whole = run_stage(name, tmp_path / "whole", *keys)
    recipe = stage_recipe(name, tmp_path / "stopped", *keys)
    at_step(monkeypatch, 6, signal.SIGUSR1)  # this save changes nothing either
    with monkeypatch.context() as patch:
        at_step(patch, 7, signal.SIGTERM)
        with pytest.raises(Stopped, match=rf"{name}: stopped by SIGTERM after step 7; its state is saved") as stopped:
            run_section(recipe, name)
    assert stopped.value.code == 143
    folder = recipe.run_dir / name
    assert states(folder) == ["step-6", "step-7"]
    assert not (folder / "stage.json").exists()
    assert [line["step"] for line in lines_of(folder) if "loss" in line] == [4]
    run_section(recipe, name)
    again = result(recipe, name)
    assert again.lines == whole.lines
    assert all(torch.equal(whole.weights[key], again.weights[key]) for key in whole.weights)


@slow
def test_a_save_on_request_goes_on(tmp_path, monkeypatch):
    keys = ("train.max_steps=6", "train.save_steps=5", "train.save_total_limit=9", "train.logging_steps=2")
    whole = run_stage("sft", tmp_path / "whole", *keys)
    at_step(monkeypatch, 3, signal.SIGUSR1)
    asked = run_stage("sft", tmp_path / "asked", *keys)
    assert states(whole.folder) == ["step-5", "step-6"]
    assert states(asked.folder) == ["step-3", "step-5", "step-6"]
    assert asked.lines == whole.lines


@slow
def test_a_signal_in_the_last_step_lets_the_stage_publish(tmp_path, monkeypatch):
    at_step(monkeypatch, 4, signal.SIGTERM)
    run = run_stage("sft", tmp_path, "train.max_steps=4", "train.save_steps=9")
    assert run.lines[-1]["step"] == 4


@slow
def test_a_stage_stopped_while_it_reads_its_data_leaves_the_directory_as_it_was(tmp_path, monkeypatch):
    published = run_stage("sft", tmp_path, "train.max_steps=2")
    changed = stage_recipe("sft", tmp_path, "train.max_steps=3")

    def content():
        return {p.name: p.stat().st_mtime_ns for p in published.folder.iterdir() if p.name != ".lock"}

    before = content()
    with monkeypatch.context() as patch:
        patch.setattr(Run, "rows", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM) or time.sleep(10))
        with pytest.raises(Stopped):
            run_section(changed, "sft")
    assert content() == before


def ppo(micro_recipe: Path) -> tuple[Callable[[], None], Path]:
    recipe = load_recipe(micro_recipe, ["ppo.train.iterations=6", "ppo.train.save_iterations=4"])
    return lambda: run_section(recipe, "ppo"), recipe.run_dir / "ppo"


@slow
def test_ppo_stopped_in_an_iteration_ends_bit_for_bit_the_same(micro_recipe, monkeypatch):
    run, folder = ppo(micro_recipe)
    original, asked = Sampler.batch, [2, 4]  # iterations, counted from 0; it saves after neither of them

    def batch(self, stream, cursor, iteration):
        if asked and iteration == asked[0]:
            asked.pop(0)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, stream, cursor, iteration)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "batch", batch)
        for done in (3, 5):
            with pytest.raises(Stopped, match=f"ppo: stopped by SIGTERM after iteration {done}; its state is saved"):
                run()
            assert f"step-{done}" in states(folder)
        run()
    stopped, samples = (load_file(folder / "model" / "model.safetensors"), (folder / "samples.jsonl").read_text())
    lines = lines_of(folder)
    subprocess.run(["rm", "-r", str(folder)], check=True)
    run()
    whole = load_file(folder / "model" / "model.safetensors")
    assert lines == lines_of(folder) and samples == (folder / "samples.jsonl").read_text()
    assert all(torch.equal(whole[key], stopped[key]) for key in whole)


# ---- real processes

SFT = (
    "sft.train.max_steps=60",
    "sft.train.save_steps=50",
    "sft.train.logging_steps=4",
    "sft.train.per_device_train_batch_size=4",
)


def begin(root: Path, *command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Waits until metrics.jsonl has a training line of that step or a later one."""
    deadline = time.monotonic() + 120
    while not any(line["step"] >= step for line in lines_of(folder)) if (folder / "metrics.jsonl").exists() else True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def parents_of(micro_recipe: Path, output: Path, *overrides: str) -> tuple[list[str], Path]:
    """Arguments for the micro recipe in a separate folder with its published parents; and the run's folder."""
    runs = load_recipe(micro_recipe).run_dir
    keys = [f"sft.parent={runs / 'pretrain'}", f"ppo.parent={runs / 'sft'}", f"output_root={output}", *overrides]
    keys += [f'ppo.reward=[{{"model": "{runs / "reward"}"}}]']
    return [str(micro_recipe), *keys], output / "micro"


def end_of(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    return load_file(folder / "model" / "model.safetensors"), lines_of(folder)


def same(one: Path, other: Path) -> None:
    (weights, lines), (weights_, lines_) = end_of(one), end_of(other)
    assert lines == lines_
    assert weights.keys() == weights_.keys()
    assert all(torch.equal(weights[key], weights_[key]) for key in weights)


@slow
def test_a_requeued_job_continues_by_itself(micro_recipe, root, tmp_path):
    """As with Slurm: every process of the job gets the signal, and the job's command runs again."""
    arguments, folder = parents_of(micro_recipe, tmp_path / "whole", *SFT)
    run_section(load_recipe(micro_recipe, arguments[1:]), "sft")
    command = ["-m", "baton", "run", "--to", "sft"]
    again, stopped = parents_of(micro_recipe, tmp_path / "stopped", *SFT)
    runner = begin(root, *command, *again)
    wait_for_step(runner, stopped / "sft", 8)
    stage = json.loads((stopped / "sft" / ".lock").read_text())["pid"]
    assert stage != runner.pid
    os.kill(stage, signal.SIGUSR1)
    job = psutil.Process(runner.pid)
    for process in [*job.children(recursive=True), job]:
        process.send_signal(signal.SIGTERM)
    out = runner.communicate(timeout=60)[0]
    assert runner.returncode == 143
    assert "sft: stopped by SIGTERM after step" in out
    assert out.endswith("sft was stopped; the same command goes on with it\n")
    assert "Traceback" not in out
    step = int(out.split("after step ")[1].split(";")[0])
    assert f"step-{step}" in states(stopped / "sft") and step < 60
    runner = begin(root, *command, *again)
    out = runner.communicate(timeout=240)[0]
    assert runner.returncode == 0, out
    assert f"resuming after step {step}" in out
    same(folder / "sft", stopped / "sft")


HANGS = """
import os, signal, sys, time
from training import run
from training.trainer import StageTrainer

step = StageTrainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == 5:
        os.kill(os.getpid(), signal.SIGTERM)
        if {second}:
            time.sleep(2.5)
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(600)
    return step(self, *args, **kwargs)

StageTrainer.training_step = training_step
run.main("sft", sys.argv[1:])
"""


@slow
@pytest.mark.parametrize(
    ("second", "grace", "said"),
    [(True, 600, "stopped by SIGTERM at once"), (False, 0.5, r"stopped by SIGTERM, the step did not end in 0.5 s")],
)
def test_a_second_signal_and_the_end_of_the_grace_period_end_it_at_once(
    second, grace, said, micro_recipe, root, tmp_path
):
    keys = ("sft.train.max_steps=8", "sft.train.save_steps=2", f"sft.train.grace_seconds={grace}")
    arguments, folder = parents_of(micro_recipe, tmp_path, *keys)
    process = begin(root, "-c", HANGS.format(second=second), *arguments, "--section", "sft")
    out = process.communicate(timeout=120)[0]
    assert process.returncode == 143, out
    assert out.endswith(f"sft: {said}; the same command goes on from the last saved state\n")
    assert states(folder / "sft") == ["step-2", "step-4"]
    run_section(load_recipe(micro_recipe, arguments[1:]), "sft")
    _, lines = end_of(folder / "sft")
    assert lines[-1]["step"] == 8


@slow
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_of_two_processes_one_is_asked_and_both_end_after_the_same_step(stage, micro_recipe, root, tmp_path):
    keys = (*SFT, "ppo.train.iterations=8", "ppo.train.save_iterations=7")
    command = ["-m", "baton", "run", "--to", stage, "--launch", str(root / "recipes" / "launch" / "cpu2.yaml")]
    arguments, stopped = parents_of(micro_recipe, tmp_path / "stopped", *keys)
    runner = begin(root, *command, *arguments)
    wait_for_step(runner, stopped / stage, {"sft": 8, "ppo": 2}[stage])
    family = psutil.Process(runner.pid).children(recursive=True)
    (second,) = [one for one in family if one.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGTERM)
    out = runner.communicate(timeout=60)[0]
    assert runner.returncode == 143, out
    assert f"{stage}: stopped by SIGTERM after" in out
    assert not any(one.is_running() for one in family)
    (state,) = states(stopped / stage)
    assert {"sft": 8, "ppo": 2}[stage] <= int(state.removeprefix("step-")) < {"sft": 60, "ppo": 8}[stage]
    if stage == "sft":  # losses are summed separately on each process
        out = begin(root, *command, *arguments).communicate(timeout=240)[0]
        assert "resuming after step" in out
        whole, folder = parents_of(micro_recipe, tmp_path / "whole", *keys)
        done = grouped(root, "cpu2", f"stages.{stage}", *whole)
        assert done.returncode == 0, done.stderr
        same(folder / stage, stopped / stage)
