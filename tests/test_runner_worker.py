"""Stages forked from the warm server: the same exit codes and output as a directly started stage."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """\
name: w
output_root: {folder}
stages:
  tokenizer: {{data: [{{source: world, kind: documents, size: 100}}], vocab_size: 300}}
  long: {{stage: tokenizer, data: [{{source: world, kind: documents, size: 500000}}]}}
  wrong: {{stage: tokenizer, data: [{{source: file, path: missing.txt}}]}}
  broken:
    {{stage: pretrain, parent: tokenizer, model: {{architecture: none}}, data: [{{source: world, kind: documents}}]}}
"""
DRIVER = """
import json, os, signal, sys, threading, time
from baton.worker import WarmStage

# A shell that started the tests in the background has it ignored, and what is ignored would be inherited.
signal.signal(signal.SIGINT, signal.default_int_handler)

def send_once_begun(running, signum):
    while not os.path.exists(sys.argv[3]):
        time.sleep(0.05)
    running.send(signum)

def run(section, stage, signum=None):
    read, write = os.pipe()
    running = WarmStage(stage, [sys.argv[1], "--section", section], write, preload=False)
    os.close(write)
    if signum is not None:
        threading.Thread(target=send_once_begun, args=[running, signum], daemon=True).start()
    code = running.wait()
    return code, os.fdopen(read).read()

print(json.dumps([run(*args) for args in json.loads(sys.argv[2])]))
"""

LOADED = """
import baton.preload, gc, json, sys, threading, torch
present = [name for name in ("bitsandbytes", "wandb", "deepspeed") if name in sys.modules]
state = [threading.active_count(), torch.cuda.is_initialized(), present, gc.get_freeze_count(), gc.isenabled()]
print(json.dumps(state))
"""
AVAILABLE = """
import baton.preload, json
from peft.import_utils import is_bnb_4bit_available
from transformers.utils import is_bitsandbytes_available
from transformers.integrations import is_wandb_available
print(json.dumps([is_bitsandbytes_available(), is_bnb_4bit_available(), is_wandb_available()]))
"""


@pytest.fixture
def recipe(tmp_path) -> Path:
    path = tmp_path / "w.yaml"
    path.write_text(RECIPE.format(folder=tmp_path))
    return path


def drive(root: Path, recipe: Path, *stages: list) -> list[list]:
    """Exit code and output of each stage; a signal is sent when the stage `long` has begun."""
    begun = recipe.parent / "w" / "long" / "started.json"
    command = [sys.executable, "-c", DRIVER, str(recipe), json.dumps(stages), str(begun)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return json.loads(done.stdout)


def test_results_output_and_exit_codes_equal_those_of_a_direct_start(recipe, root, tmp_path):
    good, wrong, broken = drive(
        root, recipe, ["tokenizer", "tokenizer"], ["wrong", "tokenizer"], ["broken", "pretrain"]
    )
    assert good[0] == 0
    assert "rows in" in good[1]
    assert (tmp_path / "w" / "tokenizer" / "stage.json").exists()
    assert wrong[0] == 2
    assert "missing.txt" in wrong[1]
    assert "Traceback" not in wrong[1]
    assert broken[0] == 2
    assert "none" in broken[1]


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143)]
)
def test_a_signal_ends_the_stage_with_its_code(recipe, root, signum, code):
    ((found, said),) = drive(root, recipe, ["long", "tokenizer", int(signum)])
    assert found == code
    assert ("with no step under way; the same command goes on" in said) == (code > 0)


def test_a_stage_ends_when_its_runner_is_killed(recipe, root):
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "baton", "run", str(recipe), "--to", "long"]
    runner = subprocess.Popen(command, cwd=root, env=environment, stdout=subprocess.PIPE, text=True)
    lock = recipe.parent / "w" / "long" / ".lock"
    stage = wait_for(lambda: json.loads(lock.read_text() or "null") if lock.exists() else None)["pid"]
    assert stage != runner.pid
    runner.kill()
    runner.wait()
    runner.stdout.close()
    wait_for(lambda: not is_alive(stage))


def test_the_servers_imports_start_neither_threads_nor_cuda(root):
    done = subprocess.run([sys.executable, "-c", LOADED], cwd=root, capture_output=True, text=True, check=True)
    threads, cuda, absent, kept, collecting = json.loads(done.stdout)
    assert (threads, cuda) == (1, False)
    assert absent == []  # what takes a second and is not used
    assert kept > 100_000 and collecting  # what was imported is never searched for garbage, what comes later is
    assert done.stderr == ""


def test_what_the_servers_imports_passed_over_can_be_had_later(root):
    """Whether these packages are there, which several libraries ask once and remember, is not answered by then."""
    command = [sys.executable, "-c", AVAILABLE]
    later = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    assert json.loads(later) == [find_spec("bitsandbytes") is not None] * 2 + [find_spec("wandb") is not None]


def wait_for(look):
    """Waits until `look` returns a true value, and returns it."""
    for _ in range(300):
        found = look()
        if found:
            return found
        time.sleep(0.2)
    raise AssertionError("it did not come")


def is_alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False
    return "State:\tZ" not in status
