"""The reward model stage: how scores are read and measured, its report card, what RL gets from it."""

import numpy as np
import pytest
import torch

from data.config import FileSource
from data.encode import encode_preferences
from data.load import load
from data.records import Preference
from handoff.parent import open_parent
from reward.learned import score
from stages import models
from stages.config import ModelArguments
from stages.reward_model.train import Collator, pair_metrics, probe_metrics, row_scores
from tests.stage_chain import chain, run_stage, runs


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return run_stage("reward", tmp_path_factory.mktemp("reward"), "train.max_steps=40")


@pytest.fixture(scope="module")
def model(published):
    parent = open_parent(str(published.folder), published.folder.parent, {"reward_model"})
    return models.load_reward_model(parent, ModelArguments()).eval()


@pytest.fixture(scope="module")
def encoder():
    chain()
    return models.load_encoder(open_parent(str(runs() / "tiny" / "sft"), runs(), {"causal_lm"}))


@pytest.mark.slow
def test_it_learns_and_its_card_and_statistics_are_in_the_manifest(published):
    metrics, extra = published.manifest.metrics, published.manifest.extra
    assert metrics["eval_accuracy"] >= 0.8
    assert metrics["eval_accuracy_low"] < metrics["eval_accuracy"] < metrics["eval_accuracy_high"]
    assert metrics["eval_length_accuracy"] == pytest.approx(0.2125)  # of the data: "the longer one" is mostly wrong
    assert -1 <= metrics["eval_score_length_correlation"] <= 1
    assert {"eval_beats_empty", "eval_beats_repeated", "eval_beats_broken_off"} <= metrics.keys()
    assert extra["reward_std"] > 0.1 and abs(extra["reward_mean"]) < 5
    assert published.manifest.kind == "reward_model"


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
    pairs = encode_preferences(held.records, encoder, 64, "drop", held.accounting)
    answers = [row["prompt_ids"] + row[key] for row in pairs for key in ("chosen_ids", "rejected_ids")]
    scores = score(model, answers, encoder.pad_id).double()
    assert published.manifest.extra["reward_mean"] == pytest.approx(scores.mean().item(), abs=1e-5)
    assert published.manifest.extra["reward_std"] == pytest.approx(scores.std(correction=0).item(), abs=1e-5)


def pair(chosen, rejected):
    return {"prompt_ids": [1], "chosen_ids": [5] * chosen + [2], "rejected_ids": [6] * rejected + [2]}


def test_a_model_that_likes_length_is_seen_through():
    """Where the better answer is the longer one, a score that is the length alone looks good: the card says why."""
    pairs = [pair(8, 3), pair(5, 2), pair(9, 4), pair(3, 6)]
    metrics = pair_metrics(pairs, lambda rows: np.array([float(len(row)) for row in rows]))
    assert metrics["accuracy"] == metrics["length_accuracy"] == 0.75
    assert metrics["score_length_correlation"] == pytest.approx(1)
    probes = probe_metrics(pairs, [2], lambda rows: np.array([float(len(row)) for row in rows]))
    assert probes == {"beats_empty": 1, "beats_repeated": 0, "beats_broken_off": 1}


def test_pair_metrics_by_hand():
    values = iter([np.array([2.0, 0.0, 1.0]), np.array([1.0, 0.0, 3.0])])
    metrics = pair_metrics([pair(2, 2)] * 3, lambda rows: next(values))
    assert metrics["accuracy"] == 0.5  # right, a tie, wrong
    assert metrics["margin"] == pytest.approx(-1 / 3)
    assert metrics["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(2))]))
    assert metrics["score_length_correlation"] == 0  # lengths do not vary


def test_probes_are_what_they_say():
    seen = []

    def scores(rows):
        seen.append(rows)
        return np.zeros(len(rows))

    probe_metrics([{"prompt_ids": [1], "chosen_ids": [5, 6, 7, 2], "rejected_ids": [2]}], [2, 0], scores)
    assert seen == [[[1, 5, 6, 7, 2]], [[1, 2]], [[1, 5, 6, 7, 5, 6, 7, 5, 6, 7, 2]], [[1, 5, 6]]]


@pytest.mark.slow
def test_without_held_out_pairs_the_statistics_are_of_the_training(tmp_path):
    run = run_stage("reward", tmp_path, "train.max_steps=2", "eval_data=[]")
    assert run.manifest.extra["reward_std"] > 0
    assert not any(key.startswith("eval_") for key in run.manifest.metrics)
