"""A process that works alone for longer than a collective may take: the others wait for it, and notice when it ends.

The file is also the program of each process: `python tests/test_engine_meeting.py WHAT`.
"""

import os
import signal
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest

from tests.launching import launched, ranked

pytestmark = pytest.mark.slow
ALL = pytest.mark.skipif("BATON_RESUME" not in os.environ, reason="takes long: set BATON_RESUME=all")
TIMEOUT, ALONE = 5, 8  # seconds of a collective, and of work before it
RECIPE = """
name: patient
output_root: {root}
stages:
  sft:
    parent: {parent}
    data: [{{source: world, kind: chats, size: 40}}]
    eval_data: [{{source: world, kind: chats, size: 7, split: validation}}]
    max_length: 128
    train: {{max_steps: 2, global_batch_size: 8, ddp_timeout: {timeout}}}
"""


def program(what: str) -> None:
    """What one process does."""
    from handoff.errors import UserError
    from training.engines import meeting
    from training.engines.ddp import Ddp
    from training.engines.launch import Request, rank
    from training.engines.lost import peers_lost

    engine = Ddp(Request("ddp", None, 2, "cpu"))
    engine.wait_at_most(TIMEOUT)
    main = rank() == 0

    def alone() -> dict:
        if what == "main stops":
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "fails":
            raise RuntimeError("the disk is on fire")
        time.sleep(ALONE)
        return {"rank": rank()}

    def refuses() -> None:
        raise UserError("no such file")

    if what.endswith("stops"):
        meeting._SILENT_AT_LEAST = meeting._SILENT_AT_MOST = 3.0
    try:
        if what != "works":
            engine.barrier()  # both have found the store
        if what == "other stops":
            if not main:
                os.kill(os.getpid(), signal.SIGSTOP)
            engine.barrier()
        assert engine.on_main(alone) == {"rank": 0}  # before there is a group
        assert engine.of_all(rank()) == [0, 1]
        try:
            engine.on_main(refuses)
        except UserError as error:
            print(f"{error}, said: {error.said}")
        if not main:
            time.sleep(TIMEOUT + 1)
        engine.barrier()
        assert engine.largest(float(rank())) == [1.0]
        assert engine.from_main(rank()) == 0
        assert [engine.on_main(lambda n=n: n * 7) for n in range(20)] == [n * 7 for n in range(20)]
        print("all went on")
    except Exception as error:
        engine.shutdown(error)
        print(peers_lost(error) or f"{type(error).__name__}: {error}")
        sys.exit(1)
    finally:
        engine.shutdown()


def run(root: Path, what: str) -> tuple[list[subprocess.Popen[str]], list[str]]:
    """The processes after their end, and what they have printed. The agents of two machines have started them, one more
    often than the other."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, what],
            cwd=root,
            env={**os.environ, **place, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            | {"TORCHELASTIC_RESTART_COUNT": place["RANK"]},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for place in ranked(2)
    ]
    stopped = {"main stops": 0, "other stops": 1}.get(what)
    said = [process.communicate(timeout=120)[0] for number, process in enumerate(processes) if number != stopped]
    if stopped is not None:
        processes[stopped].kill()
        said.insert(stopped, processes[stopped].communicate()[0])
    return processes, said


def test_work_alone_may_take_longer_than_a_collective(root: Path) -> None:
    processes, said = run(root, "works")
    assert [process.returncode for process in processes] == [0, 0], said
    assert "no such file, said: False" in said[0] and "no such file, said: True" in said[1]
    assert all(text.endswith("all went on\n") for text in said)


@pytest.mark.parametrize(
    ("what", "number", "why"),
    [
        ("fails", 1, ": process 0 has ended: RuntimeError: the disk is on fire. If another process"),
        ("killed", 1, "waited"),  # the store is gone with it
        pytest.param("main stops", 1, ", where they meet, has not answered for 3 s", marks=ALL),
        ("other stops", 0, ": process 1 has shown no sign of life for 3 s"),
    ],
)
def test_who_waits_for_a_process_that_has_ended_says_so(root: Path, what: str, number: int, why: str) -> None:
    processes, said = run(root, what)
    assert processes[number].returncode == 1 and why in said[number], said
    assert (
        f"process {number} of 2 on " in said[number]
        and "waited for the other processes in program (tests/" in said[number]
    )
    assert "The same command goes on from the last saved state" in said[number]


def test_a_stage_survives_a_preparation_that_is_longer_than_its_timeout(
    root: Path, micro_recipe: Path, tmp_path: Path
) -> None:
    """Hashing the parent and encoding the rows each take longer than `train.ddp_timeout`."""
    recipe = tmp_path / "patient.yaml"
    parent = micro_recipe.parent / "runs" / "micro" / "pretrain"
    recipe.write_text(RECIPE.format(root=tmp_path, parent=parent, timeout=TIMEOUT))
    done = launched(root, "cpu2", "tests.test_engine_meeting", "stage", recipe, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "patient" / "sft" / "stage.json").is_file()
    assert done.stdout.count("took its time") == 2  # the parent and the rows, on one process


def slow_stage(recipe: str) -> None:
    """The stage sft, in which the first parent and the first rows take long."""
    import data.shards
    import training.run

    def slowly(call):
        calls = count()

        def slow(*arguments, **keys):
            if next(calls) == 0:
                time.sleep(ALONE)
                print("took its time", flush=True)
            return call(*arguments, **keys)

        return slow

    training.run.open_parent = slowly(training.run.open_parent)
    data.shards.write_rows = slowly(data.shards.write_rows)
    training.run.main("sft", [recipe])


if __name__ == "__main__":
    if sys.argv[1] == "stage":
        slow_stage(sys.argv[2])
    else:
        program(sys.argv[1])
