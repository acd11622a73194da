"""What a changed recipe sets aside: the content of a stage's directory moves to .previous and back."""

from pathlib import Path

import pytest

from handoff.errors import HandoffError
from handoff.files import hash_tree
from handoff.lock import RunLock
from handoff.previous import KEPT
from handoff.stage import StageDir
from handoff.state import StateStore
from handoff.verify import verify_run
from tests.handoff_models import inputs, publish, published


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def save_state(stage: StageDir, step: int = 1) -> None:
    store = StateStore(stage.state_dir)
    (store.staging(step) / "part").write_text("x")
    store.commit(step, store.staging_path(step), keep=1)


def make(folder: Path, rate: float) -> None:
    stage = StageDir(folder)
    stage.begin(inputs(rate=rate))
    publish(stage, given=inputs(rate=rate), metrics={"rate": rate})
    stage.close()


@pytest.mark.parametrize("how", ["inputs", "record"])
def test_other_inputs_set_the_old_content_aside(tmp_path: Path, how: str) -> None:
    stage = published(tmp_path / "run" / "sft")
    if how == "record":
        stage.started_path.write_text("{")
    before = hash_tree(stage.path)
    given = inputs(rate=0.2) if how == "inputs" else inputs()
    assert stage.set_aside() is None
    assert stage.begin(given) is False
    assert stage.set_aside() == tmp_path / "run" / ".previous" / "sft" / "1"
    save_state(stage)
    assert stage.started_inputs() == given
    assert names(stage.path) == [".lock", "started.json", "state"]
    aside = tmp_path / "run" / ".previous" / "sft"
    assert names(aside) == ["1"]
    assert {**hash_tree(aside / "1"), ".lock": before[".lock"]} == before
    stage.close()


def test_it_comes_back_whole_when_the_inputs_do(tmp_path: Path) -> None:
    make(tmp_path / "sft", 1)
    before = hash_tree(tmp_path / "sft")
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs(rate=2))
    save_state(stage, 7)
    stage.close()
    interrupted = hash_tree(tmp_path / "sft")
    assert stage.has_aside(inputs(rate=1)) and not stage.has_aside(inputs(rate=3))
    for content, rate in ((before, 1), (interrupted, 2), (before, 1)):
        assert stage.begin(inputs(rate=rate)) is True
        stage.close()
        assert {**hash_tree(stage.path), ".lock": ""} == {**content, ".lock": ""}
        assert len(names(tmp_path / ".previous" / "sft")) == 1
    assert verify_run(tmp_path) == []


def test_the_newest_contents_are_kept(tmp_path: Path) -> None:
    for rate in range(KEPT + 3):
        make(tmp_path / "sft", rate)
    stage = StageDir(tmp_path / "sft")
    there = [rate for rate in range(KEPT + 3) if stage.has_aside(inputs(rate=rate))]
    assert there == [2, 3, 4] and len(names(tmp_path / ".previous" / "sft")) == KEPT
    assert stage.begin(inputs(rate=0)) is False
    stage.close()


def test_a_refused_start_removes_no_earlier_content(tmp_path: Path) -> None:
    for rate in range(KEPT + 1):
        make(tmp_path / "sft", rate)
    before = hash_tree(tmp_path)
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs(rate=9))
    stage.close()  # as after an error in the data: nothing was written
    assert hash_tree(tmp_path) == before


def test_a_forced_start_sets_content_aside_for_good(tmp_path: Path) -> None:
    make(tmp_path / "sft", 1)
    stage = StageDir(tmp_path / "sft")
    stage.started_path.unlink()
    assert stage.begin(inputs(rate=1)) is False
    publish(stage, given=inputs(rate=1), metrics={"rate": 10.0})
    stage.close()
    make(tmp_path / "sft", 2)
    assert stage.bring_back(inputs(rate=1)) is True
    manifest = stage.manifest()
    assert manifest is not None and manifest.metrics == {"rate": 10.0}


def test_a_start_without_result_is_not_kept(tmp_path: Path) -> None:
    published(tmp_path / "sft")
    for rate in (2, 3):
        stage = StageDir(tmp_path / "sft")
        stage.begin(inputs(rate=rate))
        assert names(stage.path) == [".lock", "started.json"]
        stage.metrics_path.write_text("{}\n")
        StateStore(stage.state_dir).staging(1)
        stage.close()
    assert names(tmp_path / ".previous" / "sft") == ["1"]
    assert names(tmp_path / "sft") == [".lock", "metrics.jsonl", "started.json", "state"]


def test_interrupted_moves_are_completed(tmp_path: Path) -> None:
    stage = published(tmp_path / "sft")
    whole = hash_tree(stage.path)
    leaving = tmp_path / ".previous" / "sft" / ".leaving"
    leaving.mkdir(parents=True)
    stage.manifest_path.rename(leaving / "stage.json")
    assert stage.begin(inputs(rate=2)) is False
    save_state(stage)
    stage.close()
    assert {**hash_tree(tmp_path / ".previous" / "sft" / "1"), ".lock": whole[".lock"]} == whole
    make(tmp_path / "sft", 3)
    (tmp_path / ".previous" / "sft" / "1").rename(tmp_path / "sft" / "x")  # a kill after two of three moves back
    returning = tmp_path / ".previous" / "sft" / ".returning"
    for path in (tmp_path / "sft").iterdir():
        if path.name not in (".lock", "x"):
            path.rename(tmp_path / path.name)
    (tmp_path / "sft" / "x").rename(returning)
    (returning / "started.json").rename(tmp_path / "sft" / "started.json")
    assert stage.begin(inputs()) is True
    stage.close()
    assert {**hash_tree(stage.path), ".lock": ""} == {**whole, ".lock": ""}


def test_a_stage_in_use_is_not_replaced(tmp_path: Path) -> None:
    for rate in (1, 2):
        make(tmp_path / "sft", rate)
    with RunLock(tmp_path / "sft", "test"), pytest.raises(HandoffError, match="process"):
        StageDir(tmp_path / "sft").bring_back(inputs(rate=1))


def test_a_resumed_start_records_where_its_recipe_came_from(tmp_path: Path) -> None:
    stage = StageDir(tmp_path / "sft")
    stage.begin(inputs(), origin={"overrides": ["train.logging_steps=1"]})
    save_state(stage)
    run = stage.run_id()
    stage.close()
    assert stage.begin(inputs(), origin={"overrides": ["train.logging_steps=2"]}) is True
    assert stage.origin() == {"overrides": ["train.logging_steps=2"]} and stage.run_id() == run
    stage.close()
