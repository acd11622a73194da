"""The PPO stage as a whole, on a model of 0.2 M parameters: identities, independence of how it is cut."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from handoff.errors import GateError
from stages.ppo.actor_critic import ActorCritic
from tests import stage_chain
from training.recipe import RecipeError, load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow


def run_ppo(micro_recipe: Path, *overrides: str) -> tuple[dict[str, torch.Tensor], list[dict]]:
    recipe = load_recipe(micro_recipe, [f"ppo.{o}" for o in overrides])
    run_section(recipe, "ppo")
    return result(recipe.run_dir / "ppo")


def result(folder: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines = [{k: v for k, v in line.items() if not k.startswith("time/")} for line in lines]
    return load_file(folder / "model" / "model.safetensors"), lines


def steps(lines: list[dict]) -> list[dict]:
    return [line for line in lines if "episode" in line]


def test_without_learning_nothing_moves(micro_recipe):
    """lr = 0: every ratio is 1 and the KL 0, with answers of mixed length and padded prompts."""
    _, lines = run_ppo(micro_recipe, "train.learning_rate=0", "train.critic_learning_rate=0", "train.temperature=0.8")
    lengths = {line["completions/mean_length"] for line in steps(lines)}
    assert len(lengths) > 1 and max(lengths) < 24
    for line in steps(lines):
        assert abs(line["val/ratio"] - 1) < 1e-5
        assert line["val/first_ratio_deviation"] < 1e-5
        assert abs(line["objective/kl"]) < 1e-4  # a sum over some twenty tokens
        assert line["policy/clipfrac_avg"] == 0
        assert line["policy/approxkl_avg"] < 1e-9


def test_it_learns_what_is_rewarded(micro_recipe):
    """Shorter answers pay: the held-out score rises, the KL stays bounded, the metrics carry TRL's names."""
    _, lines = run_ppo(
        micro_recipe,
        'reward=[{"function": "length_penalty", "args": {"free": 4}}]',
        "train.iterations=16",
        "train.kl_coef=0.01",
        "train.missing_eos_penalty=0",
        "train.rollout_batch_size=32",
        "train.sample_iterations=16",
        "train.learning_rate=3e-3",
    )
    looks = [line for line in lines if "eval/scores" in line]
    assert looks[-1]["eval/scores"] > looks[0]["eval/scores"] + 0.5
    assert 0 < steps(lines)[-1]["objective/kl"] < 50
    names = {"objective/rlhf_reward", "policy/clipfrac_avg", "loss/value_avg", "val/num_eos_tokens"}
    assert names <= steps(lines)[-1].keys()


def test_what_is_saved_is_what_was_trained(micro_recipe, monkeypatch):
    """The published policy, loaded by transformers alone, gives the logits of the policy in memory."""
    kept = {}

    class Remembering(ActorCritic):
        def __init__(self, policy, critic):
            super().__init__(policy, critic)
            kept["policy"] = policy

    monkeypatch.setattr("stages.ppo.train.ActorCritic", Remembering)
    run_ppo(micro_recipe, "guards.keep=last")
    loaded = AutoModelForCausalLM.from_pretrained(load_recipe(micro_recipe).run_dir / "ppo" / "model")
    ids = torch.arange(8, 32).reshape(2, 12)
    kept["policy"].set_attn_implementation("sdpa")  # in training it has one that reads rows without padding
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, kept["policy"].eval()(input_ids=ids).logits)


def test_how_a_step_is_cut_changes_nothing(micro_recipe):
    weights, lines = run_ppo(micro_recipe)
    for size, rollout in ((1, 3), (8, 64)):
        other, others = run_ppo(
            micro_recipe, f"train.per_device_train_batch_size={size}", f"train.rollout_micro_batch_size={rollout}"
        )
        for a, b in zip(steps(lines), steps(others), strict=True):
            assert a["loss/policy_avg"] == pytest.approx(b["loss/policy_avg"], abs=1e-5)
            assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
        for name, tensor in weights.items():
            assert torch.allclose(tensor, other[name], atol=1e-4), name


def test_kl_in_the_loss_and_an_adaptive_coefficient(micro_recipe):
    _, lines = run_ppo(micro_recipe, "train.kl_in=loss", "train.kl_controller=adaptive", "train.kl_horizon=100")
    first, *_, last = steps(lines)
    assert first["objective/non_score_reward"] == last["objective/non_score_reward"] == 0
    assert last["objective/kl_coef"] < first["objective/kl_coef"]  # the KL is below its target


def test_it_stops_when_the_policy_has_left_the_reference(micro_recipe):
    with pytest.raises(GateError, match=r"nats from the reference, above guards.kl_limit 0\.5"):
        run_ppo(
            micro_recipe, "guards.kl_limit=0.5", "train.learning_rate=0.05", "train.kl_coef=0", "train.iterations=20"
        )


def test_batches_that_do_not_divide_are_refused(micro_recipe):
    with pytest.raises(RecipeError, match="rollout_batch_size 16 is not a multiple of num_mini_batches 3"):
        load_recipe(micro_recipe, ["ppo.train.num_mini_batches=3"])


# fmt: off
GOLDEN_SCORES = [
    -1.421875, -0.59375, -0.796875, -0.484375, -0.703125, -0.21875, -0.265625, -0.171875, -0.015625, -0.140625,
    -0.203125, -0.03125, 0.0, -0.046875, 0.0, -0.015625, -0.015625, 0.0, 0.0, 0.0,
]
GOLDEN_POLICY_LOSSES = [
    -0.014746, -0.008609, -0.015426, -0.01531, -0.007215, -0.01763, -0.014969, -0.02016, -0.022231, -0.016072,
    -0.019104, -0.018343, -0.023787, -0.034791, -0.027955, -0.021998, -0.010972, -0.019775, -0.003703, -0.007516,
]
# fmt: on


def test_golden_curve(tmp_path):
    """20 iterations on data that no generator makes; one thread of an x86 CPU, torch 2.13.0 (see CONTRIBUTING.md)."""
    path = tmp_path / "golden.yaml"
    path.write_text(
        f"""
name: golden
output_root: {tmp_path}
seed: 3
data_root: {stage_chain.chain().parent}
stages:
  ppo:
    parent: {stage_chain.runs() / "tiny" / "sft"}
    reward: [{{function: length_penalty, args: {{free: 4}}}}]
    data: [{{source: file, path: chats.jsonl}}]
    guards: {{max_truncated: 1}}
    train: {{iterations: 20, rollout_batch_size: 16, max_completion_length: 16, learning_rate: 1.0e-3,
             critic_learning_rate: 1.0e-3, adam_epsilon: 1.0e-4, kl_coef: 0.01, lr_decay: none}}
"""
    )
    recipe = load_recipe(path)
    run_section(recipe, "ppo")
    _, lines = result(recipe.run_dir / "ppo")
    lines = steps(lines)
    assert [line["objective/scores"] for line in lines] == pytest.approx(GOLDEN_SCORES, rel=1e-4)
    assert [line["loss/policy_avg"] for line in lines] == pytest.approx(GOLDEN_POLICY_LOSSES, rel=1e-3, abs=1e-5)
