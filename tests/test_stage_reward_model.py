"""The reward model stage: reading and measuring scores, the report card, and the statistics for RL."""

import json
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch

from data.config import FileSource
from data.records import Message, Preference
from data.rows import Pairs
from handoff.errors import GateError, UserError
from handoff.files import read_json
from handoff.parent import open_parent
from handoff.refused import failed_dir
from handoff.stage import StageDir
from reward.learned import score
from stages.reward_model.schema import Card
from stages.reward_model.train import Collator, Trainer, check_scores, row_scores
from tests.row_sets import encode, load
from tests.stage_chain import THINGS, chain, run_stage, runs, stage_recipe
from training import engines
from training.config import ModelArguments
from training.model import Model, load_encoder
from training.recipe import RecipeError
from training.run import main, run_section


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return run_stage("reward", tmp_path_factory.mktemp("reward"), "train.max_steps=40")


@pytest.fixture(scope="module")
def model(published):
    parent = open_parent(str(published.folder), published.folder.parent, {"reward_model"})
    loaded = Model.load(engines.current(), parent, "reward", load_encoder(parent), ModelArguments())
    return loaded.module.eval()


@pytest.fixture(scope="module")
def encoder():
    chain()
    return load_encoder(open_parent(str(runs() / "tiny" / "sft"), runs(), {"causal_lm"}))


def card_of(folder) -> Card:
    return Card.model_validate(read_json(folder / "card.json"))


@pytest.mark.slow
def test_it_learns_and_its_card_and_statistics_are_in_the_manifest(published):
    metrics, extra = published.manifest.metrics, published.manifest.extra
    assert metrics["eval_accuracy"] >= 0.8
    assert metrics["eval_accuracy_low"] < metrics["eval_accuracy"] < metrics["eval_accuracy_high"]
    assert metrics["eval_length_alone"] == pytest.approx(0.7875)  # in the data, the longer answer is mostly wrong
    assert -1 <= metrics["eval_score_length_correlation"] <= 1
    assert {f"eval_beats_{probe}" for probe in ("empty", "repeated", "truncated", "off-topic")} <= metrics.keys()
    assert extra["reward_std"] > 0.1 and abs(extra["reward_mean"]) < 5
    assert published.manifest.kind == "reward_model"
    assert "card.json" in published.manifest.files
    card = card_of(published.folder)
    assert card.accuracy.value == metrics["eval_accuracy"] and card.accuracy.n == 40
    assert card.ece == metrics["eval_ece"] and card.loss == pytest.approx(metrics["eval_loss"])
    assert sum(bucket.accuracy.n for bucket in card.by_length if bucket.accuracy) == 40
    assert [probe.name for probe in card.probes] == ["empty", "repeated", "truncated", "off-topic"]
    assert card.gate == [] and card.ensemble is None


@pytest.mark.slow
def test_scores_depend_on_the_row_alone(model, encoder):
    """Batches of 1, 3 and 8, more padding, either side: the reader of RL and the forward pass of training agree."""
    generator = np.random.default_rng(0)
    rows = [[*generator.integers(16, encoder.vocab_size, n).tolist(), encoder.stop_ids[0]] for n in range(3, 27, 3)]
    single = torch.cat([score(model, [row], encoder.pad_id) for row in rows])
    for size in (3, 8):
        assert torch.allclose(score(model, rows, encoder.pad_id, batch_size=size), single, atol=1e-5)
    with torch.no_grad():
        for extra in (0, 17):
            batch = Collator(encoder.pad_id)([*rows, [7] * (26 + extra)])
            assert torch.allclose(row_scores(model, batch)["score"][:-1], single, atol=1e-5)


@pytest.mark.slow
def test_statistics_are_those_of_the_scores_of_held_out_answers(published, model, encoder):
    source = FileSource(source="file", path="held_pairs.jsonl")
    held = load([source], Preference, runs().parent, 3)
    pairs = encode(Pairs(64, "drop"), held.records, encoder, held.accounting)
    answers = [row["prompt_ids"] + row[key] for row in pairs for key in ("chosen_ids", "rejected_ids")]
    scores = score(model, answers, encoder.pad_id).double()
    assert published.manifest.extra["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert published.manifest.extra["reward_std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


@pytest.mark.slow
def test_without_held_out_pairs_the_statistics_are_of_the_training(tmp_path):
    run = run_stage("reward", tmp_path, "train.max_steps=2", "eval_data=[]")
    assert run.manifest.extra["reward_std"] > 0
    assert not any(key.startswith("eval_") for key in run.manifest.metrics)
    assert not (run.folder / "card.json").exists()


# ---- the gate


def length_biased(split, count, longer):
    """Pairs in which the chosen answer is the longer one in `longer` of ten cases, without any other difference."""
    rows = []
    for i in range(count):
        words = [THINGS[(i * k + i // 6) % 6] for k in (1, 2, 3, 5, 7, 11, 13)]
        short, long = " ".join(words[: 1 + i % 2]), " ".join(words[: 5 + i % 3])
        better, worse = (long, short) if i % 10 < longer else (short, long)
        rows.append({"prompt": f"say {split} {i}", "chosen": better, "rejected": worse})
    path = runs().parent / f"{split}_biased.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"[{{source: file, path: {path.name}}}]"


@pytest.fixture
def biased():
    """Overrides for `run_stage` with such data."""
    chain()
    return [f"data={length_biased('train', 160, 10)}", f"eval_data={length_biased('test', 60, 8)}"]


@pytest.mark.slow
def test_a_length_biased_model_is_flagged_and_stopped_by_the_gate(tmp_path, biased, capsys):
    """Its accuracy looks good, but the card flags it, and with the gate the pipeline exits with 3."""
    gate = ["gate.min_accuracy=0.7", "gate.min_over_length=0.05", "gate.max_length_correlation=0.5"]
    recipe = stage_recipe("reward", tmp_path, *biased, *gate)
    with pytest.raises(SystemExit) as exited:
        main("reward_model", [str(recipe.path), *recipe.overrides, "--section", "reward"])
    assert exited.value.code == 3
    said = capsys.readouterr().err
    assert said.startswith("reward: the result is below its gate and is not published")
    assert "min_over_length is 0.05" in said and "max_length_correlation is 0.5" in said
    assert "min_accuracy is" not in said, "it is right often enough"
    assert "Traceback" not in said

    folder = recipe.run_dir / "reward"
    card = card_of(failed_dir(recipe.run_dir, "reward"))
    assert card.accuracy.value >= 0.7 and card.longer_wins.value == 0.8
    assert any(finding.startswith("follows length") for finding in card.findings)
    assert len(card.gate) == 2
    assert StageDir(folder).manifest() is None and not (folder / "model").exists()

    # Without the gate it is published, with the same findings.
    free = run_stage("reward", tmp_path / "free", *biased)
    assert card_of(free.folder) == card.model_copy(update={"gate": []})


@pytest.mark.slow
def test_another_gate_costs_no_training(tmp_path, monkeypatch):
    """The gate refuses, accepts and refuses again: each time it decides from the last saved state, without training.
    What it accepted stays published."""
    steps = []
    original = Trainer.training_step
    monkeypatch.setattr(
        Trainer, "training_step", lambda self, *args, **keys: steps.append(1) or original(self, *args, **keys)
    )
    cards = []
    for gate, passes, trained in ((1.0, False, 20), (0.0, True, 0), (1.0, False, 0)):
        recipe = stage_recipe("reward", tmp_path, f"gate.min_accuracy={gate}", "train.save_steps=10")
        stage = StageDir(recipe.run_dir / "reward")
        steps.clear()
        if passes:
            run_section(recipe, "reward")
        else:
            with pytest.raises(GateError, match=r"it ranks [\d.]+ % of 40 held-out pairs right; min_accuracy is 100 %"):
                run_section(recipe, "reward")
        assert (stage.manifest() is not None) == (trained == 0)
        assert len(steps) == trained
        kept = failed_dir(recipe.run_dir, "reward")
        assert kept.exists() != passes
        cards.append(card_of(stage.path if passes else kept).model_copy(update={"gate": []}))
    assert cards[0] == cards[1] == cards[2]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("gate.min_acuracy=0.5",), "reward.gate.min_acuracy: unknown key, did you mean min_accuracy?"),
        (("gate.min_accuracy=70",), "70 is out of range, it must be at most 1"),
        (("gate.max_ece=0.1", "eval_data=[]"), "`gate` is measured on held-out pairs: name them under eval_data"),
        (("ensemble_with=[sft]", "eval_data=[]"), "`ensemble_with` is measured on held-out pairs"),
        (("ensemble_with=[sft, sft]",), "`ensemble_with` names one model twice"),
        (("ensemble_with=[reward]",), "a stage cannot start from itself"),
    ],
)
def test_an_impossible_gate_is_refused(keys, said, tmp_path):
    with pytest.raises(RecipeError) as raised:
        stage_recipe("reward", tmp_path, *keys)
    assert said in str(raised.value)


# ---- ensembles


@pytest.mark.slow
def test_members_with_different_seeds_are_compared_on_the_same_pairs(published, tmp_path):
    other = f"ensemble_with=[{published.folder}]"
    second = run_stage("reward", tmp_path, "train.max_steps=40", "seed=11", other)
    assert second.manifest.seed == 11 and published.manifest.seed == 3
    assert not torch.equal(second.weights["score.weight"], published.weights["score.weight"])
    assert second.manifest.parents[f"ensemble:{published.folder}"].fingerprint == published.manifest.fingerprint

    card, first = card_of(second.folder), card_of(published.folder)
    assert card.ensemble.members == ["reward", str(published.folder)]
    assert [share.value for share in card.ensemble.accuracy] == [card.accuracy.value, first.accuracy.value]
    ((same, agree), (mirrored, _)) = card.ensemble.agreement
    assert same == 1.0 and agree == mirrored and 0.5 < agree <= 1
    assert 0.001 < card.ensemble.mean_std < 1

    # A model agrees with itself.
    twin = run_stage("reward", tmp_path / "twin", "train.max_steps=40", other)
    assert card_of(twin.folder).ensemble.agreement == [[1.0, 1.0], [1.0, 1.0]]
    assert card_of(twin.folder).ensemble.mean_std == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_an_invalid_member_is_refused_before_training(tmp_path):
    chain()
    with pytest.raises(
        UserError, match=r"reward\.ensemble_with\.0: .*a language model, and a reward model is needed here"
    ):
        run_stage("reward", tmp_path, f"ensemble_with=[{runs() / 'tiny' / 'sft'}]")
    assert not (tmp_path / "tiny").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounded_training_is_no_reason_to_refuse_scores_and_a_wrong_scorer_is(published, encoder, dtype, monkeypatch):
    """What autocast rounds away does not count; a scorer that reads another token does, in either precision."""
    parent = open_parent(str(published.folder), published.folder.parent, {"reward_model"})
    loaded = Model.load(engines.current(), parent, "reward", load_encoder(parent), ModelArguments(), dtype=dtype)
    answers = [[*encoder.prompt((Message("user", f"Where is the {thing}?"),)), 5, 6, 7] for thing in THINGS]
    trainer = cast(Trainer, SimpleNamespace(model_wrapped=loaded.module, args=SimpleNamespace(bf16=True)))
    measured = score(loaded.module, answers, encoder.pad_id).double().numpy()
    check_scores(loaded, answers, measured + np.linspace(-0.1, 0.1, len(measured)), trainer)
    monkeypatch.setattr("stages.reward_model.train.score", lambda m, rows, pad: score(m, [r[:-3] for r in rows], pad))
    with pytest.raises(AssertionError, match="the scores that RL would compute differ"):
        check_scores(loaded, answers, measured, trainer)
