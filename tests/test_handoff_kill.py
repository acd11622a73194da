"""Kills at every moment of begin, publish, close and a state's commit.

Exhaustive tests fork a child that kills itself before its n-th change to the disk, for every n; Python's audit events
announce the changes. Another test sends SIGKILL from outside at random times.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from handoff.errors import HandoffError
from handoff.files import hash_tree, read_json, write_json
from handoff.parent import open_dataset, open_parent
from handoff.stage import StageDir
from handoff.state import StateStore
from handoff.verify import verify_run
from tests.handoff_models import inputs, publish, write_model, write_rows

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree"}


def changes_disk(event: str, arguments: Any) -> bool:
    """Whether an audit event announces a change: one of CHANGES, or a file opened for writing."""
    return event in CHANGES or (event == "open" and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR)))


def killed_before_each_change(work: Callable[[], None]) -> Iterator[int]:
    """Runs `work` in a child killed before its n-th change to the disk, for n = 1, 2, ... until a child completes."""
    for n in range(1, 1000):
        child = os.fork()
        if child == 0:
            count = 0

            def hook(event: str, arguments: Any, n: int = n) -> None:
                nonlocal count
                if changes_disk(event, arguments):
                    count += 1
                    if count == n:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            try:
                work()
            except BaseException:
                os._exit(1)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), f"the child failed with {status} before it was killed at change {n}"
        yield n
        if status == 0:
            return
    raise AssertionError("the work never ended")


def restore(directory: Path, copy: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    if copy.exists():
        shutil.copytree(copy, directory)


def check_stage(run: Path) -> str:
    """Whatever happened: published and true, or plainly unfinished. Says which value was published."""
    assert verify_run(run) == []
    try:
        parent = open_parent("sft", run, {"causal_lm"})
    except HandoffError as error:
        if "is a data set" in str(error):
            rows = open_dataset("sft", run, "reader")
            value = str(rows.manifest.metrics["value"])
            assert [json.loads(line)["completion"] for line in (rows.data_dir / "rows.jsonl").open()] == [value] * 2
            return value
        assert "unfinished" in str(error) or "does not exist" in str(error) or "neither" in str(error)
        return "unfinished"
    assert parent.manifest is not None
    return str(parent.manifest.metrics["value"])


def publish_value(run: Path, value: float, rate: float = 1.0, kind: str = "causal_lm") -> None:
    write = write_rows if kind == "dataset" else write_model
    stage = StageDir(run / "sft")
    stage.begin(inputs(rate=rate))
    publish(stage, lambda path: write(path, value=value), inputs(rate=rate), kind=kind, metrics={"value": str(value)})
    stage.close()


KINDS = pytest.mark.parametrize(("kind", "folder"), [("causal_lm", "model"), ("dataset", "data")])


@KINDS
@pytest.mark.parametrize("rate", [1.0, 2.0], ids=["same inputs", "other inputs"])
@pytest.mark.slow
def test_publishing_over_a_published_stage(tmp_path: Path, rate: float, kind: str, folder: str) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    publish_value(copy, 1.0, kind=kind)
    restore(run, copy)
    seen = set()
    for _ in killed_before_each_change(lambda: publish_value(run, 2.0, rate, kind)):
        seen.add(check_stage(run))
        publish_value(run, 3.0, rate, kind)  # the next run finishes, whatever the last one left
        assert check_stage(run) == "3.0"
        leftovers = [path.name for path in (run / "sft").iterdir()]
        assert sorted(leftovers) == sorted([".lock", folder, "stage.json", "started.json"])
        restore(run, copy)
    assert seen == {"1.0", "unfinished", "2.0"}


@KINDS
@pytest.mark.slow
def test_the_first_publishing(tmp_path: Path, kind: str, folder: str) -> None:
    run = tmp_path / "run"
    run.mkdir()
    seen = set()
    for _ in killed_before_each_change(lambda: publish_value(run, 1.0, kind=kind)):
        seen.add(check_stage(run))
        publish_value(run, 3.0, kind=kind)
        assert check_stage(run) == "3.0" and (run / "sft" / folder).is_dir()
        shutil.rmtree(run)
        run.mkdir()
    assert seen == {"unfinished", "1.0"}


@pytest.mark.slow
def test_setting_aside_loses_nothing(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    publish_value(copy, 1.0)
    before = {name.removeprefix("sft/"): digest for name, digest in hash_tree(copy).items() if "lock" not in name}
    restore(run, copy)

    def begin_anew() -> None:
        stage = StageDir(run / "sft")
        stage.begin(inputs(rate=2.0))
        stage.metrics_path.write_text("{}\n")

    for _ in killed_before_each_change(begin_anew):
        check_stage(run)
        begin_anew()
        assert hash_tree(run / ".previous" / "sft") == {f"1/{name}": digest for name, digest in before.items()}
        restore(run, copy)


@pytest.mark.slow
def test_bringing_back_loses_nothing(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for value, rate in ((1.0, 1.0), (2.0, 2.0)):
        publish_value(copy, value, rate)
    restore(run, copy)

    def bring_back() -> None:
        StageDir(run / "sft").bring_back(inputs(rate=1.0))

    seen = set()
    for _ in killed_before_each_change(bring_back):
        seen.add(check_stage(run))
        for rate, value in ((1.0, "1.0"), (2.0, "2.0"), (1.0, "1.0")):
            stage = StageDir(run / "sft")
            assert stage.begin(inputs(rate=rate)) is True
            stage.close()
            assert check_stage(run) == value
        assert [path.name for path in (run / ".previous" / "sft").iterdir()] != []
        restore(run, copy)
    assert seen == {"2.0", "unfinished", "1.0"}


@pytest.mark.slow
def test_undoing_a_begin(tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    publish_value(copy, 1.0)
    restore(run, copy)

    def begin_and_fail() -> None:
        stage = StageDir(run / "sft")
        stage.begin(inputs(rate=2.0))
        stage.close()

    seen = set()
    for _ in killed_before_each_change(begin_and_fail):
        seen.add(check_stage(run))
        publish_value(run, 3.0)
        assert check_stage(run) == "3.0"
        restore(run, copy)
    assert seen == {"1.0", "unfinished"}


@pytest.mark.parametrize("step", [2, 1], ids=["next step", "same step"])
@pytest.mark.slow
def test_committing_a_state(tmp_path: Path, step: int) -> None:
    state, copy = tmp_path / "state", tmp_path / "copy"

    def save(directory: Path, at: int, content: str) -> None:
        store = StateStore(directory)
        staged = store.staging(at)
        (staged / "part").write_text(content)
        store.commit(at, staged, keep=1)

    save(copy, 1, "old")
    restore(state, copy)
    seen = set()
    for _ in killed_before_each_change(lambda: save(state, step, "new")):
        store = StateStore(state)
        found = store.latest()
        assert found is not None
        seen.add((found.path / "part").read_text())
        store.clean(found)
        # What the rotation did not reach is gone.
        assert [path.name for path in state.iterdir()] == [found.path.name]
        save(state, 3, "third")
        assert [path.name for path in state.iterdir()] == ["step-3"]
        restore(state, copy)
    assert seen == {"old", "new"}


def test_writing_json(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, "old")
    seen = set()
    for _ in killed_before_each_change(lambda: write_json(path, "new")):
        seen.add(read_json(path))
    assert seen == {"old", "new"}


def save_and_publish_forever(run: Path) -> None:
    stage = StageDir(run / "sft")
    stage.begin(inputs(rate=1.0))
    store = StateStore(stage.state_dir)
    found = store.latest()
    for step in itertools.count(found.step + 1 if found else 1):
        staged = store.staging(step)
        for rank in range(3):
            (staged / f"rank{rank}").write_bytes(bytes([step % 256]) * 50_000)
        store.commit(step, staged, keep=2)

        def write_step(path: Path, step: int = step) -> None:
            write_model(path, value=step)

        publish(stage, write_step, inputs(rate=1.0), metrics={"value": str(step)})


@pytest.mark.slow
def test_sigkill_at_random_times(tmp_path: Path) -> None:
    delays = random.Random(0)
    last = 0
    outcomes = set()
    for _ in range(48):
        child = os.fork()
        if child == 0:
            try:
                save_and_publish_forever(tmp_path)
            finally:
                os._exit(1)
        time.sleep(delays.uniform(0.01, 0.2))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        outcomes.add(check_stage(tmp_path))
        state = StateStore(tmp_path / "sft" / "state").latest()
        step = state.step if state else 0
        assert step >= last, "a committed state was lost"
        last = step
    assert last > 0
    assert outcomes - {"unfinished"}
