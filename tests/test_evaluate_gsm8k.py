"""Grading of GSM8K-shaped rows by `numeric_match`: a model that was taught its answers, and a real one."""

import json
import re
from pathlib import Path

import pytest

from tests.smollm2 import gguf_file
from tests.stage_chain import chain, runs
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

# (question, right answer, what the model is taught to answer)
TAUGHT = [
    ("Ann has 3 apples and gets 4", "7", "3 + 4 = <<3+4=7>>7\n#### 7"),
    ("Bob has 9 cats and loses 2", "7", "9 - 2 = <<9-2=7>>7\n#### 7"),
    ("Cleo has 1,200 eggs and gets 50", "1,250", "1200 + 50 = 1250 eggs"),
    ("Dan has 5 dogs and gets 5", "10", "5 + 5 = 11\n#### 11"),
    ("Eve has 8 fish and loses 8", "0", "none at all"),
    ("Finn has 6 balls and gets 1", "7", "#### 7"),
]
GRADED_RIGHT = 4  # by hand: the fourth is wrong, the fifth has no number

RECIPE = """
name: gsm
seed: 3
output_root: {root}
data_root: {root}
stages:
  sft:
    parent: {parent}
    max_length: 96
    data: [{{source: file, path: taught.jsonl}}]
    max_new_tokens: 32
    train: {{learning_rate: 1.0e-2, max_steps: 250, global_batch_size: 6, per_device_train_batch_size: 6}}
  evaluate:
    models: [sft]
    tasks:
      - name: gsm
        data: [{{source: file, path: questions.jsonl}}]
        scores: [{{function: numeric_match, name: accuracy, on: greedy}}]
        group_by: kind
        max_new_tokens: 32
"""


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def results_of(recipe) -> dict:
    return json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())["tasks"]["gsm"]


def last_number(text: str) -> float | None:
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def test_answers_that_a_model_was_taught_are_counted_right(tmp_path):
    chain()
    write(tmp_path / "taught.jsonl", [{"prompt": q, "completion": said} for q, _, said in TAUGHT])
    rows = [
        {"question": q, "answer": f"It is so.\n#### {right}", "kind": "gets" if "gets" in q else "loses"}
        for q, right, _ in TAUGHT
    ]
    write(tmp_path / "questions.jsonl", rows)
    path = tmp_path / "gsm.yaml"
    path.write_text(RECIPE.format(root=tmp_path, parent=runs() / "tiny" / "pretrain"))
    recipe = load_recipe(path)
    for name in ("sft", "evaluate"):
        run_section(recipe, name)
    results = results_of(recipe)
    said = {sample["prompt"]: sample["answers"]["sft"] for sample in results["samples"]}
    assert said == {question: answer for question, _, answer in TAUGHT}, "it learned its answers"
    accuracy = results["metrics"]["sft"]["accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (GRADED_RIGHT / 6, 6)
    assert accuracy["low"] == pytest.approx(0.2999, abs=1e-3) and accuracy["high"] == pytest.approx(0.9032, abs=1e-3)
    kinds = {kind: (one["sft"]["value"], one["sft"]["n"]) for kind, one in results["families"].items()}
    assert kinds == {"gets": (3 / 4, 4), "loses": (1 / 2, 2)}


def test_smollm2_on_gsm8k(tmp_path, tmp_path_factory, shared_data):
    """A real model of 135 M parameters on eight published rows; the count is made again from its answers."""
    file = gguf_file(tmp_path_factory.mktemp("smollm2"))
    path = tmp_path / "gsm.yaml"
    path.write_text(
        f"name: gsm\noutput_root: {tmp_path}\ndata_root: {shared_data}\nstages:\n  evaluate:\n    models: [{file}]\n"
        "    tasks:\n      - name: gsm\n"
        "        data: [{source: file, path: verifiable/gsm8k-train.jsonl.gz, limit: 8}]\n"
        "        scores: [{function: numeric_match, name: accuracy, on: greedy}]\n"
        "        num_generations: 0\n        max_new_tokens: 160\n    batch_size: 8\n"
    )
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = results_of(recipe)
    (model,) = results["models"]
    assert results["metrics"][model]["stop_rate"]["value"] > 0.5, "it ends its turns"
    samples = results["samples"]
    assert len(samples) == 8
    right = [last_number(sample["answers"][model]) == float(sample["reference"]) for sample in samples]
    accuracy = results["metrics"][model]["accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (sum(right) / 8, 8)
