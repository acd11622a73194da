"""The DPO stage: the reference, the loss at the start, held-out metrics, alarms."""

import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.accounting import Accounting
from data.records import Message, Origin, Preference
from data.rows import Pairs
from handoff.parent import open_parent
from stages.dpo import train
from stages.dpo.loss import alarms, pair_metrics
from stages.dpo.train import PairRows
from tests.launching import grouped
from tests.row_sets import encode
from tests.stage_chain import chain, result, run_stage, runs, stage_recipe
from training import engines
from training.config import ModelArguments
from training.engines.files import MODEL
from training.model import Model, load_encoder
from training.recipe import RecipeError, load_recipe


def parent():
    chain()
    return open_parent(str(runs() / "tiny" / "sft"), runs(), {"causal_lm"})


@pytest.mark.slow
def test_policy_equals_reference_at_the_start(tmp_path):
    run = run_stage("dpo", tmp_path, "train.max_steps=12")
    assert run.of("loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    first, last = run.lines[0], run.lines[-2]
    assert first["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["eval_loss"] < first["eval_loss"] and last["eval_rewards/margins"] > 0
    names = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen"}
    assert names <= run.lines[1].keys()


@pytest.mark.slow
def test_the_references_log_probabilities_are_sums_over_the_answers_tokens(tmp_path):
    """Compared with a loop over single answers with the parent, without padding or other rows."""
    heldout = []

    class Kept(PairRows):
        def __init__(self, rows):
            super().__init__(rows)
            heldout[:] = [self]  # the training pairs come first

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stages.dpo.train.PairRows", Kept)
        run_stage("dpo", tmp_path, "train.max_steps=1")
    (pairs,) = heldout
    engine = engines.current()
    model = Model.load(engine, parent(), "policy", load_encoder(parent()), ModelArguments()).module.eval()
    assert len(pairs) == 40
    lengths = [len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) for row in pairs]
    assert lengths == sorted(lengths, reverse=True) == list(pairs.lengths)
    for row in pairs[::8]:
        for key in ("chosen", "rejected"):
            ids = torch.tensor([row["prompt_ids"] + row[f"{key}_ids"]])
            with torch.no_grad():
                logp = torch.log_softmax(model(ids).logits[0, :-1], -1).gather(-1, ids[0, 1:, None]).squeeze(-1)
            answer = logp[len(row["prompt_ids"]) - 1 :]
            assert len(answer) == len(row[f"{key}_ids"])
            assert row[f"ref_{key}_logps"] == pytest.approx(answer.sum().item(), abs=1e-4)


@pytest.mark.slow
def test_the_reference_is_computed_once_and_found_again(tmp_path, monkeypatch):
    """A second start reads the first one's file; an altered file or another reference is computed again."""
    calls = []
    compute = train.answer_logps

    def counted(model, batch):
        calls.append("ref_chosen_logps" not in batch)  # the reference's own pass reads pairs that do not have them
        return compute(model, batch)

    class Stop(Exception):
        pass

    def stop(*args):
        raise Stop

    monkeypatch.setattr("stages.dpo.train.answer_logps", counted)
    keys = ("train.max_steps=4", "train.save_steps=2")
    with monkeypatch.context() as patch:
        patch.setattr("stages.dpo.train.Trainer.training_step", stop)
        with pytest.raises(Stop):
            run_stage("dpo", tmp_path, *keys)
    once = sum(calls)
    assert once > 0
    run = run_stage("dpo", tmp_path, *keys)
    assert sum(calls) == once
    assert run.of("loss")[0] == pytest.approx(math.log(2), abs=1e-6)

    # A run that goes on from a state computes them with the parent's weights, not with those of the state.
    (run.folder / "stage.json").unlink()
    shutil.rmtree(run.folder / "state" / "step-4")
    kept = run.folder / "state" / "pairs" / "reference.safetensors"
    content = bytearray(kept.read_bytes())
    content[-5] ^= 16
    kept.write_bytes(content)
    again = run_stage("dpo", tmp_path, *keys)
    assert again.lines == run.lines
    assert all(torch.equal(value, run.weights[name]) for name, value in again.weights.items())
    assert sum(calls) == 2 * once
    run_stage("dpo", tmp_path, *keys, f"parent={runs() / 'tiny' / 'pretrain'}")
    assert sum(calls) == 3 * once


def logps(**arrays):
    return {key: np.array(value, dtype=float) for key, value in arrays.items()}


PAIRS = {
    "chosen": [-1, -4],
    "rejected": [-5, -2],
    "ref_chosen": [-2, -3],
    "ref_rejected": [-4, -4],
    "chosen_tokens": [2, 3],
    "rejected_tokens": [4, 1],
}


def test_held_out_metrics_by_hand():
    found = pair_metrics(logps(**PAIRS), 0.5)
    margins = np.array([0.5 * (1 + 1), 0.5 * (-1 - 2)])
    assert found["rewards/margins"] == pytest.approx(margins.mean())
    assert found["loss"] == pytest.approx(np.log1p(np.exp(-margins)).mean())
    assert found["rewards/accuracies"] == 0.5
    assert found["chosen_logratio_per_token"] == pytest.approx((1 - 1) / 5)


def test_the_held_out_loss_of_every_kind_by_hand():
    """The margins are 0.5 · (1 + 1) and 0.5 · (−1 − 2); the ratios per token differ by 1/2 + 1/4 and −1/3 − 2."""
    good, bad = 1.0, -1.5

    def sigmoid(margin):
        return math.log1p(math.exp(-margin))

    smoothed = [(0.8 * sigmoid(m) - 0.2 * sigmoid(-m)) / 0.6 for m in (good, bad)]
    expected = {
        ("sigmoid", 0.0, 0.0): (sigmoid(good) + sigmoid(bad)) / 2,
        ("sigmoid", 0.2, 0.0): sum(smoothed) / 2,
        ("hinge", 0.0, 0.0): (0 + 2.5) / 2,
        ("ipo", 0.0, 0.0): ((0.75 - 1) ** 2 + (-7 / 3 - 1) ** 2) / 2,
        ("hinge", 0.0, 0.3): (0 + 2.5) / 2 + 0.3 * (1 + 4) / (2 + 3),
    }
    for keys, loss in expected.items():
        assert pair_metrics(logps(**PAIRS), 0.5, *keys)["loss"] == pytest.approx(loss)


def test_alarms_name_what_went_wrong():
    good = {"eval_chosen_logratio_per_token": -0.1, "eval_stop_rate": 1.0, "eval_answer_tokens": 10.0}
    assert alarms(good, good) == []
    assert "lost 0.90 nats a token" in alarms(good, good | {"eval_chosen_logratio_per_token": -0.9})[0]
    assert "grew from 10 to 25 tokens" in alarms(good, good | {"eval_answer_tokens": 25.0})[0]
    assert "fewer answers stop (1.00 before, 0.80 now)" in alarms(good, good | {"eval_stop_rate": 0.8})[0]


@pytest.mark.slow
def test_the_alarms_of_a_resumed_run_compare_the_same_measurements(tmp_path, monkeypatch):
    compared = []
    monkeypatch.setattr("stages.dpo.train.alarms", lambda before, after: compared.append((before, after)) or [])
    keys = ("train.save_steps=4", "train.eval_steps=2", "train.max_steps=6")
    run = run_stage("dpo", tmp_path, *keys)
    (run.folder / "stage.json").unlink()
    shutil.rmtree(run.folder / "state" / "step-6")
    run_stage("dpo", tmp_path, *keys)
    (before, after), resumed = compared
    assert resumed == (before, after)
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6) and after["eval_loss"] < math.log(2)


@pytest.mark.slow
def test_a_collapse_is_warned_about_on_the_terminal(tmp_path, capsys):
    run_stage("dpo", tmp_path, "train.learning_rate=3e-2", "beta=0.01", "train.max_steps=15")
    assert "warning: chosen answers lost" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("override", "at_start"),
    [("loss_type=ipo", 25.0), ("loss_type=hinge", 1.0), ("label_smoothing=0.1", math.log(2)), ("sft_weight=0.5", None)],
)
def test_other_losses_train_and_the_held_out_loss_is_the_trained_one(override, at_start, tmp_path):
    """At the start, policy and reference are equal; β is 0.1, so IPO's loss is (0 − 1 / 0.2)²."""
    run = run_stage("dpo", tmp_path, override, "train.max_steps=12")
    assert run.lines[-2]["eval_rewards/margins"] > 0
    losses, heldout = run.of("loss"), run.of("eval_loss")
    if at_start is not None:
        assert heldout[0] == pytest.approx(at_start, abs=1e-5) == pytest.approx(losses[0], abs=1e-5)
    else:
        assert heldout[0] == pytest.approx(losses[0], rel=0.2) and heldout[0] > 1.3
        assert run.lines[-2]["eval_logps/chosen"] > run.lines[0]["eval_logps/chosen"]
    assert heldout[-1] == pytest.approx(np.mean(losses[-3:]), rel=0.3)


def test_smoothing_is_for_the_sigmoid_loss():
    with pytest.raises(RecipeError, match="label_smoothing is for loss_type sigmoid"):
        load_recipe(chain(), ["dpo.loss_type=ipo", "dpo.label_smoothing=0.1"])


def test_truncation_keeps_the_answer_and_its_stop():
    """P16: what is cut is the beginning of the prompt; both answers stay whole."""
    encoder = load_encoder(parent())
    record = Preference((Message("user", "repeat: " + "cat " * 40),), "cat", "dog", Origin("here", 1))
    accounting = Accounting()
    accounting.read()
    row = encode(Pairs(24, "keep_end"), [record], encoder, accounting)[0]
    assert row["chosen_ids"] == encoder.answer("cat") and row["chosen_ids"][-1] == encoder.stop_ids[0]
    assert len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"])) == 24


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return run_stage("dpo", tmp_path_factory.mktemp("alone"), *LAUNCHED)


# Evaluations and saved states right after them; no answers are generated between, so the model stays as it was read.
LAUNCHED = (
    "train.max_steps=2", "train.eval_steps=1", "train.save_steps=1", "train.adam_epsilon=1.0e-3", "eval_answers=0",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["cpu2_zero2", "cpu2_zero3", "cpu2_fsdp2"])
def test_a_sharded_run_trains_as_one_process_does(launch, alone, root, tmp_path):
    """Before the first step the policy equals the reference, so the loss is ln 2."""
    recipe = stage_recipe("dpo", tmp_path, *LAUNCHED)
    parent = f"parent={runs() / 'tiny' / 'sft'}"
    done = grouped(root, launch, "stages.dpo", chain(), f"output_root={tmp_path}", parent, *LAUNCHED)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = result(recipe, "dpo")
    assert found.lines[0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert found.lines[0]["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert [line["step"] for line in found.lines] == [line["step"] for line in alone.lines]
    for key in ("loss", "grad_norm", "eval_loss", "eval_rewards/margins"):
        assert found.of(key) == pytest.approx(alone.of(key), rel=1e-4, abs=1e-5), key
    for key, value in found.weights.items():
        torch.testing.assert_close(value, alone.weights[key], rtol=1e-4, atol=1e-5)
    for step in (1, 2):
        mine, theirs = (load_file(folder / "state" / f"step-{step}" / MODEL) for folder in (found.folder, alone.folder))
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-4, atol=1e-5)
