"""Asks llama.cpp how it reads and answers with a GGUF file.

It is called through the npm package node-llama-cpp, which brings it compiled: `npm install node-llama-cpp` in a folder,
and that folder's name in BATON_LLAMA_CPP.
"""

import json
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from baton.export.answers import Answers
from handoff.errors import HandoffError
from handoff.files import quoted, read_json

VARIABLE = "BATON_LLAMA_CPP"
_PACKAGE = Path("node_modules") / "node-llama-cpp"
_SMALLEST = 1e-30  # a probability that is 0 in float32


@dataclass(frozen=True)
class Llama:
    """A llama.cpp that can be asked."""

    package: Path
    version: str


@dataclass(frozen=True)
class Heard:
    """What llama.cpp made of a file."""

    tokens: list[list[int]]
    """Of each text."""
    answers: Answers
    unknown_stops: list[int]
    """Stop ids at which it would not stop."""


def find() -> Llama | str:
    """The llama.cpp of this machine, or why there is none.

    Raises:
        HandoffError: the variable names a folder without it.
    """
    folder = os.environ.get(VARIABLE)
    if not folder:
        return f"{VARIABLE} names no folder with node-llama-cpp"
    package = Path(folder).expanduser() / _PACKAGE
    if not (package / "package.json").is_file():
        raise HandoffError(f"{VARIABLE}: {quoted(folder)} has no {_PACKAGE}; `npm install node-llama-cpp` there")
    if shutil.which("node") is None:
        return "there is no node to run it"
    return Llama(package, str(read_json(package / "package.json")["version"]))


def ask(
    llama: Llama,
    file: Path,
    texts: Sequence[str],
    rows: Sequence[Sequence[int]],
    question: Sequence[int],
    longest: int,
    stops: Sequence[int],
) -> Heard:
    """Lets it cut texts, read rows and answer a question.

    Raises:
        HandoffError: it cannot load the file.
    """
    import torch

    asked = {
        "library": str((llama.package / "dist" / "index.js").absolute()),
        "threads": max(1, torch.get_num_threads() // 2),  # more wait for each other where the machine is not idle
        "model": str(file.absolute()),
        "texts": list(texts),
        "sequences": [list(row) for row in rows],
        "prompt": list(question),
        "maxNewTokens": longest,
        "stops": list(stops),
    }
    command = ["node", str(Path(__file__).with_name("llama_cpp.mjs"))]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, check=False)
    if done.returncode:
        raise HandoffError(f"llama.cpp cannot use {quoted(file.name)}: {quoted(done.stderr.strip()[-800:])}")
    said = json.loads(done.stdout)
    places = [place for row in said["rows"] for place in row]
    answers = Answers(
        best=[best for best, _, _ in places],
        log_probs=[math.log(max(following, _SMALLEST)) for _, _, following in places],
        answer=said["answer"],
        ended=said["ended"],
    )
    return Heard(said["tokens"], answers, said["unknownStops"])
