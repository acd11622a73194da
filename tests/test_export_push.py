"""The model card, and uploads to a hub on this machine."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import ModelCard

from baton.export.evaluations import failed_gates
from baton.export.push import push
from baton.export.record import read_record, verify_export
from baton.export.run import export
from baton.export.source import Source
from handoff.errors import HandoffError, UserError
from handoff.files import read_json, sha256_file, write_json
from handoff.manifest import read_manifest, sealed
from tests.fake_hub import Hub, hub
from tests.test_families import publish
from training.recipe import load_recipe


def quiet(line: str) -> None:
    """What `export` says is in the record, too."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A hub, whose token is at hand."""
    with hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setenv("HF_TOKEN", server.token)
        yield server


def evaluate(run: Path, folder: str, *, passed: bool, model: str | None = "sft") -> Path:
    """An evaluation of the run's sft model as its stage writes it, with one task and one condition."""
    made = read_manifest(run / "sft" / "stage.json")
    assert made is not None
    record = Source.open(str(run / "sft")).parent.record().model_copy(update={"path": "sft"})
    estimate = {"value": 0.625, "low": 0.5, "high": 0.75, "n": 40}
    results = {
        "models": ["sft"],
        "tasks": {"exam": {"models": ["sft"], "metrics": {"sft": {"accuracy": estimate}}}},
        "gates": [
            {"task": "exam", "model": model, "metric": "accuracy", "passed": passed, "said": "exam: accuracy is low"}
        ],
    }
    place = run / folder
    place.mkdir(parents=True)
    write_json(place / "results.json", results)
    manifest = made.model_copy(
        update={
            "name": place.name,
            "stage": "evaluate",
            "kind": "evaluation",
            "parents": {"model": record},
            "tokenizer": None,
            "files": {"results.json": sha256_file(place / "results.json")},
        }
    )
    write_json(place / "stage.json", sealed(manifest))
    return place


@pytest.fixture
def run(micro_recipe: Path, tmp_path: Path) -> Path:
    """A copy of the run's published models, without what other tests have evaluated."""
    whole, copy = load_recipe(micro_recipe).run_dir, tmp_path / "runs" / "micro"
    for name in ("tokenizer", "pretrain", "sft"):
        shutil.copytree(whole / name, copy / name)
    return copy


def test_the_card_says_what_the_model_is_from_what_and_how_good(run, tmp_path):
    evaluate(run, "exam", passed=True)
    folder = export(f"{run}:sft", "hf", None, tmp_path / "out", quiet)
    text = (folder / "README.md").read_text()
    found = ModelCard(text)
    assert found.data.library_name == "transformers" and found.data.pipeline_tag == "text-generation"
    assert [(one.metric_type, one.metric_value) for one in found.data.eval_results] == [("accuracy", 0.625)]
    record = read_record(folder)
    for one in record.lineage:
        assert f"`{one.fingerprint}`" in text
    for words in (
        "| pretrain | pretrain | tokenizer |",
        "| sft | the embedded world: chats, generated | 300 | that of Baton (Apache-2.0) |",
        "| exam | accuracy | 0.625 | [0.5, 0.75] | 40 |",
        "1000 of 1000 texts have the same tokens",
        "vllm serve FOLDER",
        "AutoModelForCausalLM.from_pretrained",
        "architecture: llama",
        "## Limitations",
    ):
        assert words in text, words
    verify_export(folder)


def test_a_card_names_its_base_and_data_sets_of_the_hub(run, tmp_path):
    path = run / "sft" / "stage.json"
    made = read_manifest(path)
    assert made is not None
    record = made.parents["parent"].model_copy(update={"name": "org/base-model", "fingerprint": "f" * 64})
    recipe = {
        **made.recipe,
        "data": [{"source": "hub", "name": "org/chats"}, {"source": "file", "path": "a/own.jsonl"}],
    }
    write_json(path, sealed(made.model_copy(update={"parents": {"parent": record}, "recipe": recipe})))
    text = (export(f"{run}:sft", "hf", None, tmp_path / "out", quiet, check=False) / "README.md").read_text()
    data = ModelCard(text).data
    assert data.base_model == ["org/base-model"] and data.datasets == ["org/chats"]
    assert "file own.jsonl" in text and "no licence is recorded" in text and "was not compared" in text


def test_a_push_is_private_and_uploads_the_checked_export_in_one_commit(run, fake):
    address = push(f"{run}:sft", "org/tiny", "hf", None, quiet)
    assert address == f"{fake.address}/org/tiny/commit/1"
    made = fake.repositories["org/tiny"]
    assert made.get("private") is True or made.get("visibility") == "private"
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "export.json"} <= fake.files.keys()
    assert fake.files["model.safetensors"][:8] == (run / "sft/model/model.safetensors").read_bytes()[:8]
    assert json.loads(fake.files["export.json"])["fingerprint"] == Source.open(f"{run}:sft").parent.fingerprint
    push(f"{run}:sft", "org/open", "hf", None, quiet, public=True, check=False)
    assert fake.repositories["org/open"].get("private") is not True


def test_a_model_that_failed_a_gate_is_not_pushed(run, fake):
    evaluate(run, "exam", passed=True)
    assert failed_gates(Source.open(f"{run}:sft").parent) == []
    evaluate(run, ".failed/exam2", passed=False)
    evaluate(run, "other", passed=False, model="pretrain")
    with pytest.raises(HandoffError, match=r"did not pass the gate of its evaluation, .*exam2: exam: accuracy is low"):
        push(f"{run}:sft", "org/tiny", "hf", None, quiet)
    assert fake.repositories == {} and fake.files == {}


def test_a_missing_or_refused_token_is_named(run, fake, monkeypatch, tmp_path):
    with pytest.raises(UserError, match="is no name of a repository; write ORGANISATION/NAME"):
        push(f"{run}:sft", "tiny", "hf", None, quiet)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(HandoffError, match=r"the hub refuses the token \(401\)"):
        push(f"{run}:sft", "org/tiny", "hf", None, quiet, check=False)
    monkeypatch.setenv("HF_TOKEN", fake.token)
    fake.refuses_commits = True
    with pytest.raises(HandoffError, match=r"the hub refuses the token \(403\)"):
        push(f"{run}:sft", "org/tiny", "hf", None, quiet, check=False)
    assert fake.files == {}
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match="there is no token for the hub: `hf auth login`"):
        push(f"{run}:sft", "org/tiny", "hf", None, quiet)


def test_a_foreign_model_has_a_card_too(tmp_path):
    publish(tmp_path / "model", "Qwen3")
    text = (export(str(tmp_path / "model"), "hf", None, tmp_path / "out", quiet, check=False) / "README.md").read_text()
    assert "No evaluation of its run" in text and "no stage of Baton made this model" in text
    assert read_json(tmp_path / "out" / "export.json")["files"].keys() >= {"README.md"}
