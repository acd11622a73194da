"""The pipeline as a user runs it: from nothing, killed in the middle, without a network; and what becomes stale."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.faults_setup import differences
from data.encode import Encoder
from training.recipe import load_recipe

pytestmark = pytest.mark.slow

MORE = """
  dpo:
    parent: sft
    data: [{source: world, kind: preferences, size: 32}]
    eval_data: [{source: world, kind: preferences, size: 16, split: validation}]
    max_length: 128
    train: {max_steps: 4, global_batch_size: 8}
  evaluate:
    models: [pretrain, sft, ppo, dpo]
    tasks:
      - name: world
        scores:
          - {function: world_correct, name: accuracy, on: greedy}
          - {function: world_gold, name: gold}
          - {model: reward, name: reward, reencode: true}
        wins: gold
        data: [{source: world, kind: prompts, size: 26, split: test}]
        max_new_tokens: 16
"""
MODELS = ("pretrain", "sft", "reward", "ppo", "dpo")


# Every Python process loads this at its start. It makes all connections to other machines fail, as without a network.
BLOCKED = """
import errno, socket
connect = socket.socket.connect
def refused(self, address):
    if self.family in (socket.AF_INET, socket.AF_INET6) and not address[0].startswith(("127.", "::1", "localhost")):
        raise OSError(errno.ENETUNREACH, "Network is unreachable")
    return connect(self, address)
socket.socket.connect = socket.socket.connect_ex = refused
"""


def without_network(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Cuts a command off the network: by a command prefix if the system allows it, else by variables."""
    command = ["unshare", "-n"]
    if shutil.which("unshare") and subprocess.run([*command, "true"], capture_output=True).returncode == 0:
        return command, {}
    (folder / "sitecustomize.py").write_text(BLOCKED)
    return [], {"PYTHONPATH": str(folder)}


def baton(root: Path, *arguments: str, offline: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the command; without a network if `offline`, a folder for the files that this needs, is given."""
    prefix, blocked = ([], {}) if offline is None else without_network(offline)
    command = [*prefix, str(root / ".venv" / "bin" / "baton"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **blocked}
    return subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def pipeline(micro_recipe, tmp_path_factory, root) -> Path:
    """All stages of the micro recipe, run by the command, with a SIGKILL in the middle of SFT."""
    folder = tmp_path_factory.mktemp("pipeline")
    path = folder / "micro.yaml"
    text = micro_recipe.read_text().replace(str(micro_recipe.parent), str(folder))
    path.write_text(text + MORE)
    run = folder / "runs" / "micro"
    started = subprocess.Popen(
        [str(root / ".venv" / "bin" / "baton"), "run", str(path)],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list((run / "sft" / "state").glob("step-*")):
        assert started.poll() is None and time.monotonic() < deadline, "SFT never came to its first state"
        time.sleep(0.005)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    assert not (run / "sft" / "stage.json").exists()

    # Without a network, the tracker cannot reach its server.
    done = baton(root, "run", str(path), "sft.train.report_to=wandb", "ppo.train.report_to=wandb", offline=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pretrain" in done.stdout and "up to date, skipped" in done.stdout
    assert "unfinished: resumes from step" in done.stdout
    return path


def test_a_killed_pipeline_ends_as_one_that_was_not(pipeline, micro_recipe):
    """SFT, which was killed, and the stages before and after it equal the session's own chain bit for bit."""
    ours, theirs = load_recipe(pipeline).run_dir, load_recipe(micro_recipe).run_dir
    for name in ("tokenizer", "pretrain", "sft", "reward"):
        assert differences(ours / name, theirs / name) == [], name


@pytest.mark.parametrize("address", ["192.0.2.1", "127.0.0.1"])
def test_without_a_network_is_what_it_says(tmp_path, address):
    """Both ways of cutting off the network leave only this machine reachable."""
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    code = f"import socket; socket.create_connection(({address!r}, 9), timeout=5)"
    ways = [([], {"PYTHONPATH": str(tmp_path)}), without_network(tmp_path)]
    for prefix, blocked in ways:
        command = [*prefix, sys.executable, "-c", code]
        done = subprocess.run(command, env={**os.environ, **blocked}, capture_output=True, text=True)
        reasons = ("Network is unreachable", "Connection refused") if address[:3] == "127" else ("unreachable",)
        assert done.returncode and any(reason in done.stderr for reason in reasons), done.stderr


def test_a_second_run_has_nothing_to_do(pipeline, root):
    done = baton(root, "run", str(pipeline))
    assert done.returncode == 0
    assert [line.split(maxsplit=1)[1] for line in done.stdout.splitlines()] == ["up to date, skipped"] * 7


def test_what_follows_a_changed_stage_is_stale_and_says_why(pipeline, root):
    done = baton(root, "run", str(pipeline), "--dry-run", "sft.train.learning_rate=1e-3")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line and not line.startswith(" ")}
    assert "up to date" in lines["tokenizer"] and "up to date" in lines["pretrain"]
    assert "stale" in lines["sft"]
    assert "train.learning_rate 0.005 → 0.001" in done.stdout
    for name in ("reward", "ppo", "dpo", "evaluate"):
        assert "up to date" not in lines[name], done.stdout


def test_every_published_model_loads_and_stops_where_its_files_say(pipeline):
    run = load_recipe(pipeline).run_dir
    for name in ("pretrain", "sft", "ppo", "dpo"):
        folder = run / name / "model"
        assert {file.suffix for file in folder.iterdir()} == {".safetensors", ".json", ".jinja"}
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        encoder = Encoder.from_pretrained(folder)
        assert set(model.generation_config.eos_token_id) == set(encoder.stop_ids)
        assert model.generation_config.pad_token_id == encoder.pad_id != encoder.eos_id


def test_the_report_and_chat_work_on_the_run(pipeline, root):
    assert baton(root, "report", str(pipeline)).returncode == 0
    page = (load_recipe(pipeline).run_dir / "report.html").read_text()
    assert all(name in page for name in MODELS)
    command = [str(root / ".venv" / "bin" / "baton"), "chat", str(pipeline), "--max-new-tokens", "4"]
    talked = subprocess.run(command, cwd=root, input="Sort 3 1 2.\n/quit\n", capture_output=True, text=True)
    assert talked.returncode == 0, talked.stderr


def test_verify_names_the_file_that_was_touched_and_a_run_makes_it_again(pipeline, root):
    """This test comes last, since it damages the run."""
    run = load_recipe(pipeline).run_dir
    assert baton(root, "verify", str(run)).returncode == 0
    weights = run / "sft" / "model" / "model.safetensors"
    published = weights.read_bytes()
    content = bytearray(published)
    content[-1] ^= 1
    weights.write_bytes(content)
    done = baton(root, "verify", str(run))
    assert done.returncode == 1
    assert "sft" in done.stderr and "model.safetensors" in done.stderr
    refused = subprocess.run(
        [sys.executable, "-m", "stages.dpo", str(pipeline), "train.max_steps=1"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2 and "was altered after publishing" in refused.stderr
    again = baton(root, "run", str(pipeline), "--to", "dpo")
    assert again.returncode == 0 and "stale: model/model.safetensors was altered" in again.stdout
    assert weights.read_bytes() == published
    assert baton(root, "verify", str(run)).returncode == 0
