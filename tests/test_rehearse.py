"""`baton rehearse`: a recipe's stages with tiny models of the same architectures, on a sample of its data."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from handoff.errors import HandoffError
from handoff.files import hash_tree
from handoff.parent import outline
from tests.rehearsing import rehearsed
from tests.test_families import FAMILIES, publish
from training.recipe import load_recipe
from training.shrink import shrunk, shrunk_network, write_tiny

pytestmark = pytest.mark.slow


def rows(folder: Path) -> None:
    """Chats, pairs and prompts, a few more than a rehearsal reads."""
    asked = [f"Sort the words: pear{n}, apple" for n in range(80)]
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "apple, pear"}]} for q in asked
    ]
    pairs = [{"prompt": q, "chosen": "apple, pear", "rejected": "pear"} for q in asked]
    prompts = [{"prompt": q, "answer": "apple, pear"} for q in asked]
    for name, made in (("chats", chats), ("pairs", pairs), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in made))


def recipe(folder: Path, **sections: dict[str, Any]) -> Path:
    rows(folder)
    path = folder / "own.yaml"
    text = {"name": "own", "output_root": str(folder / "runs"), "data_root": str(folder), "stages": sections}
    path.write_text(yaml.safe_dump(text, sort_keys=False))
    return path


def source(name: str, **keys: Any) -> list[dict[str, Any]]:
    return [{"source": "file", "path": f"{name}.jsonl", **keys}]


LONG = {"max_steps": 5000, "global_batch_size": 64, "warmup_steps": 500, "bf16": True, "report_to": "wandb"}


def test_every_stage_runs_hands_over_and_leaves_no_trace(tmp_path, capsys):
    publish(tmp_path / "model", "Qwen3")
    before = hash_tree(tmp_path / "model")
    parts = {
        "data": source("chats", holdout=0.2, split="train"),
        "eval_data": source("chats", holdout=0.2, split="test"),
    }
    path = recipe(
        tmp_path,
        sft={"parent": str(tmp_path / "model"), **parts, "max_new_tokens": 500, "adapter": {"r": 8}, "train": LONG},
        reward={"stage": "reward_model", "parent": "sft", "data": source("pairs", holdout=0.2, split="train"),
                "eval_data": source("pairs", holdout=0.2, split="test"),
                "gate": {"min_accuracy": 1.0}, "train": LONG},
        ppo={"parent": "sft", "data": source("prompts"), "reward": [{"model": "reward"}, {"function": "exact_match"}],
             "train": {"iterations": 900, "max_completion_length": 900, "rollout_batch_size": 512}},
        evaluate={"models": [str(tmp_path / "model"), "ppo"],
                  "tasks": [{"name": "t", "data": source("prompts"), "max_new_tokens": 900}]},
    )  # fmt: skip
    assert rehearsed(path, "reward.train.max_steps=1") == 0
    said = capsys.readouterr().out
    assert "rehearsed in" in said and "sft, reward, ppo, evaluate" in said
    assert f"{tmp_path / 'model'}: a qwen3 of 2 layers" in said and "random weights" in said
    assert "reward.train.max_steps" not in said and "train.max_steps=1" in said, "the user's own value is less"
    assert f"baton plan {path}" in said and "not checked" in said
    assert list((tmp_path / "runs").iterdir()) == []
    assert hash_tree(tmp_path / "model") == before


def test_a_stage_that_fails_is_named_with_its_own_error_and_the_code_is_2(tmp_path, capsys):
    publish(tmp_path / "model", "Llama 3")
    path = recipe(tmp_path, sft={"parent": str(tmp_path / "model"), "data": source("chats"), "max_length": 8})
    assert rehearsed(path) == 2
    said = capsys.readouterr()
    assert "max_length is 8" in said.err and "sft failed" in said.err
    assert "--keep" in said.err and "repeat:" not in said.err
    assert list((tmp_path / "runs").iterdir()) == []


def test_with_keep_the_run_stays_and_has_the_parents_tokenizer_and_stop_ids(tmp_path, capsys):
    publish(tmp_path / "model", "Gemma 3")
    path = recipe(tmp_path, sft={"parent": str(tmp_path / "model"), "data": source("chats")},
                  dpo={"parent": "sft", "data": source("pairs")})  # fmt: skip
    assert rehearsed(path, to=["sft"], keep=True) == 0
    (kept,) = (tmp_path / "runs").iterdir()
    assert f"kept: {kept / 'own'}" in capsys.readouterr().out
    assert not (kept / "own" / "dpo").exists(), "--to leaves it out"
    made = AutoModelForCausalLM.from_pretrained(kept / "own" / "sft" / "model")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "model")
    ours = AutoTokenizer.from_pretrained(kept / "own" / "sft" / "model")
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    assert made.config.vocab_size == AutoConfig.from_pretrained(tmp_path / "model").vocab_size


def test_a_parent_that_is_not_at_hand_is_refused_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    path = recipe(tmp_path, sft={"parent": "nobody/nothing", "data": source("chats")})
    with pytest.raises(HandoffError, match=r"nobody/nothing.*hf download nobody/nothing"):
        rehearsed(path)
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_adapter_is_rehearsed_as_a_whole_model_of_its_base(tmp_path):
    from peft import LoraConfig, get_peft_model

    publish(tmp_path / "model", "Mistral")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    seen = outline(str(tmp_path / "adapter"), tmp_path / "runs" / "own")
    assert seen.adapted and seen.config_dir == tmp_path / "model" and seen.kind == "causal_lm"
    assert write_tiny(seen, tmp_path / "tiny").model_type == "mistral"
    assert (tmp_path / "tiny" / "tokenizer.json").read_bytes() == (tmp_path / "model" / "tokenizer.json").read_bytes()
    assert not (tmp_path / "tiny" / "adapter_config.json").exists()


KINDS = [*sorted({kind for kind, _, _ in FAMILIES.values()} - {"granitemoehybrid"}), "gemma3"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiny_network_is_one_of_its_architecture_with_the_same_vocabulary_and_window(kind):
    whole = AutoConfig.for_model(kind)
    if kind != "gemma3":
        whole.vocab_size, whole.pad_token_id = 512, None
    small = shrunk(whole)
    made = AutoModelForCausalLM.from_config(small, dtype=torch.bfloat16)
    inner, theirs = small.get_text_config(), whole.get_text_config()
    outside = sum(p.numel() for name, p in made.named_parameters() if p.shape[0] != inner.vocab_size)
    assert 0 < outside < 200_000
    assert inner.vocab_size == theirs.vocab_size and type(small) is type(whole)
    assert getattr(inner, "max_position_embeddings", 0) == getattr(theirs, "max_position_embeddings", 0)
    assert set(getattr(inner, "layer_types", None) or ()) == set(getattr(theirs, "layer_types", None) or ())
    assert torch.isfinite(made(input_ids=torch.arange(9)[None]).logits).all()


def test_a_recipes_own_network_keeps_the_keys_that_are_no_sizes():
    keys = {"architecture": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36, "rms_norm_eps": 1e-5}
    small = shrunk_network(keys)
    assert small["architecture"] == "qwen3" and small["rms_norm_eps"] == 1e-5
    assert small["hidden_size"] < 100 and small["num_hidden_layers"] == 2 and small["num_key_value_heads"] <= 4


def test_every_source_is_limited_wherever_a_section_names_it(tmp_path):
    tasks = [
        {"name": "t", "data": source("prompts")},
        {"name": "arc", "kind": "choices", "data": source("chats", limit=3)},
    ]
    path = recipe(
        tmp_path,
        sft={"parent": str(tmp_path), "data": source("chats"), "eval_data": source("chats", limit=2)},
        evaluate={"models": ["sft"], "tasks": tasks},
    )
    sections = load_recipe(path).sections
    laid = {name: sections[name].config.rehearsal(processes=3) for name in sections}
    limits = {f"{name}.{key}": value for name in laid for key, value in laid[name].items() if key.endswith(".limit")}
    assert limits == {
        "sft.data.0.limit": 64,
        "sft.eval_data.0.limit": 2,
        "evaluate.tasks.0.data.0.limit": 4,
        "evaluate.tasks.1.data.0.limit": 3,
    }
    assert laid["sft"]["train.global_batch_size"] == 6, "a multiple of the processes"
