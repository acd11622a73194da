"""Mirrors metrics.jsonl to Weights & Biases from a separate process, which may be slow, hang or die without delaying a
step.

The mirror reads metrics.jsonl and records which lines it has sent. So a resumed stage continues the same wandb run:
lines that were cut off and written again are not sent twice, and lines that a kill left unsent are sent then. A line is
identified by its step and its position among the lines of that step. Its `_step` in wandb is the number of lines before
it, so wandb drops a repetition of a line that was sent but not recorded when the mirror died.
"""

import fcntl
import json
import logging
import netrc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

FOLDER = "wandb"
"""Names in the stage's folder: wandb's own folder, and the two files of the mirror."""
GRACE = 120
"""Seconds in which the mirror may send its last lines after its stage has ended."""
RETRY = 600.0
"""Seconds after which a mirror that died is replaced."""
_LAST_WAIT = 0.5  # seconds for which a stage waits for its mirror at the end
_LOOK = 0.5  # seconds between two looks at metrics.jsonl

logger = logging.getLogger(__name__)


def destination(project: str, name: str) -> tuple[dict[str, str], str]:
    """(the project and the run's name, as arguments of wandb.init; what will happen, for the user). Without arguments
    nothing is sent.

    What the environment sets (WANDB_PROJECT, WANDB_NAME) holds, and wandb reads it itself. It also reads WANDB_MODE,
    WANDB_BASE_URL and the keys that are looked for here.
    """
    set_here = os.environ
    given = {"project": set_here.get("WANDB_PROJECT") or project, "name": set_here.get("WANDB_NAME") or name}
    mode = set_here.get("WANDB_MODE", "online").lower()
    if mode == "disabled" or set_here.get("WANDB_DISABLED", "").lower() in ("true", "1"):
        return {}, "report_to is wandb, and the environment disables wandb: nothing is sent"
    if mode in ("offline", "dryrun"):
        return given, f"metrics are kept for wandb in the stage's folder {FOLDER}/ (WANDB_MODE is {mode})"
    host = urlsplit(set_here.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    if not _has_key(host):
        return {}, (
            f"report_to is wandb, but there is no key for {host}: nothing is sent. Run `wandb login` or set "
            "WANDB_API_KEY; a resumed stage then sends all lines. metrics.jsonl has everything"
        )
    return given, f"metrics go to wandb at {host}, project {given['project']}"


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    with suppress(OSError, netrc.NetrcParseError):
        return host in netrc.netrc(Path(os.environ.get("NETRC") or "~/.netrc").expanduser()).hosts
    return False


class WandbMirror:
    """The stage's side. The first line starts the process, so that a stage that fails earlier leaves nothing."""

    def __init__(self, folder: Path, given: dict[str, str], run_id: str, config: dict[str, Any]) -> None:
        """
        Args:
            folder: the stage's folder, with metrics.jsonl.
            given: project and name, from `destination`.
            run_id: wandb's run id, the same after a resume.
        """
        self._settings = {**given, "id": run_id, "config": config, "dir": str(folder)}
        self._log = folder / FOLDER / "mirror.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._next_start = 0.0

    def wake(self) -> None:
        """Called after a new line in metrics.jsonl. Starts the mirror if none is running; it finds the line itself."""
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
        """Called at the end of the stage. Waits at most half a second; the rest is sent in the background."""
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
                start_new_session=True,  # Ctrl-C in the terminal must reach only the stage
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
    """The lines of metrics.jsonl, a file that grows, and may be truncated and grow again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._begin_again()

    def _begin_again(self) -> None:
        self._offset, self._last, self._key = 0, b"", (-1, 0)

    def new(self) -> Iterator[tuple[tuple[int, int], dict[str, Any]]]:
        """((step, position among the lines of that step), line) for each line since the last call; for every line if
        the file was truncated or changed since then."""
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
    """Sends lines until `ended` is set, then the remaining ones.

    Args:
        settings: arguments of wandb.init; `dir` is the stage's folder.
        record: file with the keys of the sent lines, one per line; new keys are appended.
    """
    import wandb

    run = wandb.init(resume="allow", **settings)
    run.define_metric("*", step_metric="step")
    record.seek(0)
    keys = record.readlines()
    if run.resumed:
        # Fewer lines arrived than were recorded, because the machine went down. Send the rest again.
        keys = keys[: run.starting_step]
        record.seek(0)
        record.truncate()
        record.writelines(keys)
    sent, last = len(keys), tuple(json.loads(keys[-1])) if keys else (-1, 0)
    lines = Lines(Path(settings["dir"]) / "metrics.jsonl")
    while True:
        over = ended.is_set()  # read first, so that lines written before the end are still sent below
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
    """The mirror's process. It reads its settings from the first line of stdin; stdin closes when the stage ends."""
    settings = json.loads(sys.stdin.readline())
    ended = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        signal.alarm(GRACE)
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    with (Path(settings["dir"]) / FOLDER / "sent.jsonl").open("a+", encoding="utf-8") as record:
        fcntl.flock(record, fcntl.LOCK_EX)  # a mirror from an earlier start may still be sending
        try:
            send(settings, record, ended)
        except Exception as error:  # no failure of the mirror may stop training
            print(f"{_STOPPED} ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
