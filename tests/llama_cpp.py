"""A real llama.cpp, for tests that compare with it: the npm package node-llama-cpp, which brings it compiled.

BATON_LLAMA_CPP names a folder that has it. Otherwise it is fetched once, into the user's folder for caches (83 MB).
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

VERSION = "3.21.1"
_PACKAGES = (f"node-llama-cpp@{VERSION}", f"@node-llama-cpp/linux-x64@{VERSION}")


def folder() -> Path:
    """The folder with the package. Skips the test, with the reason, where it cannot be had."""
    named = os.environ.get("BATON_LLAMA_CPP")
    if named:
        return Path(named)
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    kept = caches / "baton-tests" / f"node-llama-cpp-{VERSION}"
    if not kept.is_dir():
        _fetch(kept)
    return kept


def _fetch(kept: Path) -> None:
    if shutil.which("npm") is None or shutil.which("node") is None:
        pytest.skip("there is no npm or node to get llama.cpp with")
    fresh = kept.with_name(f".{kept.name}.{os.getpid()}")
    fresh.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--prefix", str(fresh), "--omit=optional", "--ignore-scripts", *_PACKAGES]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip("npm does not fetch node-llama-cpp within 300 s")
    if done.returncode:
        shutil.rmtree(fresh)
        pytest.skip(f"npm cannot fetch node-llama-cpp: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    try:
        fresh.rename(kept)
    except OSError:  # another process was faster
        shutil.rmtree(fresh)
