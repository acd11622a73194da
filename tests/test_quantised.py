"""Quantised frozen weights below an adapter: what is quantised and published, and what the next stage does with it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from handoff.errors import HandoffError
from handoff.manifest import QuantizationRecord
from handoff.parent import open_parent
from handoff.verify import verify_run
from rollout.bnb_layers import EightBitLinear, FourBitLinear
from rollout.quantised import QuantisedLinear
from tests.stage_chain import chain, foreign_checkpoint, run_stage, runs
from tests.test_adapter import ENGINE, IDS, by_peft, interrupt, loaded, logits, remembered
from training import quantised_loading
from training.config import AdapterConfig, ModelArguments
from training.engines.launch import LaunchError, Request
from training.engines.splitting import Splitting
from training.model import Model, load_encoder
from training.recipe import RecipeError, load_recipe

pytestmark = pytest.mark.slow  # models are trained and loaded again

NF4 = QuantizationRecord(method="nf4", double_quant=True)
INT8 = QuantizationRecord(method="int8", double_quant=False)
QUICK = ("adapter.r=4", "train.max_steps=4", "eval_answers=0")


@pytest.fixture(scope="module")
def base():
    chain()
    return runs() / "tiny" / "pretrain" / "model"


def quantised_layers(module):
    return [name for name, layer in module.named_modules() if isinstance(layer, QuantisedLinear)]


# ---- the recipe's keys


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["quantization=nf4"], "trained weights cannot be quantised. Add `adapter: {}`"),
        (["quantization=nf5", "adapter.r=4"], "quantization.*nf4"),
        (["adapter.r=4", "quantization_args.bnb_4bit_use_double_quant=false"], "not read unless quantization is given"),
        (
            ["adapter.r=4", "quantization=int8", "quantization_args.bnb_4bit_use_double_quant=true"],
            "not read unless quantization is nf4",
        ),
        (["adapter.r=4", "quantization=nf4", "quantization_args.bnb_4bit_quant_type=fp4"], "write quantization: nf4"),
        (["adapter.r=4", "quantization=nf4", "quantization_args.bnb_4bit_compute_dtype=bfloat16"], "train.bf16"),
        (["adapter.r=4", "quantization=nf4", "quantization_args.bnb_4bit_double_quant=true"], "did you mean"),
    ],
)
@pytest.mark.parametrize("section", ["sft", "reward", "dpo"])
def test_keys_are_checked_before_anything_starts(section, overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(chain(), [f"{section}.{override}" for override in overrides])


def test_random_weights_cannot_be_quantised():
    with pytest.raises(RecipeError, match=r"random weights are all trained"):
        load_recipe(chain(), ["pretrain.adapter.r=4", "pretrain.quantization=nf4"])


def test_a_name_that_fits_no_layer_is_refused(base):
    record = NF4.model_copy(update={"skipped": ["q_prj"]})
    with pytest.raises(RecipeError, match=r"llm_int8_skip_modules: no linear layer's name ends with q_prj.*q_proj"):
        loaded(base.parent, adapter=AdapterConfig(r=4), quantization=record)


def test_the_missing_package_is_named_with_the_command(base, monkeypatch):
    monkeypatch.setattr(quantised_loading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HandoffError, match=r"pip install 'baton-align\[quant\]'"):
        loaded(base.parent, adapter=AdapterConfig(r=4), quantization=NF4)


@pytest.mark.parametrize("name", ["deepspeed", "fsdp2"])
def test_engines_that_cut_weights_up_refuse_quantised_ones(name):
    with pytest.raises(LaunchError, match=rf"pretrain: its frozen weights are quantised, and {name} cannot"):
        Splitting(Request(name, 3, 2, "cpu")).check_quantised("pretrain")


# ---- what is quantised


@pytest.mark.parametrize(
    ("record", "keys"),
    [
        (NF4, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}),
        (NF4.model_copy(update={"double_quant": False}), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
        (INT8, {"load_in_8bit": True}),
    ],
)
def test_the_weights_are_those_that_transformers_loads_quantised(record, keys, base):
    found = loaded(base.parent, adapter=AdapterConfig(r=4), quantization=record).module
    config = BitsAndBytesConfig(**keys)
    theirs = AutoModelForCausalLM.from_pretrained(base, quantization_config=config, dtype=torch.float32)
    ours = {name.replace(".base_layer", ""): value for name, value in found.state_dict().items()}
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, ours[name]), name
    assert len(quantised_layers(found)) == 14
    assert (logits(loaded(base.parent).module) - logits(found)).abs().max() > 1e-3


@pytest.mark.parametrize("width", [16, 32, 48, 50, 64, 96, 128])
@pytest.mark.parametrize("double", [False, True])
def test_the_weights_are_the_codes_times_their_scales(width, double):
    """bitsandbytes' own kernel for CPUs takes wrong scales where a row is no multiple of a block of 64."""
    torch.manual_seed(0)
    weight = torch.randn(24, width)
    layer = FourBitLinear.of(weight, None, torch.device("cpu"), double=double)
    packed, state = layer.weight.data.flatten(), layer.weight.quant_state
    scales = state.absmax
    if double:
        scales = state.state2.code[state.absmax.long()] * state.state2.absmax[0] + state.offset
    codes = torch.stack((packed >> 4, packed & 15), 1).flatten().long()  # the first of two is in the higher bits
    expected = state.code[codes] * scales.repeat_interleave(64)[: codes.numel()]
    torch.testing.assert_close(layer.dequantised(), expected.view(24, width), rtol=1e-6, atol=1e-6)
    assert (layer.dequantised() - weight).norm() < 0.1 * weight.norm()
    x = torch.randn(5, width)
    torch.testing.assert_close(layer(x), x @ layer.dequantised().T)


def test_training_and_evaluation_compute_alike(base):
    for record in (NF4, INT8):
        module = loaded(base.parent, adapter=AdapterConfig(r=4), quantization=record).module
        with torch.no_grad():
            assert torch.equal(module.train()(input_ids=IDS).logits, module.eval()(input_ids=IDS).logits)


def test_embeddings_head_norms_and_named_layers_stay_as_they_are(base):
    record = NF4.model_copy(update={"skipped": ["q_proj", "layers.1.mlp.up_proj"]})
    model = loaded(base.parent, adapter=AdapterConfig(r=4), quantization=record)
    names = quantised_layers(model.module)
    assert len(names) == 11 and not any("q_proj" in name or "layers.1.mlp.up_proj" in name for name in names)
    assert model.parameters() == loaded(base.parent, adapter=AdapterConfig(r=4)).parameters()


def test_the_base_is_quantised_layer_by_layer(base, monkeypatch):
    """There is no float32 copy of the whole base: one layer is read, and quantised, after the other."""
    held = []
    read = quantised_loading.ParentWeights.__call__

    def counted(self, name):
        tensor = read(self, name)
        held.append(sum(value.numel() for value in self._held.values()))
        return tensor

    monkeypatch.setattr(quantised_loading.ParentWeights, "__call__", counted)
    loaded(base.parent, adapter=AdapterConfig(r=4), quantization=NF4)
    assert (
        len(held) == 20
        and max(held) < sum(value.numel() for value in load_file(base / "model.safetensors").values()) / 2
    )


@pytest.mark.parametrize("record", [NF4, INT8])
def test_under_autocast_products_are_those_of_a_linear_layer_with_the_dequantised_weights(record):
    """Also with rows that are no multiple of a block of 64, a bias, and a gradient for the input."""
    torch.manual_seed(0)
    bias, cpu = torch.nn.Parameter(torch.randn(7), requires_grad=False), torch.device("cpu")
    weight = torch.randn(7, 50)
    layer = FourBitLinear.of(weight, bias, cpu, double=True) if record == NF4 else EightBitLinear.of(weight, bias, cpu)
    plain = torch.nn.Linear(50, 7)
    plain.weight.data, plain.bias.data = layer.dequantised(), bias.data.clone()
    assert 0 < (plain.weight - weight).abs().max() < (0.5 if record == NF4 else 0.05)
    for bf16 in (False, True):
        x, y = (torch.randn(3, 50, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            found, expected = layer(x), plain(y)
        assert found.dtype == expected.dtype == (torch.bfloat16 if bf16 else torch.float32)
        torch.testing.assert_close(found, expected)
        found.float().square().sum().backward()
        expected.float().square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=0.02 if bf16 else 1e-5, atol=0.1 if bf16 else 1e-4)
    assert torch.equal(layer.bias, bias) and layer.bias.dtype == torch.float32


def gpt2(folder):
    foreign_checkpoint(folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(0)
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=size, eos_token_id=1, bos_token_id=1, **sizes))
    model.save_pretrained(folder)
    return folder


def test_the_layers_of_gpt2_are_quantised_the_other_way_round(tmp_path):
    folder = gpt2(tmp_path / "gpt2")
    model = loaded(folder, adapter=AdapterConfig(r=4), quantization=NF4)
    assert len(quantised_layers(model.module)) == 8
    kept = logits(model.module)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plain.load_state_dict(dict(model.adapter.parameters()), strict=False)
    assert (logits(plain) - kept).abs().max() < 1e-5


# ---- stages


@pytest.mark.parametrize(("method", "record"), [("nf4", NF4), ("int8", INT8)])
def test_what_sft_publishes_is_what_was_trained(method, record, tmp_path, monkeypatch, base):
    kept = remembered(monkeypatch, "sft")
    run = run_stage("sft", tmp_path, *QUICK, f"quantization={method}")
    assert run.manifest.adapter.quantization == record
    assert run.manifest.adapter.base.fingerprint == open_parent(str(base.parent), runs(), {"causal_lm"}).fingerprint
    state = load_file(run.folder / "state" / "step-4" / "model.safetensors")
    assert state.keys() == set(kept["trained"]) and all("lora" in name for name in state)
    reader = loaded(run.folder, frozen=True)  # as chat, evaluation and rewards load it
    assert len(quantised_layers(reader.module)) == 14
    assert (logits(reader.module) - kept["logits"]).abs().max() < 1e-5
    whole = loaded(run.folder)  # all weights are to be trained
    assert quantised_layers(whole.module) == [] and all(p.requires_grad for p in whole.module.parameters())
    assert (logits(whole.module) - kept["logits"]).abs().max() < 1e-5
    full = logits(by_peft(run.folder, base))  # plain peft, over the base as it was before
    assert 1e-3 < (full - kept["logits"]).abs().max() < 1
    assert verify_run(run.folder.parent) == []


def test_an_adapter_belongs_to_its_quantised_base(tmp_path, base):
    """The same files over another base are another model."""
    run = run_stage("sft", tmp_path, *QUICK, "quantization=nf4")
    without = run.manifest.adapter.model_copy(update={"quantization": None})
    assert run.manifest.model_copy(update={"adapter": without}).fingerprint != run.manifest.fingerprint


@pytest.mark.parametrize("keys", [("quantization=nf4",), ("quantization=int8",)])
def test_a_merged_model_equals_the_trained_one(keys, tmp_path, monkeypatch):
    kept = remembered(monkeypatch, "sft")
    run = run_stage("sft", tmp_path, *QUICK, *keys, "adapter.merge=true")
    model = AutoModelForCausalLM.from_pretrained(run.folder / "model")
    assert (logits(model) - kept["logits"]).abs().max() < 1e-5
    assert run.manifest.adapter is None
    assert "quantization_config" not in json.loads((run.folder / "model" / "config.json").read_text())


def test_the_next_stages_train_on_the_same_quantised_base(tmp_path, monkeypatch, base):
    """SFT, then DPO, which takes over how the base is quantised; then all weights."""
    first = run_stage("sft", tmp_path / "a", *QUICK, "quantization=nf4", "adapter.modules_to_save=[norm]")
    kept = remembered(monkeypatch, "dpo")
    keys = (f"parent={first.folder}", *QUICK, "adapter.target_modules=[q_proj, down_proj]")
    second = run_stage("dpo", tmp_path / "b", *keys)
    record = second.manifest.adapter
    assert record.stack == ["sft", "dpo"] and record.quantization == NF4 and record.base == first.manifest.adapter.base
    assert next(line["loss"] for line in second.lines if "loss" in line) == pytest.approx(0.6931472, abs=1e-6)
    assert (logits(loaded(second.folder, frozen=True).module) - kept["logits"]).abs().max() < 1e-5
    assert second.weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape[0] == 8
    assert second.weights["base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight"].shape[0] == 4
    merged = run_stage("dpo", tmp_path / "c", *keys, "adapter.merge=true")
    assert (logits(AutoModelForCausalLM.from_pretrained(merged.folder / "model")) - kept["logits"]).abs().max() < 1e-5
    with pytest.raises(HandoffError, match=r"quantised as nf4 with double quantisation, and this section says int8"):
        run_stage("dpo", tmp_path / "d", f"parent={first.folder}", *QUICK, "quantization=int8")
    third = run_stage("dpo", tmp_path / "e", f"parent={second.folder}", "train.max_steps=1", "eval_answers=0")
    assert third.manifest.adapter is None
    assert next(line["loss"] for line in third.lines if "loss" in line) == pytest.approx(0.6931472, abs=1e-6)


def test_a_reward_model_over_a_quantised_base_gives_the_same_scores_again(tmp_path, monkeypatch):
    kept = remembered(monkeypatch, "reward_model")
    run = run_stage("reward", tmp_path, "adapter.r=4", "train.max_steps=4", "quantization=nf4")
    parent = open_parent(str(run.folder), runs(), {"reward_model"})
    again = Model.load(ENGINE, parent, "reward", load_encoder(parent), ModelArguments(), frozen=True)
    assert (logits(again.module) - kept["logits"]).abs().max() < 1e-5
    whole = Model.load(ENGINE, parent, "reward", load_encoder(parent), ModelArguments())
    assert (logits(whole.module) - kept["logits"]).abs().max() < 1e-5


def test_dora_is_refused_over_quantised_weights(tmp_path, base):
    with pytest.raises(RecipeError, match=r"over quantised ones take LoRA"):
        load_recipe(chain(), ["sft.adapter.use_dora=true", "sft.quantization=nf4"])
    first = run_stage("sft", tmp_path / "a", *QUICK, "quantization=nf4")
    with pytest.raises(RecipeError, match=r"over quantised ones take LoRA"):  # the parent's quantisation
        loaded(first.folder, adapter=AdapterConfig(r=4, use_dora=True))
    dora = run_stage("sft", tmp_path / "b", *QUICK, "adapter.use_dora=true")
    with pytest.raises(HandoffError, match=r"an adapter with DoRA cannot stand beside a quantised base"):
        loaded(dora.folder, adapter=AdapterConfig(r=4), quantization=NF4)


def test_an_interrupted_stage_ends_as_if_it_had_not_been(tmp_path):
    interrupt(tmp_path, "quantization=nf4")


# ---- checkpoints that are quantised themselves


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A checkpoint whose files transformers has written with NF4 weights."""
    folder = foreign_checkpoint(tmp_path_factory.mktemp("stored") / "model")
    keys = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=BitsAndBytesConfig(**keys))
    model.save_pretrained(folder)
    return folder


def test_a_quantised_checkpoint_is_a_frozen_base(stored, tmp_path, monkeypatch):
    kept = remembered(monkeypatch, "sft")
    run = run_stage("sft", tmp_path, f"parent={stored}", *QUICK)
    assert run.manifest.adapter.quantization is None
    reader = loaded(run.folder, frozen=True)
    assert len(quantised_layers(reader.module)) == 7
    assert (logits(reader.module) - kept["logits"]).abs().max() < 1e-5
    merged = run_stage(
        "sft", tmp_path / "merged", f"parent={stored}", *QUICK, "adapter.merge=true", "publish_dtype=float32"
    )
    assert "quantiz" not in (merged.folder / "model" / "config.json").read_text()
    assert (logits(AutoModelForCausalLM.from_pretrained(merged.folder / "model")) - kept["logits"]).abs().max() < 1e-5


def test_a_quantised_checkpoint_is_not_trained_whole(stored, tmp_path):
    with pytest.raises(HandoffError, match=r"its weights are quantised \(bitsandbytes\), so they can only be frozen"):
        run_stage("sft", tmp_path, f"parent={stored}", "train.max_steps=2")
    assert not (tmp_path / "tiny" / "sft" / "metrics.jsonl").exists()
    with pytest.raises(HandoffError, match=r"quantised already \(bitsandbytes\); leave `quantization` out"):
        run_stage("sft", tmp_path, f"parent={stored}", *QUICK, "quantization=nf4")


@pytest.mark.parametrize("method", ["gptq", "awq", "mxfp4", "fp8"])
def test_other_quantised_checkpoints_are_refused_by_name(method, tmp_path):
    folder = foreign_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))
    with pytest.raises(HandoffError, match=rf"\({method}\).*name the model from which it was made"):
        loaded(folder, adapter=AdapterConfig(r=4), quantization=NF4)


def test_a_model_of_fused_experts_is_refused(tmp_path):
    folder = foreign_checkpoint(tmp_path / "model")
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4}
    Qwen3MoeForCausalLM(Qwen3MoeConfig(vocab_size=size, **sizes, num_experts_per_tok=2)).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"linear layers alone, which hold \d+% of .*such as .*experts"):
        loaded(folder, adapter=AdapterConfig(r=4), quantization=NF4)
