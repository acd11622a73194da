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
    assert caplog.text.count("no room to write to it") == 1
    with pytest.raises(OSError, match="No space left"):
        journal.sync()
    disk.room = 10_000
    journal.append([{"step": 6}])
    journal.sync()
    assert steps(journal) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]


def test_lines_of_a_file_that_cannot_be_written_wait_too(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    journal.path.mkdir()
    for step in (1, 2):
        journal.append([{"step": step}])
    assert caplog.text.count("metrics.jsonl: it cannot be written (Is a directory)") == 1
    with pytest.raises(IsADirectoryError):
        journal.sync()
    journal.path.rmdir()
    journal.sync()
    assert steps(journal) == [1, 2]


def sealed_lines(journal: Journal, count: int) -> dict[str, Any]:
    """A line for each of `count` steps, sealed, and two lines after that."""
    journal.append([{"step": step, "loss": step / 7} for step in range(1, count + 1)])
    seal = journal.seal()
    journal.append([{"step": count}, {"step": count + 1}])
    return seal


def test_a_whole_file_is_cut_without_a_word(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    seal = sealed_lines(journal, 3)
    journal.cut(3, seal)
    assert steps(journal) == [1, 2, 3, 3] and not caplog.text  # a line of the same step may follow the seal
    assert [path.name for path in journal.path.parent.iterdir()] == ["metrics.jsonl"]
    journal.end_at(seal)
    assert steps(journal) == [1, 2, 3]
    journal.append([{"step": 3}])
    journal.path.write_bytes(b" " + journal.path.read_bytes())  # damaged: what can be read of it stays
    journal.end_at(seal)
    assert steps(journal) == [1, 2, 3, 3]


@pytest.mark.parametrize(
    "damage",
    [b'{"step": 2, "lo\n', b"\0" * 20 + b"\n", b"[2]\n", b'{"loss": 1}\n', b'{"step": "2"}\n', b"\xff\xfe\n",
     b"[" * 100_000 + b"\n", b"\n"],
    ids=["torn", "zeros", "list", "no step", "step is text", "not UTF-8", "deep", "empty"],
)  # fmt: skip
@pytest.mark.parametrize("sealed", [True, False])
def test_a_damaged_line_costs_that_line_and_is_named(
    journal: Journal, caplog: pytest.LogCaptureFixture, damage: bytes, sealed: bool
) -> None:
    seal = sealed_lines(journal, 4)
    lines = journal.path.read_bytes().splitlines(keepends=True)
    journal.path.write_bytes(b"".join([lines[0], damage, *lines[2:]]))
    before = journal.path.read_bytes()
    journal.cut(4, seal if sealed else None)
    assert steps(journal) == [1, 3, 4, 4]
    assert "metrics.jsonl cannot be read in line 2;" in caplog.text
    assert journal.path.with_name("metrics.jsonl.damaged").read_bytes() == before
    caplog.clear()
    journal.cut(4)
    assert not caplog.text


def test_a_number_that_was_altered_is_noticed(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    seal = sealed_lines(journal, 3)
    journal.path.write_bytes(journal.path.read_bytes().replace(b"0.28", b"0.38"))
    journal.cut(3, seal)
    assert "metrics.jsonl is not as it was when the state was saved" in caplog.text
    assert steps(journal) == [1, 2, 3, 3]


def test_a_deleted_and_a_shortened_file_are_noticed(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    seal = sealed_lines(journal, 3)
    os.truncate(journal.path, 60)
    journal.cut(3, seal)
    assert "is not as it was" in caplog.text and steps(journal) == [1]
    journal.path.unlink()
    journal.cut(3, seal)
    assert "metrics.jsonl is missing; its lines up to step 3 are lost" in caplog.text
    assert not journal.path.exists()
    caplog.clear()
    journal.cut(0, Journal(journal.path).seal())  # nothing was written by then
    assert not caplog.text


def test_a_damaged_line_hides_no_other(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    journal.append([{"step": 1}, {"step": 2}, {"step": 3}])
    journal.path.write_bytes(journal.path.read_bytes().replace(b'"step": 2', b'"step": ,2'))
    assert journal.lines() == [{"step": 1}, {"step": 3}]
    assert "line 2; the other lines are used" in " ".join(caplog.text.split())
