"""Runs a module under `accelerate launch`, as users do."""

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path


def launched(
    root: Path,
    config: str,
    module: str,
    *arguments: object,
    options: Sequence[object] = (),
    timeout: float | None = None,
) -> subprocess.CompletedProcess[str]:
    """The finished command. `config` names a file of recipes/launch; `options` are those of `accelerate launch`."""
    command = [Path(sys.executable).parent / "accelerate", "launch", "--config_file"]
    command += [root / "recipes" / "launch" / f"{config}.yaml", *options, "-m", module, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, command)), cwd=root, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )


@lru_cache
def variables(root: Path, config: str) -> dict[str, str]:
    """What `accelerate launch` with this launch file adds to a process's environment, the same in all processes."""
    own = ("RANK", "LOCAL_", "GROUP_", "ROLE_", "WORLD_SIZE", "MASTER_", "TORCHELASTIC_", "TORCH_", "OMP_")
    with tempfile.TemporaryDirectory() as folder:
        script, found = Path(folder, "show.py"), Path(folder, "found.json")
        script.write_text(
            "import json, os, sys\n"
            "if os.environ['RANK'] == '0':\n"
            "    open(sys.argv[1], 'w').write(json.dumps(dict(os.environ)))\n"
        )
        command = [Path(sys.executable).parent / "accelerate", "launch", "--config_file"]
        command += [root / "recipes" / "launch" / f"{config}.yaml", script, found]
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
