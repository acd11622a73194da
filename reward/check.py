"""Imports a recipe's reward functions before any stage starts, so that an error in one shows at once, not hours later.

It runs in a process of its own: a module may be slow to import, use a GPU, print, or end the process.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from reward.functions import RewardError, find


@dataclass(frozen=True)
class Use:
    """One use of a reward function."""

    place: str
    """Where the recipe names it: `recipes/x.yaml:12: ppo.reward.0.function`."""
    label: str
    """The reward's name."""
    function: str
    args: dict[str, Any]


def check_functions(uses: Sequence[Use]) -> None:
    """Raises RewardError with a line for each use whose function cannot be imported or called with its arguments."""
    if not uses:
        return
    reading, writing = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-m", __name__, str(writing)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=[writing],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    os.close(writing)
    child.communicate(json.dumps([asdict(use) for use in uses]).encode())
    with os.fdopen(reading, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.endswith("\n")]
    problems = [line for line in lines if line]
    if len(lines) < len(uses):
        use = uses[len(lines)]
        problems.append(
            f"{use.place}: importing `{use.function}` ended the process (exit code {child.returncode}); a module "
            "of reward functions must not end it when it is imported"
        )
    if problems:
        raise RewardError("\n".join(problems))


def main() -> None:
    """The process that imports. It answers each use with a line: an empty text, or what is wrong."""
    with os.fdopen(int(sys.argv[1]), "w", encoding="utf-8") as answers:
        for use in [Use(**entry) for entry in json.load(sys.stdin)]:
            problem = ""
            try:
                find(use.label, use.function, use.args)
            except RewardError as error:
                problem = f"{use.place}: {error}"
            print(json.dumps(problem), file=answers, flush=True)
    os._exit(0)  # a thread that a module has started must not keep the process


if __name__ == "__main__":
    main()
