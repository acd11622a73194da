"""Begin, publish and close of a stage's directory (handoff/stage.py). For kills see test_handoff_kill.py."""

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

import handoff.stage
from handoff.errors import HandoffError
from handoff.files import hash_tree, read_json, write_json
from handoff.manifest import Inputs, Manifest, ParentRecord
from handoff.parent import open_dataset, open_parent
from handoff.stage import StageDir
from handoff.state import StateStore
from handoff.verify import verify_run
from tests.handoff_models import inputs, publish, published, write_model, write_rows, write_tokenizer


def save_state(stage: StageDir) -> None:
    store = StateStore(stage.state_dir)
    (store.staging(1) / "part").write_text("x")
    store.commit(1, store.staging_path(1), keep=1)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# ---- publish


def test_a_published_stage_opens_and_verifies(tmp_path: Path) -> None:
    stage = published(tmp_path / "sft", metrics={"eval/loss": 1.5, "broken": float("nan")}, extra={"reward_mean": 0.5})
    assert names(stage.path) == [".lock", "model", "stage.json", "started.json"]
    manifest = stage.manifest()
    assert manifest is not None
    assert manifest.metrics == {"eval/loss": 1.5, "broken": None}
    assert manifest.extra == {"reward_mean": 0.5}
    assert manifest.files == {f"model/{name}": digest for name, digest in hash_tree(stage.model_dir).items()}
    parent = open_parent("sft", tmp_path, {"causal_lm"})
    assert (parent.name, parent.fingerprint, parent.tokenizer) == ("sft", manifest.fingerprint, manifest.tokenizer)
    assert verify_run(tmp_path) == []


def test_the_fingerprint_identifies_the_result(tmp_path: Path) -> None:
    def made(name: str, **fields: Any) -> Manifest:
        manifest = published(tmp_path / name / "sft", **fields).manifest()
        assert manifest is not None
        return manifest

    first = made("a")
    again = made("b", metrics={"loss": 2.0})
    assert (first.fingerprint, first.created) != (again.fingerprint, again.created)
    assert first.fingerprint == again.fingerprint
    assert made("c", extra={"reward_mean": 1.0}).fingerprint != first.fingerprint
    assert made("d", write_files=lambda path: write_model(path, value=2.0)).fingerprint != first.fingerprint


def test_an_evaluation_publishes_files_and_no_model(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "evaluate")
    stage.begin(inputs())
    stage.made("results.json").write_text("{}")
    manifest = publish(stage, None, kind="evaluation", files=["results.json"])
    stage.close()
    assert list(manifest.files) == ["results.json"]
    assert not stage.model_dir.exists()
    (stage.path / "results.json").write_text("{ }")
    assert [(p.stage, p.file) for p in verify_run(tmp_path)] == [("evaluate", "results.json")]
    with pytest.raises(HandoffError, match="nothing can start from it"):
        open_parent("evaluate", tmp_path, {"causal_lm"})


def test_parents_of_the_same_run_are_kept_relative_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = Path("runs/tiny")  # relative, as in a recipe
    base = published(run / "pretrain").manifest()
    assert base is not None
    record = ParentRecord(path=str(run / "pretrain"), fingerprint=base.fingerprint, name="pretrain")
    child = published(run / "sft", parents={"parent": record}).manifest()
    assert child is not None
    assert child.parents["parent"].path == "pretrain"
    shutil.move(run, tmp_path / "moved")
    assert verify_run(tmp_path / "moved") == []


def test_a_model_that_breaks_the_contract_is_not_published(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs())
    with pytest.raises(HandoffError, match="only 9 embeddings"):
        publish(stage, lambda path: write_model(path, rows=9))
    assert names(stage.path) == [".lock", "started.json"]
    stage.close()


def test_a_changed_encoding_is_not_published(tmp_path: Path) -> None:
    record = open_parent("base", published(tmp_path / "base").path.parent, {"causal_lm"}).tokenizer
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs())
    with pytest.raises(HandoffError, match="encoding changed"):
        publish(stage, lambda path: write_model(path, template="other<|end|>"), tokenizer=record)
    assert stage.manifest() is None
    stage.close()


def test_publishing_again_replaces_the_model_as_a_whole(tmp_path: Path) -> None:
    stage = published(tmp_path / "sft")
    first = stage.manifest()
    stage.begin(inputs())

    def other(path: Path) -> None:
        write_model(path, value=2.0, template=None)

    second = publish(stage, other)
    stage.close()
    assert first is not None
    assert second.fingerprint != first.fingerprint
    assert "chat_template.jinja" not in names(stage.model_dir)
    assert names(stage.path) == [".lock", "model", "stage.json", "started.json"]
    assert verify_run(tmp_path) == []


@pytest.mark.parametrize("where", ["write_model", "safetensors", "fsync", "manifest"])
def test_a_full_disk_leaves_the_published_state_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    stage = published(tmp_path / "sft")
    before = stage.manifest()
    stage.begin(inputs())

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_safetensors(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    if where == "fsync":
        monkeypatch.setattr(handoff.stage, "fsync_tree", full)
    if where == "manifest":
        monkeypatch.setattr(handoff.stage, "write_json", full)
    with pytest.raises(HandoffError, match="disk is full, nothing was published"):
        publish(stage, {"write_model": full, "safetensors": full_for_safetensors}.get(where, write_model))
    stage.close()
    assert stage.manifest() == before
    assert names(stage.path) == [".lock", "model", "stage.json", "started.json"]
    assert verify_run(tmp_path) == []


def test_a_tokenizer_is_published_with_its_record(tmp_path: Path) -> None:
    published(tmp_path / "tokenizer", write_tokenizer, kind="tokenizer")
    parent = open_parent("tokenizer", tmp_path, {"tokenizer"})
    assert (parent.tokenizer.vocab_size, parent.tokenizer.stop_ids) == (11, [1, 5])


# ---- rows


def test_published_rows_open_and_verify(tmp_path: Path) -> None:
    stage = published(tmp_path / "generate", write_rows, kind="dataset")
    assert names(stage.path) == [".lock", "data", "stage.json", "started.json"]
    manifest = stage.manifest()
    assert manifest is not None and manifest.tokenizer is None
    assert manifest.files == {"data/rows.jsonl": hash_tree(stage.data_dir)["rows.jsonl"]}
    for ref in ("generate", str(stage.path), str(stage.data_dir)):
        rows = open_dataset(ref, tmp_path, "sft")
        assert rows.data_dir == stage.data_dir and rows.record().fingerprint == manifest.fingerprint
    child = published(tmp_path / "sft", parents={"data:generate": rows.record()}).manifest()
    assert child is not None and child.parents["data:generate"].path == "generate"
    assert verify_run(tmp_path) == []


def test_rows_that_changed_after_publishing_are_named(tmp_path: Path) -> None:
    stage = published(tmp_path / "generate", write_rows, kind="dataset")
    published(tmp_path / "sft", parents={"data:generate": open_dataset("generate", tmp_path, "sft").record()})
    (stage.data_dir / "more.jsonl").write_text("{}\n")
    with pytest.raises(HandoffError, match=r"altered after publishing: data/more.jsonl was added"):
        open_dataset("generate", tmp_path, "sft")
    assert [(p.stage, p.file) for p in verify_run(tmp_path)] == [("generate", "data/more.jsonl")]
    (stage.data_dir / "more.jsonl").unlink()
    stage.begin(inputs())
    publish(stage, lambda path: write_rows(path, value=2), kind="dataset")
    stage.close()
    problems = verify_run(tmp_path)
    assert [p.stage for p in problems] == ["sft"]
    assert "data:generate: it has changed: data/rows.jsonl" in problems[0].message


def test_rows_and_models_are_not_taken_for_one_another(tmp_path: Path) -> None:
    published(tmp_path / "generate", write_rows, kind="dataset")
    published(tmp_path / "sft")
    write_model(tmp_path / "llama")
    with pytest.raises(HandoffError, match=r"generate is a data set: nothing can start from it; .*name: generate"):
        open_parent("generate", tmp_path, {"causal_lm"})
    for ref, found in (("sft", "is a language model"), (str(tmp_path / "llama"), "was not published by a stage")):
        with pytest.raises(HandoffError, match=f"{ref} {found}; `source: stage, name: {ref}` of sft2 has to name"):
            open_dataset(ref, tmp_path, "sft2")
    (tmp_path / "sft" / "stage.json").unlink()
    with pytest.raises(HandoffError, match="sft is unfinished"):
        open_dataset("sft", tmp_path, "sft2")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "wrote no rows"),
        ({"rows.jsonl": b""}, r"rows.jsonl has no rows"),
        ({"rows.jsonl": b"{}\n[1]\n"}, r"rows.jsonl, line 2: each line of published rows is one JSON object"),
        ({"rows.jsonl": b"{}\n\xff\n"}, r"rows.jsonl, line 2"),
        ({"rows.pkl": b"x"}, r"rows.pkl: published rows are files .jsonl, .jsonl.gz, .parquet"),
        ({"rows.parquet": b"PA"}, r"rows.parquet is no parquet file"),
    ],
)
def test_rows_that_cannot_be_read_are_not_published(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    stage = StageDir(tmp_path / "generate")
    stage.begin(inputs())

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    with pytest.raises(HandoffError, match=message):
        publish(stage, write, kind="dataset")
    assert names(stage.path) == [".lock", "started.json"]
    stage.close()


# ---- begin


def test_the_same_inputs_resume(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "run" / "sft")
    assert stage.begin(inputs(rate=0.1)) is False
    write_json(stage.started_path, {**read_json(stage.started_path), "begun": "2026-02-03T04:05:06+00:00"})
    save_state(stage)
    stage.close()
    assert stage.begin(inputs(rate=0.1)) is True
    assert stage.begun().isoformat() == "2026-02-03T04:05:06+00:00"  # of the first start
    assert StateStore(stage.state_dir).latest() is not None
    stage.close()


def test_leftovers_of_a_killed_publish_are_removed(tmp_path: Path) -> None:
    stage = published(tmp_path / "sft")
    for name in (".writing", ".old"):
        (stage.path / name).mkdir()
        (stage.path / name / "part").write_text("x")
    (stage.path / ".stage.json.1234.tmp").write_text("x")
    assert stage.begin(inputs()) is True
    stage.close()
    assert names(stage.path) == [".lock", "model", "stage.json", "started.json"]


# ---- nothing written on a user's error


def test_a_stage_that_fails_before_it_writes_leaves_nothing(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "runs" / "tiny" / "sft")
    stage.begin(inputs())
    stage.close()
    assert list(tmp_path.iterdir()) == []


def test_a_stage_that_fails_before_it_writes_restores_the_published_one(tmp_path: Path) -> None:
    stage = published(tmp_path / "sft")
    before = hash_tree(tmp_path)
    stage.begin(inputs(rate=0.2))
    assert stage.manifest() is None
    stage.close()
    assert hash_tree(tmp_path) == before
    assert verify_run(tmp_path) == []


def test_too_little_space_is_refused(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "run" / "sft")
    with pytest.raises(HandoffError, match=r"stage sft needs .* TiB, but .* free"):
        stage.begin(inputs(), need_bytes=1 << 60)
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("x")
    with pytest.raises(HandoffError, match="is a file, not a directory"):
        StageDir(tmp_path / "run" / "sft").begin(inputs())


def test_a_folder_on_another_disk_than_its_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a folder of the same disk is as good as the folder."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "sft").symlink_to(tmp_path / "elsewhere")
    stage = StageDir(tmp_path / "run" / "sft")
    assert stage.begin(inputs()) is False
    stage.close()

    stat = Path.stat
    disks = {"elsewhere": 7, "run": 8}

    def on_disks(path: Path, **options: Any) -> Any:
        found = stat(path, **options)
        disk = disks.get(Path(os.path.realpath(path)).name)
        return found if disk is None else os.stat_result([*found[:2], disk, *found[3:10]])

    monkeypatch.setattr(Path, "stat", on_disks)
    with pytest.raises(HandoffError, match=r"run/sft: this folder is on another disk than .* set output_root"):
        stage.begin(inputs())
    assert names(tmp_path / "elsewhere") == [".lock"]


def test_a_link_to_a_folder_that_is_gone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sft").symlink_to(tmp_path / "gone")
    with pytest.raises(HandoffError, match=r"sft: a link to .*gone, which is not there"):
        StageDir(tmp_path / "sft").begin(inputs())
    with pytest.raises(HandoffError, match="File name too long"):
        StageDir(tmp_path / ("x" * 300)).begin(inputs())


def test_an_unwritable_directory_is_refused() -> None:
    # Runs under an unprivileged account, since root may write everywhere.
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o555)
        script = (
            "import os\nfrom pathlib import Path\n"
            "from handoff.stage import StageDir\nfrom tests.handoff_models import inputs\n"
            "if os.getuid() == 0: os.setgid(65534); os.setuid(65534)\n"
            f"StageDir(Path({name!r}) / 'run' / 'sft').begin(inputs())\n"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert f"no permission to write in {name}" in done.stderr
        assert names(folder) == []


def test_a_second_begin_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    first = StageDir(tmp_path / "sft")
    first.begin(inputs())
    before = hash_tree(tmp_path)
    second = StageDir(tmp_path / "sft")
    with pytest.raises(HandoffError, match=rf"in use by process {os.getpid()} on .* \(stage sft, since "):
        second.begin(inputs(rate=2))
    second.close()
    assert hash_tree(tmp_path) == before
    first.close()


# ---- manifests


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"format_version": 2}', "format_version is 2, but this Baton reads 1"),
        ('{"format_version": 1, "name": "sft"}', "stage: Field required"),
        ("[]", "format_version is None"),
    ],
)
def test_an_unreadable_manifest_is_refused(tmp_path: Path, content: str, message: str) -> None:
    stage = published(tmp_path / "sft")
    stage.manifest_path.write_text(content)
    with pytest.raises(HandoffError, match=message) as raised:
        stage.manifest()
    assert str(stage.manifest_path) in str(raised.value)


def test_differences_are_described_in_words() -> None:
    old = inputs(train={"learning_rate": 0.001}).model_copy(
        update={"parents": {"sft": "a", "reward": "b"}, "data": {"world:chats": "c"}}
    )
    new = inputs(train={"learning_rate": 0.002}, beta=0.1).model_copy(
        update={"parents": {"sft": "z"}, "data": {"world:chats": "d", "file": "e"}, "code": "other", "seed": 2}
    )
    assert old.differences(old) == []
    assert new.differences(old) == [
        "recipe: beta absent → 0.1",
        "recipe: train.learning_rate 0.001 → 0.002",
        "parent reward is no longer used",
        "parent sft: retrained",
        "data: file is new",
        "data: world:chats changed",
        "code of stages/sft changed",
        "seed 1 → 2",
    ]


def world(size: int, kind: str = "chats") -> dict[str, Any]:
    return {"source": "world", "kind": kind, "size": size, "families": None}


def file(path: str, limit: int | None = None) -> dict[str, Any]:
    return {"source": "file", "path": path, "limit": limit, "ignore": []}


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ([world(10)], [world(20)], ["data.0.size 10 → 20"]),
        ([world(10)], [world(10), file("a.jsonl")], ["data.1 is new: file a.jsonl"]),
        ([file("a"), world(10)], [world(30)], ["data.0.size 10 → 30", "data no longer has file a"]),
        (
            [world(10)],
            [world(10, "documents")],
            ["data.0 is new: world documents", "data no longer has world chats"],
        ),
        ([world(10), file("a")], [file("a"), world(10)], ["the entries of data are in another order"]),
        (
            [file("a")],
            [file("a", 5) | {"ignore": ["tools", "id"]}],
            ["data.0.ignore [] → [tools, id]", "data.0.limit null → 5"],
        ),
    ],
)
def test_changed_sources_are_told_once_and_in_words(before, after, said) -> None:
    """The hashes of the world's rows and the names of sources change with the recipe, and say nothing more."""

    def with_sources(sources: list[dict[str, Any]]) -> Inputs:
        hashes = {f"{one['source']}:{one.get('path', 'chats')}": str(one.get("size")) for one in sources}
        return inputs(data=sources).model_copy(update={"data": hashes})

    old, new = with_sources(before), with_sources(after)
    assert new.differences(old) == [f"recipe: {change}" for change in said]
    assert new.changed(old)[0] == "recipe" and old.changed(old) == []


def test_a_file_that_is_read_twice_and_has_changed_is_told_once() -> None:
    data = [file("a.jsonl", 5)]
    old, new = (
        inputs(data=data).model_copy(update={"data": {"file:a.jsonl": one, "file:a.jsonl#2": one}}) for one in "xy"
    )
    assert new.differences(old) == ["data: file:a.jsonl changed"]
    other = inputs(data=[file("a.jsonl", 6)]).model_copy(update={"data": new.data})
    assert other.differences(old) == ["recipe: data.0.limit 5 → 6", "data: file:a.jsonl changed"]


def test_changed_demands_make_a_stage_stale_without_retraining(tmp_path: Path) -> None:
    lax, strict = (inputs().model_copy(update={"demands": {"gate": {"min": value}}}) for value in (0.5, 0.9))
    assert strict.differences(lax) == ["recipe: gate.min 0.5 → 0.9"] and strict.fingerprint != lax.fingerprint
    assert strict.differences(inputs()) == ["recipe: gate.min absent → 0.9"]
    stage = StageDir(tmp_path / "reward")
    stage.begin(lax)
    stage.metrics_path.write_text("kept")
    stage.close()
    assert stage.begin(strict) and stage.metrics_path.read_text() == "kept"
    publish(stage, given=strict)
    stage.close()
    manifest = stage.manifest()
    assert manifest is not None and manifest.inputs == strict
    assert not stage.begin(inputs(beta=1))
    stage.close()
