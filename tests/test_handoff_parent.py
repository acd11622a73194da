"""Opening a parent (handoff/parent.py) and verifying a run with its lineage (handoff/verify.py)."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest

import handoff.files
from handoff.errors import HandoffError
from handoff.files import HashCache, sha256_file
from handoff.manifest import ParentRecord
from handoff.parent import Parent, open_parent
from handoff.stage import StageDir
from handoff.state import StateStore
from handoff.verify import Problem, lineage, verify_run
from tests.handoff_models import inputs, published, write_model

CAUSAL = {"causal_lm"}


def record(parent: Parent) -> dict[str, ParentRecord]:
    return {"parent": parent.record()}


def flip_last_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


# ---- where a reference leads


def test_a_section_a_stage_directory_and_its_model_are_the_same_parent(tmp_path: Path) -> None:
    run = tmp_path / "run"
    stage = published(run / "sft")
    by_name = open_parent("sft", run, CAUSAL)
    assert by_name == open_parent(str(stage.path), tmp_path / "other", CAUSAL)
    assert by_name == open_parent(str(stage.model_dir), tmp_path / "other", CAUSAL)
    assert (by_name.kind, by_name.model_dir) == ("causal_lm", stage.model_dir)


def test_a_foreign_directory_has_an_identity_of_its_bytes(tmp_path: Path) -> None:
    run = tmp_path / "run"
    foreign = tmp_path / "models" / "llama"
    write_model(foreign)
    first = open_parent(str(foreign), run, CAUSAL)
    assert (first.name, first.path, first.model_dir, first.manifest) == ("llama", foreign, foreign, None)
    assert open_parent(str(foreign), run, CAUSAL, verify=False).fingerprint == first.fingerprint
    (foreign / "README.md").write_text("not read, not part of it")
    assert open_parent(str(foreign), run, CAUSAL).fingerprint == first.fingerprint
    flip_last_byte(foreign / "model.safetensors")
    assert open_parent(str(foreign), run, CAUSAL).fingerprint != first.fingerprint


def test_opening_a_foreign_parent_writes_nothing(tmp_path: Path) -> None:
    write_model(tmp_path / "llama")
    (tmp_path / "run").mkdir()
    for run in ("run", "never_began"):
        open_parent(str(tmp_path / "llama"), tmp_path / run, CAUSAL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["llama", "run"]
    assert list((tmp_path / "run").iterdir()) == []


def test_hashes_of_a_foreign_parent_are_kept_by_the_stage_that_leaves_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handoff.files, "_SETTLED", -1.0)
    write_model(tmp_path / "llama")
    run = tmp_path / "run"
    stage = StageDir(run / "sft")
    for written in (False, True):
        stage.begin(inputs())
        first = open_parent(str(tmp_path / "llama"), run, CAUSAL)
        if written:
            stage.metrics_path.write_text('{"step": 1}\n')
        stage.close()
        assert (run / ".hashes.json").exists() == written

    hashed = []
    monkeypatch.setattr(handoff.files, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    cache = HashCache(run / ".hashes.json")  # as another process reads it
    assert cache.sha256(tmp_path / "llama" / "model.safetensors") and hashed == []
    (run / ".hashes.json").write_text("{")
    damaged = HashCache(run / ".hashes.json")
    assert damaged.sha256(tmp_path / "llama" / "config.json") == sha256_file(tmp_path / "llama" / "config.json")
    assert hashed == [(tmp_path / "llama" / "config.json").resolve()]
    assert open_parent(str(tmp_path / "llama"), run, CAUSAL) == first


def test_a_missing_section_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(HandoffError) as raised:
        open_parent("sft_long", tmp_path, CAUSAL)
    assert f"{tmp_path / 'sft_long'} does not exist" in str(raised.value)
    assert "make it with `baton run <recipe> --to sft_long`" in str(raised.value)


@pytest.mark.parametrize("ref", ["./models/llama", "/models/llama", "models/llama/7b"])
def test_a_missing_directory_is_an_error(tmp_path: Path, ref: str) -> None:
    with pytest.raises(HandoffError, match=f"{ref}: no such directory"):
        open_parent(ref, tmp_path, CAUSAL)


def test_a_hub_id_is_downloaded_without_pickles_and_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "snapshot")
    asked: list[tuple[str, list[str]]] = []

    def download(ref: str, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        asked.append((ref, allow_patterns))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    parent = open_parent("org/model-1.5b", tmp_path / "run", CAUSAL)
    assert (parent.name, parent.path) == ("org/model-1.5b", tmp_path / "snapshot")
    templates = ["additional_chat_templates/*.jinja"]
    assert asked == [(parent.name, templates), (parent.name, ["*.safetensors", "*.json", "*.jinja", "*.txt"])]


def test_an_unreachable_hub_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(ref: str, **_: object) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(
        HandoffError, match=r"org/model: not a directory here, and the hub cannot be reached .*hf download"
    ):
        open_parent("org/model", tmp_path, CAUSAL)


# ---- what is refused


def test_an_unfinished_stage_is_refused_as_a_parent(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs())
    with pytest.raises(HandoffError, match=r"sft is unfinished: .*make it with"):
        open_parent("sft", tmp_path, CAUSAL)
    stage.close()


def test_a_parent_of_the_wrong_kind_is_refused(tmp_path: Path) -> None:
    published(tmp_path / "reward", lambda path: write_model(path, stops=None), kind="reward_model")
    with pytest.raises(HandoffError, match="is a reward model, and a language model or a tokenizer is needed here"):
        open_parent("reward", tmp_path, {"causal_lm", "tokenizer"})


@pytest.mark.parametrize("how", ["altered", "missing", "truncated", "added"])
def test_a_parent_altered_after_publishing_names_the_file(tmp_path: Path, how: str) -> None:
    stage = published(tmp_path / "sft")
    path = stage.model_dir / "model.safetensors"
    match how:
        case "altered":
            flip_last_byte(path)
        case "missing":
            path.unlink()
        case "truncated":
            path.write_bytes(path.read_bytes()[:-1])
        case "added":
            path = stage.model_dir / "adapter_config.json"
            path.write_text("{}")
    change = {"missing": "is missing", "added": "was added"}.get(how, "was altered")
    with pytest.raises(HandoffError, match=f"altered after publishing: model/{path.name} {change}"):
        open_parent("sft", tmp_path, CAUSAL)
    assert open_parent("sft", tmp_path, CAUSAL, verify=False).name == "sft"  # another process has looked
    problems = verify_run(tmp_path)
    assert [(p.stage, p.file) for p in problems] == [("sft", f"model/{path.name}")]
    assert change in problems[0].message


# ---- lineage


def chain(run: Path) -> None:
    """base -> sft -> ppo."""
    published(run / "base")
    published(run / "sft", lambda p: write_model(p, value=2.0), parents=record(open_parent("base", run, CAUSAL)))
    published(run / "ppo", lambda p: write_model(p, value=3.0), parents=record(open_parent("sft", run, CAUSAL)))


def test_a_chain_verifies_and_tells_its_lineage(tmp_path: Path) -> None:
    chain(tmp_path)
    assert verify_run(tmp_path) == []
    line = lineage(tmp_path)
    assert [(a.stage, [p.name for p in a.parents.values()]) for a in line] == [
        ("base", []),
        ("sft", ["base"]),
        ("ppo", ["sft"]),
    ]
    assert line[1].parents["parent"].fingerprint == line[0].fingerprint


def test_a_retrained_parent_is_a_problem_of_its_child_only(tmp_path: Path) -> None:
    chain(tmp_path)
    published(tmp_path / "base", lambda p: write_model(p, value=9.0))
    problems = verify_run(tmp_path)
    assert [(p.stage, p.file) for p in problems] == [("sft", "")]
    assert "it has changed: model/model.safetensors (fingerprint" in problems[0].message


def test_a_parent_that_was_begun_again_or_removed(tmp_path: Path) -> None:
    chain(tmp_path)
    stage = StageDir(tmp_path / "base")
    stage.begin(inputs(rate=2))
    stage.metrics_path.write_text("{}\n")
    stage.close()
    problems = verify_run(tmp_path)
    assert [p.stage for p in problems] == ["sft"]
    assert "unfinished: it was started again" in problems[0].message
    shutil.rmtree(tmp_path / "base")
    assert "is gone" in verify_run(tmp_path)[0].message


def test_lineage_is_followed_into_another_run_and_a_foreign_model(tmp_path: Path) -> None:
    foreign, first, second = tmp_path / "llama", tmp_path / "first", tmp_path / "second"
    write_model(foreign)
    published(first / "sft", parents=record(open_parent(str(foreign), first, CAUSAL)))
    published(second / "ppo", parents=record(open_parent(str(first / "sft"), second, CAUSAL)))
    assert verify_run(second) == []
    flip_last_byte(foreign / "model.safetensors")
    problems = verify_run(second)
    assert [p.stage for p in problems] == [str(first / "sft")]
    assert "parent llama: it has changed: model.safetensors (" in problems[0].message
    flip_last_byte(first / "sft" / "model" / "model.safetensors")
    assert [(p.stage, p.file) for p in verify_run(second)] == [
        (str(first / "sft"), "model/model.safetensors"),
        (str(first / "sft"), ""),
    ]


def test_a_damaged_manifest_is_a_problem_and_verification_continues(tmp_path: Path) -> None:
    chain(tmp_path)
    (tmp_path / "ppo" / "stage.json").write_text("{")
    assert [(p.stage, p.file) for p in verify_run(tmp_path)] == [("ppo", "stage.json")]


def test_a_manifest_that_was_edited_is_a_problem(tmp_path: Path) -> None:
    chain(tmp_path)
    path = tmp_path / "sft" / "stage.json"
    path.write_text(path.read_text().replace('"seed": 1', '"seed": 2'))
    problems = verify_run(tmp_path)
    assert [(p.stage, p.file) for p in problems] == [("ppo", ""), ("sft", "stage.json")]
    assert all(f"{path} was altered: its content does not match its hash" in p.message for p in problems)


def test_states_are_hashed_too_of_unfinished_stages_as_well(tmp_path: Path) -> None:
    chain(tmp_path)
    unfinished = StageDir(tmp_path / "dpo")
    unfinished.begin(inputs())
    for stage in ("sft", "dpo"):
        store = StateStore(tmp_path / stage / "state")
        for step in (2, 4):
            staged = store.staging(step)
            (staged / "weights").write_text("of a step")
            (staged / "moments").write_text("of a step")
            store.commit(step, staged, keep=2)
    assert verify_run(tmp_path) == []
    flip_last_byte(tmp_path / "sft" / "state" / "step-2" / "weights")
    (tmp_path / "dpo" / "state" / "step-4" / "moments").unlink()
    (tmp_path / "dpo" / "state" / "step-4" / "weights").write_text("")
    found = [(p.stage, p.file, p.message) for p in verify_run(tmp_path)]
    assert [entry[:2] for entry in found] == [
        ("dpo", "state/step-4/moments"),
        ("dpo", "state/step-4/weights"),
        ("sft", "state/step-2/weights"),
    ]
    assert found[0][2] == "is missing" and found[1][2].startswith("has 0 bytes instead of 9")
    assert found[2][2].startswith("was altered")
    unfinished.close()


def test_a_missing_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(HandoffError, match="no such run"):
        verify_run(tmp_path / "nowhere")


def test_an_unfinished_stage_is_not_a_problem(tmp_path: Path) -> None:
    chain(tmp_path)
    stage = StageDir(tmp_path / "dpo")
    stage.begin(inputs())
    assert verify_run(tmp_path) == list[Problem]()
    stage.close()
