"""Processes that torch's elastic agent starts again, under `accelerate launch --max_restarts`."""

import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.faults_setup import differences
from tests.launching import launched
from tests.stage_chain import lines_of
from tests.test_preemption import parents_of
from tests.two_nodes import Nodes, ended, two_nodes
from training.engines import elastic
from training.engines.launch import LaunchError
from training.recipe import load_recipe

slow = pytest.mark.slow
KEYS = tuple(
    f"sft.train.{key}"
    for key in ("max_steps=80", "save_steps=5", "logging_steps=1", "per_device_train_batch_size=4", "ddp_timeout=60")
)
ALL = pytest.mark.skipif("BATON_RESUME" not in os.environ, reason="takes long: set BATON_RESUME=all")


@pytest.fixture
def started_by_an_agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets the variables of a process that an agent starts for the given time."""

    def start(attempt: int, restarts: int = 2, **more: str) -> None:
        folder = tmp_path / f"attempt_{attempt}" / "0"
        folder.mkdir(parents=True)
        given = {"RUN_ID": "none", "ERROR_FILE": str(folder / "error.json"), "MAX_RESTARTS": str(restarts), **more}
        for name, value in given.items():
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)

    monkeypatch.setattr(elastic, "die_with_parent", lambda libc: None)  # would outlive the test
    return start


def test_a_stage_that_ended_for_good_ends_at_once_when_it_is_started_again(started_by_an_agent):
    started_by_an_agent(0)
    elastic.begin()
    with pytest.raises(SystemExit):
        elastic.end(3)
    started_by_an_agent(1)
    with pytest.raises(SystemExit) as again:
        elastic.begin()
    assert again.value.code == 3


def test_what_another_start_may_mend_is_tried_again(started_by_an_agent):
    started_by_an_agent(0)
    with pytest.raises(SystemExit) as end:
        elastic.end(143, for_good=False)
    assert end.value.code == 143
    started_by_an_agent(1)
    elastic.begin()
    started_by_an_agent(2, restarts=0)
    with pytest.raises(SystemExit):
        elastic.end(2)
    started_by_an_agent(3, restarts=0)
    elastic.begin()


def test_restarts_that_would_not_work_are_refused(started_by_an_agent, monkeypatch):
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    started_by_an_agent(0, USE_AGENT_STORE="True")
    with pytest.raises(LaunchError, match="needs TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in the environment"):
        elastic.begin()
    started_by_an_agent(1, USE_AGENT_STORE="False")
    elastic.begin()
    started_by_an_agent(2, restarts=0, USE_AGENT_STORE="True")
    elastic.begin()
    monkeypatch.setenv("GROUP_WORLD_SIZE", "1")
    started_by_an_agent(3, USE_AGENT_STORE="True")
    elastic.begin()


ORPHAN = """
import os, subprocess, sys, time
code = "from training.engines import elastic; elastic.begin(); print('up', flush=True); import time; time.sleep(60)"
subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TORCHELASTIC_RUN_ID": "none"})
time.sleep(60)
"""


def test_a_process_does_not_outlive_its_agent(root):
    agent = subprocess.Popen([sys.executable, "-c", ORPHAN], cwd=root, stdout=subprocess.PIPE, text=True)
    assert agent.stdout is not None and agent.stdout.readline() == "up\n"
    (stage,) = psutil.Process(agent.pid).children()
    agent.kill()
    agent.wait()
    assert agent.stdout.read() == ""  # returns only when the process has ended
    psutil.wait_procs([stage], timeout=30)
    assert not stage.is_running() or stage.status() == psutil.STATUS_ZOMBIE


@slow
def test_a_mistake_is_told_once_and_keeps_its_code(micro_recipe, root, tmp_path):
    arguments, _ = parents_of(micro_recipe, tmp_path, "sft.parent=nowhere")
    done = launched(root, "cpu2", "stages.sft", *arguments, "--section", "sft", options=("--max_restarts", 2))
    assert "exitcode  : 2 " in done.stderr  # of the last start
    assert sum("nowhere" in line for line in done.stderr.splitlines()) == 1


def launch(nodes: Nodes, number: int, *arguments: object) -> "subprocess.Popen[str]":
    """Starts the agent of one machine; torch names each machine by its address."""
    first = nodes.nodes[0].address
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PET_LOCAL_ADDR", nodes.nodes[number].address)
        patch.setenv(elastic.OWN_STORE, "1")
        command = ["accelerate", "launch", "--config_file", nodes.root / "recipes" / "launch" / "cpu2.yaml"]
        command += ["--num_machines", 2, "--num_processes", 2, "--machine_rank", number]
        command += ["--main_process_ip", first, "--main_process_port", 29581, "--max_restarts", 1]
        command += ["--rdzv_backend", "c10d", "--rdzv_conf", f"is_host={int(number == 0)}"]
        return nodes.start_on(number, *map(str, command), "-m", "stages.sft", *arguments)


@slow
@pytest.mark.parametrize("killed", ["a process", pytest.param("an agent", marks=ALL)])
def test_of_two_machines_one_is_killed_and_training_goes_on(killed, micro_recipe, root, tmp_path):
    """From the last saved state, without a command. An agent that was killed is started again, as Kubernetes does.
    Afterwards the result is the one of a run that was not disturbed, bit for bit."""
    whole, folder = parents_of(micro_recipe, tmp_path / "whole", *KEYS)
    done = launched(root, "cpu2", "stages.sft", *whole, "--section", "sft")
    assert done.returncode == 0, done.stderr
    arguments, disturbed = parents_of(micro_recipe, tmp_path / "disturbed", *KEYS)
    arguments += ["--section", "sft"]
    stage = disturbed / "sft"
    assert load_recipe(micro_recipe, arguments[1:-2]).run_dir == disturbed
    with two_nodes(root) as nodes:
        agents = [launch(nodes, number, *arguments) for number in range(2)]
        while not (stage / "metrics.jsonl").exists() or len(lines_of(stage)) < 7:
            assert all(agent.poll() is None for agent in agents), ended(agents)
            time.sleep(0.02)
        (process,) = psutil.Process(agents[1].pid).children()
        if killed == "a process":
            process.kill()
        else:
            agents[1].kill()
            agents[1].communicate()
            agents[1] = launch(nodes, 1, *arguments)
        codes, output = ended(agents)
        assert codes == [0, 0], output
        assert "resuming after step" in output[0]
    assert differences(stage, folder / "sft") == []
