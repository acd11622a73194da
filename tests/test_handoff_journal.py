"""metrics.jsonl and samples.jsonl (handoff/journal.py): neither a kill nor a full disk loses or truncates a line."""

import errno
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from handoff.journal import Journal
from tests.test_handoff_kill import killed_before_each_change


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "metrics.jsonl")


def steps(journal: Journal) -> list[int]:
    return [json.loads(line)["step"] for line in journal.path.read_bytes().split(b"\n")[:-1]]


class SmallDisk:
    """Files opened for writing accept this many bytes in all, then none."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._open = Path.open

    def open(self, path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = self._open(path, mode, *args, **kwargs)
        return _Limited(file, self) if "a" in mode else file


class _Limited:
    def __init__(self, file: Any, disk: SmallDisk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> "_Limited":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def tell(self) -> int:
        return int(self._file.tell())

    def truncate(self, size: int) -> None:
        self._file.truncate(size)

    def write(self, data: memoryview) -> int:
        if not self._disk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = int(self._file.write(data[: self._disk.room]))
        self._disk.room -= written
        return written


def test_lines_are_cut_back_to_a_step_and_a_torn_one_with_them(journal: Journal) -> None:
    journal.cut(3)  # no file yet
    journal.append([{"step": 1}, {"step": 2, "text": "a\u2028b"}, {"step": 2}])
    journal.append([{"step": 3}])
    with journal.path.open("a") as file:
        file.write('{"step": 4, "lo')
    journal.cut(4)
    assert steps(journal) == [1, 2, 2, 3]
    journal.cut(2)
    assert steps(journal) == [1, 2, 2]
    journal.cut(None)
    assert journal.path.read_bytes() == b""


def test_a_line_that_a_kill_has_torn_is_not_read(journal: Journal) -> None:
    assert journal.lines() == []
    journal.append([{"step": 1}, {"step": 2, "text": "é"}])
    with journal.path.open("ab") as file:
        file.write(b'{"step": 3, "te')
    assert journal.lines() == [{"step": 1}, {"step": 2, "text": "é"}]


def test_a_kill_while_it_is_cut_takes_no_line_that_stays(journal: Journal) -> None:
    whole = "".join(f'{{"step": {step}}}\n' for step in range(9))
    journal.path.write_text(whole)
    seen = set()
    for _ in killed_before_each_change(lambda: journal.cut(4)):
        seen.add(len(steps(journal)))
        journal.path.write_text(whole)
    assert seen == {9, 5}


@pytest.mark.parametrize("room", range(0, 60, 7))
def test_on_a_full_disk_lines_wait_and_none_is_torn(
    journal: Journal, room: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    disk = SmallDisk(room)
    monkeypatch.setattr(Path, "open", lambda self, *args, **kwargs: disk.open(self, *args, **kwargs))
    for step in range(1, 6):
        journal.append([{"step": step}, {"step": step, "eval": 1.0}])
        here = steps(journal) if journal.path.exists() else []
        assert here == list(itertools.chain(*([n, n] for n in range(1, len(here) // 2 + 1))))
    assert caplog.text.count("no room to write to") == 1
    with pytest.raises(OSError, match="No space left"):
        journal.sync()
    disk.room = 10_000
    journal.append([{"step": 6}])
    journal.sync()
    assert steps(journal) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_errors_other_than_a_full_disk_are_raised(journal: Journal) -> None:
    journal.path.mkdir()
    with pytest.raises(IsADirectoryError):
        journal.append([{"step": 1}])
