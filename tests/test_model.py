"""training/model.py and architecture.py: what is loaded for a role, built from a recipe, written."""

import doctest
import json
import logging
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from baton.speaker import ChatSampling, Speaker
from data.encode import Encoder
from handoff.contract import read_tokenizer
from handoff.errors import HandoffError
from handoff.files import sha256_file
from handoff.parent import open_parent
from rollout.sampling import SamplingSpec
from tests.stage_chain import chain, foreign_checkpoint, runs
from training import architecture, engines, parent_weights, publishing
from training.config import ModelArguments
from training.engines.single import Single
from training.importing import quiet_libraries
from training.model import Model, check_vocabulary, load_encoder
from training.model_files import copy_tokenizer
from training.recipe import RecipeError

ARGUMENTS = ModelArguments()
ENGINE = engines.current()
SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
KERNELS = ("flash_attention_2", "sdpa")


def load(parent, role="policy", **keys):
    return Model.load(ENGINE, parent, role, load_encoder(parent), ARGUMENTS, **keys)


def build(encoder, **keys):
    return Model.build(ENGINE, architecture.model_config(keys, encoder, 64), encoder, ARGUMENTS, bf16=False)


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
def test_attention_is_chosen_by_what_is_there(requested, cuda, bf16, packages, expected):
    found = architecture.choose_attention(requested, cuda=cuda, bf16=bf16, packages=packages, supported=KERNELS)
    assert found == expected


@pytest.mark.parametrize(
    ("supported", "expected"), [((), "eager"), (("sdpa",), "sdpa"), (("flash_attention_2",), "flash_attention_2")]
)
def test_attention_is_one_that_the_architecture_has(supported, expected):
    machine = {"cuda": True, "bf16": True, "packages": {"flash_attn"}, "supported": supported}
    assert architecture.choose_attention("auto", **machine) == expected
    with pytest.raises(RecipeError, match="this architecture has no"):
        architecture.choose_attention("sdpa" if expected != "sdpa" else "flash_attention_2", **machine)


@pytest.mark.parametrize(
    ("cuda", "bf16", "lacking"), [(False, True, "a CUDA GPU"), (True, False, "bf16: true"), (True, True, "flash-attn")]
)
def test_flash_attention_where_it_cannot_run_is_refused(cuda, bf16, lacking):
    with pytest.raises(RecipeError, match=lacking):
        architecture.choose_attention("flash_attention_2", cuda=cuda, bf16=bf16, packages=set(), supported=KERNELS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"architecture": "lama"}, "no `lama`; did you mean `llama`"),
        ({"architecture": "bert", "hidden_siz": 3}, "has no such field; did you mean `hidden_size`"),
        ({"architecture": "llama", "num_layers": 3}, "model.num_layers: a llama configuration has no such field"),
        ({"architecture": "llama", "vocab_size": 3}, "model.vocab_size: follows from the tokenizer"),
        ({"architecture": "llama", "hidden_size": "big"}, "llama refuses these values"),
        ({"architecture": "llama", "max_position_embeddings": 16}, "is 16, shorter than rows of 64 tokens"),
        ({"architecture": "gpt2", "n_positions": 16}, "model.n_positions is 16, shorter than rows of 64 tokens"),
        ({"architecture": "clip"}, "is not a causal language model"),
    ],
)
def test_a_model_that_cannot_be_built_is_refused_with_the_key(keys, message, encoder):
    with pytest.raises(RecipeError, match=message):
        architecture.model_config(keys, encoder, 64)


def test_a_built_model_has_the_tokenizers_ids_and_one_row_for_each(encoder):
    model = build(encoder, architecture="gpt2", hidden_size=32, n_layer=1, n_head=2).module
    config = model.config
    assert model.get_input_embeddings().num_embeddings == encoder.vocab_size == config.vocab_size
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (
        encoder.bos_id,
        encoder.eos_id,
        encoder.pad_id,
    )
    assert model.dtype == torch.float32


def test_a_foreign_parent_keeps_its_tokenizer_its_template_and_its_settings(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = load(parent)
    assert model.module.dtype == torch.float32  # saved in bfloat16: AdamW could not move such weights
    out = tmp_path / "out"
    out.mkdir()
    encoder = model.encoder
    model.write(out, model.module)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (foreign / name).read_bytes()
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["repetition_penalty"] == 1.1
    assert settings["eos_token_id"] == sorted({1, 9, *encoder.stop_ids})
    assert settings["pad_token_id"] == encoder.pad_id
    assert read_tokenizer(out).fingerprint == parent.tokenizer.fingerprint
    assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {torch.bfloat16}  # as the parent


def test_rollouts_evaluation_and_chat_stop_where_the_published_model_does(foreign, tmp_path):
    """The parent declares the stop ids 1 and 12; its template ends answers with 9."""
    settings = foreign / "generation_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token_id": [1, 12]}))
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model, out = load(parent), tmp_path / "out"
    out.mkdir()
    model.write(out, model.module)
    published = set(json.loads((out / "generation_config.json").read_text())["eos_token_id"])
    speaker = Speaker(open_parent(str(out), tmp_path, {"causal_lm"}), ChatSampling(0.0, 4, 0))
    assert published == {1, 9, 12}
    assert set(SamplingSpec.of(load_encoder(parent), 8).stop_ids) == published
    assert set(speaker.encoder.stop_ids) == published == set(read_tokenizer(out).stop_ids)
    for stop in published:  # an answer that begins with any of them is empty
        speaker.live._drawn = lambda answers, logits, stop=stop: ([stop], [True])
        speaker.reset(None)
        assert list(speaker.answer("hi")) == []
    answered = model.encoder.answer("x")
    assert answered[-1] == model.encoder.stop_ids[0]  # what answers are trained to end with


def test_chat_never_says_an_id_without_a_token(foreign, tmp_path):
    """The model has three rows more than the tokenizer has ids."""
    speaker = Speaker(open_parent(str(foreign), tmp_path, {"causal_lm"}), ChatSampling(1.0, 4, 0))
    with torch.no_grad():
        head = speaker.model.get_output_embeddings().weight
        head[:-3], head[-3], head[-2:] = 0.0, 100.0, -100.0  # whatever the hidden state, one of these is the likeliest
    drawn, seen = speaker.live._drawn, []
    speaker.live._drawn = lambda answers, logits: seen.append(drawn(answers, logits)) or seen[-1]
    list(speaker.answer("hi"))
    assert seen and all(ids[0] < speaker.model.config.vocab_size - 3 for ids, _ in seen)


def test_a_tokenizer_larger_than_the_model_is_refused_with_both_sizes(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = load(parent).module
    model.resize_token_embeddings(parent.tokenizer.vocab_size - 2)
    size = parent.tokenizer.vocab_size
    with pytest.raises(HandoffError, match=f"tokenizer has {size} ids, the model only {size - 2} embeddings"):
        check_vocabulary(model, parent)


def test_a_parent_without_a_pad_token_is_padded_with_a_spare_one(foreign, tmp_path):
    """Many base models have no pad token; the hand-off chooses one, which encoder and published model use."""
    path = foreign / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token": "<|eos|>"}))
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = load(parent)
    encoder = model.encoder
    assert encoder.pad_id == parent.tokenizer.pad_id != encoder.eos_id
    out = tmp_path / "out"
    out.mkdir()
    model.write(out, model.module)
    assert read_tokenizer(out).pad_id == encoder.pad_id


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_head_is_written_once_and_restored(tied, encoder, tmp_path):
    keys = {"architecture": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    keys |= {"num_attention_heads": 2, "tie_word_embeddings": tied}
    model = build(encoder, **keys)
    model.write(tmp_path, model.module)
    assert ("lm_head.weight" in load_file(tmp_path / "model.safetensors")) is not tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.module.eval()(ids).logits)


def test_what_does_not_load_under_its_names_is_never_published(encoder, tmp_path, monkeypatch):
    model = build(encoder, architecture="gpt2", n_embd=16, n_layer=1, n_head=2)
    published = Model._published

    def renamed(self, entries, prefix):
        groups = published(self, entries, prefix)
        groups[0] = [replace(groups[0][0], name="other.name"), *groups[0][1:]]
        return groups

    monkeypatch.setattr(Model, "_published", renamed)
    with pytest.raises(AssertionError, match="does not load as it was saved"):
        model.write(tmp_path, model.module)


def test_writing_needs_no_second_copy_of_the_weights_and_hashes_what_it_writes(encoder, tmp_path, monkeypatch):
    """A tensor at a time, over several files; what is hashed on the way are the files' own bytes."""
    keys = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    model = build(encoder, architecture="llama", **keys)
    monkeypatch.setattr(publishing, "_FILE_BYTES", 40_000)
    written = model.write(tmp_path, model.module)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 1 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert written.hashes == {name: sha256_file(tmp_path / name) for name in files}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {name: load_file(tmp_path / file)[name].shape for name, file in index["weight_map"].items()} == {
        name: value.shape for name, value in model.module.state_dict().items()
    }
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.module.eval()(ids).logits)


def test_experts_that_are_held_as_one_tensor_are_published_one_by_one(encoder, tmp_path):
    """Checkpoints of mixtures of experts have a tensor for each expert, and so has what is published."""
    keys = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    keys |= {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}
    model = build(encoder, architecture="qwen3_moe", **keys)
    model.write(tmp_path, model.module)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert {f"model.layers.1.mlp.experts.{n}.down_proj.weight" for n in range(4)} <= names
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.module.eval()(ids).logits)


def test_two_runs_of_a_mixture_of_experts_on_two_threads_are_equal(encoder):
    """Without a fixed order of addition their gradients differ in the last bits."""
    keys = WIDE | {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 4, "hidden_size": 64}
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(False)  # a test before this one may have had experts
    try:
        model = build(encoder, architecture="qwen3_moe", **keys).module
        assert torch.are_deterministic_algorithms_enabled()
        torch.set_num_threads(2)
        ids = torch.randint(0, 200, (16, 64), generator=torch.Generator().manual_seed(0))
        grads = []
        for _ in range(3):
            model.zero_grad()
            model(ids).logits.square().mean().backward()
            grads.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        assert all(torch.equal(a, b) for other in grads[1:] for a, b in zip(grads[0], other, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)


def test_the_share_of_changed_weights_is_counted_while_they_are_written(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    model = load(parent)
    out = tmp_path / "out"
    out.mkdir()
    written = model.write(out, model.module)
    assert (written.changed, written.published) == (0.0, 0.0)
    with torch.no_grad():
        embeddings = model.module.get_input_embeddings().weight
        embeddings[0] += 1
        embeddings[1] *= 1 + 1e-5  # too little for bfloat16
    width, total = model.module.config.hidden_size, model.parameters()
    written = model.write(out, model.module)
    assert written.changed == pytest.approx(2 * width / total)
    assert written.published == pytest.approx(width / total)


def test_a_reference_is_a_frozen_view_of_what_the_policy_started_from(foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    before = load(parent).module.state_dict()
    for dtype, moves, stored in (
        (torch.float32, False, torch.bfloat16),
        (torch.float32, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
    ):
        policy = load(parent, dtype=dtype)
        with torch.no_grad():
            policy.module.get_input_embeddings().weight += 1
        reference = policy.reference(bf16=False, moves=moves).freeze()
        assert (reference.role, reference.dtype) == ("reference", policy.dtype)
        assert reference.module.get_input_embeddings().weight.dtype == stored
        assert not any(p.requires_grad for p in reference.module.parameters()) and not reference.module.training
        assert all(torch.equal(value, before[name]) for name, value in reference.module.state_dict().items())


def test_dropout_can_be_switched_off_wherever_an_architecture_keeps_it(encoder):
    gpt2 = {"architecture": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 2, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    llama = {"architecture": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    llama |= {"num_attention_heads": 2, "attention_dropout": 0.5}
    ids = torch.arange(24)[None]
    for keys in (gpt2, llama):
        model = build(encoder, **keys).module.train()
        assert not torch.equal(model(ids).logits, model(ids).logits)
        architecture.without_dropout(model)
        assert torch.equal(model(ids).logits, model(ids).logits)


class Sharding(Single):
    """As an engine that shards: `load` leaves the values to `fill`."""

    splits = True


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
WIDE = SMALL | {"intermediate_size": 32, "num_key_value_heads": 2}
FAMILIES = {
    "llama": WIDE | {"tie_word_embeddings": True},
    "qwen3": WIDE,
    "gemma3_text": WIDE,
    "gpt2": SMALL,
    "gpt_neox": SMALL | {"intermediate_size": 32},
    "qwen3_moe": WIDE | {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2},
}


def loaded_later(parent, role, **keys):
    model = Model.load(Sharding(ENGINE.request), parent, role, load_encoder(parent), ARGUMENTS, **keys)
    with torch.no_grad():
        for name, parameter in model.module.named_parameters():
            if not name.startswith("score."):
                parameter.fill_(torch.nan)  # nothing may depend on the values before `fill`
    return model


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_a_model_that_is_filled_after_sharding_equals_one_loaded_whole(name, role, encoder, tmp_path):
    first = build(encoder, architecture=name, **FAMILIES[name])
    (tmp_path / "a").mkdir()
    first.write(tmp_path / "a", first.module)
    parent = open_parent(str(tmp_path / "a"), tmp_path, {"causal_lm"})
    if name in ("gemma3_text", "gpt2") and role == "reward":  # also from a parent that has a head already
        whole = load(parent, "reward")
        (tmp_path / "b").mkdir()
        whole.write(tmp_path / "b", whole.module)
        shutil.copy(tmp_path / "a" / "tokenizer.json", tmp_path / "b")
        parent = open_parent(str(tmp_path / "b"), tmp_path, {"reward_model"})
    whole, later = load(parent, role), loaded_later(parent, role)
    later.fill(later.module)
    wanted = dict(whole.module.named_buffers()) | whole.module.state_dict()
    found = dict(later.module.named_buffers()) | later.module.state_dict()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value) and found[key].dtype == value.dtype, key
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(later.module.eval()(ids).logits, whole.module.eval()(ids).logits)
    (tmp_path / "out").mkdir()
    (tmp_path / "again").mkdir()
    assert later.write(tmp_path / "out", later.module).hashes == whole.write(tmp_path / "again", whole.module).hashes


def test_weights_that_are_stored_in_bfloat16_without_the_head_are_filled_too(foreign, tmp_path):
    """A checkpoint of the transformer's body alone has no `model.` before its names."""
    body = AutoModel.from_pretrained(foreign, dtype=torch.bfloat16)
    body.config.tie_word_embeddings = True
    body.save_pretrained(foreign)
    config = json.loads((foreign / "config.json").read_text())
    (foreign / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"]}))
    assert "embed_tokens.weight" in load_file(foreign / "model.safetensors")
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    whole, later = load(parent), loaded_later(parent, "policy").freeze()
    for key, value in whole.module.state_dict().items():
        assert torch.equal(later.module.state_dict()[key], value), key


@pytest.mark.parametrize("engine", [ENGINE, Sharding(ENGINE.request)], ids=["whole", "sharded"])
def test_a_checkpoint_that_lacks_weights_is_refused(engine, foreign, tmp_path):
    weights = load_file(foreign / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, foreign / "model.safetensors", {"format": "pt"})
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    with pytest.raises(HandoffError, match=r"lack model.layers.0.mlp.up_proj.weight"):
        Model.load(engine, parent, "policy", load_encoder(parent), ARGUMENTS)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_a_reward_models_head_depends_on_the_seed_alone(name, encoder, tmp_path):
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    if name != "gpt2":
        small |= {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8}
    model = build(encoder, architecture=name, **small)
    model.write(tmp_path, model.module)
    parent = open_parent(str(tmp_path), tmp_path, {"causal_lm"})
    heads = []
    for stream, seed in ((0, 5), (1, 5), (1, 6)):
        torch.manual_seed(stream)
        heads.append(load(parent, "reward", seed=seed).module.get_submodule("score").weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[1], heads[2])
    assert 0.02 < heads[0].std().item() < 1


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_reward_model_that_pads_with_its_end_token_reads_the_end(side, foreign, tmp_path):
    """transformers' own classifier would read the token before the end, since it takes the end for padding."""
    model = load(open_parent(str(foreign), tmp_path, {"causal_lm"}), "reward").module.eval()
    model.config.pad_token_id = 1
    rows = [[5, 6, 7, 1], [5, 1], [9, 8, 7, 6, 1]]
    padded = [[*row, *[1] * (5 - len(row))] if side == "right" else [*[1] * (5 - len(row)), *row] for row in rows]
    mask = [[1] * len(row) + [0] * (5 - len(row)) for row in rows]
    mask = mask if side == "right" else [line[::-1] for line in mask]
    positions = (torch.tensor(mask).cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        found = model(torch.tensor(padded), attention_mask=torch.tensor(mask), position_ids=positions).logits
        alone = [model(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits[0] for row in rows]
        body = [model.model(torch.tensor([row])).last_hidden_state[0, -1] for row in rows]
    assert torch.allclose(found, torch.stack(alone), atol=1e-5)
    assert torch.allclose(found, torch.stack([model.score(hidden) for hidden in body]), atol=1e-5)


def test_an_architecture_without_a_reward_head_is_refused(foreign, tmp_path, monkeypatch):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    monkeypatch.setattr(architecture, "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING", {})
    with pytest.raises(HandoffError, match=r"no sequence classification, .* for `llama`"):
        load(parent, "reward")


@pytest.mark.parametrize("architecture_of", ["clip", "unheard"])
def test_an_architecture_without_a_language_model_is_refused(architecture_of, foreign, tmp_path):
    parent = open_parent(str(foreign), tmp_path, {"causal_lm"})
    path = foreign / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": architecture_of}))
    with pytest.raises(
        HandoffError, match=f"transformers .* {architecture_of}|`{architecture_of}`|'{architecture_of}'"
    ):
        load(parent)


def test_a_classifier_with_several_scores_is_no_reward_model(foreign, tmp_path):
    config = LlamaConfig(**SIZES, vocab_size=500, num_labels=3, pad_token_id=2)
    LlamaForSequenceClassification(config).save_pretrained(foreign)
    with pytest.raises(HandoffError, match="gives 3 scores for a text; a reward model gives one"):
        load(open_parent(str(foreign), tmp_path, {"reward_model"}), "reward")


def test_tokenizer_files_are_copied_as_they_are(tokenizer_dir, tmp_path):
    copy_tokenizer(tokenizer_dir, tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"} <= names
    assert "generation_config.json" not in names
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast)


def test_the_example_in_a_docstring():
    assert doctest.testmod(parent_weights) == (0, 1)


def test_a_head_that_the_base_lacks_is_no_news_and_other_warnings_are(foreign, caplog):
    """Loading a causal model for scoring makes a new head, which transformers reports at length."""
    quiet_libraries()
    monitored = logging.getLogger("transformers.modeling_utils")
    monitored.addHandler(caplog.handler)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        load(open_parent(str(foreign), foreign.parent, {"causal_lm"}), "reward")
        assert "LOAD REPORT" not in caplog.text
        monitored.warning("the weights are odd")
        assert "the weights are odd" in caplog.text
    finally:
        transformers_logging.set_verbosity(before)
        monitored.removeHandler(caplog.handler)
