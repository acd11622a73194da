"""training/model_files.py and the rehearsal of a publication: what is written besides weights, before and after."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config, GptOssConfig, LlamaConfig

from handoff.contract import check_foreign
from handoff.errors import HandoffError
from handoff.parent import open_parent
from tests.stage_chain import foreign_checkpoint, run_stage
from training import engines, model_files
from training.config import ModelArguments
from training.model import Model, load_encoder

ENGINE = engines.current()


def load(parent, **keys):
    return Model.load(ENGINE, parent, "policy", load_encoder(parent), ModelArguments(), **keys)


@pytest.fixture
def foreign(tmp_path):
    model_files.warn.cache_clear()
    return foreign_checkpoint(tmp_path / "foreign")


def change(path: Path, **keys) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (content | keys).items() if value is not None}))


def vocabulary(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["vocab_size"]


def replaced(folder: Path, config) -> None:
    """The checkpoint's model becomes one with random weights of another configuration."""
    (folder / "generation_config.json").unlink()
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def published(parent, folder: Path) -> Model:
    """The loaded model, after rehearsing and writing it."""
    model = load(parent)
    for name in ("rehearsed", "out"):
        (folder / name).mkdir()
    model.rehearse(folder / "rehearsed")
    model.write(folder / "out", model.module)
    written = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.suffix != ".safetensors"}
    assert {path.name: path.read_bytes() for path in (folder / "rehearsed").iterdir()} == written
    return model


def test_a_rehearsal_writes_all_but_the_weights(foreign, tmp_path):
    published(open_parent(str(foreign), tmp_path, {"causal_lm"}), tmp_path)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_names_that_do_not_load_are_known_before_training(foreign, tmp_path, monkeypatch):
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}))
    groups = model._published(ENGINE.weights(model.module), "")
    monkeypatch.setattr(Model, "_published", lambda *_: groups[1:])
    (tmp_path / "out").mkdir()
    with pytest.raises(HandoffError, match=r"do not load under the names that they are saved by: .*missing_keys"):
        model.rehearse(tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "expected", "said"),
    [
        ({"temperature": 0.6, "top_p": 0.95}, {"do_sample": True, "temperature": 0.6, "top_p": 0.95}, "do_sample true"),
        ({"do_sample": True, "top_k": 20}, {"do_sample": True, "top_k": 20}, ""),
        ({"do_sample": False, "top_k": 20}, {"do_sample": False, "top_k": None}, "leave out top_k 20"),
        ({"repetition_penalty": 1.2}, {"do_sample": None, "repetition_penalty": 1.2}, ""),
    ],
)
def test_generation_settings_are_published_as_transformers_can_save_them(
    settings, expected, said, foreign, tmp_path, caplog
):
    """Published checkpoints often have a temperature without do_sample, which transformers reads and will not save."""
    change(foreign / "generation_config.json", **settings)
    published(open_parent(str(foreign), tmp_path, {"causal_lm"}), tmp_path)
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: written.get(key) for key in expected} == expected
    assert (said in caplog.text) if said else not caplog.text


def test_settings_that_contradict_each_other_name_their_file(foreign, tmp_path):
    change(foreign / "generation_config.json", early_stopping=True)  # for beams, of which there is one
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}))
    (tmp_path / "out").mkdir()
    with pytest.raises(HandoffError, match=r"foreign/generation_config.json: .*early_stopping"):
        model.rehearse(tmp_path / "out")


def test_settings_that_transformers_does_not_even_read_name_their_folder(foreign, tmp_path):
    change(foreign / "generation_config.json", num_return_sequences=4)
    with pytest.raises(HandoffError, match=r"foreign: transformers cannot load it: .*num_return_sequences"):
        load(open_parent(str(foreign), tmp_path, {"causal_lm"}))


def test_a_configuration_that_cannot_be_saved_names_its_file(foreign, tmp_path, monkeypatch):
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}))
    monkeypatch.setattr(LlamaConfig, "save_pretrained", lambda *_: int("x"))
    (tmp_path / "out").mkdir()
    with pytest.raises(HandoffError, match=r"foreign/config.json: transformers cannot save it: ValueError"):
        model.rehearse(tmp_path / "out")


def test_a_disk_that_cannot_be_written_is_no_fault_of_the_parent(foreign, tmp_path, monkeypatch):
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(LlamaConfig, "save_pretrained", full)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match="No space left"):
        model.rehearse(tmp_path / "out")


# ---- code, quantised weights, images


def test_code_beside_an_architecture_that_transformers_has_is_neither_needed_nor_published(foreign, tmp_path):
    """Many checkpoints still carry the code from before transformers had their architecture."""
    change(foreign / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    change(foreign / "tokenizer_config.json", auto_map={"AutoTokenizer": ["own.T", None]})
    (foreign / "own.py").write_text("raise SystemExit('this code ran')\n")
    model = published(open_parent(str(foreign), tmp_path, {"causal_lm"}), tmp_path)
    assert type(model.module).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "out" / "own.py").exists()
    for name in ("config.json", "tokenizer_config.json"):
        assert "auto_map" not in json.loads((tmp_path / "out" / name).read_text())


@pytest.mark.parametrize(("file", "key"), [("config.json", "model_type"), ("tokenizer_config.json", "tokenizer_class")])
def test_a_model_that_only_its_own_code_can_load_is_refused(file, key, foreign):
    change(foreign / file, auto_map={"AutoModelForCausalLM": "own.M"}, **{key: "own"})
    with pytest.raises(HandoffError, match=rf"{file}.*{key}.*own"):
        check_foreign(foreign)


def gpt_oss(vocab_size: int) -> GptOssConfig:
    return GptOssConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )


def test_an_architecture_without_a_fused_kernel_computes_eagerly(foreign, tmp_path):
    replaced(foreign, gpt_oss(vocabulary(foreign)))
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}))
    assert model.module.config._attn_implementation == "eager"


def quantised(folder: Path) -> None:
    """The experts of the GPT-OSS model in `folder` become packed four-bit numbers, as OpenAI publishes them."""
    tensors = load_file(folder / "model.safetensors")
    drawn = torch.Generator().manual_seed(0)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(
            0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=drawn
        )
        tensors[f"{name}_scales"] = torch.randint(
            118, 122, (experts, outer, inner // 32), dtype=torch.uint8, generator=drawn
        )
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    change(folder / "config.json", quantization_config={"quant_method": "mxfp4"})


def test_quantised_weights_are_trained_and_published_as_plain_ones(foreign, tmp_path):
    replaced(foreign, gpt_oss(vocabulary(foreign)))
    quantised(foreign)
    model = published(open_parent(str(foreign), tmp_path, {"causal_lm"}), tmp_path)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    experts = weights["model.layers.0.mlp.experts.gate_up_proj"]
    assert experts.dtype == torch.float32 and len(experts.unique()) > 10
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.module.eval()(ids).logits)


def test_a_quantisation_that_cannot_be_undone_is_refused(foreign, tmp_path):
    change(foreign / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(
        HandoffError, match=r"its weights are quantised \(gptq\); name the model from which it was made"
    ):
        load(open_parent(str(foreign), tmp_path, {"causal_lm"}))


def test_the_processor_of_a_model_of_images_is_published_with_it(foreign, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": vocabulary(foreign), "num_key_value_heads": 1, "head_dim": 8}
    vision = small | {"image_size": 28, "patch_size": 14}
    replaced(foreign, Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))
    (foreign / "preprocessor_config.json").write_text('{"image_size": 28, "auto_map": {"AutoProcessor": "own.P"}}')
    (foreign / "processor_config.json").write_text('{"image_seq_length": 4}')
    model = published(open_parent(str(foreign), tmp_path, {"causal_lm"}), tmp_path)
    assert type(model.module).__name__ == "Gemma3ForConditionalGeneration"
    assert json.loads((tmp_path / "out" / "preprocessor_config.json").read_text()) == {"image_size": 28}
    assert (tmp_path / "out" / "processor_config.json").read_text() == '{"image_seq_length": 4}'


# ---- stages


@pytest.mark.slow
def test_what_cannot_be_published_is_refused_before_the_first_step(foreign, tmp_path):
    change(foreign / "generation_config.json", early_stopping=True)
    with pytest.raises(HandoffError, match=r"generation_config\.json"):
        run_stage("sft", tmp_path, f"parent={foreign}", "train.max_steps=2")
    assert not (tmp_path / "tiny" / "sft").exists()


@pytest.mark.slow
def test_a_base_model_whose_settings_lack_the_templates_stop_is_trained_and_stops_there(foreign, tmp_path):
    """Base models of several families name only their document end, and have a template that ends turns otherwise."""
    change(foreign / "generation_config.json", eos_token_id=1)
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    ends = load_encoder(parent).stop_ids
    assert len(ends) == 2 and parent.tokenizer.stop_ids == [1]
    done = run_stage("sft", tmp_path, f"parent={foreign}", "train.max_steps=2")
    assert done.manifest.tokenizer is not None
    assert done.manifest.tokenizer.stop_ids == sorted(ends)
    settings = json.loads((done.folder / "model" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == sorted(ends)
