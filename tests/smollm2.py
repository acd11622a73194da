"""SmolLM2-135M-Instruct, for tests that need a real model.

Set BATON_SMOLLM2 to a folder to keep the file and the model between test sessions.
"""

import os
from pathlib import Path

import pytest

from benchmarks.real_model import Unavailable, fetch


def gguf_file(scratch: Path) -> Path:
    """The GGUF file, fetched into `scratch` unless BATON_SMOLLM2 names a folder.

    Skips the test, with the reason, where it cannot be had.
    """
    try:
        return fetch(Path(os.environ.get("BATON_SMOLLM2", scratch)))
    except Unavailable as error:
        pytest.skip(str(error))
