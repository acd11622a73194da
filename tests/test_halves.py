"""Weights in the parent's precision: frozen ones stay in bfloat16 and give the numbers of float32 ones; what is
published has the parent's precision, or the recipe's."""

import json
import shutil
from functools import cache
from math import log

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from handoff.parent import open_parent
from reward.learned import score
from rollout.halves import Half, computes_in, keep_halves
from rollout.lean import Lean, fits
from stages.ppo import setup
from tests.stage_chain import chain, foreign_checkpoint, run_stage, runs
from tests.test_adapter_ppo import lines, of
from training import engines
from training.config import AdapterConfig, ModelArguments, TrainedModelArguments
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.recipe import load_recipe
from training.shared import SharedBase

pytestmark = pytest.mark.slow  # models are trained and loaded again

ENGINE = engines.current()
IDS = torch.arange(6, 30).reshape(2, 12)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300, "bos_token_id": 1}
WIDE = SIZES | {"intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "eos_token_id": 2}
FAMILIES = {
    "qwen3": WIDE,
    "gemma2": WIDE,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300, "bos_token_id": 1, "eos_token_id": 2},
    "mixtral": WIDE | {"num_local_experts": 2},
}


def halved(source, folder):
    """A copy of a published model with its weights in bfloat16, as others publish theirs."""
    shutil.copytree(source, folder)
    path = folder / "model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


@cache
def published(family, tmp):
    """A foreign model of a family, in bfloat16."""
    folder = foreign_checkpoint(tmp)
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **FAMILIES[family])
    config.vocab_size = max(config.vocab_size, AutoConfig.from_pretrained(folder).vocab_size)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    return open_parent(str(folder), folder, {"causal_lm"})


def load(parent, **keys):
    return Model.load(ENGINE, parent, "policy", load_encoder(parent), ModelArguments(), dropout=False, **keys)


def size(module):
    return sum(p.numel() * p.element_size() for p in module.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_frozen_weights_in_bfloat16_give_the_numbers_of_float32_ones(family, tmp_path):
    parent = published(family, tmp_path)
    whole, kept = load(parent), load(parent, dtype=None, frozen=True)
    assert size(kept.module) < (0.75 if family == "gpt2" else 0.55) * size(whole.module)  # positions stay float32
    assert kept.dtype == computes_in(kept.module) == torch.float32
    for autocast in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first, second = (model.module.eval()(input_ids=IDS).logits for model in (whole, kept))
        assert torch.equal(first, second), f"autocast {autocast}"


def test_an_adapter_learns_the_same_on_weights_in_bfloat16(tmp_path):
    """DoRA, too, and modules that are trained as a whole, which are float32."""
    parent = published("qwen3", tmp_path)
    config = AdapterConfig(r=4, use_dora=True, modules_to_save=["embed_tokens"])
    gradients = []
    for dtype in (torch.float32, None):
        module = load(parent, dtype=dtype, adapter=config, seed=1).module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert {p.dtype for p in trained.values()} == {torch.float32} and any(
            "embed_tokens" in name for name in trained
        )
        module.train()(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in trained.values()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


def test_the_backward_pass_makes_its_float32_copies_from_the_originals(tmp_path):
    """So a pass keeps no float32 copy of the network: a weight that is set to zero in between gives no gradient."""
    module = load(published("qwen3", tmp_path), dtype=None, frozen=True).module.requires_grad_(False)
    layer = module.model.layers[0].mlp.up_proj
    assert isinstance(layer, Half) and isinstance(layer, nn.Linear)
    x = torch.randn(3, 32, requires_grad=True)
    out = layer(x)
    with torch.no_grad():
        layer.weight.zero_()
    out.sum().backward()
    assert not x.grad.any()


def test_a_small_new_head_is_float32_and_the_fast_decoder_takes_such_a_model(tmp_path):
    parent = published("qwen3", tmp_path)
    reward = Model.load(
        ENGINE, parent, "reward", load_encoder(parent), ModelArguments(), dtype=None, frozen=True, seed=1
    )
    assert reward.module.get_submodule("score").weight.dtype == torch.float32
    kept, whole = load(parent, dtype=None, frozen=True).module, load(parent).module
    assert fits(kept) and fits(whole)
    first, second = Lean(kept)._head._weight, Lean(whole)._head._weight
    assert torch.equal(first.to_dense(), second.to_dense())


def test_an_architecture_that_reads_the_precision_of_its_head_is_loaded_in_float32(tmp_path):
    folder = foreign_checkpoint(tmp_path)
    sizes = {"hidden_size": 32, "num_heads": 4, "head_dim": 16, "num_hidden_layers": 1, "n_groups": 1, "state_size": 8}
    config = AutoConfig.for_model("mamba2", vocab_size=400, **sizes)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    parent = open_parent(str(folder), tmp_path, {"causal_lm"})
    assert {p.dtype for p in load(parent, dtype=None, frozen=True).module.parameters()} == {torch.float32}


def test_which_weights_stay_as_they_are_stored():
    assert trained_dtype(ENGINE, TrainedModelArguments(), None) is torch.float32
    assert trained_dtype(ENGINE, TrainedModelArguments(), AdapterConfig()) is None
    assert trained_dtype(ENGINE, TrainedModelArguments(dtype="float32"), AdapterConfig()) is torch.float32


def test_keeping_halves_leaves_a_float32_model_alone():
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen3", **WIDE))
    keep_halves(module)
    assert not any(isinstance(part, Half) for part in module.modules())


def test_a_reward_model_on_weights_in_bfloat16_scores_as_alone(half_sft, tmp_path):
    """Its adapter stands beside the policy's weights, in float32."""
    few = ("adapter.r=4", "train.max_steps=2", "train.learning_rate=1e-2")
    folder = run_stage("reward", tmp_path, f"parent={half_sft}", *few).folder
    parent = open_parent(str(half_sft), tmp_path, {"causal_lm"})
    reward = open_parent(str(folder), tmp_path, {"reward_model"})
    policy = load(parent, dtype=None, frozen=True)
    base = SharedBase(policy)
    policy.adapt(AdapterConfig(), 1)
    beside = base.model(reward, "reward", load_encoder(reward)).freeze()
    assert sum(isinstance(part, Half) for part in beside.module.modules()) > 8
    alone = Model.load(ENGINE, reward, "reward", load_encoder(reward), ModelArguments()).freeze()
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    assert torch.allclose(score(alone.module, rows, 2), score(beside.module, rows, 2), atol=1e-5)


def test_the_adapter_of_a_parent_stands_beside_weights_in_bfloat16(half_sft, micro_recipe, tmp_path, monkeypatch):
    """SFT, a reward model and PPO, each an adapter on a base in bfloat16, which no merge rounds."""
    few = ("adapter.r=4", "train.max_steps=2", "train.learning_rate=1e-2", "eval_answers=0")
    sft = run_stage("sft", tmp_path / "sft", f"parent={half_sft}", *few).folder
    reward = run_stage("reward", tmp_path / "reward", f"parent={sft}", *few[:3]).folder
    parent = open_parent(str(sft), tmp_path, {"causal_lm"})
    precise, policy = load(parent).module, load(parent, dtype=None, frozen=True)
    assert size(policy.module) < 0.65 * size(precise)
    ids = torch.arange(6, 30).reshape(2, 12)
    plain = load(open_parent(str(half_sft), tmp_path, {"causal_lm"})).module
    with torch.no_grad():
        assert (policy.module(ids).logits - precise(ids).logits).abs().max() < 1e-5
        assert (plain(ids).logits - precise(ids).logits).abs().max() > 1e-2
    scored = open_parent(str(reward), tmp_path, {"reward_model"})
    alone = Model.load(ENGINE, scored, "reward", load_encoder(scored), ModelArguments()).freeze()
    small = Model.load(
        ENGINE, scored, "reward", load_encoder(scored), ModelArguments(), dtype=None, frozen=True
    ).freeze()
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    assert torch.allclose(score(alone.module, rows, 2), score(small.module, rows, 2), atol=1e-5)
    assert size(small.module) < 0.8 * size(alone.module)  # two adapters of a tiny model
    keys = [f"parent={sft}", "reward=[{model: " + str(reward) + "}]", "train.iterations=2", "adapter.r=4"]
    seen = []
    setup_optimizer = setup.make_optimizer
    monkeypatch.setattr(
        "stages.ppo.train.make_optimizer", lambda model, *others: seen.append(model) or setup_optimizer(model, *others)
    )
    folder = of(micro_recipe, tmp_path, *keys, "guards={probe_prompts: 0, keep: last}")
    (trained,) = seen
    bases = {p.data_ptr() for name, p in trained.named_parameters() if name.endswith("proj.base_layer.weight")}
    assert bases and {p.dtype for p in trained.parameters() if p.data_ptr() in bases} == {torch.bfloat16}
    first = next(line for line in lines(folder) if line["step"] == 1)
    assert abs(first["objective/kl"]) < 1e-5 and first["val/first_ratio_deviation"] < 1e-5
    aligned = open_parent(str(folder), tmp_path, {"causal_lm"})
    assert aligned.manifest.adapter.stack == ["sft", "ppo"]
    with torch.no_grad():
        merged, beside = (load(aligned, **how).module(ids).logits for how in ({}, {"dtype": None, "frozen": True}))
    assert (merged - beside).abs().max() < 1e-5


# ---- what is published


@pytest.fixture(scope="module")
def half_sft(tmp_path_factory):
    chain()
    return halved(runs() / "tiny" / "sft" / "model", tmp_path_factory.mktemp("half") / "sft")


def of_published(run):
    return {v.dtype for v in run.weights.values()}, json.loads((run.folder / "model" / "config.json").read_text())[
        "dtype"
    ]


def test_a_stage_publishes_in_its_parents_precision(half_sft, tmp_path):
    """Trained in float32, so that it is rounded once; and the next stage's masters are float32 again."""
    few = ("train.max_steps=2", "train.learning_rate=1e-5", "eval_answers=0")
    run = run_stage("dpo", tmp_path, f"parent={half_sft}", *few)
    assert run.of("loss")[0] == pytest.approx(log(2), abs=1e-6)
    assert of_published(run) == ({torch.bfloat16}, "bfloat16")
    changed, as_published = (run.manifest.metrics[f"weights/{key}"] for key in ("changed", "changed_as_published"))
    assert as_published < 0.5 < changed
    state = load_file(run.folder / "state" / "step-2" / "model.safetensors")
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in run.weights.items())
    next_run = run_stage("sft", tmp_path, f"parent={run.folder}", *few, "publish_dtype=float32")
    assert of_published(next_run) == ({torch.float32}, "float32")
    assert next_run.manifest.metrics["weights/changed"] > 0.5


def test_a_merged_adapter_is_rounded_once_and_an_adapter_is_float32(half_sft, tmp_path):
    few = ("adapter.r=4", "train.max_steps=2", "eval_answers=0")
    alone = run_stage("dpo", tmp_path / "alone", f"parent={half_sft}", *few)
    assert {value.dtype for value in alone.weights.values()} == {torch.float32}
    assert alone.of("loss")[0] == pytest.approx(log(2), abs=1e-6)
    merged = run_stage("dpo", tmp_path / "merged", f"parent={half_sft}", *few, "adapter.merge=true")
    assert of_published(merged) == ({torch.bfloat16}, "bfloat16")
    parent = open_parent(str(alone.folder), tmp_path, {"causal_lm"})
    live = dict(load(parent).module.named_parameters())  # the base in float32, with the adapter merged
    assert all(torch.equal(value, live[name].bfloat16()) for name, value in merged.weights.items())


@pytest.mark.parametrize("adapter", [False, True])
def test_ratios_and_kl_start_as_those_of_float32_parents(micro_recipe, tmp_path, adapter):
    """PPO whose policy, reference, critic and reward model come from bfloat16 files: the ratio is 1 and the KL 0."""
    made = load_recipe(micro_recipe).run_dir
    sft, reward = (halved(made / name / "model", tmp_path / name) for name in ("sft", "reward"))
    keys = [f"parent={sft}", "reward=[{model: " + str(reward) + "}]", "train.iterations=1"]
    keys += ["guards={probe_prompts: 0, keep: last}"] + ["adapter.r=4"] * adapter
    folder = of(micro_recipe, tmp_path, *keys)
    first = next(line for line in lines(folder) if line["step"] == 1)
    assert abs(first["objective/kl"]) < 1e-5
    assert first["val/first_ratio_deviation"] < 1e-5
