"""What limits a stage is known before its data is read: a model's window, and a batch that processes share."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from rollout.errors import RolloutError
from tests.stage_chain import foreign_checkpoint, run_stage, stage_recipe
from training.engines.launch import LaunchError
from training.engines.single import Single
from training.recipe import RecipeError
from training.run import run_section

pytestmark = pytest.mark.slow

WINDOW = 24


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A checkpoint with learned positions for `WINDOW` tokens, beyond which its forward pass is an error."""
    return with_window(tmp_path_factory.mktemp("gpt2") / "gpt2", WINDOW)


def with_window(place: Path, tokens: int) -> Path:
    folder = foreign_checkpoint(place)
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    (folder / "generation_config.json").unlink()
    torch.manual_seed(0)
    small = {"n_positions": tokens, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 1}
    config = GPT2Config(vocab_size=vocabulary, **small)
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_rows_longer_than_the_window_go_the_way_of_rows_that_are_too_long(name, gpt2, tmp_path, capsys):
    keys = (f"parent={gpt2}", "max_length=64", "train.max_steps=2", "max_drop_fraction=1.0")
    keys = (*keys, "eval_data=[]")
    short = run_stage(name, tmp_path / "short", *keys, f"max_length={WINDOW}")
    capsys.readouterr()
    done = run_stage(name, tmp_path / "long", *keys)
    said = capsys.readouterr().out
    assert f"max_length is {WINDOW} here, not 64: the window of gpt2, {WINDOW} tokens (n_positions" in said
    assert done.manifest.data["data"] == short.manifest.data["data"]
    assert 0 < done.manifest.data["data"]["data/rows_used"] < done.manifest.data["data"]["data/rows_in"]
    assert all(torch.equal(short.weights[key], done.weights[key]) for key in short.weights)
    with pytest.raises(ValueError, match="tokens"):
        run_stage(name, tmp_path / "error", *keys, "truncation=error")


def test_blocks_longer_than_the_window_are_refused(gpt2, tmp_path):
    with pytest.raises(RecipeError, match=rf"block_size is 48, more than the window of gpt2, {WINDOW} tokens"):
        run_stage("pretrain", tmp_path, f"parent={gpt2}", "model=null")
    assert not list(tmp_path.rglob("started.json"))


def test_questions_that_leave_no_room_for_an_answer_are_counted(tmp_path, capsys):
    parent = with_window(tmp_path / "gpt2", 64)
    run_stage("sft", tmp_path, f"parent={parent}", "train.max_steps=1", "max_new_tokens=50")
    assert "of 4 held-out questions are not answered: with max_new_tokens 50" in capsys.readouterr().out


@pytest.fixture(scope="module")
def longrope(tmp_path_factory):
    """A checkpoint that rotates all rows of a batch in another way when one of them passes `WINDOW` tokens."""
    folder = foreign_checkpoint(tmp_path_factory.mktemp("longrope") / "longrope")
    config = LlamaConfig.from_pretrained(folder)
    factors = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": WINDOW}
    config.rope_parameters = {"rope_theta": 1e4, "rope_type": "longrope", "factor": 4.0, **factors}
    config.max_position_embeddings = 4 * WINDOW
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "pretrain"])
def test_rows_that_would_change_the_positions_of_others_are_refused_before_the_first_step(name, longrope, tmp_path):
    keys = (f"parent={longrope}", "train.max_steps=1", "eval_data=[]")
    if name == "pretrain":
        keys = (*keys, "model=null", "isolate_documents=true")
        long, short = ("block_size=48",), (f"block_size={WINDOW}",)
    else:
        long, short = (), (f"max_length={WINDOW}", "max_drop_fraction=1.0")
    with pytest.raises(RolloutError, match=rf"passes {WINDOW} tokens, .* there are rows of up to \d+ tokens"):
        run_stage(name, tmp_path / "long", *keys, *long)
    assert not list((tmp_path / "long").rglob("metrics.jsonl"))
    run_stage(name, tmp_path / "short", *keys, *short)


# ---- batches


def test_the_micro_batch_is_a_cap(tmp_path, capsys):
    """8 rows do not divide a batch of 12, so 6 are taken, and the result is that of asking for 6."""
    keys = ("train.global_batch_size=12", "train.max_steps=2")
    asked = run_stage("sft", tmp_path / "asked", *keys, "train.per_device_train_batch_size=6")
    assert "per_device_train_batch_size" not in capsys.readouterr().out
    capped = run_stage("sft", tmp_path / "capped", *keys, "train.per_device_train_batch_size=8")
    assert "train.per_device_train_batch_size is 6 here, not 8" in capsys.readouterr().out
    assert capped.lines == asked.lines
    assert all(torch.equal(asked.weights[key], capped.weights[key]) for key in asked.weights)


def test_a_batch_that_the_processes_cannot_share_is_refused_before_any_data_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Single, "data_world", 3)
    recipe = stage_recipe("sft", tmp_path, "data=[{source: file, path: nowhere.jsonl}]")
    with pytest.raises(LaunchError, match="which 3 processes cannot share evenly"):
        run_section(recipe, "sft")
    assert not recipe.run_dir.exists()
