"""Exports to GGUF: a real llama.cpp, and transformers, read and answer as the model that was exported."""

import errno
import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from baton.cli import app
from baton.export import check, gguf_file, gguf_settings, llama_cpp
from baton.export import run as running
from baton.export.check import CheckFailed
from baton.export.record import read_record, verify_export
from baton.export.run import export
from handoff.errors import HandoffError, UserError
from tests import llama_cpp as real
from tests.test_chat_templates import MARKERS
from tests.test_data_encode import make_tokenizer
from tests.test_families import FAMILIES, publish
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow  # each unpacking is a process of its own

NAMES = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32, "rope_theta": 10_000.0}
# What a configuration has besides, so that every rule of llama.cpp for the family is used.
MORE = {
    "Llama 3": {"rope_parameters": LLAMA3, "attention_bias": True},
    "Mistral": {"sliding_window": 128},
    "Qwen2.5": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}},
    "Qwen3": {"tie_word_embeddings": True},
    "Gemma 3": {
        "num_hidden_layers": 6,
        "sliding_window": 8,
        "query_pre_attn_scalar": 8,
        "max_position_embeddings": 256,
    },
}


def quiet(line: str) -> None:
    """What `export` says is in the record, too."""


@pytest.fixture
def llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama.cpp that `export` finds."""
    monkeypatch.setenv(llama_cpp.VARIABLE, str(real.folder()))


@pytest.fixture
def no_llama(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without llama.cpp."""
    monkeypatch.delenv(llama_cpp.VARIABLE, raising=False)


@pytest.fixture
def run(micro_recipe: Path, tmp_path: Path) -> Path:
    """A run with an instruction-tuned model and our own tokenizer; what is exported goes elsewhere."""
    return load_recipe(micro_recipe).run_dir


def write_family(folder: Path, family: str) -> None:
    """A random float32 model whose weights are large enough that its answers differ much."""
    kind, keys, template = FAMILIES[family]
    made = make_tokenizer(list(dict.fromkeys([*NAMES.values(), *MARKERS.findall(template)])), template, **NAMES)
    made.save_pretrained(folder)
    ids = {f"{name}_id": made.convert_tokens_to_ids(text) for name, text in NAMES.items()}
    config = AutoConfig.for_model(
        kind, **{**keys, "vocab_size": len(made) + 8, "initializer_range": 0.3, **ids, **MORE[family]}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(folder)


@pytest.mark.parametrize("family", sorted(MORE))
def test_llama_cpp_answers_as_the_model_of_each_family(family, tmp_path, llama):
    write_family(tmp_path / "model", family)
    folder = export(str(tmp_path / "model"), "gguf", "f32", tmp_path / "out", quiet)
    record = read_record(folder)
    assert record.check is not None and record.check.by == f"llama.cpp (node-llama-cpp {real.VERSION})"
    found = record.check.numbers
    assert found["texts"] == 1000 and found["positions"] >= 500 and found["agreement"] > 0.99
    assert found["largest_difference"] < 1e-2


def test_llama_cpp_reads_our_own_tokenizer_and_stops_as_the_stage_does(run, tmp_path, llama, capsys):
    folder = export(f"{run}:sft", "gguf", None, tmp_path / "out", quiet)
    record = read_record(folder)
    assert record.form == "gguf" and record.dtype == "f16"
    verify_export(folder)
    assert [one.name for one in record.lineage] == ["tokenizer", "pretrain", "sft"]
    assert record.lineage[-1].fingerprint == record.fingerprint
    assert record.check is not None and record.check.numbers["largest_difference"] <= 1e-2
    rough = read_record(export(f"{run}:sft", "gguf", "q4_0", tmp_path / "rough", quiet))
    assert rough.check is not None and any("nats per token" in line for line in rough.check.said)
    assert rough.check.numbers["mean_difference"] > record.check.numbers["mean_difference"] > 0
    (tmp_path / "out" / "more").write_text("x")
    with pytest.raises(SystemExit):
        app(["verify", str(folder)], standalone_mode=False)
    assert capsys.readouterr().err == f"{folder}/more: was added after the export\n"


def test_without_llama_cpp_the_file_is_read_back_and_it_is_said(run, tmp_path, no_llama):
    lines: list[str] = []
    folder = export(f"{run}:sft", "gguf", "f32", tmp_path / "out", lines.append)
    record = read_record(folder)
    assert record.check is not None and record.check.by == "transformers"
    assert "llama.cpp was not asked" in record.check.said[0] and any("was not asked" in line for line in lines)
    assert record.check.numbers["largest_difference"] < 1e-4
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "export.json", "micro-sft-f32.gguf"]


def test_a_gguf_file_goes_on_as_a_parent_and_is_exported_again(run, tmp_path, llama):
    first = export(f"{run}:sft", "gguf", "f32", tmp_path / "first", quiet, check=False)
    recipe = tmp_path / "again.yaml"
    section = {
        "stage": "sft",
        "parent": str(first / "micro-sft-f32.gguf"),
        "max_length": 128,
        "data": [{"source": "world", "kind": "chats", "size": 8}],
        "train": {"learning_rate": 1e-4, "max_steps": 2, "global_batch_size": 2},
    }
    recipe.write_text(yaml.safe_dump({"name": "again", "output_root": str(tmp_path), "stages": {"taught": section}}))
    loaded = load_recipe(recipe)
    run_section(loaded, "taught")
    record = read_record(export(f"{recipe}:taught", "gguf", "f32", None, quiet))
    assert record.check is not None and record.check.numbers["agreement"] == 1
    assert [one.stage for one in record.lineage] == [None, "sft"]
    config = json.loads((tmp_path / "again" / "taught" / "model" / "generation_config.json").read_text())
    assert len(config["eos_token_id"]) == 2, "a turn and a text end with different tokens"


def test_an_export_that_answers_otherwise_is_not_left(run, tmp_path, monkeypatch, llama):
    def turned(family, config, name, values):
        return values[::-1].copy() if name.endswith("1.mlp.up_proj.weight") else correct(family, config, name, values)

    correct = gguf_settings.stored
    monkeypatch.setattr(gguf_file, "stored", turned)
    with pytest.raises(CheckFailed, match=r"failed its check and was removed: llama.cpp .* answers otherwise"):
        export(f"{run}:sft", "gguf", "f32", tmp_path / "out", quiet)
    assert list(tmp_path.iterdir()) == []
    export(f"{run}:sft", "gguf", "f32", tmp_path / "out", quiet, check=False)
    assert read_record(tmp_path / "out").check is None


def test_a_check_that_finds_other_tokens_or_stops_fails(run, tmp_path, monkeypatch, no_llama):
    source = running.Source.open(f"{run}:sft")
    expected = check.Expected.of(source.load("auto"))
    verdict = check.Verdict("x")
    with pytest.raises(CheckFailed, match="x cuts 1 of 2 texts into other tokens"):
        check._same_tokens(verdict, ["a", "b"], [[1], [2]], [[1], [3]])
    with pytest.raises(CheckFailed, match="would not end at the stop ids"):
        check._same_stops(expected, expected.encoder.stop_ids[:1])


def test_a_full_disk_leaves_nothing(run, tmp_path, monkeypatch, no_llama):
    def full(*given, **keys):
        given[1].write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(gguf_file, "write_gguf", full)
    with pytest.raises(HandoffError, match="the disk is full; nothing was exported"):
        export(f"{run}:sft", "gguf", None, tmp_path / "new" / "out", quiet)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("handoff.files.free_bytes", lambda path: 1000)
    with pytest.raises(HandoffError, match="the export of sft needs"):
        export(f"{run}:sft", "gguf", None, tmp_path / "out", quiet)


def test_what_gguf_cannot_hold_is_refused_before_anything_is_loaded(run, tmp_path, monkeypatch):
    monkeypatch.setattr(running.Source, "load", None)
    publish(tmp_path / "gpt2", "GPT-2")
    with pytest.raises(HandoffError, match="the architecture 'gpt2' cannot be exported to GGUF"):
        export(str(tmp_path / "gpt2"), "gguf", None, tmp_path / "out", quiet)
    publish(tmp_path / "qwen", "Qwen3")
    path = tmp_path / "qwen" / "tokenizer.json"
    content = json.loads(path.read_text())
    for change, words in (
        ({"pre_tokenizer": {"type": "Whitespace"}}, "llama.cpp has no rule that cuts texts as this tokenizer does"),
        ({"normalizer": {"type": "Lowercase"}}, "rewrites texts .Lowercase. before it cuts them"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(HandoffError, match=words):
            export(str(tmp_path / "qwen"), "gguf", None, tmp_path / "out", quiet)
    path.write_text(json.dumps(content))
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config | {"use_sliding_window": True}))
    with pytest.raises(HandoffError, match="use_sliding_window, which a GGUF file of this architecture cannot hold"):
        export(str(tmp_path / "qwen"), "gguf", None, tmp_path / "out", quiet)
    with pytest.raises(HandoffError, match="is a reward model, which gguf cannot hold"):
        export(f"{run}:reward", "gguf", None, tmp_path / "out", quiet)
    with pytest.raises(UserError, match="--to pdf: there are hf, gguf"):
        export(f"{run}:sft", "pdf", None, tmp_path / "out", quiet)
    with pytest.raises(UserError, match="--dtype q4_0: hf has auto"):
        export(f"{run}:sft", "hf", "q4_0", tmp_path / "out", quiet)
    with pytest.raises(UserError, match="no section nothing; there are"):
        export(f"{run}:nothing", "hf", None, tmp_path / "out", quiet)
    with pytest.raises(HandoffError, match="is there already and is no export"):
        export(f"{run}:sft", "gguf", None, tmp_path / "gpt2", quiet)
