"""A run continues with another number of processes or engine: the same rows, batch and losses."""

import json
import shutil
from pathlib import Path

import pytest

from handoff.stage import StageDir
from tests.launching import grouped
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

STEPS, FIRST, SECOND = 36, 8, 16
# An epoch has seven steps, the last of which wraps; a batch needs accumulation on every number of processes but four.
SFT = """
name: moved
output_root: {root}
stages:
  sft:
    parent: {parent}
    data: [{{source: world, kind: chats, size: 50}}]
    max_length: 128
    train: {{learning_rate: 2.0e-3, adam_epsilon: 1.0e-3, max_steps: 36, global_batch_size: 8, save_steps: 8,
             per_device_train_batch_size: 2, logging_steps: 1, save_total_limit: 9}}
"""
COMPARED = ("loss", "grad_norm", "learning_rate", "epoch")


class Moved:
    """A section of a recipe in a separate folder, which may begin with a state saved by another one."""

    def __init__(self, folder: Path, text: str, section: str) -> None:
        self.section = section
        folder.mkdir()
        self.recipe = folder / "moved.yaml"
        self.recipe.write_text(text.format(root=folder))
        self.stage = load_recipe(self.recipe).run_dir / section

    def with_state(self, other: "Moved", step: int) -> "Moved":
        """Begins with the other one's files, as they were shortly after it had saved that state."""
        shutil.copytree(other.stage, self.stage)
        shutil.rmtree(self.stage / "model")
        (self.stage / "stage.json").unlink()
        for state in (self.stage / "state").iterdir():
            if state.name != f"step-{step}":
                shutil.rmtree(state)
        return self

    def here(self, *overrides: str) -> "Moved":
        run_section(load_recipe(self.recipe, [f"{self.section}.{key}" for key in overrides]), self.section)
        return self

    def launched(self, root: Path, config: str, processes: int, *overrides: str) -> str:
        """Runs under a launch file with another number of processes. Returns the output."""
        done = grouped(root, config, f"stages.{self.section}", self.recipe, *overrides, processes=processes)
        assert done.returncode == 0, done.stderr[-4000:]
        return done.stdout

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in (self.stage / "metrics.jsonl").read_text().splitlines()]

    def engine(self) -> tuple[str, int | None, int]:
        manifest = StageDir(self.stage).manifest()
        assert manifest is not None
        return manifest.engine.name, manifest.engine.zero_stage, manifest.engine.processes


def steps_of(run: Moved, after: int) -> list[dict]:
    """The lines of the steps after a state."""
    found = [line for line in run.lines() if "loss" in line]
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    return found[after:]


def agree(run: Moved, reference: Moved, after: int) -> None:
    compared = 0
    for ours, theirs in zip(steps_of(run, after), steps_of(reference, after), strict=True):
        for key in COMPARED:
            assert ours[key] == pytest.approx(theirs[key], abs=1e-4), (ours["step"], key)
            compared += 1
    assert compared >= 20 * len(COMPARED)


@pytest.fixture(scope="module")
def make(micro_recipe, tmp_path_factory):
    """A new folder for the SFT section."""
    text = SFT.replace("{parent}", str(micro_recipe.parent / "runs" / "micro" / "pretrain"))
    return lambda: Moved(tmp_path_factory.mktemp("moved") / "sft", text, "sft")


@pytest.fixture(scope="module")
def on_two(make, root):
    """An undisturbed run on two processes, with all its states kept."""
    run = make()
    run.launched(root, "cpu2", 2)
    assert run.engine() == ("ddp", None, 2)
    return run


def test_two_processes_become_one(make, on_two, capfd):
    run = make().with_state(on_two, FIRST).here()
    said = capfd.readouterr().out
    assert "saved by ddp on 2 processes, goes on with single on 1 process" in said
    assert "resuming after step 8" in said
    assert run.engine() == ("single", None, 1)
    agree(run, on_two, FIRST)


def test_two_processes_become_four_of_smaller_batches(make, on_two, root):
    run = make().with_state(on_two, FIRST)
    said = run.launched(root, "cpu2", 4, "train.per_device_train_batch_size=1")
    assert "goes on with ddp on 4 processes" in said
    assert run.engine() == ("ddp", None, 4)
    agree(run, on_two, FIRST)


def test_ddp_becomes_zero3_becomes_zero2_on_one(make, on_two, root):
    """Finally, the rest of the run continues as one plain process."""
    sharded = make().with_state(on_two, FIRST)
    assert "goes on with deepspeed ZeRO-3 on 2 processes" in sharded.launched(root, "cpu2_zero3", 2)
    assert sharded.engine() == ("deepspeed", 3, 2)
    agree(sharded, on_two, FIRST)
    smaller = make().with_state(sharded, SECOND)
    assert "saved by deepspeed ZeRO-3 on 2 processes" in smaller.launched(root, "cpu2_zero2", 1)
    assert smaller.engine() == ("deepspeed", 2, 1)
    agree(smaller, on_two, SECOND)
    plain = make().with_state(smaller, SECOND).here()
    agree(plain, on_two, SECOND)


PPO_KEYS = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "eval/scores", "grad_norm")


def test_rl_goes_on_with_other_processes_and_back(micro_recipe, tmp_path, root):
    """Saved on one process after two iterations, sharded on two after four, finished on one."""
    published = micro_recipe.parent / "runs" / "micro"
    text = micro_recipe.read_text().replace(str(micro_recipe.parent / "runs"), "{root}")
    text = text.replace("iterations: 4", "iterations: 8, save_total_limit: 9")
    text = text.replace("{", "{{").replace("}", "}}").replace("{{root}}", "{root}")
    runs = []
    for name in ("whole", "sharded", "back"):
        runs.append(Moved(tmp_path / name, text, "ppo"))
        for parent in ("tokenizer", "pretrain", "sft", "reward"):
            shutil.copytree(published / parent, runs[-1].stage.parent / parent)
    whole, sharded, back = runs
    whole.here()
    said = sharded.with_state(whole, 2).launched(root, "cpu2_zero2", 2)
    assert "saved by single on 1 process, goes on with deepspeed ZeRO-2 on 2 processes" in said
    assert "resumes at iteration 2 of 8" in said
    assert sharded.engine() == ("deepspeed", 2, 2)
    back.with_state(sharded, 4).here()
    for run in (sharded, back):
        for ours, theirs in zip(run.lines(), whole.lines(), strict=True):
            assert ours["step"] == theirs["step"]
            for key in PPO_KEYS:
                if key in theirs:
                    assert ours[key] == pytest.approx(theirs[key], abs=1e-4), (ours["step"], key)
