"""Adapters: what is adapted, the stages that train them, what they publish, and how the next stage takes it over."""

import dataclasses
import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from handoff.errors import HandoffError
from handoff.parent import open_parent
from handoff.verify import verify_run
from tests.stage_chain import chain, foreign_checkpoint, result, run_stage, runs, stage_recipe
from tests.test_resume import dies
from training import engines
from training.adapter import Adapter
from training.config import AdapterConfig, ModelArguments
from training.model import Model, load_encoder
from training.recipe import RecipeError, load_recipe
from training.run import run_section
from training.trainer import StageTrainer, fit

pytestmark = pytest.mark.slow  # models are trained and loaded again

ENGINE = engines.current()
IDS = torch.arange(8, 32).reshape(2, 12)
QUICK = ("adapter.r=4", "train.max_steps=4", "eval_answers=0")


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def loaded(ref, **keys):
    parent = open_parent(str(ref), runs(), {"causal_lm", "reward_model"})
    return Model.load(ENGINE, parent, "policy", load_encoder(parent), ModelArguments(), **keys)


def by_peft(folder, base):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / "model")


def remembered(monkeypatch, stage):
    """The model that the stage's trainer holds after its last step."""
    kept = {}

    def remember(run, trainer, *others, **named):
        fit(run, trainer, *others, **named)
        kept["logits"] = logits(trainer.model)
        kept["trained"] = [name for name, p in trainer.model.named_parameters() if p.requires_grad]

    monkeypatch.setattr(f"stages.{stage}.train.fit", remember)
    return kept


@pytest.fixture(scope="module")
def base():
    chain()
    return runs() / "tiny" / "pretrain" / "model"


# ---- the recipe's keys


def test_every_key_of_peft_is_taken_or_refused_with_a_reason():
    ours = AdapterConfig.model_fields.keys()
    theirs = {field.name for field in dataclasses.fields(LoraConfig)}
    assert theirs - ours - AdapterConfig.refused.keys() == set()
    assert ours - theirs == {"merge"}
    assert not ours & AdapterConfig.refused.keys()


def test_an_adapter_learns_at_ten_times_the_usual_rate_unless_the_recipe_says_otherwise(tmp_path):
    keys = ["sft.adapter.r=4", "sft.train.global_batch_size=8"]
    recipe = load_recipe(chain(), keys)
    assert recipe.sections["sft"].config.train.learning_rate == 1e-2  # the recipe's own
    plain = tmp_path / "recipe.yaml"
    plain.write_text(chain().read_text().replace("learning_rate: 1.0e-2, ", ""))
    assert load_recipe(plain).sections["sft"].config.train.learning_rate == 2e-5
    section = load_recipe(plain, keys).sections["sft"]
    assert section.config.train.learning_rate == section.resolved["train"]["learning_rate"] == pytest.approx(2e-4)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rr=4", "did you mean `r`|did you mean r"),
        ("adapter.r=0", "adapter.r"),
        ("adapter.bias=all", "adapter off is the reference"),
        ("adapter.init_lora_weights=pissa", "init_lora_weights"),
        ("adapter.layers_pattern=layers", "layers_to_transform"),
        ("adapter={}", None),
    ],
)
def test_keys_are_checked_before_anything_starts(override, message):
    if message is None:
        assert load_recipe(chain(), [f"sft.{override}"]).sections["sft"].config.adapter == AdapterConfig()
        return
    with pytest.raises(RecipeError, match=message):
        load_recipe(chain(), [f"sft.{override}"])


def test_muon_and_an_adapter_are_refused_together():
    with pytest.raises(RecipeError, match="muon orthogonalises whole weight matrices"):
        load_recipe(chain(), ["sft.adapter.r=4", "sft.train.optim=muon"])


# ---- what is adapted


def llama(**keys):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, **keys))


def adapted(module, **keys):
    Adapter(module, AdapterConfig(**keys), seed=1)
    return [name.removesuffix(".lora_A.default.weight") for name, _ in module.named_parameters() if "lora_A" in name]


def test_all_linear_layers_but_the_head_are_adapted():
    names = adapted(llama())
    assert len(names) == 3 * 7 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    ("keys", "count"),
    [
        ({"target_modules": ["q_proj", "layers.1.mlp.up_proj"]}, 4),
        ({"target_modules": r".*\.(q|v)_proj"}, 6),
        ({"exclude_modules": ["down_proj"]}, 18),
        ({"layers_to_transform": [0, 2]}, 14),
        ({"target_modules": ["o_proj"], "layers_to_transform": [1], "layers_pattern": "layers"}, 1),
    ],
)
def test_the_recipe_chooses_layers(keys, count):
    assert len(adapted(llama(), **keys)) == count


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"target_modules": ["q_prj"]}, "no linear layer's name ends with q_prj.*did you mean"),
        ({"target_modules": ["lm_head"]}, "embeddings, head .* cannot be adapted"),
        ({"target_modules": "q_proj"}, "fits no linear layer's whole name"),
        ({"layers_to_transform": [5]}, "has no layer 5"),
        ({"rank_pattern": {"qq": 3}}, "adapter.rank_pattern: no adapted layer's name ends with qq"),
        ({"modules_to_save": ["nom"]}, "no module's name ends with nom"),
        ({"exclude_modules": r".*_proj"}, "no layer is left"),
    ],
)
def test_a_key_that_names_nothing_is_refused(keys, message):
    with pytest.raises(RecipeError, match=message):
        adapted(llama(), **keys)


def test_a_tied_embedding_is_not_trained_as_a_whole():
    with pytest.raises(RecipeError, match="shares its weights"):
        adapted(llama(tie_word_embeddings=True), modules_to_save=["embed_tokens"])


def test_initial_values_depend_on_the_seed_only():
    found = []
    for noise, seed in ((1, 1), (2, 1), (2, 2)):
        module = llama()
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        found.append(Adapter(module, AdapterConfig(r=4), seed).own())
        assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


# ---- a stage


def test_sft_publishes_an_adapter_that_loads_with_plain_peft(tmp_path, monkeypatch, base):
    kept = remembered(monkeypatch, "sft")
    run = run_stage("sft", tmp_path, *QUICK, "adapter.modules_to_save=[norm]")
    files = {path.name for path in (run.folder / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= files
    assert "model.safetensors" not in files
    assert (logits(by_peft(run.folder, base)) - kept["logits"]).abs().max() < 1e-5
    assert (logits(loaded(run.folder).module) - kept["logits"]).abs().max() < 1e-5
    assert (logits(loaded(base.parent).module) - kept["logits"]).abs().max() > 1e-2
    state = load_file(run.folder / "state" / "step-4" / "model.safetensors")
    assert state.keys() == set(kept["trained"]) and all("lora" in n or "norm" in n for n in state)
    record = run.manifest.adapter
    parent = open_parent(str(base.parent), runs(), {"causal_lm"})
    assert record.base.fingerprint == parent.fingerprint and record.stack == ["sft"]
    settings = json.loads((run.folder / "model" / "adapter_config.json").read_text())
    assert settings["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"]
    )
    assert verify_run(run.folder.parent) == []


@pytest.mark.parametrize("kind", [(), ("adapter.use_dora=true",), ("adapter.use_rslora=true",)])
def test_a_merged_model_equals_the_trained_one(kind, tmp_path, monkeypatch):
    kept = remembered(monkeypatch, "sft")
    run = run_stage("sft", tmp_path, *QUICK, *kind, "adapter.merge=true")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert (logits(model) - kept["logits"]).abs().max() < 1e-5
    assert run.manifest.adapter is None and run.manifest.metrics["weights/changed"] > 0.5


def test_the_next_stages_add_to_the_adapter_of_the_one_before(tmp_path, monkeypatch, base):
    """SFT, then DPO, then full training: each publication is complete on the first base."""
    first = run_stage("sft", tmp_path / "a", *QUICK)
    kept = remembered(monkeypatch, "dpo")
    parent = f"parent={first.folder}"
    second = run_stage("dpo", tmp_path / "b", parent, *QUICK, "adapter.target_modules=[q_proj, down_proj]")
    assert second.manifest.adapter.stack == ["sft", "dpo"]
    assert second.manifest.adapter.base == first.manifest.adapter.base
    assert (logits(by_peft(second.folder, base)) - kept["logits"]).abs().max() < 1e-5
    assert (logits(loaded(second.folder).module) - kept["logits"]).abs().max() < 1e-5
    assert second.weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 8
    assert second.weights["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape[0] == 4
    first_loss = next(line["loss"] for line in second.lines if "loss" in line)
    assert first_loss == pytest.approx(0.6931472, abs=1e-6)  # policy and reference are equal at the start
    third = run_stage("dpo", tmp_path / "c", f"parent={second.folder}", "train.max_steps=1", "eval_answers=0")
    assert third.manifest.adapter is None and "model.embed_tokens.weight" in third.weights


def test_an_altered_or_another_base_is_refused(tmp_path, base):
    chain()
    shutil.copytree(runs() / "tiny" / "pretrain", tmp_path / "run" / "pretrain")
    run = run_stage("sft", tmp_path, f"parent={tmp_path / 'run' / 'pretrain'}", *QUICK)
    weights = tmp_path / "run" / "pretrain" / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights)
    with pytest.raises(HandoffError, match=r"pretrain was altered after publishing: model/model.safetensors"):
        open_parent(str(run.folder), runs(), {"causal_lm"})
    shutil.rmtree(tmp_path / "run" / "pretrain")
    with pytest.raises(HandoffError, match=r"the base of the adapter .* is gone"):
        open_parent(str(run.folder), runs(), {"causal_lm"})
    shutil.copytree(foreign_checkpoint(tmp_path / "other"), tmp_path / "run" / "pretrain")
    with pytest.raises(HandoffError, match=r"is not the base that the adapter .* was trained on"):
        open_parent(str(run.folder), runs(), {"causal_lm"})


def test_a_run_with_an_adapter_and_its_base_can_be_moved(tmp_path):
    chain()
    shutil.copytree(runs() / "tiny" / "pretrain", tmp_path / "tiny" / "pretrain")
    run = run_stage("sft", tmp_path, f"parent={tmp_path / 'tiny' / 'pretrain'}", *QUICK)
    assert run.manifest.adapter.base.path == "pretrain"
    before = open_parent(str(run.folder), runs(), {"causal_lm"})
    (tmp_path / "tiny").rename(tmp_path / "moved")
    after = open_parent(str(tmp_path / "moved" / "sft"), runs(), {"causal_lm"})
    assert after.fingerprint == before.fingerprint
    assert after.base.path == tmp_path / "moved" / "pretrain"
    problems = [problem.message for problem in verify_run(tmp_path / "moved")]
    assert all("tokenizer" in message for message in problems)  # the base's own parent was not copied


# ---- adapters from elsewhere


def trained_elsewhere(model, folder, base, **keys):
    """An adapter that peft itself has made and saved. Returns the logits of the merged model."""
    torch.manual_seed(1)
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **keys))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(base)
    wrapped.save_pretrained(folder)
    return logits(wrapped.merge_and_unload())


@pytest.mark.parametrize(
    "keys",
    [
        {"r": 4},
        {"r": 4, "use_rslora": True, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 2}},
        {"r": 4, "use_dora": True, "lora_alpha": 16},
        {"r": 4, "alpha_pattern": {"layers.0.self_attn.q_proj": 3}, "target_modules": "all-linear"},
        {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]},
    ],
)
def test_an_adapter_from_elsewhere_is_merged_as_peft_does(keys, tmp_path):
    folder = foreign_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = trained_elsewhere(model, tmp_path / "adapter", folder, **keys)
    found = loaded(tmp_path / "adapter")
    assert (logits(found.module) - expected).abs().max() < 1e-5
    assert found.parent.stack == ["adapter"] and found.parent.base.path == folder


def test_the_layers_of_gpt2_are_merged_the_other_way_round(tmp_path):
    foreign_checkpoint(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = json.loads((tmp_path / "base" / "config.json").read_text())["vocab_size"]
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, eos_token_id=1, bos_token_id=1, **sizes))
    model.save_pretrained(tmp_path / "base")
    keys = {"r": 4, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}
    expected = trained_elsewhere(model, tmp_path / "adapter", tmp_path / "base", **keys)
    assert (logits(loaded(tmp_path / "adapter").module) - expected).abs().max() < 1e-5


def test_an_adapter_from_elsewhere_for_another_base_is_refused(tmp_path):
    folder = foreign_checkpoint(tmp_path / "base")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    other = LlamaForCausalLM(LlamaConfig(vocab_size=size, **sizes))
    trained_elsewhere(other, tmp_path / "adapter", folder, r=2, target_modules=["q_proj"])
    with pytest.raises(HandoffError, match="it is not the base of this adapter"):
        loaded(tmp_path / "adapter")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'; an adapter is LORA"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"init_lora_weights": "pissa"}, "changes the base's weights"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path is missing"),
        ({"base_model_name_or_path": "/no/where"}, "base_model_name_or_path: .*no such directory"),
        ({"r": 5}, "has rank 2, adapter_config.json says 5"),
        ({"use_dora": True}, "lacks the lengths of DoRA"),
    ],
)
def test_an_adapter_that_cannot_be_merged_is_refused_by_name(change, message, tmp_path):
    folder = foreign_checkpoint(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trained_elsewhere(model, tmp_path / "adapter", folder, r=2, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(HandoffError, match=message):
        open_parent(str(tmp_path / "adapter"), tmp_path, {"causal_lm"})


def test_an_adapter_beside_a_model_is_refused(tmp_path):
    folder = foreign_checkpoint(tmp_path / "base")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(HandoffError, match="beside the weights of a model"):
        open_parent(str(folder), tmp_path, {"causal_lm"})


def test_a_reward_model_publishes_its_head_with_the_adapter(tmp_path, monkeypatch, base):
    kept = remembered(monkeypatch, "reward_model")
    run = run_stage("reward", tmp_path, "adapter.r=4", "train.max_steps=4")
    plain = AutoModelForSequenceClassification.from_pretrained(runs() / "tiny" / "sft" / "model", num_labels=1)
    found = PeftModel.from_pretrained(plain, run.folder / "model").eval()
    plain.config.pad_token_id = run.manifest.tokenizer.pad_id
    assert (logits(found) - kept["logits"]).abs().max() < 1e-5
    parent = open_parent(str(run.folder), runs(), {"reward_model"})
    again = Model.load(ENGINE, parent, "reward", load_encoder(parent), ModelArguments())
    assert (logits(again.module) - kept["logits"]).abs().max() < 1e-5
    merged = run_stage("reward", tmp_path / "merged", "adapter.r=4", "train.max_steps=4", "adapter.merge=true")
    whole = AutoModelForSequenceClassification.from_pretrained(merged.folder / "model")
    assert (logits(whole) - kept["logits"]).abs().max() < 1e-5


def interrupt(tmp_path, *keys: str) -> None:
    """Checks that six steps of SFT end alike, to the last bit, whether or not they are interrupted in the fourth."""
    keys = (*QUICK, *keys, "train.max_steps=6", "train.save_steps=2", "train.logging_steps=1")
    whole = run_stage("sft", tmp_path / "whole", *keys)
    recipe = stage_recipe("sft", tmp_path / "cut", *keys)
    with dies(StageTrainer, "training_step", lambda _, trainer, *__: trainer.state.global_step == 3):
        run_section(recipe, "sft")
    run_section(recipe, "sft")
    again = result(recipe, "sft")
    assert all(torch.equal(again.weights[key], value) for key, value in whole.weights.items())
    assert again.lines == whole.lines
    for part in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(run.folder / "state" / "step-6" / part) for run in (whole, again))
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path):
    """Dropout in the adapter draws the same numbers after a resume."""
    interrupt(tmp_path, "adapter.lora_dropout=0.3")


def test_another_engine_gets_the_merged_weights_under_the_models_own_names():
    plain, module = llama(), llama()
    adapter = Adapter(module, AdapterConfig(r=2, modules_to_save=["norm"]), seed=1)
    with torch.no_grad():
        for value in module.parameters():
            if value.requires_grad:
                value.add_(0.1)
    given = dict(adapter.parameters())
    assert {name: value.shape for name, value in given.items()} == {n: p.shape for n, p in plain.named_parameters()}
    plain.load_state_dict(given)
    assert (logits(plain) - logits(module)).abs().max() < 1e-5
    with adapter.off():
        assert torch.equal(logits(module), logits(llama()))
    assert (logits(plain) - logits(module)).abs().max() < 1e-5
