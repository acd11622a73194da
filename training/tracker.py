"""Weights & Biases as a mirror of metrics.jsonl, from a process of its own: it may be slow, hang or die, and no step
waits for it.

The mirror reads metrics.jsonl, which is the truth, and writes down which lines it has sent. So a stage that is resumed
goes on in the same wandb run: lines that were cut off and written again are not sent twice, and those that a kill had
left unsent are sent then. A line is known by its step and its place among the lines of that step. In wandb its `_step`
is the number of lines before it: what was sent, and not yet written down when the mirror died, is dropped there as a
repetition.
"""

import fcntl
import json
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

FOLDER = "wandb"
"""In the stage's folder: what wandb keeps on the disk, and the two files of the mirror."""
GRACE = 120
"""Seconds that a mirror has for its last lines once its stage has ended."""
RETRY = 600.0
"""Seconds after which a mirror that died is replaced."""
_LAST_WAIT = 0.5  # seconds that the end of a stage waits for its mirror
_LOOK = 0.5  # seconds between two looks at metrics.jsonl

logger = logging.getLogger(__name__)


class WandbMirror:
    """The stage's end of it. The process is started by the first line: a stage that fails before has left nothing."""

    def __init__(self, folder: Path, project: str, name: str, run_id: str, config: dict[str, Any]) -> None:
        """`folder`: the stage's, with metrics.jsonl; `run_id`: wandb's, the same after a resume."""
        self._settings = {"project": project, "name": name, "id": run_id, "config": config, "dir": str(folder)}
        self._log = folder / FOLDER / "mirror.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    def wake(self) -> None:
        """There is a new line in metrics.jsonl. The mirror finds it by itself; this sees to it that there is one."""
        if self._process is not None and self._process.poll() is not None:
            self._report(self._process.returncode)
            self._process = None
        if self._process is None and time.monotonic() >= self._next_start:
            self._next_start = time.monotonic() + RETRY
            try:
                self._start()
            except OSError as error:
                logger.warning("wandb could not be started (%s); metrics.jsonl has everything", error)

    def close(self) -> None:
        """The stage has ended. What is left is sent in the background; this waits for half a second at most."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._report(self._process.wait(_LAST_WAIT))
        except subprocess.TimeoutExpired:
            logger.warning(
                "the last lines go to wandb in the background, for %d s at most; metrics.jsonl has everything", GRACE
            )
        self._process = None

    def _start(self) -> None:
        self._log.parent.mkdir(exist_ok=True)
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "training.tracker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,  # the terminal's Ctrl-C is for the stage
            )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(self._settings).encode() + b"\n")
        self._process.stdin.flush()

    def _report(self, code: int) -> None:
        if code == 0:
            return
        said = [line for line in self._log.read_text(encoding="utf-8", errors="replace").splitlines() if line]
        last = next((line for line in reversed(said) if line.startswith(_STOPPED)), f"{_STOPPED} (exit code {code})")
        logger.warning("%s; metrics.jsonl has everything", last)


_STOPPED = "wandb stopped"


class Lines:
    """The lines of metrics.jsonl, which grows, and may be cut back and grow again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_again()

    def _begin_again(self) -> None:
        self._offset, self._last, self._key = 0, b"", (-1, 0)

    def new(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """((step, place among the lines of that step), line) of each line since the last call; of each line there is
        when the last one that was seen is no longer in its place."""
        with self._path.open("rb") as file:
            file.seek(self._offset - len(self._last))
            if file.read(len(self._last)) != self._last:
                self._begin_again()
                file.seek(0)
            while (raw := file.readline()).endswith(b"\n"):
                line = json.loads(raw)
                step, place = self._key
                self._key = (step, place + 1) if line["step"] == step else (line["step"], 0)
                self._offset, self._last = file.tell(), raw
                yield self._key, line


def send(settings: dict[str, Any], record: TextIO, ended: threading.Event) -> None:
    """Sends lines until `ended`, and then those that are left.

    Args:
        settings: of wandb.init; `dir` is the stage's folder.
        record: holds the keys of the lines that were sent before, one a line; gets those that are sent now.
    """
    import wandb

    run = wandb.init(resume="allow", **settings)
    run.define_metric("*", step_metric="step")
    record.seek(0)
    keys = record.readlines()
    if run.resumed:
        # Less than was handed over arrived: the machine went down. The rest is sent again.
        keys = keys[: run.starting_step]
        record.seek(0)
        record.truncate()
        record.writelines(keys)
    sent, last = len(keys), tuple(json.loads(keys[-1])) if keys else (-1, 0)
    lines = Lines(Path(settings["dir"]) / "metrics.jsonl")
    while True:
        over = ended.is_set()  # asked first: what was written before the end is seen below
        for key, line in lines.new():
            if key > last:
                run.log(line, step=sent, commit=True)
                record.write(json.dumps(key) + "\n")
                record.flush()
                sent, last = sent + 1, key
        if over:
            break
        ended.wait(_LOOK)
    run.finish()


def main() -> None:
    """The mirror's process. Its settings come in a line on stdin, and the end of stdin is the end of the stage."""
    settings = json.loads(sys.stdin.readline())
    ended = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        signal.alarm(GRACE)
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    with (Path(settings["dir"]) / FOLDER / "sent.jsonl").open("a+", encoding="utf-8") as record:
        fcntl.flock(record, fcntl.LOCK_EX)  # the mirror of an earlier start may still be at its last lines
        try:
            send(settings, record, ended)
        except Exception as error:  # whatever happens to the mirror, the training goes on
            print(f"{_STOPPED} ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
