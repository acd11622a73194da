"""Jobs on clusters: slurm/baton.sbatch on a real Slurm, and on two machines."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.faults_setup import differences
from tests.launching import launched
from tests.slurm_cluster import slurm_cluster
from tests.stage_chain import lines_of
from tests.test_preemption import parents_of, same
from tests.two_nodes import Nodes, two_nodes
from training.recipe import load_recipe
from training.run import run_section

slow = pytest.mark.slow
BATON = Path(sys.executable).with_name("baton")
ONE_PROCESS = 'distributed_type: MULTI_GPU\nnum_machines: 1\nnum_processes: 1\ngpu_ids: "-1,-1"\n'


def keys(steps: int) -> tuple[str, ...]:
    own = (f"max_steps={steps}", "save_steps=1000", "logging_steps=1", "per_device_train_batch_size=4")
    return tuple(f"sft.train.{key}" for key in own)


def wait(true: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + 200
    while not true():
        assert time.monotonic() < deadline, said()
        time.sleep(0.05)


def steps_of(stage: Path) -> int:
    return len(lines_of(stage)) if (stage / "metrics.jsonl").exists() else 0


@slow
def test_a_preempted_slurm_job_is_requeued_and_goes_on(micro_recipe, root, tmp_path):
    """On a real Slurm. Afterwards the result is the one of a run that was not preempted, bit for bit."""
    threads = str(torch.get_num_threads())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BATON", str(BATON))
        patch.setenv("OMP_NUM_THREADS", threads)
        whole, folder = parents_of(micro_recipe, tmp_path / "whole", *keys(150))
        run_section(load_recipe(micro_recipe, whole[1:]), "sft")
        arguments, stopped = parents_of(micro_recipe, tmp_path / "stopped", *keys(150))
        output, cluster_folder = tmp_path / "job.txt", tmp_path / "slurm"
        cluster_folder.mkdir()
        with slurm_cluster(root, cluster_folder) as cluster:
            submit = ("sbatch", "--parsable", "--exclusive", "--output")
            job = cluster.ask(*submit, output, "slurm/baton.sbatch", *arguments, "--to", "sft")

            def said() -> str:
                return f"{cluster.field(job, 'JobState')}\n{output.read_text() if output.exists() else ''}"

            wait(lambda: steps_of(stopped / "sft") >= 4, said)
            cluster.ask(*submit, tmp_path / "urgent.txt", "--partition=urgent", "--wrap=true")
            wait(lambda: cluster.field(job, "Restarts") == "1", said)
            wait(lambda: cluster.field(job, "JobState") in ("COMPLETED", "FAILED"), said)
            assert cluster.field(job, "JobState") == "COMPLETED", said()
    out = output.read_text()
    step = int(out.split("sft: stopped by SIGTERM after step ")[1].split(";")[0])
    assert f"resuming after step {step}" in out and 4 <= step < 150
    same(folder / "sft", stopped / "sft")


SRUN = """\
#!/bin/bash
# Starts the command on both machines, as `srun` does with one task on each of two nodes.
while [[ $1 == --* ]]; do shift; done
for number in 0 1; do
  node=NODES_$number
  read -r name interface <<< "${!node}"
  SLURM_NODEID=$number GLOO_SOCKET_IFNAME=$interface ip netns exec "$name" "$@" > "$SAID.$number" 2>&1 &
done
wait -n; first=$?
wait -n; second=$?
exit $((first > second ? first : second))
"""
SCONTROL = """\
#!/bin/bash
if [ "$1" = show ]; then printf '%s\\n' "$ADDRESSES"; else echo "$@" >> "$SAID.scontrol"; fi
"""


def job(nodes: Nodes, folder: Path, *arguments: object) -> "subprocess.Popen[bytes]":
    """Starts slurm/baton.sbatch as Slurm would on two nodes."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        **{f"NODES_{number}": f"{node.name} {node.interface}" for number, node in enumerate(nodes.nodes)},
        "ADDRESSES": "\n".join(node.address for node in nodes.nodes),
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "SAID": str(folder / "said"),
        "BATON": str(BATON),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "a[0-1]",
    }
    command = ["bash", str(nodes.root / "slurm" / "baton.sbatch"), *map(str, arguments)]
    return subprocess.Popen(command, cwd=nodes.root, env=environment)


@slow
def test_a_job_on_two_machines_is_stopped_and_goes_on(micro_recipe, root, tmp_path):
    """All processes of the job get the signal. With BATON_RESUME=all the result is compared with that of two processes
    on one machine: it is the same, bit for bit."""
    launch, said = tmp_path / "launch.yaml", tmp_path / "said"
    launch.write_text(ONE_PROCESS)
    arguments, stopped = parents_of(micro_recipe, tmp_path / "stopped", *keys(60))

    def output() -> str:
        return "\n".join(path.read_text() for path in sorted(tmp_path.glob("said.*")))

    with two_nodes(root) as nodes:
        command = (*arguments, "--to", "sft", "--launch", launch)
        running = job(nodes, tmp_path, *command)
        wait(lambda: steps_of(stopped / "sft") >= 4 or running.poll() is not None, output)
        for process in psutil.Process(running.pid).children(recursive=True):
            if process.name() not in ("srun", "bash"):
                process.terminate()
        assert running.wait(120) == 143, output()
        assert Path(f"{said}.scontrol").read_text() == "requeue 4711\n"
        assert "sft: stopped by SIGTERM after step" in output()
        running = job(nodes, tmp_path, *command)
        assert running.wait(200) == 0, output()
        assert "resuming after step" in Path(f"{said}.0").read_text()
        assert "machine 1 of 2 takes part in sft" in Path(f"{said}.1").read_text()
        assert "accelerate launch" in (stopped / "logs" / "sft.1.log").read_text()
    assert (stopped / "sft" / "stage.json").exists()
    if "BATON_RESUME" not in os.environ:
        return
    whole, folder = parents_of(micro_recipe, tmp_path / "whole", *keys(60))
    done = launched(root, "cpu2", "stages.sft", *whole, "--section", "sft")
    assert done.returncode == 0, done.stderr
    assert differences(stopped / "sft", folder / "sft", same_states=False) == []
