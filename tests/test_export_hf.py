"""Exports as a model directory: merged, in any precision, in several files; and what the command says."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import training.publishing
from baton.cli import app
from baton.export.record import read_record
from baton.export.run import export
from handoff.errors import HandoffError
from handoff.weights import read_tensors
from tests.test_families import publish
from training.recipe import load_recipe


def quiet(line: str) -> None:
    """What `export` says is in the record, too."""


def test_an_adapter_is_merged_into_its_base(tmp_path, monkeypatch):
    publish(tmp_path / "base", "Llama 3.2")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(training.publishing, "_FILE_BYTES", 10_000)
    folder = export(str(tmp_path / "adapter"), "hf", "f32", tmp_path / "out", quiet)
    assert len(list(folder.glob("model-*.safetensors"))) > 2 and not (folder / "adapter_config.json").exists()
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, wanted = AutoModelForCausalLM.from_pretrained(folder)(ids).logits, adapted(ids).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    record = read_record(folder)
    assert record.check is not None and record.check.numbers["agreement"] == 1
    assert [one.name for one in record.lineage] == ["base", "adapter"]


def test_the_precision_is_the_published_one_or_the_one_asked_for(tmp_path):
    publish(tmp_path / "model", "Qwen3")
    assert {
        i.dtype for i in read_tensors(export(str(tmp_path / "model"), "hf", None, tmp_path / "a", quiet)).values()
    } == {"BF16"}
    export(str(tmp_path / "model"), "hf", "f16", tmp_path / "a", quiet)  # in the place of the earlier one
    assert {info.dtype for info in read_tensors(tmp_path / "a").values()} == {"F16"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "model"]


def test_a_reward_model_can_be_exported_and_scores_alike(micro_recipe, tmp_path):
    run = load_recipe(micro_recipe).run_dir
    folder = export(f"{run}:reward", "hf", None, tmp_path / "out", quiet)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        one, other = (
            AutoModelForSequenceClassification.from_pretrained(path)(ids).logits
            for path in (folder, run / "reward" / "model")
        )
    assert torch.equal(one, other) and read_record(folder).check is None


def test_the_command_prints_the_folder_and_says_what_was_checked(micro_recipe, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("BATON_LLAMA_CPP", raising=False)
    app(["export", f"{micro_recipe}:sft", "--to", "hf", "--out", str(tmp_path / "out")], standalone_mode=False)
    said = capsys.readouterr()
    assert said.out == f"{tmp_path / 'out'}\n" and "1000 of 1000 texts have the same tokens" in said.err
    run = load_recipe(micro_recipe).run_dir
    app(["export", f"{run / 'sft'}", "--to", "hf", "--no-check"], standalone_mode=False)
    assert Path(capsys.readouterr().out.strip()) == run / "exports" / "sft-hf"


def test_an_altered_record_is_noticed(micro_recipe, tmp_path):
    folder = export(f"{micro_recipe}:sft", "hf", None, tmp_path / "out", quiet, check=False)
    path = folder / "export.json"
    path.write_text(path.read_text().replace('"hf"', '"gguf"'))
    with pytest.raises(HandoffError, match="was altered"):
        read_record(folder)
    with pytest.raises(HandoffError, match="is no export"):
        read_record(tmp_path)
