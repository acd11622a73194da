"""GPUs and limits of a machine, and a trial of the launch file's engine in another process, which imports torch."""

import json
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from baton.doctor.finding import Finding, fault, ok, warning
from baton.doctor.packages import installed
from handoff.files import human_bytes
from training.engines.launch_file import LaunchFile
from training.engines.trial import Report

_GPUS, _LIMITS, _SHARED, _ENGINE, _REDUCE, _BUILD = "GPUs", "open files", "/dev/shm", "engine", "all-reduce", "build"
_PATIENCE = 120
_ON_CPU = 2
"""Processes of the trial on a CPU."""
_FILES, _FILES_EACH = 512, 16
_SHARED_LEAST = 512 * 2**20
_SHARED_PATH = Path("/dev/shm")
_BUSY = 0.1
"""Share of a GPU's memory that may be taken before a training."""


def check_limits(processes: int) -> list[Finding]:
    """Checks the system's limits. `processes`: how many are started on this machine."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    least = _FILES + _FILES_EACH * processes
    if files != resource.RLIM_INFINITY and files < least:
        found = [
            warning(_LIMITS, f"a process may open {files} files, and {least} are few enough for {processes} processes: "
                    f"`ulimit -n {least if most == resource.RLIM_INFINITY else min(max(most, least), 65536)}`"
                    + ("" if most == resource.RLIM_INFINITY or most >= least else " as root"))
        ]  # fmt: skip
    else:
        found = [ok(_LIMITS, "no limit" if files == resource.RLIM_INFINITY else f"up to {files} in a process")]
    if processes > 1 and _SHARED_PATH.is_dir():
        size = shutil.disk_usage(_SHARED_PATH)
        if size.free < _SHARED_LEAST:
            found.append(
                warning(_SHARED, f"{human_bytes(size.free)} of {human_bytes(size.total)} are free, through which the "
                        "processes of a machine exchange data: give a container more (`docker run --shm-size 8g`), "
                        "or `mount -o remount,size=8g /dev/shm`")
            )  # fmt: skip
        else:
            found.append(ok(_SHARED, f"{human_bytes(size.free)} free"))
    return found


def tried(launch: LaunchFile | None, *, reduce: bool) -> Report:
    """What the trial in a process of its own has found (training/engines/trial.py). Without a launch file and without a
    GPU there is nothing to try.

    Args:
        reduce: whether to try an all-reduce.
    """
    if launch is None and not _cards():
        return Report()
    count = 0
    if launch is not None and reduce:
        count = launch.processes_here if launch.request.device == "cuda" else min(_ON_CPU, launch.processes_here)
    asked = {
        "request": None if launch is None else asdict(launch.request),
        "processes": 1 if launch is None else launch.processes_here,
        "trial": count,
        "address": launch.address if launch is not None and launch.machines == 1 else "127.0.0.1",
    }
    command = [sys.executable, "-m", "training.engines.trial", json.dumps(asked)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False)
    except subprocess.TimeoutExpired:
        return Report(fault=f"its trial did not end within {_PATIENCE} s; look for a GPU or a file system that hangs")
    try:
        return Report(**json.loads(done.stdout.splitlines()[-1]))
    except (IndexError, ValueError):
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        return Report(fault=f"its trial failed: {last[0]}")


def check_gpus(launch: LaunchFile | None, trial: Report) -> list[Finding]:
    """Checks GPUs, engine and all-reduce, by what the trial has found."""
    cuda = launch is not None and launch.request.device == "cuda"
    found = _check_cards(trial)
    found += [
        warning(_BUILD, f"{path} was left by a build that was killed, and torch would wait for it for ever; the next "
                f"start of this engine removes it, or `rm {path}`")
        for path in trial.left_behind
    ]  # fmt: skip
    if launch is None:
        return found
    if trial.fault is not None:
        return [*found, fault(_ENGINE, trial.fault)]
    found.append(ok(_ENGINE, f"{launch.request} can run here"))
    if trial.reduce_fault is not None:
        how = "NCCL_DEBUG=INFO says more; " if cuda else ""
        found.append(
            fault(_REDUCE, f"{trial.reduce_fault}: {how}look for a firewall between processes of this machine, and at "
                  "the interface that GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names")
        )  # fmt: skip
    elif trial.reduced is not None:
        over = "nccl" if cuda else "gloo"
        found.append(ok(_REDUCE, f"between processes of this machine over {over}, in {trial.reduced:.1f} s"))
    return found


def _cards() -> list[list[str]]:
    """Of each card that the driver knows: name, memory and used memory in MiB, version of the driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=name,memory.total,memory.used,driver_version", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run([program, *query], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == 4] if done.returncode == 0 else []


def _check_cards(trial: Report) -> list[Finding]:
    cards = _cards()
    if not trial.gpus:
        if not cards:
            return [ok(_GPUS, "none; what runs here trains on the CPU")]
        name, driver = cards[0][0], cards[0][3]
        torch = f"torch {installed('torch')}"
        if trial.cuda is None:
            why = f"{torch} was built without CUDA: install the build of the same version for the driver's CUDA"
        else:
            why = (
                f"{torch} was built for CUDA {trial.cuda} and cannot use them with driver {driver}: update the driver, "
                "or install the build of the same version for an older CUDA; and see that CUDA_VISIBLE_DEVICES "
                "hides none"
            )
        return [fault(_GPUS, f"there are {len(cards)} ({name}), and {why}")]
    found = []
    kinds = {f"{gpu['name']} with {human_bytes(gpu['memory'])}{'' if gpu['bf16'] else ', no bfloat16'}"
             for gpu in trial.gpus}  # fmt: skip
    driver = f", driver {cards[0][3]}" if cards else ""
    found.append(ok(_GPUS, f"{len(trial.gpus)}: {', '.join(sorted(kinds))}{driver}, CUDA {trial.cuda}"))
    for number, (name, total, used, _) in enumerate(cards):
        if total.isdigit() and used.isdigit() and int(used) > _BUSY * int(total):
            found.append(
                warning(_GPUS, f"{used} of {total} MiB of GPU {number} ({name}) are taken: `nvidia-smi` says by whom; "
                        "end that, or leave the GPU out (gpu_ids in the launch file)")
            )  # fmt: skip
    return found
