"""A GGUF file as a parent: one that is written here with llama.cpp's names and order is unpacked to the same model."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import handoff.gguf
from baton.runner import run_pipeline
from baton.status import State, overview
from handoff.errors import HandoffError
from handoff.gguf import sizes, unpacked
from handoff.manifest import QuantizationRecord
from handoff.parent import UNPACKED, open_parent, packed
from rollout.quantised import QuantisedLinear
from tests.hostile_models import write_good
from training import engines
from training.config import AdapterConfig, ModelArguments
from training.model import Model, load_encoder
from training.recipe import load_recipe
from training.shapes import shape_of

pytestmark = pytest.mark.slow  # each unpacking is a process of its own

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
MERGES = ["t h", "th e", "1 2"]


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Path, template: str, split: str = "gpt-2") -> None:
    """The model as llama.cpp stores a Llama, where the two halves of each head's rotated dimensions are interleaved."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    backend = json.loads((tokenizer / "tokenizer.json").read_text())
    special = {entry["content"] for entry in backend["added_tokens"]}
    tokens = sorted(backend["model"]["vocab"], key=backend["model"]["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(template)
    for name, value in model.state_dict().items():
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        name = name.replace("model.layers.", "blk.")
        if "attn_q" in name or "attn_k" in name:
            heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            rows, columns = value.shape
            value = value.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, LlamaForCausalLM]:
    """A GGUF file and the model in it."""
    folder = write_good(tmp_path / "plain")
    backend = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = backend["model"]["vocab"]
    for merge in MERGES:
        vocabulary[merge.replace(" ", "")] = len(vocabulary)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    config = loaded.config
    config.vocab_size, config.num_key_value_heads, config.hidden_size, config.head_dim = len(vocabulary), 1, 16, 8
    torch.manual_seed(0)
    built = LlamaForCausalLM(config)
    (folder / "tokenizer.json").write_text(json.dumps(backend))
    path = tmp_path / "tiny.gguf"
    write_gguf(path, built, folder, (folder / "chat_template.jinja").read_text())
    return path, built


def test_the_sizes_of_a_file_are_those_of_its_model(model):
    path, built = model[0], model[1]
    config, stored = sizes(path)
    shape = shape_of(config, stored)
    assert shape.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert shape_of(config).parameters == shape.parameters


def test_a_gguf_file_is_the_model_that_was_written(model, tmp_path):
    path, built = model
    parent = open_parent(str(path), tmp_path / "runs" / "own", {"causal_lm"})
    assert parent.name == "tiny" and parent.path.parent == tmp_path / "runs" / UNPACKED
    assert parent.tokenizer.stop_ids == [1] and parent.tokenizer.vocab_size == built.config.vocab_size
    loaded = AutoModelForCausalLM.from_pretrained(parent.path)
    ids = torch.randint(0, built.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, built(ids).logits)
    assert sorted(entry.name for entry in parent.path.parent.iterdir()) == [parent.path.name]


def test_it_can_be_a_quantised_frozen_base(model, tmp_path):
    path, built = model
    parent = open_parent(str(path), tmp_path / "runs" / "own", {"causal_lm"})
    record = QuantizationRecord(method="nf4", double_quant=True)
    keys = {"adapter": AdapterConfig(r=2), "quantization": record}
    found = Model.load(engines.current(), parent, "policy", load_encoder(parent), ModelArguments(), **keys).module
    layers = [layer for layer in found.modules() if isinstance(layer, QuantisedLinear)]
    plain = [layer for layer in built.model.modules() if isinstance(layer, torch.nn.Linear)]
    assert len(layers) == len(plain) > 6
    for ours, theirs in zip(layers, plain, strict=True):
        difference = ours.dequantised() - theirs.weight
        assert 0 < difference.abs().max() < theirs.weight.abs().max() / 4
    assert torch.equal(found.get_input_embeddings().weight, built.get_input_embeddings().weight)


def test_it_is_unpacked_once_and_again_when_the_content_changes(model, tmp_path, monkeypatch):
    path, _ = model
    run = tmp_path / "runs" / "own"
    first = open_parent(str(path), run, {"causal_lm"})
    converted = []
    convert = handoff.gguf._convert_apart
    monkeypatch.setattr(handoff.gguf, "_convert_apart", lambda *given: (converted.append(given), convert(*given)))
    copy = Path(shutil.copy(path, tmp_path / "other.gguf"))
    assert open_parent(str(copy), run, {"causal_lm"}).fingerprint == first.fingerprint and not converted
    copy.write_bytes(copy.read_bytes() + b"\0")
    other = open_parent(str(copy), run, {"causal_lm"})
    assert len(converted) == 1 and other.path != first.path


@pytest.mark.parametrize(
    ("split", "expected"),
    [("gpt-2", ["the", " ", "12"]), ("smollm", ["the", " ", "1", "2"]), ("llama-bpe", ["the", " ", "12"])],
)
def test_texts_are_split_by_the_rule_of_the_file(model, tmp_path, split, expected):
    """The token "12" exists, and a rule that takes each digit alone never makes it."""
    folder, built = tmp_path / "plain", model[1]
    path = tmp_path / "split.gguf"
    write_gguf(path, built, folder, (folder / "chat_template.jinja").read_text(), split)
    parent = open_parent(str(path), tmp_path / "runs" / "own", {"causal_lm"})
    tokenizer = AutoTokenizer.from_pretrained(parent.path)
    assert [tokenizer.decode([token]) for token in tokenizer("the 12").input_ids] == expected


def test_other_files_are_refused_by_name(model, tmp_path, monkeypatch):
    path, _ = model
    run = tmp_path / "runs" / "own"
    for name, content, words in (
        ("notes.txt", b"x", "is a file; a parent is a directory"),
        ("wrong.gguf", b"PK\x03\x04", "does not begin with the letters GGUF"),
        ("cut.gguf", path.read_bytes()[:400], "transformers cannot load it"),
    ):
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(HandoffError, match=words) as refused:
            open_parent(str(file), run, {"causal_lm"})
        assert name in str(refused.value)
    strange = tmp_path / "strange.gguf"
    write_gguf(strange, model[1], tmp_path / "plain", (tmp_path / "plain/chat_template.jinja").read_text(), "martian")
    with pytest.raises(HandoffError, match="by the rule 'martian', which is not known here"):
        open_parent(str(strange), run, {"causal_lm"})
    monkeypatch.setattr(handoff.gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HandoffError, match=r"pip install 'baton-align\[gguf\]'"):
        open_parent(str(path), run, {"causal_lm"})
    assert list((tmp_path / "runs" / UNPACKED).glob("*")) == []


def test_unpacking_leaves_no_memory_behind_and_a_killed_one_is_named(model, tmp_path, monkeypatch):
    """The runner of a pipeline would keep the whole model's memory beside every stage."""
    path, _ = model
    code = (
        "import sys\nfrom pathlib import Path\nfrom handoff.gguf import unpacked\n"
        "unpacked(Path(sys.argv[1]), Path(sys.argv[2]), '0' * 64)\nprint('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n" and done.stderr == ""
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr("handoff.gguf.subprocess.run", lambda *given, **keys: killed)
    with pytest.raises(HandoffError, match="killed by signal 9, by the system for lack of memory"):
        unpacked(path, tmp_path / "store", "1" * 64)
    assert [folder.name for folder in (tmp_path / "store").iterdir()] == ["0" * 16]


def test_a_failed_conversion_leaves_nothing_behind(model, tmp_path, monkeypatch):
    path, _ = model

    def fails(path: Path, folder: Path) -> None:
        (folder / "half").write_text("x")
        raise HandoffError("no such architecture")

    monkeypatch.setattr(handoff.gguf, "_convert_apart", fails)
    with pytest.raises(HandoffError, match="no such architecture"):
        unpacked(path, tmp_path / "store", "0" * 64)
    assert list((tmp_path / "store").iterdir()) == []


def test_the_status_of_a_recipe_does_not_unpack_and_says_nothing_else(model, tmp_path, monkeypatch, capfd):
    path, _ = model
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: own\noutput_root: {tmp_path}/runs\nstages:\n"
        f"  taught: {{stage: sft, parent: {path}, data: [{{source: world, kind: chats, size: 20}}]}}\n"
    )
    loaded = load_recipe(recipe)
    capfd.readouterr()
    with monkeypatch.context() as closed:
        closed.setattr("handoff.gguf._convert", None)  # it may not be called
        (found,) = overview(loaded).values()
        assert found.state is State.NEW and found.reasons == (f"{path} is unpacked first",)
        assert run_pipeline(loaded, [], [], None, dry_run=True) == 0
    assert capfd.readouterr().err == "" and not loaded.output_root.exists()
    open_parent(str(path), loaded.run_dir, {"causal_lm"})
    (found,) = overview(loaded).values()
    assert found.state is State.NEW and found.reasons == ()
    assert not packed(str(path), loaded.run_dir)
    path.write_bytes(path.read_bytes() + b"\0")
    assert packed(str(path), loaded.run_dir)
