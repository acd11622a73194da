"""A fake wandb package: copied to `wandb/__init__.py`, it behaves as the variable FAKE_WANDB says.

Its server is one file per run id beside the package. Like the real server, it keeps one line per `_step` and drops
repetitions.
"""

import json
import os
import time
from pathlib import Path
from typing import Any

MODES = ("absent", "raises at init", "raises", "hangs at import", "hangs at init", "hangs", "dies", "offline")
"""Values of FAKE_WANDB; without it everything works. `offline`: the server cannot say what was sent before."""
_HANGS = 60.0
_MODE = os.environ.get("FAKE_WANDB", "")
_HERE = Path(__file__).parent

if __name__ == "wandb":
    (_HERE / f"pid-{os.getpid()}").touch()
    if _MODE == "absent":
        raise ModuleNotFoundError("No module named 'wandb'")
    if _MODE == "hangs at import":
        time.sleep(_HANGS)


class FakeRun:
    """The run that `init` returns, with the methods that the mirror uses."""

    def __init__(self, run_id: str) -> None:
        self._path = _HERE / f"server-{run_id}.jsonl"
        known = self._path.read_text(encoding="utf-8").splitlines() if self._path.exists() else []
        self.resumed = bool(known) and _MODE != "offline"
        self.starting_step = len(known) if self.resumed else 0
        self._lines = 0

    def define_metric(self, name: str, step_metric: str) -> None:
        """Accepts only the call that the mirror makes."""
        assert (name, step_metric) == ("*", "step")

    def log(self, line: dict[str, Any], step: int, commit: bool) -> None:
        """Keeps the line if its step is new; fails at the second line in the modes that say so."""
        assert commit
        self._lines += 1
        if self._lines == 2:
            if _MODE == "raises":
                raise RuntimeError("no route to host")
            if _MODE == "hangs":
                time.sleep(_HANGS)
            if _MODE == "dies":
                os.abort()
        if step >= self.starting_step:
            self.starting_step = step + 1
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"_step": step, **line}) + "\n")

    def finish(self) -> None:
        """Writes a marker that all lines have arrived."""
        (_HERE / "finished").touch()


def init(resume: str, **settings: Any) -> FakeRun:
    """As wandb.init."""
    assert resume == "allow"
    if _MODE == "raises at init":
        raise RuntimeError("no API key")
    if _MODE == "hangs at init":
        time.sleep(_HANGS)
    return FakeRun(settings["id"])
