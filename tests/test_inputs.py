"""What makes a stage stale: everything that its result depends on, and nothing else (training/inputs.py)."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

import data.shards
from data.config import HubSource
from data.errors import DataError
from data.fingerprint import fingerprint
from handoff.files import HashCache, write_json
from reward.judge_config import JudgeConfig
from tests.stage_chain import result, run_stage, stage_recipe
from training.closure import function_fingerprint
from training.inputs import effective, stage_inputs, without_effect
from training.recipe import load_recipe
from training.recipe_errors import models_in
from training.registry import Registry
from training.run import run_section

OPTIMIZER = {
    "per_device_train_batch_size", "gradient_checkpointing", "save_total_limit", "resume", "max_skipped_steps",
    "grace_seconds", "ddp_timeout", "report_to",
}  # fmt: skip
TRAIN = {*OPTIMIZER, "per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps"}
WITHOUT_EFFECT = {
    **dict.fromkeys(("PretrainTrainConfig", "SFTTrainConfig", "RewardTrainConfig", "DPOTrainConfig"), TRAIN),
    "PPOTrainConfig": {*OPTIMIZER, "rollout_micro_batch_size", "save_iterations"},
    "VLLMConfig": {
        "base_url", "timeout", "sync_timeout", "start_timeout", "retries", "retry_wait", "concurrency", "transfer",
        "weights_dir", "transfer_port", "gpu_memory_utilization", "tensor_parallel_size",
    },
    "stages.generate.config": {"batch_size"},
    "stages.evaluate.config": {"batch_size"},
    "JudgeConfig": {
        "api_key_env", "concurrency", "timeout", "retries", "backoff", "cache_dir", "price_per_million_input",
        "price_per_million_output", "max_cost",
    },
}  # fmt: skip
"""Class, or module of a stage's `Config`, -> the keys on which no result depends. All others count."""


def configurations() -> list[type[BaseModel]]:
    """Every class that holds keys of a section, at any depth."""
    registry = Registry()
    waiting: list[type[BaseModel]] = [registry.config_class(stage) for stage in registry.names] + [JudgeConfig]
    found: dict[type[BaseModel], None] = {}
    while waiting:
        model = waiting.pop()
        if model not in found:
            found[model] = None
            waiting += [inner for field in model.model_fields.values() for inner in models_in(field.annotation)]
    return list(found)


@pytest.mark.parametrize("model", configurations(), ids=lambda model: f"{model.__module__}.{model.__name__}")
def test_every_key_counts_or_is_listed_as_without_effect(model: type[BaseModel]) -> None:
    name = model.__module__ if model.__name__ == "Config" else model.__name__
    expected = WITHOUT_EFFECT.get(name, set())
    assert without_effect(model) == expected
    assert expected <= model.model_fields.keys(), "a key that does not exist"
    made = model.model_construct(**dict.fromkeys(model.model_fields, 1))
    assert effective(made).keys() == model.model_fields.keys() - expected


def test_the_configurations_reach_what_sections_hold() -> None:
    names = {model.__name__ for model in configurations()}
    assert {"Gate", "PPOTrainConfig", "GuardConfig", "VLLMConfig", "ScoreConfig", "HubSource", "JudgeConfig"} <= names


RECIPE = """
name: r
stages:
  tokenizer: {data: [{source: world, kind: documents, size: 10}]}
  base: {stage: pretrain, parent: tokenizer, data: [{source: world, kind: documents}]}
  scored:
    stage: evaluate
    models: [base]
    tasks: [{name: world, data: [{source: world, kind: prompts, size: 5}], scores: [SCORES]}]
"""


def scored(folder: Path, entry: str) -> Any:
    path = folder / "r.yaml"
    path.write_text(RECIPE.replace("SCORES", entry))
    return stage_inputs(load_recipe(path, [f"output_root={folder}"]), "scored")


def test_options_of_the_judge_that_change_no_verdict_do_not_count(tmp_path: Path) -> None:
    judge = "{{function: judge, name: j, args: {{base_url: http://localhost, model: m, {}}}}}"
    first = scored(tmp_path, judge.format("timeout: 5"))
    assert scored(tmp_path, judge.format("timeout: 9, cache_dir: x")) == first
    changed = scored(tmp_path, judge.format("timeout: 5, rubric: other"))
    assert changed.differences(first) == ["recipe: tasks.0.scores.0.args.rubric absent → other"]


def test_a_users_function_counts_with_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    entry = "{function: 'ours.scores:kind', name: k}"
    package = tmp_path / "ours"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "scores.py").write_text("import json\nfrom . import words\ndef kind(prompts, completions): ...\n")
    (package / "words.py").write_text("def f():\n    from helper import g\n")
    (tmp_path / "helper.py").write_text("import numpy\ng = 1\n")
    (tmp_path / "stranger.py").write_text("")
    first = scored(tmp_path, entry)
    (tmp_path / "stranger.py").write_text("changed = True\n")
    assert scored(tmp_path, entry) == first
    for path in (package / "scores.py", package / "__init__.py", package / "words.py", tmp_path / "helper.py"):
        before = scored(tmp_path, entry)
        path.write_text(path.read_text() + "# changed\n")
        assert scored(tmp_path, entry).differences(before) == ["reward function ours.scores:kind changed"], path


def test_a_users_function_that_is_broken_or_missing_has_a_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong with it is said where it is imported."""
    monkeypatch.chdir(tmp_path)
    missing = function_fingerprint("broken_one:f")
    (tmp_path / "broken_one.py").write_text("def f(:\n")
    broken = function_fingerprint("broken_one:f")
    assert broken != missing
    (tmp_path / "broken_one.py").write_text("def f(): ...\n")
    assert function_fingerprint("broken_one:f") not in (broken, missing)


def test_a_local_folder_under_a_hubs_name_counts_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = HubSource(source="hub", name="./rows")
    online = fingerprint(source, None)
    (tmp_path / "rows" / "data").mkdir(parents=True)
    (tmp_path / "rows" / "data" / "train.jsonl").write_text('{"text": "a"}\n')
    first = fingerprint(source, None)
    (tmp_path / "rows" / "data" / "train.jsonl").write_text('{"text": "b"}\n')
    second = fingerprint(source, None)
    (tmp_path / "rows" / "data" / "train.jsonl").rename(tmp_path / "rows" / "train.jsonl")
    assert len({online, first, second, fingerprint(source, None)}) == 4


def test_the_hash_of_a_file_that_was_just_changed_is_not_kept(tmp_path: Path) -> None:
    """Within the unit of a file system's clock, another change would have the same time."""
    path = tmp_path / "rows.jsonl"
    path.write_text("a")
    cache = HashCache(tmp_path / "hashes.json")
    first = cache.sha256(path)
    with path.open("r+") as file:  # the same size and inode
        file.write("b")
    os.utime(path)
    assert cache.sha256(path) != first
    cache.save()
    assert not (tmp_path / "hashes.json").exists()


def test_data_that_change_while_a_stage_reads_them_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "old words here"}\n' * 3)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nstages: {tokenizer: {data: [{source: file, path: rows.jsonl, format: text}]}}\n")
    loaded = load_recipe(
        recipe, [f"output_root={tmp_path / 'runs'}", f"data_root={tmp_path}", "tokenizer.vocab_size=300"]
    )
    read = data.shards.read

    def late(*arguments: Any) -> Any:
        rows.write_text('{"text": "new words here"}\n' * 3)
        return read(*arguments)

    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"file:rows\.jsonl: has changed since the stage"),
    ):
        patch.setattr(data.shards, "read", late)
        run_section(loaded, "tokenizer")
    assert not (tmp_path / "runs" / ".rows").exists()
    run_section(loaded, "tokenizer")


@pytest.fixture
def dropout(tmp_path: Path) -> Iterator[Path]:
    """A parent whose training draws random numbers at every step."""
    parent = run_stage("pretrain", tmp_path / "parent", "train.max_steps=1").folder / "model"
    config = json.loads((parent / "config.json").read_text())
    write_json(parent / "config.json", {**config, "attention_dropout": 0.2})
    for file in ("stage.json", "started.json"):
        (parent.parent / file).unlink()
    yield parent


@pytest.mark.slow
def test_keys_without_effect_change_no_weight_even_in_the_middle(dropout: Path, tmp_path: Path) -> None:
    keys = ("train.max_steps=6", f"parent={dropout}")
    plain = run_stage("sft", tmp_path / "plain", *keys)
    others = (
        "train.logging_steps=4", "train.eval_steps=2", "train.save_steps=3", "train.per_device_eval_batch_size=3",
        "train.gradient_checkpointing=true", "train.save_total_limit=1",
    )  # fmt: skip
    recipe = stage_recipe("sft", tmp_path / "cut", *keys, "train.save_steps=3")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("training.callbacks.FlowCallback.on_save", _interrupt)
        run_section(recipe, "sft")
    changed = stage_recipe("sft", tmp_path / "cut", *keys, *others)
    assert stage_inputs(changed, "sft") == stage_inputs(recipe, "sft")
    run_section(changed, "sft")
    resumed = result(changed, "sft")
    assert [line["step"] for line in resumed.lines if "loss" in line] == [1, 2, 3, 4, 6]
    assert all(torch.equal(plain.weights[name], resumed.weights[name]) for name in plain.weights)


def _interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt
