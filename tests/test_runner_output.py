"""A stage's output on the screen and in its log."""

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console
from rich.progress import track

from baton.output import TAIL, Pieces, PlainText, Tee


def plain(*pieces: str) -> str:
    log = io.StringIO()
    text, whole = PlainText(log), Pieces()
    for piece in pieces:
        text.feed(whole.text(piece.encode()))
    text.feed(whole.text(b""))
    text.close()
    return log.getvalue()


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["a\nb\n"], "a\nb\n"),
        (["a\nb"], "a\nb\n"),
        (["a\r\nb\r\n"], "a\nb\n"),
        (["\x1b[1;31mred\x1b[0m\n"], "red\n"),
        (["\x1b[1", ";31mre", "d\x1b", "[0m\n"], "red\n"),
        (["\x1b]0;title\x07\n"], "\\x1b]0;title\\x07\n"),
        (["a\x1b"], "a\\x1b\n"),
        (["10%\r20%\r100%\ndone\n"], "100%\ndone\n"),
        (["one\ntwo", "\r\x1b[2K\x1b[1A\x1b[2K", "1\n2\n"], "1\n2\n"),
        (["kept\n", "a\nb\n", "\x1b[2A", "A\nB\n"], "kept\nA\nB\n"),
        (["\n\nx\n"], "\n\nx\n"),
    ],
)
def test_the_log_has_what_remains_on_the_screen(pieces, expected):
    assert plain(*pieces) == expected


def test_cutting_the_output_anywhere_changes_nothing():
    whole = "start\n\x1b[32m 1\x1b[0m\r\x1b[2K\x1b[32m 2\x1b[0m\r\n\x1b[1A\x1b[2Kend → ✓\n"
    assert plain(*whole) == plain(whole) == "start\nend → ✓\n"


def test_only_the_last_state_of_a_progress_bar_is_logged():
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, width=60)
    console.print("before")
    for _ in track(range(50), "training", console=console, update_period=0.0):
        console.print("note") if _ == 25 else None
    console.print("after")
    lines = plain(shown.getvalue()).splitlines()
    assert [line.split()[0] for line in lines] == ["before", "note", "training", "after"]
    assert "100%" in lines[2]


def test_long_output_is_written_as_it_comes_and_its_end_remembered():
    log = io.StringIO()
    text = PlainText(log)
    text.feed("".join(f"{n}\n" for n in range(1000)))
    assert log.getvalue().splitlines()[-1] == "987"  # a progress display may still overwrite the last ones
    text.close()
    assert list(text.tail) == [str(n) for n in range(1000 - TAIL, 1000)]


def test_the_tee_shows_and_keeps_bytes_cut_inside_a_character(tmp_path, capsys):
    tee = Tee(tmp_path / "logs" / "x.log", "=== head")
    for piece in ("é→".encode()[:2], "é→".encode()[2:4], "é→".encode()[4:], b" \xff\n"):
        os.write(tee.descriptor, piece)
    assert tee.close() == ["é→ \ufffd"]
    assert capsys.readouterr().out == "é→ \ufffd\n"
    assert tee.log_path.read_text() == "=== head\né→ \ufffd\n"
    Tee(tee.log_path, "=== again").close()
    assert tee.log_path.read_text() == "=== head\né→ \ufffd\n=== again\n"


COPY = """
import os, sys
from pathlib import Path
from baton.output import Tee
from training.terminal import prepare
prepare()
tee = Tee(Path(sys.argv[1]), "=== head")
for n in range(3000):
    os.write(tee.descriptor, b"a line that helps to fill the pipe \\x1b]0;title\\x07\\n")
assert len(tee.close()) == 200
"""


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_reader_does_not_stop_the_stage(tmp_path, root, closed):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-c", COPY, str(tmp_path / "x.log")]
    end = (lambda: os.close(1)) if closed else None
    done = subprocess.run(command, cwd=root, stdout=writing, stderr=subprocess.PIPE, text=True, preexec_fn=end)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")
    lines = (tmp_path / "x.log").read_text().splitlines()
    assert lines[1:] == ["a line that helps to fill the pipe \\x1b]0;title\\x07"] * 3000


def test_a_log_on_a_full_disk_does_not_stop_the_stage(capsys):
    tee = Tee(Path("/dev/full"), "=== head")
    lines = b"a line of output\n" * 20_000  # more than a pipe's buffer, so it must be read
    writer = threading.Thread(target=lambda: os.write(tee.descriptor, lines), daemon=True)
    writer.start()
    writer.join(20)
    assert not writer.is_alive(), "the stage stands still in a print"
    assert tee.close()[-1] == "a line of output"
    assert capsys.readouterr().out == lines.decode()


CHILD = """
import os, sys
from pathlib import Path
from baton.output import Tee
tee = Tee(Path(sys.argv[1]), "=== head")
os.write(tee.descriptor, f"{os.isatty(tee.descriptor)} {os.get_terminal_size(tee.descriptor).columns}\\n".encode())
tee.close()
"""


def test_in_a_terminal_the_stage_has_one_of_the_same_size(tmp_path, root):
    import fcntl
    import struct
    import termios

    outside, inside = pty.openpty()
    fcntl.ioctl(inside, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 77, 0, 0))
    subprocess.run([sys.executable, "-c", CHILD, str(tmp_path / "x.log")], cwd=root, stdout=inside, check=True)
    os.close(inside)
    os.close(outside)
    assert (tmp_path / "x.log").read_text() == "=== head\nTrue 77\n"
