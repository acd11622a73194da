"""A loss or a gradient that is not finite: the step is skipped, counted and named; too many in a row stop the stage.

The file is also a program for `accelerate launch`: SFT whose third step is broken, on the last process only.
"""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from data.sampling import shuffled
from handoff.errors import GateError
from handoff.state import StateStore
from tests.launching import grouped
from tests.stage_chain import lines_of, result, run_stage, stage_recipe
from training import engines
from training.engines import finite
from training.faults import Faults
from training.recipe import load_recipe
from training.run import main, run_section
from training.signals import Stopped
from training.trainer import StageTrainer, StepOrder

slow = pytest.mark.slow
KEYS = ("train.max_steps=8", "train.logging_steps=2", "train.save_steps=9", "train.per_device_train_batch_size=4")


def broken(monkeypatch: pytest.MonkeyPatch, *steps: int, infinite: bool = False) -> None:
    """In the last micro-batch of these optimizer steps, counted from 1, the model gives only NaN.

    `infinite`: instead, a constant makes the loss infinite but leaves its gradient finite.
    """
    original, carry = StageTrainer.compute_loss, finite.carry_nonfinite

    def compute_loss(self, *args, **kwargs):
        here = self.run.engine.data_rank == self.run.engine.data_world - 1
        if not (here and self.accelerator.sync_gradients and self.state.global_step + 1 in steps):
            return original(self, *args, **kwargs)
        if infinite:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(finite, "carry_nonfinite", lambda loss: carry(loss + torch.inf))
                return original(self, *args, **kwargs)
        hook = self.model.get_input_embeddings().register_forward_hook(lambda *call: call[-1] * torch.nan)
        try:
            return original(self, *args, **kwargs)
        finally:
            hook.remove()

    monkeypatch.setattr(StageTrainer, "compute_loss", compute_loss)


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, signum: int) -> None:
    """Sends this process a signal in an optimizer step, counted from 1."""
    original = StageTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            os.kill(os.getpid(), signum)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "training_step", training_step)


# ---- the parts


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_has_no_finite_gradient(value):
    weight = torch.tensor(2.0, requires_grad=True)
    finite.carry_nonfinite(weight * 3 + value).backward()
    assert weight.grad is not None and not torch.isfinite(weight.grad)


def test_a_finite_loss_keeps_its_gradient():
    weight = torch.tensor(2.0, requires_grad=True)
    loss = finite.carry_nonfinite(weight * 3)
    loss.backward()
    assert (loss.item(), weight.grad.item()) == (6.0, 3.0)


def test_a_step_on_a_broken_gradient_changes_neither_weights_nor_moments():
    weight = torch.nn.Parameter(torch.ones(3))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.AdamW([weight], lr=0.1, weight_decay=0.5)

    def step(factor: float) -> float:
        (weight.sum() * factor).backward()
        return engines.current().step(model, optimizer, 1.0)

    step(2.0)
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    for factor in (float("nan"), float("inf")):
        assert not step(factor) < float("inf")
        after = [weight.detach(), *optimizer.state[weight].values()]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        assert weight.grad is None
    step(2.0)
    assert not torch.equal(weight.detach(), before[0])


@pytest.mark.parametrize("lengths", [None, list(range(1, 12))])
def test_the_rows_of_a_step_are_those_that_the_order_gives_it(lengths):
    order = StepOrder(11, 4, 5, lengths)
    for epoch in (0, 1, 3):
        order.set_epoch(epoch)
        rows = list(order)
        for step in range(order.steps):
            assert order.rows_of(epoch * order.steps + step) == sorted(rows[4 * step : 4 * step + 4])


class Listener:
    """The part of a Run that `Faults` uses."""

    class section:
        name = "sft"

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict]] = []
        self.said: list[str] = []
        self.console = self

    def log(self, step: int, line: dict) -> None:
        self.lines.append((step, line))

    def print(self, text: str, **_: object) -> None:
        self.said.append(text)


def test_a_skipped_step_is_printed_and_logged():
    run, faults = Listener(), Faults()
    assert faults.metrics() == {}
    found = {"loss": 1.5, "grad_norm": float("inf")}
    faults.skip(run, 7, 3, found, {"epoch": 1, "rows": list(range(20))})
    line = {"skipped_steps": 1, "skipped/loss": 1.5, "skipped/grad_norm": "inf", "skipped/epoch": 1}
    assert run.lines == [(7, line | {"skipped/rows": list(range(20))})]
    assert run.said == [
        "  skipped: grad_norm is inf at step 7 (epoch 1, rows 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 ...)"
    ]
    assert faults.metrics() == {"skipped_steps": 1}


def test_only_consecutive_skips_count_towards_the_limit():
    run, faults = Listener(), Faults()
    for _ in range(3):
        faults.skip(run, 1, 2, {"loss": float("nan")}, {})
        faults.skip(run, 2, 2, {"loss": float("nan")}, {})
        faults.in_a_row = 0
    assert faults.total == 6
    faults.skip(run, 1, 2, {"loss": float("nan")}, {})
    faults.skip(run, 2, 2, {"loss": float("nan")}, {})
    with pytest.raises(
        GateError, match=r"^sft: loss is nan at step 9, and 3 steps in a row were skipped .*max_skipped"
    ):
        faults.skip(run, 9, 2, {"loss": float("nan")}, {})


# ---- the Trainer-based stages


@slow
@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo"])
def test_a_broken_batch_is_skipped_and_named_and_the_stage_ends(name, tmp_path, monkeypatch):
    whole = run_stage(name, tmp_path / "whole", *KEYS)
    broken(monkeypatch, 3)
    run = run_stage(name, tmp_path / "broken", *KEYS)
    (skipped,) = [line for line in run.lines if "skipped/rows" in line]
    assert skipped["step"] == 3 and skipped["skipped_steps"] == 1
    assert skipped["skipped/loss"] == "nan" and skipped["skipped/grad_norm"] == "nan"
    assert len(skipped["skipped/rows"]) == 8
    assert [(line["step"], line.get("skipped_steps")) for line in run.lines if "loss" in line] == [
        (2, None),
        (4, 1),
        (6, 1),
        (8, 1),
    ]
    numbers = [value for line in run.lines for value in line.values() if isinstance(value, float)]
    assert all(torch.isfinite(torch.tensor(numbers)))
    assert all(torch.isfinite(value).all() for value in run.weights.values())
    # Earlier steps are unchanged, and the learning rate still follows the step number.
    assert run.of("loss")[0] == whole.of("loss")[0]
    assert run.of("learning_rate") == whole.of("learning_rate")
    assert any(not torch.equal(run.weights[key], whole.weights[key]) for key in run.weights)


@slow
def test_a_loss_that_is_infinite_by_a_constant_is_skipped_as_well(tmp_path, monkeypatch):
    """Its gradient is finite, but the weights end as after a batch of NaN."""
    with monkeypatch.context() as patch:
        broken(patch, 3)
        nan = run_stage("sft", tmp_path / "nan", *KEYS)
    broken(monkeypatch, 3, infinite=True)
    inf = run_stage("sft", tmp_path / "inf", *KEYS)
    assert all(torch.equal(nan.weights[key], inf.weights[key]) for key in nan.weights)
    assert [line["skipped/loss"] for line in inf.lines if "skipped/rows" in line] == ["inf"]


@slow
def test_the_state_after_a_skipped_step_is_the_one_before_it(tmp_path, monkeypatch):
    """A requested save happens; a scheduled one waits for the next step that is not skipped."""
    keys = ("train.save_steps=2", "train.max_steps=6", "train.save_total_limit=9")
    with monkeypatch.context() as patch:
        broken(patch, 3)
        at_step(patch, 3, signal.SIGUSR1)
        run = run_stage("sft", tmp_path / "asked", *keys)
    store = StateStore(run.folder / "state")
    before, after = store.at(2), store.at(3)
    files = sorted(path.name for path in before.path.glob("*.safetensors"))
    assert files
    for file in files:
        one, other = load_file(before.path / file), load_file(after.path / file)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    broken(monkeypatch, 2, 3)
    run = run_stage("sft", tmp_path / "due", *keys)
    assert sorted(path.name for path in (run.folder / "state").glob("step-*")) == ["step-4", "step-6"]


@slow
def test_what_was_skipped_before_a_resume_counts_after_it(tmp_path, monkeypatch):
    """Stopped within a series of broken batches, which then ends within the limit or continues beyond it."""

    def stopped_at_4(recipe, steps) -> None:
        with monkeypatch.context() as patch:
            broken(patch, *steps)
            at_step(patch, 4, signal.SIGTERM)
            with pytest.raises(Stopped):
                run_section(recipe, "sft")

    with monkeypatch.context() as patch:
        broken(patch, 3, 4)
        whole = run_stage("sft", tmp_path / "whole", *KEYS)
    recipe = stage_recipe("sft", tmp_path / "stopped", *KEYS)
    stopped_at_4(recipe, (3, 4))
    run_section(recipe, "sft")
    again = result(recipe, "sft")
    assert again.lines == whole.lines and again.lines[-1]["step"] == 8
    assert all(torch.equal(whole.weights[key], again.weights[key]) for key in whole.weights)

    steps = (3, 4, 5, 6)
    recipe = stage_recipe("sft", tmp_path / "too many", *KEYS)
    stopped_at_4(recipe, steps)
    broken(monkeypatch, *steps)
    with pytest.raises(GateError, match="sft: loss is nan at step 6, and 4 steps in a row were skipped"):
        run_section(recipe, "sft")


@slow
def test_too_many_in_a_row_end_with_code_3_and_the_last_state_goes_on(tmp_path, monkeypatch, capsys):
    recipe = stage_recipe("sft", tmp_path, *KEYS, "train.save_steps=2", "train.max_skipped_steps=1")
    with monkeypatch.context() as patch:
        broken(patch, 4, 5)
        with pytest.raises(SystemExit) as ended:
            main("sft", [str(recipe.path), *recipe.overrides])
    assert ended.value.code == 3
    assert "sft: loss is nan at step 5, and 2 steps in a row were skipped" in capsys.readouterr().err
    folder = recipe.run_dir / "sft"
    assert not (folder / "stage.json").exists()
    assert [path.name for path in (folder / "state").glob("step-*")] == ["step-2"]
    run_section(recipe, "sft")
    assert result(recipe, "sft").lines == run_stage("sft", tmp_path / "whole", *KEYS).lines


@slow
@pytest.mark.parametrize("engine", ["cpu2", "cpu2_zero3"])
def test_what_is_broken_on_one_process_is_skipped_on_all(engine, micro_recipe, root, tmp_path):
    """DeepSpeed skips steps by itself; the course still equals that of one process."""
    runs = load_recipe(micro_recipe).run_dir
    keys = ["max_steps=5", "logging_steps=1", "save_steps=9", "per_device_train_batch_size=4", "adam_epsilon=1e-3"]
    keys = [f"sft.parent={runs / 'pretrain'}", *(f"sft.train.{key}" for key in keys)]
    with pytest.MonkeyPatch.context() as patch:
        broken(patch, 3)
        alone = load_recipe(micro_recipe, [*keys, f"output_root={tmp_path / 'alone'}"])
        run_section(alone, "sft")
    done = grouped(root, engine, "tests.test_nonfinite", micro_recipe, *keys, f"output_root={tmp_path}")
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.count("skipped: loss is nan at step 3 (rows ") == 1
    for mine, theirs in zip(lines_of(alone.run_dir / "sft"), lines_of(tmp_path / "micro" / "sft"), strict=True):
        assert mine.get("skipped/rows") == theirs.get("skipped/rows")
        for key in {"step", "loss", "grad_norm", "learning_rate", "skipped_steps"} & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key


# ---- PPO


def broken_minibatches(monkeypatch: pytest.MonkeyPatch, *calls: int) -> None:
    """The gradient of these micro-batches, counted over the run from 0, is NaN."""
    original, count = finite.carry_nonfinite, iter(range(10**6))
    monkeypatch.setattr(finite, "carry_nonfinite", lambda x: original(x * torch.nan if next(count) in calls else x))


def ppo(micro_recipe: Path, *overrides: str, fresh: bool = True) -> tuple[Path, list[dict]]:
    recipe = load_recipe(micro_recipe, [f"ppo.{override}" for override in overrides])
    if fresh:
        shutil.rmtree(recipe.run_dir / "ppo", ignore_errors=True)
    run_section(recipe, "ppo")
    return recipe.run_dir / "ppo", lines_of(recipe.run_dir / "ppo")


@slow
def test_ppo_skips_a_minibatch_and_names_its_answers(micro_recipe, monkeypatch):
    # An iteration has 2 epochs of 2 minibatches of 2 micro-batches: this one is in the second, epoch 1, minibatch 0.
    broken_minibatches(monkeypatch, 8 + 5)
    folder, lines = ppo(micro_recipe)
    (skipped,) = [line for line in lines if "skipped/rows" in line]
    assert {key: skipped[key] for key in ("step", "skipped_steps", "skipped/epoch", "skipped/minibatch")} == {
        "step": 2,
        "skipped_steps": 1,
        "skipped/epoch": 1,
        "skipped/minibatch": 0,
    }
    assert skipped["skipped/rows"] == sorted(shuffled(16, 1, "minibatches", 1, 1)[:8].tolist())
    iterations = [line for line in lines if "episode" in line]
    assert [line.get("skipped_steps") for line in iterations] == [None, 1, 1, 1]
    assert all(torch.isfinite(torch.tensor(line["grad_norm"])) for line in iterations)
    weights = load_file(folder / "model" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())


@slow
def test_ppo_goes_on_after_an_iteration_without_any_step(micro_recipe, monkeypatch):
    """Its training averages are empty, and no guard takes that for a collapse."""
    broken_minibatches(monkeypatch, 4, 5)
    _, lines = ppo(micro_recipe, "train.num_ppo_epochs=1", "train.num_mini_batches=1")
    one, two, three, four = (line for line in lines if "episode" in line)
    assert "policy/entropy_avg" in one and "grad_norm" in three and four["skipped_steps"] == 1
    assert not {"policy/entropy_avg", "grad_norm", "val/first_ratio_deviation"} & two.keys()


@slow
def test_ppo_stops_after_too_many_in_a_row_and_its_state_goes_on(micro_recipe, monkeypatch):
    _, whole = ppo(micro_recipe)
    with monkeypatch.context() as patch:
        broken_minibatches(patch, *range(2 * 8 + 1, 4 * 8))
        with pytest.raises(GateError, match="ppo: grad_norm is nan at step 3, and 3 steps in a row were skipped"):
            ppo(micro_recipe, "train.max_skipped_steps=2")
    _, lines = ppo(micro_recipe, fresh=False)
    assert lines == whole


if __name__ == "__main__":
    engines.start()
    broken(pytest.MonkeyPatch(), 3)
    main("sft", sys.argv[1:])
