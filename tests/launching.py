"""Runs a module under `accelerate launch`, as users do."""

import os
import subprocess
import sys
from collections.abc import Sequence
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
