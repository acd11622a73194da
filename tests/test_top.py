"""`baton top`: what is said of a run's stages from their files, whoever wrote them, here or on another machine."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import time
from datetime import UTC, datetime

import pytest

from baton.cli import main
from baton.top import look
from handoff.lock import RunLock
from tests.conftest import MICRO
from training import engines
from training.inputs import stage_inputs
from training.progress import Pulse, progress_path
from training.recipe import load_recipe
from training.run import Run
from training.signals import Signals


def section(run_dir, name, lines=(), *, begun="2026-11-29T10:00:00+00:00", published=False):
    folder = run_dir / name
    folder.mkdir(parents=True)
    (folder / "started.json").write_text(json.dumps({"begun": begun}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if published:
        (folder / "stage.json").write_text("{}")
    return folder


def owned(folder, pid, host, since=None):
    since = since or datetime.now(UTC).isoformat(timespec="seconds")
    (folder / ".lock").write_text(json.dumps({"pid": pid, "host": host, "purpose": "stage", "since": since}))


def pulse(run_dir, name, **content):
    path = progress_path(run_dir, name)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def shown(capsys, target):
    with pytest.raises(SystemExit) as ended:
        sys.argv = ["baton", "top", str(target)]
        main()
    return ended.value.code, capsys.readouterr().out


@pytest.fixture(autouse=True)
def arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)


def test_a_stage_at_work_shows_step_rate_time_left_values_and_memory(tmp_path, capsys):
    section(tmp_path, "sft", [{"step": 9, "loss": 1.0}], published=True)
    lines = [{"step": 1, "loss/policy_avg": 0.5, "objective/scores": 0.25, "objective/kl": 4.0, "loss": None}]
    folder = section(tmp_path, "ppo", [*lines, {"step": 2, "eval/kl": 1.0}], begun="2026-11-29T11:00:00+00:00")
    mine = {"pid": os.getpid(), "host": socket.gethostname()}
    pulse(tmp_path, "ppo", done=40, total=100, rate=0.5, memory=3 << 30, peak=5 << 30, at=time.time(), **mine)
    with RunLock(folder, "stage ppo"):
        first, second = look(tmp_path, None, time.time())
        code, out = shown(capsys, tmp_path)
    assert (first.name, first.state, first.step, first.values) == ("sft", "done", 9, {"loss": 1.0})
    assert (second.state, second.step, second.total, second.left) == ("running", 40, 100, 120.0)
    assert second.values == {"loss": 0.5, "reward": 0.25, "KL": 4.0}
    assert code == 0 and "40 of 100" in out and "2.00 s each" in out and "2 min 00 s" in out
    assert "3.0 GiB, at most 5.0 GiB" in out and f"process {os.getpid()} on this machine is there" in out
    assert "ppo: last line 0." in out


def test_a_process_that_was_killed_or_whose_number_went_to_another_is_gone(tmp_path):
    done = subprocess.Popen(["true"])
    done.wait()
    owned(section(tmp_path, "a", [{"step": 3, "loss": 1.0}]), done.pid, socket.gethostname())
    owned(section(tmp_path, "b"), os.getpid(), socket.gethostname(), "2020-01-01T00:00:00+00:00")
    section(tmp_path, "c", [{"step": 4, "loss": 1.0}])
    pulse(tmp_path, "a", done=5, total=9, rate=1.0, memory=1, at=time.time(), pid=1, host="earlier")
    a, b, c = look(tmp_path, None, time.time())
    assert (a.state, b.state, c.state) == ("killed", "killed", "stopped")
    assert (a.step, a.total, a.left, a.memory) == (3, None, None, "")
    assert "goes on from the last saved state" in a.notes[-1]


def test_a_run_of_another_machine_is_judged_by_what_it_last_wrote(tmp_path):
    owned(section(tmp_path, "sft", [{"step": 3, "loss": 1.0}]), os.getpid(), "node7")
    pulse(tmp_path, "sft", done=5, total=9, rate=2.0, memory=1, at=time.time(), pid=os.getpid(), host="node7")
    (now,) = look(tmp_path, None, time.time())
    assert (now.state, now.step, now.left) == ("running", 5, 2.0)
    (later,) = look(tmp_path, None, time.time() + 3600)
    assert later.state == "silent" and later.left is None
    assert "on node7, heard of 1 h 00 min ago; whether it is there is seen on node7 alone" in later.notes[-1]


def test_a_recipe_also_shows_what_has_not_begun(tmp_path, capsys):
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path / "runs"))
    section(tmp_path / "runs" / "micro", "pretrain", [{"step": 1, "loss": 1.0}])
    code, out = shown(capsys, path)
    rows = [line.split()[:2] for line in out.splitlines()[2:]]
    assert code == 0 and rows[:3] == [["tokenizer", "waiting"], ["pretrain", "stopped"], ["sft", "waiting"]]


def test_what_cannot_be_read_is_left_out_and_no_control_character_is_obeyed(tmp_path, capsys):
    name = "a\x1b[31m"
    folder = section(tmp_path, name)
    (folder / "metrics.jsonl").write_bytes(
        b'[1]\n{"step": "x"}\n{"step": 2, "loss": true}\n{"step": 3, "loss": 0.5}\n{"st'
    )
    owned(folder, "\x1b[2J", "ho\x1bst")
    section(tmp_path, "b", [])
    (tmp_path / "b" / ".lock").write_text("[" * 10_000)
    (tmp_path / "b" / "started.json").write_text("[]")
    pulse(tmp_path, "b", done="x", total=True, rate=-1)
    progress_path(tmp_path, "b").write_text('{"done": ')
    code, out = shown(capsys, tmp_path)
    assert code == 0 and "\x1b" not in out and "a\\x1b[31m" in out and "ho\\x1bst" in out
    assert next(seen for seen in look(tmp_path, None, 0) if seen.name == name).values == {"loss": 0.5}


def test_where_nothing_has_begun_the_command_says_so(tmp_path, capsys):
    sys.argv = ["baton", "top", str(tmp_path)]
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "no stage has been started here" in capsys.readouterr().err


def read_until(descriptor, wanted):
    seen = b""
    while wanted not in seen:
        assert select.select([descriptor], [], [], 60)[0], seen
        seen += os.read(descriptor, 4096)


def test_a_terminal_is_drawn_again_until_ctrl_c_which_ends_it_well(tmp_path, root):
    folder = section(tmp_path, "sft", [{"step": 1, "loss": 1.5}])
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "baton", "top", str(tmp_path), "--interval", "0.2"]
    environment = {**os.environ, "PYTHONPATH": str(root), "TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(
        command,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
    )
    os.close(theirs)
    read_until(ours, b"1.50")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": 0.25}\n')
    read_until(ours, b"0.25")
    child.send_signal(signal.SIGINT)
    assert child.wait(30) == 0
    os.close(ours)


def test_a_stage_writes_how_far_it_is_and_removes_that_at_its_end(tmp_path):
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path / "runs"))
    recipe = load_recipe(path)
    run = Run(recipe, "tokenizer", Signals("tokenizer"), engines.current())
    run.begin(stage_inputs(recipe, "tokenizer"))
    with run.progress(10, "tokenizer") as advance:
        advance(4)
        (seen,) = look(recipe.run_dir, ["tokenizer"], time.time())
        assert (seen.state, seen.step, seen.total) == ("running", 4, 10) and seen.memory
    assert not progress_path(recipe.run_dir, "tokenizer").parent.exists()
    run.close()
    assert not recipe.run_dir.exists(), "a stage that has written nothing leaves nothing"


def test_the_rate_leaves_out_steps_of_an_earlier_start_and_a_full_disk_costs_nothing(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("training.progress.time.monotonic", lambda: clock[0])
    path = tmp_path / "progress" / "sft.json"
    one = Pulse(path, 1000, lambda: 7)
    one.advance(500)
    for _ in range(10):
        clock[0] += 2
        one.advance(1)
    found = json.loads(path.read_text())
    assert found["rate"] == 0.5 and found["done"] in range(505, 511) and found["peak"] == 7
    one.end()
    (tmp_path / "progress").write_text("a file where the folder should be")
    clock[0] += 100
    one.advance(1)
    one.end()
