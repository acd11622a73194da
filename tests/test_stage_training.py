"""Tests of every training stage: golden curves, accumulation, a full disk, divergence, saving.

The golden numbers come from torch 2.13.0 on an x86 CPU with one thread. Another thread count or processor changes the
last bits, hence the relative tolerance of 1e-4. A change that should not affect training must not change them.
"""

import errno

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from handoff.errors import GateError
from handoff.stage import StageDir
from handoff.state import StateStore
from tests.stage_chain import chain, lines_of, run_stage, runs, stage_recipe
from training.engines import files
from training.gates import Bound, Gate, check_measured
from training.recipe import load_recipe
from training.run import run_section
from training.trainer import fit

pytestmark = pytest.mark.slow
STAGES = ("pretrain", "sft", "reward", "dpo")

# Loss of steps 1 to 20, and the held-out loss afterwards.
# fmt: off
GOLDEN = {
    "pretrain": (
        [5.91645, 5.46692, 5.0219, 4.63079, 4.28139, 3.96522, 3.76554, 3.57459, 3.41209, 3.32139,
         3.22636, 3.15924, 3.07384, 2.99979, 2.96349, 2.92988, 2.90706, 2.88463, 2.87478, 2.88662], 2.87311),
    "pretrain+train.optim=muon": (
        [5.91645, 5.52431, 5.1012, 4.66057, 4.28191, 3.94191, 3.71693, 3.51242, 3.34653, 3.24915,
         3.15937, 3.05937, 2.98029, 2.92281, 2.88412, 2.83939, 2.818, 2.79708, 2.79514, 2.80286], 2.79903),
    "sft": (
        [6.94634, 7.08929, 6.69776, 5.24111, 5.18868, 5.12769, 4.68463, 4.26254, 4.03441, 3.79845,
         3.61319, 3.21332, 3.36031, 3.1237, 3.22342, 3.1408, 3.11551, 3.07186, 3.15256, 2.98738], 3.02157),
    "sft+packing=true": (
        [6.31627, 7.35156, 5.75452, 5.04612, 4.78798, 4.2786, 4.07184, 3.71741, 3.51426, 3.25869,
         3.18108, 3.03803, 2.93013, 2.94732, 2.82369, 2.83343, 2.79921, 2.74779, 2.78692, 2.75467], 2.78738),
    "reward": (
        [0.771746, 0.69631, 0.691377, 0.669813, 0.683888, 0.674786, 0.65994, 0.645257, 0.637267, 0.566347,
         0.53626, 0.571627, 0.508258, 0.455544, 0.556512, 0.365042, 0.380499, 0.425422, 0.436681, 0.396423], 0.423986),
    "dpo": (
        [0.693147, 0.647325, 0.657047, 0.505007, 0.684945, 0.60178, 0.58853, 0.57285, 0.597178, 0.587889,
         0.485567, 0.621981, 0.614941, 0.593917, 0.622021, 0.581937, 0.553149, 0.593166, 0.649129, 0.578166], 0.57673),
}
# fmt: on


def close(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.allclose(tensor, b[name], **tolerance), name


@pytest.mark.parametrize(("name", "override"), [(key.split("+")[0], key.partition("+")[2]) for key in GOLDEN])
def test_golden_curve(name, override, tmp_path):
    losses, heldout = GOLDEN[f"{name}+{override}" if override else name]
    run = run_stage(name, tmp_path, *([override] if override else []))
    assert run.of("loss") == pytest.approx(losses, rel=1e-4)
    assert run.manifest.metrics["eval_loss"] == pytest.approx(heldout, rel=1e-4)
    assert heldout < run.of("eval_loss")[0]


@pytest.mark.parametrize("name", STAGES)
def test_the_split_into_micro_batches_changes_nothing(name, tmp_path):
    """8 x 1, 4 x 2 and 2 x 4 rows of unequal length, with a last step that wraps: equal losses, norms and weights."""
    runs = [
        run_stage(
            name,
            tmp_path / str(size),
            f"train.per_device_train_batch_size={size}",
            "train.max_steps=6",
            "train.adam_epsilon=1e-3",  # else noise in a last bit could flip Adam's first steps
        )
        for size in (8, 4, 2)
    ]
    for other in runs[1:]:
        assert other.of("loss") == pytest.approx(runs[0].of("loss"), abs=1e-5)
        assert other.of("grad_norm") == pytest.approx(runs[0].of("grad_norm"), rel=1e-3)
        close(runs[0].weights, other.weights, atol=1e-5)


@pytest.mark.parametrize("place", ["while its parts are written", "at the commit"])
def test_a_full_disk_costs_one_state_and_no_training(place, tmp_path, monkeypatch, caplog):
    """The second of the saves fails; the first stays until the third has replaced it."""
    seen = []
    if place == "at the commit":
        commit = StateStore.commit

        def full(self, step, *args, **kwargs):
            seen.append(sorted(p.name for p in self.directory.iterdir() if p.name.startswith("step-")))
            if step == 4:
                raise OSError(errno.ENOSPC, "No space left on device")
            return commit(self, step, *args, **kwargs)

        monkeypatch.setattr(StateStore, "commit", full)
    else:
        save = files.save_state

        def full(*args):
            seen.append(1)
            save(*args)
            if len(seen) == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(files, "save_state", full)
    keys = ("train.save_steps=2", "train.max_steps=7", "train.save_total_limit=1")
    run = run_stage("sft", tmp_path, *keys)
    assert seen and "no room to save the state of step 4" in caplog.text
    assert [p.name for p in (run.folder / "state").iterdir() if p.name.startswith("step-")] == ["step-7"]
    assert not list((run.folder / "state").glob(".tmp-step-*"))


def test_a_loss_that_is_not_finite_stops_the_stage_and_says_why(tmp_path):
    recipe = stage_recipe("sft", tmp_path, "train.learning_rate=1e30", "train.max_grad_norm=0", "train.save_steps=10")
    with pytest.raises(GateError, match=r"sft: (loss|grad_norm) is (nan|inf) at step \d+.*learning_rate too high"):
        run_section(recipe, "sft")
    folder = recipe.run_dir / "sft"
    assert not (folder / "stage.json").exists() and not (folder / "model").exists()
    assert not list((folder / "state").glob("step-*"))


@pytest.mark.parametrize("name", STAGES)
def test_the_published_model_equals_the_trained_one(name, tmp_path, monkeypatch):
    """The published model, loaded by transformers alone, gives the logits of the model in memory."""
    kept = {}
    module = "reward_model" if name == "reward" else name

    def remember(run, trainer, *others, **named):
        fit(run, trainer, *others, **named)
        kept["model"] = trainer.model.eval()

    monkeypatch.setattr(f"stages.{module}.train.fit", remember)
    run = run_stage(name, tmp_path, "train.max_steps=3")
    loader = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
    loaded = loader.from_pretrained(run.folder / "model")
    assert loaded.dtype == torch.float32
    ids = torch.arange(8, 32).reshape(2, 12)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, kept["model"](input_ids=ids).logits)


def test_evaluation_during_training_is_logged_and_changes_nothing(tmp_path):
    plain = run_stage("sft", tmp_path / "plain", "train.max_steps=6")
    watched = run_stage("sft", tmp_path / "watched", "train.max_steps=6", "train.eval_steps=2")
    assert [line["step"] for line in watched.lines if "eval_loss" in line] == [0, 2, 4, 6]
    assert [line["step"] for line in plain.lines if "eval_loss" in line] == [0, 6]
    assert all(torch.equal(plain.weights[key], watched.weights[key]) for key in plain.weights)
    assert lines_of(plain.folder)[-1] == lines_of(watched.folder)[-1]


@pytest.mark.parametrize("name", ["tokenizer", *STAGES])
def test_every_metric_that_is_published_can_be_gated(name, tmp_path):
    config = load_recipe(chain()).sections[name].config
    made = StageDir(runs() / "tiny" / name).manifest()  # as far as the chain goes
    metrics = made.metrics if made else run_stage(name, tmp_path, "train.max_steps=1").manifest.metrics
    found = [key for key in metrics if not key.startswith("time/")]
    assert found
    check_measured(Gate(metrics={key: Bound(min=0) for key in found}), config.published, held_out=True)
