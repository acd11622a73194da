"""Earlier content of a stage's directory: `<run>/.previous/<stage>/<n>/`, where the highest number is the newest.

A start with changed inputs moves the content of the directory here, and a later start with the old inputs moves it
back. A kill during a move leaves a folder under one of two temporary names, and the next start completes the move.
"""

from contextlib import suppress
from pathlib import Path

from handoff.errors import HandoffError
from handoff.files import fsync_path, read_json, remove_tree
from handoff.lock import LOCK_NAME
from handoff.manifest import Inputs

PREVIOUS = ".previous"
KEPT = 3
"""Number of earlier contents that are kept for each stage."""
STARTED, MANIFEST = "started.json", "stage.json"

_LEAVING, _RETURNING = ".leaving", ".returning"


class Previous:
    """The earlier contents of the directory of one stage."""

    def __init__(self, stage: Path) -> None:
        self._stage = stage
        self.folder = stage.parent / PREVIOUS / stage.name

    def content(self) -> list[Path]:
        """Everything in the stage's directory except the lock. stage.json comes first, so that half-moved content
        never counts as published."""
        paths = [path for path in self._stage.iterdir() if path.name != LOCK_NAME]
        return sorted(paths, key=lambda path: (path.name != MANIFEST, path.name))

    def put_aside(self) -> int:
        """Moves the content of the stage's directory here. Returns its number."""
        (self.folder / _LEAVING).mkdir(parents=True, exist_ok=True)
        self.finish()
        return self._numbers()[-1]

    def find(self, inputs: Inputs) -> int | None:
        """The number of the newest content that a start with `inputs` can continue."""
        for number in reversed(self._numbers()):
            started = read_inputs(self.folder / str(number) / STARTED)
            if started is not None and inputs.continues(started):
                return number
        return None

    def newest(self, name: str) -> int | None:
        """The number of the newest content that has a file of this name."""
        return next((n for n in reversed(self._numbers()) if (self.folder / str(n) / name).is_file()), None)

    def bring_back(self, number: int) -> None:
        """Moves content back into the stage's directory, which is empty."""
        (self.folder / str(number)).rename(self.folder / _RETURNING)
        self.finish()

    def finish(self) -> None:
        """Completes moves that a kill has interrupted."""
        leaving, returning = self.folder / _LEAVING, self.folder / _RETURNING
        if leaving.is_dir():
            for path in self.content():
                path.rename(leaving / path.name)
            fsync_path(self._stage)
            leaving.rename(self.folder / str(max(self._numbers(), default=0) + 1))
            fsync_path(self.folder)
        if returning.is_dir():
            for path in sorted(returning.iterdir(), key=lambda path: path.name == MANIFEST):
                path.rename(self._stage / path.name)
            fsync_path(self._stage)
            returning.rmdir()
        self._tidy()

    def rotate(self) -> None:
        """Removes all but the newest `KEPT` contents."""
        for number in self._numbers()[:-KEPT]:
            # Without its record, content that a kill has left half removed is never brought back.
            (self.folder / str(number) / STARTED).unlink(missing_ok=True)
            remove_tree(self.folder / str(number))

    def _numbers(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdecimal())

    def _tidy(self) -> None:
        """Removes the folders if they are empty."""
        for folder in (self.folder, self.folder.parent):
            with suppress(OSError):
                folder.rmdir()


def read_inputs(started: Path) -> Inputs | None:
    """The inputs in a started.json; None if it does not exist or is unreadable."""
    if not started.exists():
        return None
    with suppress(HandoffError, ValueError, KeyError, TypeError):
        return Inputs.model_validate(read_json(started)["inputs"])
    return None
