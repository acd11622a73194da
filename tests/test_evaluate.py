"""Evaluation: intervals against known values, bits per byte against a plain loop, and the whole stage."""

import json
import math
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.encode import Encoder
from data.errors import DataError
from data.records import Message
from data.sampling import uniform
from handoff.errors import UserError
from stages.evaluate import tables
from stages.evaluate.answers import read, schema
from stages.evaluate.config import Config
from stages.evaluate.likelihood import BITS, of_documents
from stages.evaluate.statistics import Items, difference, estimate, mean, proportion
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
    return Config.model_validate({"models": ["sft"], "tasks": [{"name": "world", "data": data, **keys}]})


def task_of(recipe: Any, name: str) -> dict[str, Any]:
    """A task's results."""
    found: dict[str, Any] = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    return found["tasks"][name]


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


def items(**values) -> dict[str, Items]:
    return {name: Items(of) for name, of in values.items()}


def test_a_score_of_zeros_and_ones_gets_wilsons_interval_and_any_other_the_bootstraps():
    values = Items([1.0, 0.0, 1.0, None, 1.0])
    assert estimate(values, 0, binary=True) == proportion([True, False, True, True])
    assert estimate(values, 0, binary=False) == mean([1.0, 0.0, 1.0, 1.0], 0)
    assert estimate(Items([None]), 0, binary=True) is None


def test_a_ratio_of_sums_is_not_the_mean_of_the_ratios():
    found = estimate(Items([8.0, 1.0, None], [1, 9, 5]), 0, binary=False)
    assert found is not None and found["value"] == pytest.approx(0.9) and found["n"] == 2
    assert (found["low"], found["high"]) == pytest.approx((1 / 9, 8.0)), "both items may be drawn twice"


def test_differences_are_paired():
    """Two models whose items go together differ clearly although the intervals of their means overlap."""
    levels = np.linspace(0, 10, 60)
    before, after = Items(levels.tolist()), Items((levels + 0.1 + 0.1 * np.cos(np.arange(60))).tolist())
    means = [estimate(one, 0, binary=False) for one in (before, after)]
    assert means[0]["high"] > means[1]["low"]
    found = difference(after, before, 0)
    gains = np.array(after.values) - np.array(before.values)
    assert found["value"] == pytest.approx(gains.mean()) and found["n"] == 60
    error = gains.std() / 60**0.5
    assert [found["low"], found["high"]] == pytest.approx(
        [gains.mean() - 1.96 * error, gains.mean() + 1.96 * error], abs=0.2 * error
    )
    assert found["detectable"] == pytest.approx(2.8 * error, rel=0.1)


def test_a_difference_is_taken_over_the_items_that_both_models_have():
    found = difference(Items([1.0, None, 4.0, 9.0]), Items([0.0, 5.0, None, 9.0]), 0)
    assert found["value"] == 0.5 and found["n"] == 2
    assert difference(Items([1.0, None]), Items([None, 1.0]), 0) is None


@pytest.mark.parametrize("effect", [0.0, 0.28])
def test_intervals_of_differences_hold_what_they_promise(effect):
    """Over 400 sets of 100 items with a spread of 1: 5 % are starred without an effect, and 80 % at `detectable`."""
    starred = 0
    for trial in range(400):
        noise = np.random.default_rng(trial).normal(size=(2, 100))
        found = difference(Items((noise[0] + effect).tolist()), Items([0.0] * 100), trial)
        starred += not found["low"] <= 0 <= found["high"]
    assert abs(starred / 400 - (0.05 if effect == 0 else 0.8)) < 0.05


def test_one_kind_of_interval_for_a_metric_of_all_models():
    both = {"a": items(x=[1.0, 0.0], y=[1.0, None]), "b": items(x=[1.0, 0.5], y=[0.0, 1.0])}
    assert tables.binary_metrics(both) & {"x", "y"} == {"y"}
    assert tables.unscored("a", items(x=[1.0, None], y=[1.0, 0.0], z=[None, None])) == [
        "a: x has no value for 1 of 2 answers; its mean is that of the others",
        "a: z has no value for 2 of 2 answers; it is left out",
    ]


def test_groups_follow_a_column_and_leave_out_prompts_without_it():
    both = {"a": items(x=[1.0, 0.0, 1.0, 1.0]), "b": items(x=[0.0, None, 1.0, 0.0])}
    found = tables.groups(0, "x", ["hard", "easy", None, "hard"], both)
    assert list(found) == ["hard", "easy"]
    assert (found["hard"]["a"]["value"], found["hard"]["a"]["n"]) == (1.0, 2)
    assert list(found["easy"]) == ["a"], "a model without a value is not in the group"


def test_wins_are_of_prompts_on_which_both_have_a_score():
    both = {"sft": items(x=[0.0, 1.0, 1.0, None]), "ppo": items(x=[1.0, 1.0, 0.0, 1.0])}
    found = tables.win_rates(0, "x", {"ppo": "sft"}, both)["ppo"]
    assert (found["over"], found["by"], found["value"], found["n"]) == ("sft", "x", 0.5, 3)


@pytest.mark.slow
def test_a_column_family_of_other_data_is_a_column_like_any(micro_recipe, tmp_path):
    rows = [{"prompt": f"Say {n}", "answer": n, "family": ["odd", 2][n % 2], "level": f"L{n % 3}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = tmp_path / "micro.yaml"
    path.write_text(
        micro_recipe.read_text() + "  evaluate:\n    models: [sft]\n    tasks:\n      - name: both\n"
        f"        data: [{{source: file, path: {tmp_path}/rows.jsonl}}, {{source: world, kind: prompts, size: 5}}]\n"
        "        scores: [{function: length_penalty, on: greedy}, {function: world_correct}]\n"
        "        max_new_tokens: 8\n"
    )
    for overrides, groups in (([], {"odd", "2"}), (["evaluate.tasks.0.group_by=level"], {"L0", "L1", "L2"})):
        recipe = load_recipe(path, overrides)
        run_section(recipe, "evaluate")
        results = task_of(recipe, "both")
        assert results["metrics"]["sft"]["world_correct"]["n"] == 5, "the world's checker judges the world's prompts"
        assert groups <= set(results["families"])
        assert results["grouped"]["metric"] == "length_penalty"
        assert {"0", "1", "2", "3", "4", "5"} <= {sample["reference"] for sample in results["samples"]}
    with pytest.raises(
        UserError, match=r"evaluate\.tasks\.0\.group_by: no row has the column levels; there are answer, "
    ):
        run_section(load_recipe(path, ["evaluate.tasks.0.group_by=levels"]), "evaluate")


@pytest.mark.slow
def test_a_checkpoint_of_elsewhere_is_evaluated_by_its_path(micro_recipe, tmp_path):
    folder = foreign_checkpoint(tmp_path / "elsewhere")
    path = tmp_path / "micro.yaml"
    path.write_text(
        micro_recipe.read_text() + f"  evaluate:\n    models: [sft, {folder}]\n    tasks:\n"
        "      - {name: few, data: [{source: world, kind: prompts, size: 4}], scores: [{function: world_correct}],\n"
        "         max_new_tokens: 4}\n"
    )
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = task_of(recipe, "few")
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
    found = of_documents(model, encoder, texts, width, 3)
    assert len(found) == len(texts) and -sum(found) == pytest.approx(nats, rel=1e-5)
    alone = [of_documents(model, encoder, [text], width, 8)[0] for text in texts]
    assert found == pytest.approx(alone, rel=1e-5), "each document has its own sum"


@pytest.mark.slow
def test_the_whole_stage(micro_recipe, tmp_path, capsys):
    text = micro_recipe.read_text() + (
        "  evaluate:\n"
        "    models: [pretrain, sft, dpo]\n"
        "    tasks:\n"
        "      - name: world\n"
        "        scores:\n"
        "          - {function: world_correct, name: accuracy, on: both}\n"
        "          - {function: world_gold, name: gold}\n"
        "          - {model: reward}\n"
        "          - {model: other, name: absent}\n"
        "        wins: gold\n"
        "        data: [{source: world, kind: prompts, size: 33, split: test}]\n"
        "        max_new_tokens: 24\n"
        "      - name: text\n"
        "        kind: documents\n"
        "        data: [{source: world, kind: documents, size: 5, split: test}]\n"
        "        context_length: 64\n"
        "    samples: 4\n"
        "  dpo: {parent: sft, data: [{source: world, kind: preferences, size: 16}], train: {max_steps: 1}}\n"
        "  other: {stage: reward_model, parent: sft, data: [{source: world, kind: preferences, size: 16}]}\n"
    )
    path = tmp_path / "micro.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    both = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    assert both["models"] == ["pretrain", "sft"], "what has not been made is left out"
    results, text = both["tasks"]["world"], both["tasks"]["text"]
    said = capsys.readouterr().out
    assert "score absent is left out, other is not in this run" in said
    assert (
        "world: 33 held-out prompts, each answered by every model: greedy (the likeliest token at each place)" in said
    )
    table = [line.split() for line in said[said.index("33 held-out") :].splitlines()[1:5]]
    names = ["stop_rate", "length_tokens", "accuracy_greedy", "accuracy_sampled", "gold", "reward"]
    assert table[0] == ["model", *names, "kl"]
    assert table[1] == ["greedy", "sampled", "greedy", "sampled", "sampled", "sampled", "sampled"]
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
    for name in text["models"]:
        bits, perplexity = (text["metrics"][name][metric] for metric in ("bits_per_byte", "perplexity"))
        assert bits["low"] <= bits["value"] <= bits["high"] and bits["n"] == 5
        assert 1 < perplexity["low"] <= perplexity["value"] <= perplexity["high"]
    for task, missing in ((results, {"kl"}), (text, set())):
        changes = task["changes"]["sft"]
        assert changes["over"] == "pretrain" and set(task["changes"]) == {"sft"}
        for metric, change in changes["metrics"].items():
            values = [task["metrics"][name][metric]["value"] for name in ("sft", "pretrain")]
            assert change["value"] == pytest.approx(values[0] - values[1]) and change["detectable"] >= 0
        assert set(changes["metrics"]) == set(task["metrics"]["sft"]) - missing
    assert both["comparisons"] == 8 and "Of 8 such intervals" in said and "sft - pretrain" in said
    assert len(results["samples"]) == 4
    manifest = json.loads((recipe.run_dir / "evaluate" / "stage.json").read_text())
    assert set(manifest["files"]) == {"results.json", "answers.arrow"}
    assert manifest["metrics"]["sft/world/gold"] == results["metrics"]["sft"]["gold"]["value"]
    check_answers(recipe, both)
    again = json.dumps(both, sort_keys=True)
    hashes = manifest["files"]
    (recipe.run_dir / "evaluate" / "started.json").unlink()
    run_section(recipe, "evaluate")
    assert json.dumps(json.loads((recipe.run_dir / "evaluate" / "results.json").read_text()), sort_keys=True) == again
    assert json.loads((recipe.run_dir / "evaluate" / "stage.json").read_text())["files"] == hashes


def check_answers(recipe, results) -> None:
    """answers.arrow has every answer with its scores: each mean of results.json is that of its rows."""
    table = read(recipe.run_dir / "evaluate")
    assert table.schema == schema()
    rows = table.to_pylist()
    count = Counter((row["task"], row["model"], row["kind"]) for row in rows)
    assert count == {
        (task, model, kind): n
        for model in ("pretrain", "sft")
        for task, kind, n in (("world", "greedy", 33), ("world", "sample", 33), ("text", "document", 5))
    }
    for model, metrics in results["tasks"]["world"]["metrics"].items():
        mine = [row for row in rows if (row["task"], row["model"]) == ("world", model)]
        for metric in ("accuracy_greedy", "accuracy_sampled", "gold", "reward"):
            found = [dict(row["scores"])[metric] for row in mine if metric in dict(row["scores"])]
            assert len(found) == 33 and np.mean(found) == pytest.approx(metrics[metric]["value"])
        greedy = [row for row in mine if row["kind"] == "greedy"]
        assert np.mean([row["stopped"] for row in greedy]) == metrics["stop_rate"]["value"]
        assert [row["item"] for row in greedy] == list(range(33))
        assert all(row["prompt"][-1]["role"] == "user" and row["reference"] for row in greedy)
        by_prompt = {"\n".join(m["content"] for m in row["prompt"]): row["answer"] for row in greedy}
        for sample in results["tasks"]["world"]["samples"]:
            assert by_prompt[sample["prompt"]] == sample["answers"][model]


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
        + "    tasks: [{name: few, data: [{source: world, kind: prompts, size: 3, split: test}]}]\n"
    )
    monkeypatch.setattr("stages.evaluate.train.Model", None)  # nothing may be answered
    with pytest.raises(DataError, match=r"undecided: .* \(brief\) and none named default, .* put a chat_template"):
        run_section(load_recipe(path), "evaluate")


def test_intervals_do_not_depend_on_anything_but_the_seed():
    values = np.linspace(-1, 1, 50).tolist()
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)


@pytest.mark.slow
def test_the_answers_of_the_rows_are_scored_by_every_model(micro_recipe, tmp_path):
    """Bits per byte of each row's own answer, its stop token included, against one forward pass for each."""
    rows = [("Say hi.", "hi"), ("What is red?", "The cup is red."), ("Nothing.", None), ("Long?", "very " * 300)]
    files = {"chats": [row for row in rows if row[1]], "prompts": [row for row in rows if not row[1]]}
    for name, some in files.items():
        lines = [{"prompt": q} | ({"completion": a} if a else {}) for q, a in some]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = tmp_path / "micro.yaml"
    sources = ", ".join(f"{{source: file, path: {tmp_path / name}.jsonl}}" for name in files)
    path.write_text(
        micro_recipe.read_text()
        + "  evaluate:\n    models: [pretrain, sft]\n"
        + f"    tasks: [{{name: own, data: [{sources}], max_new_tokens: 4}}]\n"
    )
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = task_of(recipe, "own")
    folder = recipe.run_dir / "sft" / "model"
    model, encoder = AutoModelForCausalLM.from_pretrained(folder).eval(), Encoder.from_pretrained(folder)
    bits = size = 0.0
    for question, answer in rows:
        before = encoder.prompt((Message("user", question),))
        ids = before + encoder.answer(answer or "")
        if answer is None or len(ids) - 1 > model.config.max_position_embeddings:
            continue
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
        bits -= sum(logp[i - 1, ids[i]].item() for i in range(len(before), len(ids))) * BITS
        size += len(answer.encode())
    found = results["metrics"]["sft"]["reference_bits_per_byte"]
    assert found["value"] == pytest.approx(bits / size, rel=1e-5)
    assert found["low"] <= found["value"] <= found["high"] and found["n"] < len(rows)
    assert results["changes"]["sft"]["metrics"]["reference_bits_per_byte"]["n"] == found["n"]
