"""`baton plan`: parameters are counted as real models have them, and what a recipe takes is computed from its keys."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from baton.plan import plan
from baton.plan_fit import mend
from baton.plan_shown import as_json, show_plan
from handoff.errors import UserError
from handoff.manifest import QuantizationRecord
from training.cost import Held, Settings, activations
from training.declaration import HeldModel
from training.devices import this_cpu
from training.engines.launch import LaunchError
from training.shapes import DEFAULTS, ShapeError, shape_in, shape_of
from training.work import Batch

SMALL = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 101}
WIDE = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": WIDE | {"attention_bias": True, "mlp_bias": True},
    "mistral": WIDE | {"head_dim": 16},
    "qwen2": WIDE | {"tie_word_embeddings": True},
    "qwen3": WIDE | {"head_dim": 16},
    "gemma": WIDE | {"head_dim": 8},
    "gemma2": WIDE | {"head_dim": 8},
    "gemma3_text": WIDE | {"head_dim": 8},
    "olmo2": WIDE,
    "olmo3": WIDE,
    "phi3": WIDE | {"pad_token_id": 0},
    "smollm3": WIDE | {"pad_token_id": 0},
    "granite": WIDE,
    "stablelm": WIDE | {"use_qkv_bias": True},
    "gpt2": SMALL | {"n_positions": 48},
    "gpt_neox": SMALL | {"intermediate_size": 96},
    "opt": SMALL | {"ffn_dim": 96, "word_embed_proj_dim": 16, "max_position_embeddings": 48},
    "mixtral": WIDE | {"num_local_experts": 4},
    "qwen3_moe": WIDE | {"head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4},
}


def built(family: str) -> Any:
    """The model that transformers makes of these keys, without values."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**MODELS[family]))


@pytest.mark.parametrize("family", MODELS)
def test_parameters_are_those_of_a_real_model(family: str) -> None:
    model = built(family)
    shape = shape_of(MODELS[family] | {"model_type": family})
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    config = model.config.to_dict()  # what config.json has
    assert shape_of(config).parameters == shape.parameters
    assert shape.body == sum(parameter.numel() for parameter in model.base_model.parameters())


def test_every_family_that_is_counted_is_tested() -> None:
    assert MODELS.keys() == DEFAULTS.keys()


@pytest.mark.parametrize("family", DEFAULTS)
def test_missing_keys_have_the_values_of_the_architectures_class(family: str) -> None:
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[family]()
    assert shape_of({"model_type": family}) == shape_of({"model_type": family, **config.to_dict()})


def test_a_shape_that_cannot_be_counted_is_refused_by_name() -> None:
    with pytest.raises(ShapeError, match="cost of a `mamba2` cannot be planned"):
        shape_of({"model_type": "mamba2"})
    with pytest.raises(ShapeError, match=r"here: hidden_size must be a whole number above 0, not -1"):
        shape_of({"model_type": "llama", "hidden_size": -1}, place="here")


def test_the_headers_of_weight_files_are_counted(tmp_path: Path) -> None:
    """What is stored counts, whatever the configuration says; a head that is stored beside the embedding it is tied to
    does not."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "config.json").write_text(json.dumps(WIDE | {"model_type": "llama", "tie_word_embeddings": True}))
    tensors = {"model.embed_tokens.weight": torch.zeros(101, 32), "model.extra": torch.zeros(7)}
    save_file(tensors | {"lm_head.weight": torch.zeros(101, 32)}, tmp_path / "model.safetensors")
    shape = shape_in(tmp_path)
    assert (shape.parameters, shape.body) == (101 * 32 + 7, 101 * 32 + 7)


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A pipeline from a checkpoint directory that has a configuration alone."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    config |= {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
    (model / "config.json").write_text(json.dumps(config))
    world = {"source": "world", "size": 1000}
    train = {"per_device_train_batch_size": 4, "global_batch_size": 32, "num_train_epochs": 2.0}
    stages = {
        "sft": {"parent": str(model), "max_length": 1024, "data": [world | {"kind": "chats"}], "train": train},
        "grpo": {
            "stage": "ppo",
            "parent": "sft",
            "advantage": "group",
            "reward": [{"function": "world_correct"}],
            "data": [world | {"kind": "prompts"}],
            "train": {"num_generations": 4, "iterations": 10, "max_completion_length": 256},
        },
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "large", "output_root": str(tmp_path / "runs"), "stages": stages}))
    return path


def launch(root: Path, name: str) -> Path:
    return root / "recipes" / "launch" / f"{name}.yaml"


def test_the_recipes_of_the_tree_are_planned(root: Path) -> None:
    tiny = plan(root / "recipes" / "tiny.yaml")
    sections = {section.name: section for section in tiny.sections}
    assert "tokenizer" not in sections and len(sections) == 9
    assert sections["pretrain"].held[0].parameters == sections["sft"].held[0].parameters == 1_115_520
    assert sections["pretrain"].cost.tokens == 1200 * 8 * 128
    assert [one.model.role for one in sections["ppo"].held] == ["policy", "reference", "critic", "reward"]
    assert all(section.fits and section.cost.flops for section in tiny.sections)
    real = plan(root / "recipes" / "real.yaml", launch=launch(root, "ddp"), device_name="h100", overrides=BATCHES)
    assert {section.request.processes for section in real.sections} == {8}
    assert "real.yaml on h100: ddp, 8 processes, cuda" in show_plan(real, fit=True)


BATCHES = [f"{name}.train.{key}=64" for name, key in (("ppo", "rollout_batch_size"), ("dpo", "global_batch_size"))]


def test_a_model_that_does_not_fit_says_what_to_change(recipe: Path, root: Path) -> None:
    alone = plan(recipe, device_name="h100")
    sft, grpo = alone.sections
    assert sft.held[0].parameters == 8_030_261_248  # Llama 3.1 8B
    # Weights, gradients and AdamW's two moments in float32 are 16 bytes a parameter: more than the GPU has.
    assert not sft.fits and mend(sft) is None
    assert sft.cost.tokens == 2 * 1000 * 1024
    together = plan(recipe, launch=launch(root, "zero2"), device_name="h100")
    found = mend(together.sections[0])
    assert found is not None and found.section.fits
    wide = plan(recipe, ["sft.max_length=16384"], launch(root, "zero2"), "h100")
    text = show_plan(wide, fit=True)
    assert (
        "DOES NOT FIT" in text
        and "sft.train.per_device_train_batch_size=2 sft.train.gradient_checkpointing=true" in text
    )
    values = as_json(wide)["sections"]["sft"]
    assert values["fits"] is False and values["change"]["train.per_device_train_batch_size"] == 2
    assert len(grpo.held) == 2


def test_a_change_keeps_the_global_batch(recipe: Path, root: Path) -> None:
    for name in ("ddp", "zero2", "zero3"):
        for section in plan(recipe, launch=launch(root, name), device_name="h100").sections:
            found = mend(section)
            if found is not None:
                now = found.section.cost
                assert now.micro_batch * now.accumulation * section.request.processes == section.work.batch


def test_more_work_takes_more(recipe: Path) -> None:
    def peak(*overrides: str) -> float:
        return plan(recipe, [f"sft.{o}" for o in overrides], device_name="h100").sections[0].peak

    usual = peak()
    assert peak("train.per_device_train_batch_size=8") > usual
    assert peak("max_length=2048") > usual
    assert peak("train.gradient_checkpointing=true") < usual


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"device_name": "h1000"}, "--gpu h1000: there are h200, h100"),
        ({"launch": "zero3"}, "runs on GPUs: say which"),
        ({"launch": "cpu2", "device_name": "h100"}, "runs on the CPU; leave one of the two out"),
        ({"overrides": ["sft.parent=nowhere/at/all"]}, "nowhere/at/all is not a section of this recipe"),
        ({"overrides": ["sft.max_lenght=4"]}, "did you mean"),
    ],
)
def test_mistakes_are_named(recipe: Path, root: Path, arguments: dict[str, Any], message: str) -> None:
    if "launch" in arguments:
        arguments = arguments | {"launch": launch(root, arguments["launch"])}
    with pytest.raises(UserError, match=message):
        plan(recipe, **arguments)


def test_a_batch_that_the_processes_cannot_share_is_refused(recipe: Path, root: Path) -> None:
    with pytest.raises(LaunchError, match="global_batch_size is 12, which 8 processes cannot share"):
        plan(recipe, ["sft.train.global_batch_size=12"], launch(root, "zero3"), "h100")


CASES = [(name, padded, False) for name in MODELS if name != "qwen3_moe" for padded in (False, True)]


@pytest.mark.parametrize(
    ("family", "padded", "bf16"), [*CASES, *((name, True, True) for name in ("llama", "qwen3", "gpt2"))]
)
def test_activations_are_what_autograd_keeps(family: str, padded: bool, bf16: bool) -> None:
    """The bytes of all tensors that are saved for the backward pass, without parameters, on a CPU."""
    import torch

    rows, length = 3, 40
    keys = MODELS[family] | {"hidden_size": 64, "num_hidden_layers": 2, "use_cache": False}
    keys |= {"intermediate_size": 176} if "intermediate_size" in keys else {}
    keys |= {"head_dim": 16} if "head_dim" in keys else {}
    keys |= {"ffn_dim": 256, "word_embed_proj_dim": 64} if family == "opt" else {}
    model = real(family, keys)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}
    alive = []

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # or another tensor may get its place
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, -7:] = 0 if padded else 1
    autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16)
    with autocast, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.base_model(torch.zeros(rows, length, dtype=torch.long), attention_mask=mask)
    shape = shape_of(keys | {"model_type": family})
    found = activations(shape, Batch(rows, length, padded=padded), Settings(bf16=bf16), this_cpu(1))
    found += 2 * shape.layers * shape.matrices * bf16  # autocast's copies of the weights
    assert found == pytest.approx(sum(kept.values()), rel=0.08)


def real(family: str, keys: dict[str, Any]) -> Any:
    """A model with values and without dropout."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from training.architecture import without_dropout

    kernel = "eager" if family == "gemma2" else "sdpa"
    return without_dropout(
        AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**keys), attn_implementation=kernel).train()
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gpt_neox", "opt", "gemma2"])
def test_an_adapter_has_as_many_parameters_as_pefts(family: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(built(family), LoraConfig(r=4, target_modules="all-linear"))
    found = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    keys = MODELS[family] | ({"word_embed_proj_dim": 32} if family == "opt" else {})
    extra = 0
    if family == "opt":  # its projections of narrow embeddings, which no layer has
        extra = 2 * 4 * (16 + 32)
    assert shape_of(keys | {"model_type": family}).adapter(4) == found - extra


def test_an_adapter_makes_everything_but_the_weights_small(recipe: Path) -> None:
    lora = ["sft.adapter={r: 16}", "grpo.adapter={r: 16}", "sft.max_length=128"]
    sft, grpo = plan(recipe, lora, device_name="h100").sections
    full = plan(recipe, ["sft.max_length=128"], device_name="h100").sections[0]
    assert sft.held[0].trained == 41_943_040
    phase = sft.cost.peak
    assert phase.optimizer == 8 * sft.held[0].trained and phase.weights > 4 * 8e9
    assert phase.gradients < 1e9 and sft.cost.disk < full.cost.disk / 50
    assert [one.model.role for one in grpo.held] == ["policy"]


@pytest.mark.parametrize(
    ("method", "double", "size"), [("nf4", True, 0.516), ("nf4", False, 0.5625), ("int8", False, 1.0)]
)
def test_quantised_weights_take_what_bitsandbytes_stores(method: str, double: bool, size: float) -> None:
    import torch

    from rollout.bnb_layers import EightBitLinear, FourBitLinear

    shape = shape_of({"model_type": "llama", "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 1})
    record = QuantizationRecord(method=method, double_quant=double)
    weight, cpu = torch.randn(512, 2048), torch.device("cpu")
    layer = (
        FourBitLinear.of(weight, None, cpu, double=double) if method == "nf4" else EightBitLinear.of(weight, None, cpu)
    )
    state = layer.state_dict()
    stored = sum(value.nbytes for name, value in state.items() if "map" not in name and "bitsandbytes" not in name)
    held = Held(HeldModel("policy", "x", trained=True), shape, False, 1000, quantization=record)
    found = held.frozen_bytes(4) - 4 * (shape.parameters - shape.matrices)
    assert found / shape.matrices == pytest.approx(stored / weight.numel(), rel=0.01) == pytest.approx(size, rel=0.01)


def test_a_quantised_base_is_planned_in_every_section_that_holds_it(recipe: Path, root: Path) -> None:
    keys = ["sft.adapter={r: 16}", "sft.quantization=nf4", "grpo.adapter={r: 16}"]
    sft, grpo = plan(recipe, keys, device_name="4090").sections  # grpo takes it over from its parent
    full = plan(recipe, [keys[0], keys[2]], device_name="4090").sections
    for section, whole in zip((sft, grpo), full, strict=True):
        assert section.held[0].quantization is not None
        assert whole.cost.phases[0].weights - section.cost.phases[0].weights == pytest.approx(
            3.484 * 6_979_321_856, rel=1e-3
        )
    merged = plan(recipe, [*keys, "sft.adapter.merge=true"], device_name="4090").sections[1]
    assert merged.held[0].quantization is None
    with pytest.raises(UserError, match=r"sft.quantization: engines that cut weights up cannot hold"):
        plan(recipe, keys, launch(root, "zero3"), "h100")


def test_a_checkpoint_that_is_quantised_itself_is_counted_from_its_sizes(recipe: Path) -> None:
    import torch
    from safetensors.torch import save_file

    model = recipe.parent / "model"
    config = json.loads((model / "config.json").read_text())
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    save_file({"model.layers.0.mlp.up_proj.weight": torch.zeros(8, 1, dtype=torch.uint8)}, model / "model.safetensors")
    held = plan(recipe, ["sft.adapter={r: 16}"], device_name="4090").sections[0].held[0]
    assert held.parameters == 8_030_261_248 and held.quantization == QuantizationRecord(method="nf4", double_quant=True)


def test_frozen_weights_are_counted_in_the_parents_precision(recipe: Path) -> None:
    """A bfloat16 parent: the reference takes half, the base below an adapter too, and what is published is bfloat16."""
    before = plan(recipe, [], device_name="h200").sections
    config = recipe.parent / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}))
    sft, grpo = plan(recipe, [], device_name="h200").sections
    assert (grpo.held[1].width, before[1].held[1].width) == (2, 4)
    saved = before[1].cost.peak.weights - grpo.cost.peak.weights
    assert saved == 2 * grpo.held[1].parameters
    assert before[0].cost.disk - sft.cost.disk == 2 * sft.held[0].parameters
    for keys, width in (([], 2), (["sft.model_args.dtype=float32"], 4)):
        adapted = plan(recipe, ["sft.adapter={r: 16}", *keys], device_name="h200").sections[0]
        assert adapted.held[0].width == width
    for keys, width in (([], 2), (["sft.adapter.use_dora=true"], 4), (["sft.adapter.modules_to_save=[norm]"], 4)):
        above = ["sft.adapter={r: 16}", "grpo.adapter={r: 16}", *keys]
        assert plan(recipe, above, device_name="h200").sections[1].held[0].width == width
    half = plan(recipe, ["sft.model_args.dtype=bfloat16"], device_name="h200").sections[0]
    assert (
        half.cost.peak.weights == 2 * half.held[0].parameters
        and half.cost.peak.optimizer == 4 * half.held[0].parameters
    )
    wide = plan(recipe, ["sft.publish_dtype=float32"], device_name="h200").sections
    assert wide[0].cost.disk == before[0].cost.disk and wide[1].held[1].width == 4
