"""Evaluation: intervals against known values, bits per byte against a plain loop, and the whole stage."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.encode import Encoder
from data.errors import DataError
from data.sampling import uniform
from handoff.errors import UserError
from stages.evaluate import tables
from stages.evaluate.config import Config
from stages.evaluate.statistics import estimate, mean, proportion
from stages.evaluate.tables import Answered
from stages.evaluate.train import _bits_per_byte
from tests.stage_chain import foreign_checkpoint
from training.measure import TextWindows
from training.recipe import load_recipe
from training.run import run_section


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_of_newcombe_1998(hits, n, low, high):
    """The last row is the worked example of Newcombe 1998, table I."""
    estimate = proportion([True] * hits + [False] * (n - hits))
    assert estimate["value"] == pytest.approx(hits / n)
    assert (estimate["low"], estimate["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_bootstrap_interval_covers_as_often_as_it_says():
    """95 % of the intervals of 300 samples of 60 hold the true mean, give or take three deviations."""
    covered = 0
    for trial in range(300):
        sample = uniform(60, 0, "coverage", trial) ** 2  # mean 1/3, skewed
        estimate = mean(sample.tolist(), seed=trial)
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        covered += estimate["low"] <= 1 / 3 <= estimate["high"]
    assert abs(covered / 300 - 0.94) < 3 * math.sqrt(0.95 * 0.05 / 300)


def config(**keys) -> Config:
    data = [{"source": "world", "kind": "prompts", "size": 20, "split": "test"}]
    return Config.model_validate({"models": ["sft"], "data": data, **keys})


# ---- configuration


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"scores": [{"function": "exact_match", "weight": 2.0}]}, "`weight` is for sums"),
        (
            {"scores": [{"function": "exact_match"}, {"function": "exact_match", "on": "greedy"}]},
            "two rewards of the same",
        ),
        (
            {"scores": [{"function": "exact_match", "on": "both"}, {"model": "r", "name": "exact_match_greedy"}]},
            "two entries give the metric exact_match_greedy",
        ),
        ({"scores": [{"function": "exact_match", "name": "kl"}]}, "kl is measured anyway"),
        (
            {"scores": [{"function": "exact_match"}], "wins": "gold"},
            "wins: gold is no metric of `scores`; there are exact",
        ),
        ({"group_by": "level"}, "`group_by` is not read without `scores`"),
    ],
)
def test_scores_that_cannot_be_told_apart_or_are_not_read_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        config(**keys)


# ---- tables


def answered(**scores) -> Answered:
    return Answered([], [], [], [], scores)


def test_a_score_of_zeros_and_ones_gets_wilsons_interval_and_any_other_the_bootstraps():
    values = [1.0, 0.0, 1.0, None, 1.0]
    assert estimate(values, 0, binary=True) == proportion([True, False, True, True])
    assert estimate(values, 0, binary=False) == mean([1.0, 0.0, 1.0, 1.0], 0)
    assert estimate([None], 0, binary=True) is None


def test_one_kind_of_interval_for_a_metric_of_all_models():
    both = {"a": answered(x=[1.0, 0.0], y=[1.0, None]), "b": answered(x=[1.0, 0.5], y=[0.0, 1.0])}
    assert tables.binary_metrics(both) == {"y"}
    assert tables.unscored("a", {"x": [1.0, None], "y": [1.0, 0.0], "z": [None, None]}) == [
        "a: x has no value for 1 of 2 answers; its mean is that of the others",
        "a: z has no value for 2 of 2 answers; it is left out",
    ]


def test_groups_follow_a_column_and_leave_out_prompts_without_it():
    both = {"a": answered(x=[1.0, 0.0, 1.0, 1.0]), "b": answered(x=[0.0, None, 1.0, 0.0])}
    found = tables.groups(0, "x", ["hard", "easy", None, "hard"], both)
    assert list(found) == ["hard", "easy"]
    assert (found["hard"]["a"]["value"], found["hard"]["a"]["n"]) == (1.0, 2)
    assert list(found["easy"]) == ["a"], "a model without a value is not in the group"


def test_wins_are_of_prompts_on_which_both_have_a_score():
    both = {"sft": answered(x=[0.0, 1.0, 1.0, None]), "ppo": answered(x=[1.0, 1.0, 0.0, 1.0])}
    found = tables.win_rates(0, "x", {"ppo": "sft"}, both)["ppo"]
    assert (found["over"], found["by"], found["value"], found["n"]) == ("sft", "x", 0.5, 3)


@pytest.mark.slow
def test_a_column_family_of_other_data_is_a_column_like_any(micro_recipe, tmp_path):
    rows = [{"prompt": f"Say {n}", "answer": n, "family": ["odd", 2][n % 2], "level": f"L{n % 3}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "micro.yaml"
    path.write_text(
        micro_recipe.read_text() + "  evaluate:\n    models: [sft]\n    max_new_tokens: 8\n"
        f"    data: [{{source: file, path: {tmp_path}/rows.jsonl}}, {{source: world, kind: prompts, size: 5}}]\n"
        "    scores: [{function: length_penalty, on: greedy}, {function: world_correct}]\n"
    )
    for overrides, groups in (([], {"odd", "2"}), (["evaluate.group_by=level"], {"L0", "L1", "L2"})):
        recipe = load_recipe(path, overrides)
        run_section(recipe, "evaluate")
        results = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
        assert results["metrics"]["sft"]["world_correct"]["n"] == 5, "the world's checker judges the world's prompts"
        assert groups <= set(results["families"])
        assert results["grouped"]["metric"] == "length_penalty"
        assert {"0", "1", "2", "3", "4", "5"} <= {sample["reference"] for sample in results["samples"]}
    with pytest.raises(UserError, match=r"evaluate\.group_by: no prompt has the column levels; there are answer, "):
        run_section(load_recipe(path, ["evaluate.group_by=levels"]), "evaluate")


@pytest.mark.slow
def test_a_checkpoint_of_elsewhere_is_evaluated_by_its_path(micro_recipe, tmp_path):
    folder = foreign_checkpoint(tmp_path / "elsewhere")
    path = tmp_path / "micro.yaml"
    path.write_text(
        micro_recipe.read_text() + f"  evaluate:\n    models: [sft, {folder}]\n    max_new_tokens: 4\n"
        "    data: [{source: world, kind: prompts, size: 4}]\n    scores: [{function: world_correct}]\n"
    )
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    assert results["models"] == ["sft", "elsewhere"]
    assert results["metrics"]["elsewhere"]["world_correct"]["n"] == 4


def harness_windows(ids, prefix, width):
    """What lm-evaluation-harness 0.4 computes (`get_rolling_token_windows` with one token of context, then
    `make_disjoint_window`): pairs of the context and the tokens that are scored after it."""
    first = min(width, len(ids))
    pairs = [([prefix, *ids[: first - 1]], ids[:first])]
    scored = first
    while scored < len(ids):
        count = min(len(ids) - scored, width)
        end = scored + count
        pairs.append((ids[end - width - 1 : end - 1], ids[end - count : end]))
        scored += count
    return [(before[: len(before) - (len(scored) - 1)], scored) for before, scored in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("width", [2, 7, 32, 512])
def test_bits_per_byte_are_those_of_the_harness(width, micro_recipe):
    folder = load_recipe(micro_recipe).run_dir / "sft" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder.from_pretrained(folder)
    texts = ["Mira has a red cup. Où est-il?", " ".join(f"Mira has {n} cups." for n in range(9)), "a"]
    ids = [encoder.tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    expected = [pair for one in ids for pair in harness_windows(one, encoder.tokenizer.bos_token_id, width)]
    windows = TextWindows(encoder.documents(texts), encoder, width)
    assert [(tokens.tolist(), count) for tokens, count in windows] == [
        ([*before, *scored], len(scored)) for before, scored in expected
    ]
    nats = 0.0
    for before, scored in expected:
        read = [*before, *scored[:-1]]
        assert len(read) <= width
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([read])).logits[0].double(), -1)[-len(scored) :]
        nats -= logp[range(len(scored)), scored].sum().item()
    found = _bits_per_byte(model, encoder, texts, width, 3)
    assert found == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-5)


@pytest.mark.slow
def test_the_whole_stage(micro_recipe, tmp_path, capsys):
    text = micro_recipe.read_text() + (
        "  evaluate:\n"
        "    models: [pretrain, sft, dpo]\n"
        "    scores:\n"
        "      - {function: world_correct, name: accuracy, on: both}\n"
        "      - {function: world_gold, name: gold}\n"
        "      - {model: reward}\n"
        "      - {model: other, name: absent}\n"
        "    wins: gold\n"
        "    data: [{source: world, kind: prompts, size: 33, split: test}]\n"
        "    text: [{source: world, kind: documents, size: 5, split: test}]\n"
        "    max_new_tokens: 24\n"
        "    context_length: 64\n"
        "    samples: 4\n"
        "  dpo: {parent: sft, data: [{source: world, kind: preferences, size: 16}], train: {max_steps: 1}}\n"
        "  other: {stage: reward_model, parent: sft, data: [{source: world, kind: preferences, size: 16}]}\n"
    )
    path = tmp_path / "micro.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    assert results["models"] == ["pretrain", "sft"], "what has not been made is left out"
    said = capsys.readouterr().out
    assert "score absent: left out, other is not in this run" in said
    assert "33 held-out prompts, each answered twice by every model: greedy (the likeliest token" in said
    table = [line.split() for line in said[said.index("33 held-out") :].splitlines()[1:5]]
    names = ["stop_rate", "length_tokens", "accuracy_greedy", "accuracy_sampled", "gold", "reward"]
    assert table[0] == ["model", *names, "bits_per_byte", "kl"]
    assert table[1] == ["greedy", "sampled", "greedy", "sampled", "sampled", "sampled", "documents", "sampled"]
    assert [row[0] for row in table[2:]] == ["pretrain", "sft"]
    assert "sft: its sampled answer scores higher in gold than that of pretrain on" in said
    scores = ["accuracy_greedy", "accuracy_sampled", "gold", "reward"]
    assert list(results["metrics"]["sft"]) == ["stop_rate", "length_tokens", *scores, "kl"]
    for metric in (*scores, "stop_rate"):
        for found in (results["metrics"][name][metric] for name in results["models"]):
            assert found["low"] <= found["value"] <= found["high"] and found["n"] == 33
    assert results["metrics"]["sft"]["kl"]["value"] > 0
    assert set(results["win_rates"]) == {"sft"} and results["win_rates"]["sft"]["over"] == "pretrain"
    assert results["win_rates"]["sft"]["by"] == "gold"
    assert sum(family["sft"]["n"] for family in results["families"].values()) == 33
    assert results["grouped"] == {"column": "family", "metric": "accuracy_greedy"}
    by_family = sum(family["sft"]["n"] * family["sft"]["value"] for family in results["families"].values())
    assert by_family == pytest.approx(33 * results["metrics"]["sft"]["accuracy_greedy"]["value"])
    assert all(math.isfinite(bits["value"]) for bits in results["bits_per_byte"].values())
    assert len(results["samples"]) == 4
    again = json.dumps(results, sort_keys=True)
    (recipe.run_dir / "evaluate" / "started.json").unlink()
    run_section(recipe, "evaluate")
    assert json.dumps(json.loads((recipe.run_dir / "evaluate" / "results.json").read_text()), sort_keys=True) == again


@pytest.mark.slow
def test_a_model_with_several_templates_is_refused_before_any_other_answers(micro_recipe, tmp_path, monkeypatch):
    """The section has no key to choose one, so the message says what to do beside the tokenizer."""
    undecided = tmp_path / "undecided"
    shutil.copytree(load_recipe(micro_recipe).run_dir / "sft" / "model", undecided)
    (undecided / "additional_chat_templates").mkdir()
    (undecided / "chat_template.jinja").rename(undecided / "additional_chat_templates" / "brief.jinja")
    path = tmp_path / "micro.yaml"
    path.write_text(
        micro_recipe.read_text()
        + f"  evaluate:\n    models: [sft, {undecided}]\n"
        + "    data: [{source: world, kind: prompts, size: 3, split: test}]\n"
    )
    monkeypatch.setattr("stages.evaluate.train._answer", None)  # nothing may be answered
    with pytest.raises(DataError, match=r"undecided: .* \(brief\) and none named default, .* put a chat_template"):
        run_section(load_recipe(path), "evaluate")


def test_intervals_do_not_depend_on_anything_but_the_seed():
    values = np.linspace(-1, 1, 50).tolist()
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)
