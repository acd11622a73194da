"""The process of one tracker. Its settings are the first line of stdin, which closes when the stage ends."""

import fcntl
import json
import signal
import sys
import threading
from pathlib import Path

from handoff.stage import TRACKERS
from training.trackers.mirror import GRACE, STOPPED
from training.trackers.sending import send
from training.trackers.sinks import SINKS


def _run_of(stage: Path) -> str | None:
    """The run id that the stage's folder has now; None if it cannot be read."""
    try:
        return str(json.loads((stage / "started.json").read_bytes())["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def main() -> None:
    """Sends the lines until the stage has ended, and for GRACE seconds after that at most."""
    settings = json.loads(sys.stdin.readline())
    tracker, stage = settings.pop("tracker"), Path(settings.pop("stage"))
    ended = threading.Event()

    def await_end() -> None:
        sys.stdin.read()
        signal.alarm(GRACE)
        ended.set()

    threading.Thread(target=await_end, daemon=True).start()
    folder = stage / TRACKERS / tracker
    with (folder / "sent.jsonl").open("a+", encoding="utf-8") as record:
        fcntl.flock(record, fcntl.LOCK_EX)  # a process of an earlier start may still be sending
        try:
            sink = SINKS[tracker](folder, **settings)
            send(sink, stage / "metrics.jsonl", record, ended, lambda: _run_of(stage) in (None, settings["run_id"]))
        except Exception as error:  # no failure of a tracker may stop training
            print(f"{tracker} {STOPPED} ({type(error).__name__}: {error})", file=sys.stderr, flush=True)
            sys.exit(1)


if __name__ == "__main__":
    main()
