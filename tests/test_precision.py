"""Precision of trained weights: bfloat16 ones move at every learning rate, and the changed share is reported."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import stage_chain
from training.config import TrainedModelArguments
from training.engines.deepspeed import DeepSpeed
from training.engines.launch import LaunchError, Request
from training.engines.single import Single
from training.parent_weights import ChangeTally
from training.precision import trained_dtype
from training.recipe import RecipeError, load_recipe
from training.rounding import StochasticAdamW, round_stochastically
from training.run import run_section

BF16 = "model_args.dtype=bfloat16"


def test_bfloat16_weights_take_any_learning_rate_but_no_muon(micro_recipe):
    load_recipe(micro_recipe, [f"sft.{BF16}", "sft.train.learning_rate=1e-6"])
    with pytest.raises(RecipeError, match=r"pretrain: model_args.dtype: bfloat16 weights are stepped by AdamW alone"):
        load_recipe(micro_recipe, [f"pretrain.{BF16}", "pretrain.train.optim=muon"])


def test_an_engine_that_trains_float32_refuses_it():
    engine = DeepSpeed(Request("deepspeed", 2, 2, "cpu"))
    assert trained_dtype(engine, TrainedModelArguments(), None) is torch.float32
    with pytest.raises(LaunchError, match="no effect under deepspeed"):
        trained_dtype(engine, TrainedModelArguments(dtype="bfloat16"), None)


def stepped(kind, rate: float, dtype=torch.bfloat16, steps: int = 200) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """Weights of a model's size before and after some steps, float32, and the optimizer's state."""
    torch.manual_seed(0)
    start = (torch.rand(4000) * 0.028 + 0.002).bfloat16()
    weights = torch.nn.Parameter(start.to(dtype))
    optimizer = kind([weights], rate)
    for _ in range(steps):
        weights.grad = (torch.randn(4000) + 0.5).to(dtype)
        optimizer.step()
    return start.float(), weights.detach().float(), optimizer.state[weights]


def plain(parameters, rate):
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=0.01)


def stochastic(parameters, rate, seed=0):
    return StochasticAdamW(parameters, seed, lr=rate, weight_decay=0.01)


def test_stochastic_rounding_moves_weights_where_plain_bfloat16_does_not():
    """At a rate of 1e-6, and on average as far as float32 weights move; the second moment does not stall either."""
    start, exact, exact_state = stepped(plain, 1e-6, torch.float32)
    _, lost, _ = stepped(plain, 1e-6)
    _, ours, state = stepped(stochastic, 1e-6)
    assert torch.equal(lost, start)
    assert (ours != start).float().mean() > 0.5
    assert (ours - start).mean().item() == pytest.approx((exact - start).mean().item(), rel=0.05)
    wanted = exact_state["exp_avg_sq"]
    assert state["exp_avg_sq"].float().mean().item() == pytest.approx(wanted.mean().item(), rel=0.01)
    _, _, stalled = stepped(plain, 1e-6)
    assert stalled["exp_avg_sq"].float().mean().item() != pytest.approx(wanted.mean().item(), rel=0.01)


def test_a_step_of_stochastic_adamw_is_that_of_adamw():
    """Where the step is large against the rounding."""
    start, exact, _ = stepped(plain, 1e-3, torch.float32, steps=3)
    _, ours, state = stepped(stochastic, 1e-3, steps=3)
    assert ((ours - exact).abs() <= 3 / 128 * torch.maximum(start, exact)).all()  # at most one number a step
    assert (ours - exact).mean().abs() < 0.01 * (exact - start).mean().abs()
    assert {key: value.dtype for key, value in state.items()} == {
        "step": torch.float32,
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }


def test_rounding_goes_to_a_neighbour_and_keeps_the_mean():
    drawn = torch.Generator().manual_seed(1)
    for value in (1.001, -3.0017, 1e-9, 0.0):
        found = round_stochastically(torch.full((20000,), value), drawn).double()
        assert len(found.unique()) <= 2 and (found - value).abs().max().item() <= abs(value) / 128
        assert found.mean().item() == pytest.approx(value, rel=1e-4)
    whole = torch.tensor([1.5, -0.0078125, 3e38]).bfloat16().float()
    assert torch.equal(round_stochastically(whole, drawn).float(), whole)


def test_rounding_depends_on_seed_and_step_and_not_on_the_global_stream():
    """A run that goes on from the state after two steps ends as the undisturbed one, whatever else was drawn."""

    def trained(steps: int, seed: int, saved=None):
        torch.manual_seed(steps)
        weights = [torch.nn.Parameter(torch.linspace(-1, 1, 600).bfloat16()) for _ in range(2)]
        optimizer = stochastic(weights, 1e-4, seed)
        if saved is not None:
            for weight, value in zip(weights, saved[0], strict=True):
                weight.data.copy_(value)
            optimizer.load_state_dict(saved[1])
        for _ in range(steps):
            torch.rand(7)
            for weight in weights:
                weight.grad = weight.detach() * 0.1
            optimizer.step()
        return [weight.detach().clone() for weight in weights], deepcopy(optimizer.state_dict())

    whole, half = trained(4, seed=3), trained(2, seed=3)
    again = trained(2, seed=3, saved=half)
    assert all(torch.equal(one, other) for one, other in zip(whole[0], again[0], strict=True))
    assert not torch.equal(whole[0][0], trained(4, seed=4)[0][0])
    assert not torch.equal(whole[0][0], whole[0][1])  # two equal parameters are rounded independently


@pytest.mark.parametrize(
    ("asked", "device", "installed", "compiled", "chosen"),
    [
        ("auto", "cuda", True, False, True),
        ("auto", "cuda", True, True, False),  # the compiler fuses the same parts
        ("auto", "cuda", False, False, False),
        ("auto", "cpu", True, False, False),
        (False, "cuda", True, False, False),
        (True, "cuda", True, True, True),
        (True, "cuda", False, False, "needs the package liger-kernel"),
        (True, "cpu", True, False, "needs a CUDA GPU"),
    ],
)
def test_when_ligers_kernels_are_used(asked, device, installed, compiled, chosen):
    engine = Single(Request("single", None, 1, device))
    if isinstance(chosen, str):
        with pytest.raises(LaunchError, match=chosen):
            engine.choose_liger(asked, installed=installed, compiled=compiled)
    else:
        assert engine.choose_liger(asked, installed=installed, compiled=compiled) is chosen


def test_ligers_kernels_come_without_its_loss(tmp_path, monkeypatch):
    """With a stand-in for the package, on an engine that says it has a GPU."""
    given = []
    monkeypatch.setattr("training.trainer.liger.apply_liger_kernel", lambda model, keys: given.append((model, keys)))
    few = ("train.max_steps=1", "eval_answers=0")
    stage_chain.run_stage("sft", tmp_path / "cpu", *few)
    assert not given  # `auto` on a CPU
    monkeypatch.setattr(Single, "choose_liger", lambda self, asked, **keys: True)
    stage_chain.run_stage("sft", tmp_path / "gpu", *few)
    ((model, keys),) = given
    assert type(model).__name__ == "LlamaForCausalLM" and not any(keys.values())


def test_what_counts_as_changed(tmp_path):
    """Half of one tensor changed; rounding to the trained precision, a new head and another shape do not count."""
    torch.manual_seed(0)
    parent = {"a": torch.randn(8), "b": torch.randn(8), "resized": torch.randn(3)}
    save_file(parent, tmp_path / "model.safetensors")
    weights = {"a": parent["a"].bfloat16().float(), "b": parent["b"].bfloat16().float()}
    weights["b"][:4] += 1
    weights |= {"head": torch.randn(2), "resized": torch.randn(4)}
    tally = ChangeTally(SimpleNamespace(weights_dir=tmp_path, kind="causal_lm"), torch.bfloat16)
    assert tally.shares() == (None, None)
    for name, value in weights.items():
        tally.see(name, value, torch.float32)
    assert tally.shares() == (0.25, None)


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
