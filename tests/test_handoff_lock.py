"""The lock of a directory (handoff/lock.py): between processes, after SIGKILL, and through forks."""

import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from handoff.errors import HandoffError
from handoff.lock import RunLock

HOLD = """
import os, sys, time
from pathlib import Path
from handoff.lock import RunLock
lock = RunLock(Path(sys.argv[1]), "baton run tiny.yaml").acquire()
if sys.argv[2] == "plain":
    print(0, flush=True)
elif os.fork() == 0:
    print(os.getpid(), flush=True)  # said by the child itself: its copy of the lock is closed by now
time.sleep(60)
"""


@contextmanager
def holder(directory: Path, how: str = "plain") -> Iterator[tuple[int, int]]:
    """Another process that holds the lock, killed at the end: its pid, and the pid of the child it forked."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(directory), how], stdout=subprocess.PIPE, text=True)
    child = 0
    try:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        yield process.pid, child
    finally:
        process.kill()
        process.communicate() if not child else process.wait()
        if child:
            os.kill(child, signal.SIGKILL)


def test_a_second_process_is_refused_and_told_who_has_it(tmp_path: Path) -> None:
    with holder(tmp_path) as (pid, _), pytest.raises(HandoffError) as raised:
        RunLock(tmp_path, "baton run").acquire()
    assert f"{tmp_path} is in use by process {pid} on {os.uname().nodename} (baton run tiny.yaml, since 2" in str(
        raised.value
    )


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with holder(tmp_path) as (pid, _):
        pass
    assert str(pid) in (tmp_path / ".lock").read_text()
    with caplog.at_level("INFO"), RunLock(tmp_path, "baton run"):
        assert f"taking over from process {pid}" in caplog.text
    assert (tmp_path / ".lock").read_text() == ""


def test_a_forked_child_does_not_keep_the_lock_of_its_dead_parent(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "fork"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(
            HandoffError, match="in use"
        ):  # the child's copy is closed, and the owner still has the lock
            RunLock(tmp_path, "baton run").acquire()
        process.kill()
        process.wait()
        os.kill(child, 0)  # it lives
        with RunLock(tmp_path, "baton run"):
            pass
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()


def _in_worker(run: str) -> str:
    """Acts as a runner's worker: takes its stage's lock while the runner holds the run's."""
    with RunLock(Path(run) / "sft", "stage sft"):
        try:
            RunLock(Path(run), "another run").acquire()
        except HandoffError as error:
            return str(error)
    return "the run's lock was free"


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_takes_its_stage_while_the_runner_holds_the_run(tmp_path: Path, method: str) -> None:
    with RunLock(tmp_path, "baton run"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            told = pool.apply(_in_worker, (str(tmp_path),))
        assert f"in use by process {os.getpid()} " in told
        with pytest.raises(HandoffError, match="in use"):
            RunLock(tmp_path, "another run").acquire()


def test_a_worker_that_outlives_the_runner_does_not_keep_the_run(tmp_path: Path) -> None:
    script = (
        "import multiprocessing, os, sys, time\n"
        "from pathlib import Path\n"
        "from handoff.lock import RunLock\n"
        "if __name__ == '__main__':\n"
        "    lock = RunLock(Path(sys.argv[1]), 'baton run').acquire()\n"
        "    worker = multiprocessing.get_context('forkserver').Process(target=time.sleep, args=(60,))\n"
        "    worker.start()\n"
        "    print(worker.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    worker = int(process.stdout.readline())
    process.wait()
    process.stdout.close()
    try:
        os.kill(worker, 0)  # it lives
        with RunLock(tmp_path, "baton run"):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


def test_release_frees_it_and_may_be_repeated(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, "one").acquire()
    lock.release()
    lock.release()
    with RunLock(tmp_path, "two"):
        pass


def test_a_lock_file_that_was_deleted_protects_nothing(tmp_path: Path) -> None:
    first = RunLock(tmp_path, "one").acquire()
    (tmp_path / ".lock").unlink()
    with RunLock(tmp_path, "two"), pytest.raises(HandoffError, match="two"):
        RunLock(tmp_path, "three").acquire()
    first.release()


def test_a_lock_file_that_is_deleted_while_it_is_taken_is_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    deletions = iter([True])

    def flock(descriptor: int, operation: int) -> None:
        if next(deletions, False):
            (tmp_path / ".lock").unlink()
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path, "one"), pytest.raises(HandoffError, match="one"):
        RunLock(tmp_path, "two").acquire()


def test_a_directory_made_for_the_lock_goes_with_it_unless_it_was_used(tmp_path: Path) -> None:
    with RunLock(tmp_path / "runs" / "tiny", "one"):
        pass
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "tiny", "one"):
        (tmp_path / "runs" / "tiny" / "report.html").write_text("x")
    assert (tmp_path / "runs" / "tiny" / ".lock").exists()
