"""training/models.py: loading a model for a role, building one from a recipe, and writing it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from data.encode import Encoder
from handoff.contract import read_tokenizer
from handoff.errors import HandoffError
from handoff.parent import open_parent
from tests.stage_chain import chain, foreign_checkpoint, runs
from training import models
from training.config import ModelArguments
from training.recipe import RecipeError

ARGUMENTS = ModelArguments()


@pytest.fixture(scope="module")
def tokenizer_dir():
    chain()
    return runs() / "tiny" / "tokenizer" / "model"


@pytest.fixture(scope="module")
def encoder(tokenizer_dir):
    return Encoder.from_pretrained(tokenizer_dir)


@pytest.fixture
def foreign(tmp_path):
    return foreign_checkpoint(tmp_path / "foreign")


@pytest.mark.parametrize(
    ("requested", "cuda", "bf16", "packages", "expected"),
    [
        ("auto", False, True, {"flash_attn"}, "sdpa"),
        ("auto", True, True, set(), "sdpa"),
        ("auto", True, False, {"flash_attn"}, "sdpa"),  # FlashAttention has no float32
        ("auto", True, True, {"flash_attn"}, "flash_attention_2"),
        ("eager", True, True, {"flash_attn"}, "eager"),
        ("sdpa", False, False, set(), "sdpa"),
    ],
)
def test_attention_depends_on_hardware_and_packages(requested, cuda, bf16, packages, expected):
    assert models.choose_attention(requested, cuda=cuda, bf16=bf16, packages=packages) == expected


@pytest.mark.parametrize(
    ("cuda", "bf16", "lacking"), [(False, True, "a CUDA GPU"), (True, False, "bf16: true"), (True, True, "flash-attn")]
)
def test_flash_attention_where_it_cannot_run_is_refused(cuda, bf16, lacking):
    with pytest.raises(RecipeError, match=lacking):
        models.choose_attention("flash_attention_2", cuda=cuda, bf16=bf16, packages=set())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "lama"}, "no `lama`; did you mean `llama`"),
        ({"architecture": "bert", "hidden_siz": 3}, "has no such field; did you mean `hidden_size`"),
        ({"architecture": "llama", "num_layers": 3}, "model.num_layers: a llama configuration has no such field"),
        ({"architecture": "llama", "vocab_size": 3}, "model.vocab_size: follows from the tokenizer"),
        ({"architecture": "llama", "hidden_size": "big"}, "llama refuses these values"),
        ({"architecture": "llama", "max_position_embeddings": 16}, "is 16, shorter than rows of 64 tokens"),
        ({"architecture": "clip"}, "is not a causal language model"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_key(keys, message, encoder):
    with pytest.raises(RecipeError, match=message):
        models.model_config(keys, encoder, 64)


def test_a_built_model_has_one_embedding_row_per_token_id(encoder):
    config = models.model_config({"architecture": "gpt2", "hidden_size": 32, "n_layer": 1, "n_head": 2}, encoder, 64)
    model = models.build(config, ARGUMENTS, bf16=False)
    assert model.get_input_embeddings().num_embeddings == encoder.vocab_size == config.vocab_size
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        encoder.bos_id,
        encoder.eos_id,
        encoder.pad_id,
    )
    assert model.dtype == torch.float32


def test_a_foreign_parent_keeps_its_tokenizer_its_template_and_its_settings(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = models.load_causal_lm(parent, ARGUMENTS)
    assert model.dtype == torch.float32  # saved in bfloat16, in which AdamW could not change the weights
    out = tmp_path / "out"
    out.mkdir()
    encoder = models.load_encoder(parent)
    models.save_model(model, encoder, out, model.state_dict())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (foreign / name).read_bytes()
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.1
    assert settings["eos_token_id"] == sorted({1, 9, *encoder.stop_ids})
    assert settings["pad_token_id"] == encoder.pad_id
    assert read_tokenizer(out).fingerprint == parent.tokenizer.fingerprint
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.float32}


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = models.load_causal_lm(parent, ARGUMENTS)
    model.resize_token_embeddings(parent.tokenizer.vocab_size - 2)
    size = parent.tokenizer.vocab_size
    with pytest.raises(HandoffError, match=f"tokenizer has {size} ids, the model only {size - 2} embeddings"):
        models.check_vocabulary(model, parent)


def test_a_parent_without_a_pad_token_is_padded_with_a_spare_one(foreign, tmp_path):
    """Many base models have no pad token; the hand-off chooses one, which encoder and published model use."""
    path = foreign / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|eos|>"}))
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    encoder = models.load_encoder(parent)
    assert encoder.pad_id == parent.tokenizer.pad_id != encoder.eos_id
    out = tmp_path / "out"
    out.mkdir()
    model = models.load_causal_lm(parent, ARGUMENTS)
    models.save_model(model, encoder, out, model.state_dict())
    assert read_tokenizer(out).pad_id == encoder.pad_id


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once_and_restored(tied, encoder, tmp_path):
    keys = {"architecture": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": 2, "tie_word_embeddings": tied}
    model = models.build(models.model_config(keys, encoder, 64), ARGUMENTS, bf16=False)
    # As gathered from an engine, where each name has a separate tensor.
    models.save_model(model, encoder, tmp_path, {name: value.clone() for name, value in model.state_dict().items()})
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


def test_a_model_that_loads_differently_is_never_published(encoder, tmp_path, monkeypatch):
    keys = {"architecture": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = models.build(models.model_config(keys, encoder, 64), ARGUMENTS, bf16=False)
    save = type(model).save_pretrained

    def damaged(self, path, state_dict):
        save(self, path, state_dict={name: value + 1 for name, value in state_dict.items()})

    monkeypatch.setattr(type(model), "save_pretrained", damaged)
    with pytest.raises(AssertionError, match="does not come back"):
        models.save_model(model, encoder, tmp_path, model.state_dict())


def test_dropout_can_be_switched_off_wherever_an_architecture_keeps_it(encoder):
    gpt2 = {"architecture": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    llama = {"architecture": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "attention_dropout": 0.5}
    ids = torch.arange(24)[None]
    for keys in (gpt2, llama):
        model = models.build(models.model_config(keys, encoder, 64), ARGUMENTS, bf16=False).train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        models.without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3", "gpt2"])
def test_a_reward_models_head_depends_only_on_the_seed(architecture, encoder, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if architecture != "gpt2":
        small |= {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    model = models.build(
        models.model_config({"architecture": architecture, **small}, encoder, 64), ARGUMENTS, bf16=False
    )
    models.save_model(model, encoder, tmp_path, model.state_dict())
    parent = open_parent(str(tmp_path), tmp_path, {"causal_lm"})
    heads = []
    for stream, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(stream)
        heads.append(models.load_reward_model(parent, ARGUMENTS, seed=seed).get_submodule("score").weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert 0.02 < heads[0].std().item() < 1


def test_an_architecture_without_a_reward_head_is_refused(foreign, tmp_path, monkeypatch):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    monkeypatch.setattr(models, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    with pytest.raises(HandoffError, match="no sequence classification for `llama`"):
        models.load_reward_model(parent, ARGUMENTS)


def test_tokenizer_files_are_copied_as_they_are(tokenizer_dir, tmp_path):
    models.copy_tokenizer(tokenizer_dir, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "generation_config.json" not in names
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast)
