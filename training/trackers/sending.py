"""The tracker's process: reads metrics.jsonl as it grows, sends each line once, and records which ones it has sent.

So a resumed stage continues the same run of the tracker: lines that were cut off and written again are not sent twice,
and lines that a kill left unsent are sent then. A line is identified by its step and its position among the lines of
that step. Its place is the number of lines before it; a tracker that knows how many lines have arrived is not sent a
line again that arrived but was not recorded when its process died.
"""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from training.trackers.sinks import Sink

LOOK = 0.5  # seconds between two looks at metrics.jsonl


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


def send(
    sink: Sink,
    path: Path,
    record: TextIO,
    ended: threading.Event,
    is_ours: Callable[[], bool] = lambda: True,
) -> None:
    """Sends the lines of `path` until `ended` is set, then the remaining ones.

    Args:
        record: file with the keys of the sent lines, one per line; new keys are appended.
        is_ours: whether the file is still that of this run. Another start may have put its own in its place.
    """
    record.seek(0)
    keys = record.readlines()
    if sink.arrived is not None and sink.arrived < len(keys):
        # Fewer lines arrived than were recorded, because the machine went down. Send the rest again.
        keys = keys[: sink.arrived]
        record.seek(0)
        record.truncate()
        record.writelines(keys)
    sent, last = len(keys), tuple(json.loads(keys[-1])) if keys else (-1, 0)
    lines = Lines(path)
    while True:
        # Read first, so that lines written before the end are still sent below.
        over = ended.is_set()
        if not is_ours():
            break
        for key, line in lines.new():
            if key > last:
                if sink.arrived is None or sent >= sink.arrived:
                    sink.send(sent, line)
                record.write(json.dumps(key) + "\n")
                record.flush()
                sent, last = sent + 1, key
        if over:
            break
        ended.wait(LOOK)
    sink.close()
