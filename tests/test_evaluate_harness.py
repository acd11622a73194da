"""Our own tasks and lm-evaluation-harness on the same rows and models: the same numbers."""

import csv
import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

from stages.evaluate.answers import read
from tests.smollm2 import gguf_file
from training.recipe import RecipeError, load_recipe
from training.run import run_section

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytestmark = pytest.mark.slow

CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, dev: {shots}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: dev
fewshot_config: {{sampler: first_n}}
num_fewshot: {count}
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
ARC = (
    CHOICES
    + """
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{choices.label.index(answerKey)}}}}"
doc_to_choice: "{{{{choices.text}}}}"
"""
)
MMLU = (
    CHOICES
    + """
description: "The following are multiple choice questions (with answers) about {subject}.\\n\\n"
doc_to_text: "{{{{question.strip()}}}}\\nA. {{{{choices[0]}}}}\\nB. {{{{choices[1]}}}}\\n\\
  C. {{{{choices[2]}}}}\\nD. {{{{choices[3]}}}}\\nAnswer:"
doc_to_choice: ["A", "B", "C", "D"]
doc_to_target: answer
"""
)
# lm_eval/tasks/gsm8k/gsm8k.yaml, with local files.
GSM8K = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {shots}}}}}
output_type: generate_until
test_split: test
fewshot_split: train
fewshot_config: {{sampler: first_n}}
num_fewshot: {count}
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore: [",", "\\\\$", "(?s).*#### ", "\\\\.$"]
generation_kwargs:
  {{until: ["Question:", "</s>", "<|im_end|>"], do_sample: false, temperature: 0.0, max_gen_toks: {new}}}
filter_list:
  - name: strict-match
    filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]
  - name: flexible-extract
    filter:
      - {{function: regex, group_select: -1, regex_pattern: "(-?[$0-9.,]{{2,}})|(-?[0-9]+)"}}
      - {{function: take_first}}
"""


ACCURACIES = (("accuracy", "acc"), ("accuracy_norm", "acc_norm"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source(path: Path) -> list[dict[str, str]]:
    return [{"source": "file", "path": str(path)}]


def compared(
    folder: Path, recipe: str, models: list[str], rows: dict[str, list[Any]], shots: int, new: int
) -> dict[str, Any]:
    """Both evaluations in one section. `rows`: of arc, mmlu (of one subject) and gsm8k; the first `shots` are examples.

    Returns the tasks of results.json.
    """
    (folder / "harness").mkdir()
    files = {}
    for name, all_rows in rows.items():
        files[name] = (
            write(folder / f"{name}_shots.jsonl", all_rows[:shots]),
            write(folder / f"{name}.jsonl", all_rows[shots:]),
        )
        form = {"arc": ARC, "mmlu": MMLU, "gsm8k": GSM8K}[name]
        subject = str(rows["mmlu"][0]["subject"]).replace("_", " ")
        text = form.format(
            name=f"h_{name}", shots=files[name][0], rows=files[name][1], count=shots, new=new, subject=subject
        )
        (folder / "harness" / f"{name}.yaml").write_text(text)
    tasks: list[dict[str, Any]] = [
        {"task": "arc_easy", "name": "arc", "data": source(files["arc"][1]),
         "few_shot": {"data": source(files["arc"][0]), "count": shots}},
        {"task": "mmlu", "data": source(files["mmlu"][1]),
         "few_shot": {"data": source(files["mmlu"][0]), "count": shots, "by": "subject"}},
        {"task": "gsm8k", "data": source(files["gsm8k"][1]), "max_new_tokens": new,
         "few_shot": {"data": source(files["gsm8k"][0]), "count": shots}},
    ]  # fmt: skip
    section = {"stage": "evaluate", "models": models, "tasks": tasks, "batch_size": 8}
    section |= {"lm_eval": [f"h_{name}" for name in rows], "lm_eval_path": str(folder / "harness")}
    path = folder / "both.yaml"
    path.write_text(recipe + f"  both: {json.dumps(section)}\n")
    loaded = load_recipe(path)
    run_section(loaded, "both")
    found: dict[str, Any] = json.loads((loaded.run_dir / "both" / "results.json").read_text())
    for model in found["models"]:
        check(found["tasks"], read(loaded.run_dir / "both").to_pylist(), model)
    return found["tasks"]


def check(tasks: dict[str, Any], rows: list[dict[str, Any]], model: str) -> None:
    """The numbers of one model are equal, and so are the likelihoods and answers that they come from."""
    pairs = [
        *((name, ours, f"h_{name}", theirs) for name in ("arc", "mmlu") for ours, theirs in ACCURACIES),
        ("gsm8k", "strict_match", "h_gsm8k", "exact_match,strict-match"),
        ("gsm8k", "flexible_extract", "h_gsm8k", "exact_match,flexible-extract"),
    ]  # fmt: skip
    for task, ours, other, theirs in pairs:
        mine, its = tasks[task]["metrics"][model][ours], tasks[other]["metrics"][model][theirs]
        assert abs(mine["value"] - its["value"]) < 1e-6 and mine["n"] == its["n"], (task, ours)
        assert its["low"] <= its["value"] <= its["high"]
    of = {task: [row for row in rows if (row["task"], row["model"]) == (task, model)] for task in (*tasks,)}
    for name in ("arc", "mmlu"):
        for mine, its in zip(of[name], of[f"h_{name}"], strict=True):
            assert mine["prompt"] == its["prompt"] and mine["right"] == its["right"]
            assert mine["log_likelihoods"] == pytest.approx(its["log_likelihoods"], abs=1e-3)
    for mine, its in zip(of["gsm8k"], of["h_gsm8k"], strict=True):
        assert (mine["prompt"], mine["answer"]) == (its["prompt"], its["answer"])


def test_a_tiny_model_has_the_numbers_of_the_harness(micro_recipe, tmp_path):
    words = ["cup", "ball", "dog", "cat", "hat"]
    arc = [
        {
            "question": f"Where is the {one} {n}?",
            "choices": {"text": ["in the box", "here", f"a {one}"], "label": list("ABC")},
            "answerKey": "ABC"[n % 3],
        }
        for n, one in enumerate(words * 2)
    ]
    mmlu = [
        {
            "question": f" Which of {n}? ",
            "subject": "world_facts",
            "choices": [f"{one} {k}" for k in range(4)],
            "answer": n % 4,
        }
        for n, one in enumerate(words * 2)
    ]
    gsm8k = [{"question": f"{n} + 4 = ?", "answer": f"It is {n + 4}.\n#### {n + 4}"} for n in (3, 12, 7, 1200, 5)]
    tasks = compared(
        tmp_path, micro_recipe.read_text(), ["pretrain", "sft"], {"arc": arc, "mmlu": mmlu, "gsm8k": gsm8k}, 2, 12
    )
    changes = tasks["h_arc"]["changes"]["sft"]
    assert changes["over"] == "pretrain"
    for ours, name in ACCURACIES:
        assert changes["metrics"][name] == tasks["arc"]["changes"]["sft"]["metrics"][ours], "paired, item by item"


def test_a_real_model_has_the_numbers_of_the_harness(tmp_path, tmp_path_factory, shared_data):
    """SmolLM2-135M on published rows; BATON_SMOLLM2 is the folder with its weights, BATON_EVAL_ROWS the rows a task."""
    if "BATON_SMOLLM2" not in os.environ:
        pytest.skip("set BATON_SMOLLM2 to the folder with SmolLM2-135M's GGUF file")
    count = int(os.environ.get("BATON_EVAL_ROWS", "24"))
    with gzip.open(shared_data / "eval" / "arc-easy.jsonl.gz", "rt", encoding="utf-8") as file:
        read_rows = [json.loads(line) for line in list(file)[:count]]
    arc = [
        {"question": row["query"].removeprefix("Question: "), "answerKey": "ABCDE"[row["gold"]],
         "choices": {"text": row["choices"], "label": list("ABCDE"[: len(row["choices"])])}}
        for row in read_rows
    ]  # fmt: skip
    with tarfile.open(shared_data / "eval" / "mmlu.tar.gz") as archive:
        member = next(one for one in archive.getnames() if one.endswith("test/college_biology_test.csv"))
        text = io.TextIOWrapper(archive.extractfile(member), encoding="utf-8", newline="")
        mmlu = [
            {"question": row[0], "choices": row[1:5], "answer": "ABCD".index(row[5]), "subject": "college_biology"}
            for row in list(csv.reader(text))[:count]
        ]
    with gzip.open(shared_data / "verifiable" / "gsm8k-train.jsonl.gz", "rt", encoding="utf-8") as file:
        gsm8k = [json.loads(line) for line in list(file)[: max(6, count // 3)]]
    file = gguf_file(tmp_path_factory.mktemp("smollm2"))
    recipe = f"name: real\noutput_root: {tmp_path}\nstages:\n"
    compared(tmp_path, recipe, [str(file)], {"arc": arc, "mmlu": mmlu, "gsm8k": gsm8k}, 2, 64)


def test_what_the_harness_does_not_have_is_said(micro_recipe, tmp_path):
    (tmp_path / "harness").mkdir()
    path = tmp_path / "micro.yaml"
    section = {"models": ["sft"], "lm_eval": ["nosuch"], "lm_eval_path": str(tmp_path / "harness")}
    path.write_text(micro_recipe.read_text() + f"  evaluate: {json.dumps(section)}\n")
    with pytest.raises(RecipeError, match="the harness has no task nosuch"):
        run_section(load_recipe(path), "evaluate")
    path.write_text(micro_recipe.read_text() + f"  evaluate: {json.dumps(section | {'lm_eval': []})}\n")
    with pytest.raises(RecipeError, match="nothing to evaluate: give `tasks`, or `lm_eval`"):
        load_recipe(path)
