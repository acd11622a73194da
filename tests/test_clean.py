"""`baton clean`: what it removes, what it leaves, and when it refuses."""

import subprocess
import sys

import pytest

from baton.clean import clean
from handoff.errors import HandoffError
from handoff.files import hash_tree
from handoff.lock import RunLock
from handoff.manifest import ParentRecord
from handoff.parent import UNPACKED
from handoff.stage import StageDir
from tests.handoff_models import inputs, publish
from training.run import ROWS


def put(path, content="x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


@pytest.fixture
def run(tmp_path):
    """A run with a stage that was published twice, rows, and two unpacked models, of which the stage needs one."""
    run = tmp_path / "runs" / "own"
    needed = tmp_path / "runs" / UNPACKED / "needed"
    put(needed / "config.json")
    put(tmp_path / "runs" / UNPACKED / "unneeded" / "config.json")
    put(tmp_path / "runs" / ROWS / "key" / "rows.arrow")
    for rate in (1, 2):
        stage = StageDir(run / "sft")
        stage.begin(inputs(rate=rate))
        record = ParentRecord(path=str(needed), fingerprint="0" * 64, name="needed", files=hash_tree(needed))
        publish(stage, given=inputs(rate=rate), parents={"parent": record})
        stage.close()
    return run


def test_it_removes_what_can_be_done_without_and_nothing_else(run):
    root = run.parent
    before = hash_tree(run / "sft")
    removed = clean(run)
    assert [path for path, _ in removed] == [run / ".previous", root / ROWS, root / UNPACKED / "unneeded"]
    assert all(size > 0 for _, size in removed) and not any(path.exists() for path, _ in removed)
    assert hash_tree(run / "sft") == before and (root / UNPACKED / "needed").is_dir()
    assert clean(run) == []


@pytest.mark.parametrize("busy", ["own/sft", "other/ppo"])
def test_while_a_stage_runs_it_refuses_and_removes_nothing(run, busy):
    code = "import sys; from pathlib import Path; from handoff.lock import RunLock\n"
    code += "RunLock(Path(sys.argv[1]), 'stage of a test').acquire(); print('held', flush=True); sys.stdin.read()"
    owner = subprocess.Popen(
        [sys.executable, "-c", code, str(run.parent / busy)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert owner.stdout.readline() == b"held\n"
        before = hash_tree(run.parent)
        with pytest.raises(HandoffError, match=rf"in use by process {owner.pid} .*stage of a test"):
            clean(run)
        assert {name for name in before if not name.endswith(".lock")} <= hash_tree(run.parent).keys()
    finally:
        owner.communicate()
    RunLock(run.parent / busy, "test").acquire().release()


def test_the_command_says_what_it_removed(run, root):
    command = [sys.executable, "-m", "baton", "clean", str(run)]
    said = [subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert f"removed {run / '.previous'} (" in said[0]
    assert said[1] == "nothing to remove\n"
