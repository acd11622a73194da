"""Precision of trained weights: settings that could not change them are refused, and the changed share is reported."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import stage_chain
from training.config import TrainedModelArguments
from training.engines.deepspeed import DeepSpeed
from training.engines.launch import LaunchError, Request
from training.model import trained_dtype
from training.parent_weights import ChangeTally
from training.recipe import RecipeError, load_recipe
from training.run import run_section

BF16 = "model_args.dtype=bfloat16"


@pytest.mark.parametrize("name", ["pretrain", "sft", "reward", "dpo", "ppo"])
def test_bfloat16_weights_with_too_small_a_step_are_refused(micro_recipe, tmp_path, name):
    path = tmp_path / "recipe.yaml"
    path.write_text(micro_recipe.read_text() + "  dpo: {parent: sft, data: [{source: world, kind: preferences}]}\n")
    load_recipe(path, [f"{name}.{BF16}", f"{name}.train.learning_rate=1e-4"])
    load_recipe(path, [f"{name}.train.learning_rate=1e-6"])
    with pytest.raises(RecipeError, match=rf"{name}: train.learning_rate 9e-05 is too small for model_args.dtype bf"):
        load_recipe(path, [f"{name}.{BF16}", f"{name}.train.learning_rate=9e-5"])


def test_the_critics_rate_counts_where_there_is_a_critic(micro_recipe):
    keys = [f"ppo.{BF16}", "ppo.train.critic_learning_rate=1e-6"]
    with pytest.raises(RecipeError, match=r"ppo: train.critic_learning_rate 1e-06 is too small.*float32; autocast"):
        load_recipe(micro_recipe, keys)
    load_recipe(micro_recipe, [f"ppo.{BF16}", "ppo.advantage=global_baseline"])


def test_an_engine_that_trains_float32_refuses_it():
    engine = DeepSpeed(Request("deepspeed", 2, 2, "cpu"))
    assert trained_dtype(engine, TrainedModelArguments()) is torch.float32
    with pytest.raises(LaunchError, match="no effect under deepspeed"):
        trained_dtype(engine, TrainedModelArguments(dtype="bfloat16"))


def test_why_there_is_a_limit():
    """Two hundred AdamW steps on weights of a model's size: at 1e-6 not one in a thousand changes, at 1e-4 most do."""
    moved = {}
    for rate in (1e-6, 1e-4):
        torch.manual_seed(0)
        start = (torch.rand(1000) * 0.028 + 0.002).bfloat16()
        weights = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW([weights], lr=rate, weight_decay=0.0)
        for _ in range(200):
            weights.grad = torch.randn(1000).bfloat16() + 0.5
            optimizer.step()
        moved[rate] = (weights != start).float().mean().item()
    assert moved[1e-6] == 0 and moved[1e-4] > 0.9


def test_what_counts_as_changed(tmp_path):
    """Half of one tensor changed; rounding to the trained precision, a new head and another shape do not count."""
    torch.manual_seed(0)
    parent = {"a": torch.randn(8), "b": torch.randn(8), "resized": torch.randn(3)}
    save_file(parent, tmp_path / "model.safetensors")
    weights = {"a": parent["a"].bfloat16().float(), "b": parent["b"].bfloat16().float()}
    weights["b"][:4] += 1
    weights |= {"head": torch.randn(2), "resized": torch.randn(4)}
    tally = ChangeTally(SimpleNamespace(weights_dir=tmp_path, kind="causal_lm"), torch.bfloat16)
    assert tally.share() is None
    for name, value in weights.items():
        tally.see(name, value)
    assert tally.share() == 0.25


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sft", "dpo", "reward"])
def test_float32_weights_move_at_the_rates_of_alignment(tmp_path, name):
    run = stage_chain.run_stage(name, tmp_path, "train.max_steps=2", "train.learning_rate=1e-6")
    parent = load_file(stage_chain.runs() / "tiny" / stage_chain.PARENTS[name] / "model" / "model.safetensors")
    moved = {key: (run.weights[key] != value).flatten() for key, value in parent.items()}
    changed = run.manifest.metrics["weights/changed"]
    assert run.lines[-1] == {"step": 2, "weights/changed": changed}
    assert changed == pytest.approx(torch.cat(list(moved.values())).float().mean().item())
    if name == "reward":  # no gradient reaches the embedding of a token that is in no row
        del moved["model.embed_tokens.weight"]
    assert torch.cat(list(moved.values())).float().mean() > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "reward"])
def test_bfloat16_weights_train_and_resume(tmp_path, name):
    """They stay bfloat16, they learn, and a resumed run ends bit for bit the same."""
    keys = [BF16, "train.learning_rate=1e-3", "train.max_steps=8", "train.save_steps=4"]
    whole = stage_chain.run_stage(name, tmp_path, *keys)
    for value in whole.weights.values():
        assert value.dtype == torch.float32 and torch.equal(value, value.bfloat16().float())
    if name != "pretrain":
        assert 0.5 < whole.manifest.metrics["weights/changed"] <= 1
    saved = load_file(whole.folder / "state" / "step-4" / "model.safetensors")
    assert {value.dtype for key, value in saved.items() if key.endswith("weight")} == {torch.bfloat16}
    again = stage_chain.run_stage(name, tmp_path, *keys)  # from its state of step 4
    assert again.lines == whole.lines
    assert all(torch.equal(value, again.weights[key]) for key, value in whole.weights.items())


@pytest.mark.slow
@pytest.mark.parametrize("bf16", ["false", "true"])
def test_ppo_trains_bfloat16_weights(micro_recipe, bf16):
    keys = [f"ppo.{BF16}", f"ppo.train.bf16={bf16}", "ppo.guards.keep=last", "ppo.guards.mismatch_limit=0.5"]
    recipe = load_recipe(micro_recipe, keys)
    runs = []
    for _ in range(2):  # the second continues from the state of iteration 2
        run_section(recipe, "ppo")
        folder = recipe.run_dir / "ppo"
        runs.append((load_file(folder / "model" / "model.safetensors"), stage_chain.lines_of(folder)))
    (weights, lines), (again, others) = runs
    assert lines == others and all(torch.equal(value, again[key]) for key, value in weights.items())
    assert all(torch.equal(value, value.bfloat16().float()) for value in weights.values())
    assert 0.1 < lines[-1]["weights/changed"] <= 1
