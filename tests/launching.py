"""Runs a module under `accelerate launch`, as users do, or in processes that have what that would give them."""

import json
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--config_file")
"""`accelerate launch` of this very Python. DeepSpeed builds its part for the CPU anew for every path to a Python."""


def launched(
    root: Path,
    config: str,
    module: str,
    *arguments: object,
    options: Sequence[object] = (),
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """The finished command. `config` names a file of recipes/launch; `options` are those of `accelerate launch`."""
    command = [*LAUNCH, root / "recipes" / "launch" / f"{config}.yaml", *options, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


def grouped(
    root: Path, config: str, module: str, *arguments: object, processes: int = 2, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """What `launched` returns, in a third of the time: the processes have the variables of that launch, and are forked
    from a server that has already imported everything. Without the launcher, and so without what it prints at the end.

    Raises:
        TimeoutExpired: a process hung.
    """
    own = [{}] if config == "cpu" else ranked(processes)
    shared = {**os.environ, **variables(root, config), "OMP_NUM_THREADS": "1"}
    command = [module, *map(str, arguments)]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["baton.preload"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        group = [context.Process(target=_member, args=(root, command, out, err, shared | member)) for member in own]
        for process in group:
            process.start()
        ends = time.monotonic() + timeout
        while any(process.is_alive() for process in group):
            multiprocessing.connection.wait([p.sentinel for p in group if p.is_alive()], ends - time.monotonic())
            late = time.monotonic() > ends
            if late or any(process.exitcode for process in group):
                for process in group:  # the others would wait for it
                    process.join(0 if late else 10)
                    process.kill()
            if late:
                raise subprocess.TimeoutExpired(command, timeout, out.read_text(), err.read_text())
        code = next((process.exitcode for process in group if process.exitcode), 0)
        return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())


def _member(root: Path, command: list[str], out: Path, err: Path, environment: dict[str, str]) -> None:
    """Runs in the forked process."""
    os.setsid()
    os.chdir(root)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)  # the server's OpenMP has read the variable already
    for stream, path in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream.fileno())
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.argv = command
    runpy.run_module(command[0], run_name="__main__", alter_sys=True)


@lru_cache
def variables(root: Path, config: str) -> dict[str, str]:
    """What `accelerate launch` with this launch file adds to a process's environment, the same in all processes."""
    own = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "TORCH_", "OMP_")
    with tempfile.TemporaryDirectory() as folder:
        script, found = Path(folder, "show.py"), Path(folder, "found.json")
        script.write_text(
            "import json, os, sys\n"
            "if os.environ.get('RANK', '0') == '0':\n"
            "    open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))\n"
        )
        command = [*LAUNCH, root / "recipes" / "launch" / f"{config}.yaml", script, found]
        subprocess.run(list(map(str, command)), cwd=root, check=True, capture_output=True)
        added = json.loads(found.read_bytes()).items() - os.environ.items()
    return {name: value for name, value in added if not name.startswith(own)}


def ranked(processes: int) -> list[dict[str, str]]:
    """The variables by which each process of a new group finds the others."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    group = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    group |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
