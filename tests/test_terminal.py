"""Text of others on the terminal, and streams that a terminal or a pipe closes, lacks or cannot encode."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from training.terminal import Screen, drawn, shown

HOSTILE = {
    "a title": "\x1b]0;owned\x07",
    "the clipboard": "\x1b]52;c;b3duZWQ=\x07",
    "a colour": "\x1b[31m",
    "the cursor": "\x1b[2A\x1b[2K",
    "a line that is overwritten": "real\rfake",
    "C1": "\x9b31m",
    "another direction": "abc\u202edcb\u2066x\u2069",
    "a backspace": "yes\b\b\bno",
    "half a character": "\ud83d",
    "a device's answer": "\x1b[6n",
    "a null": "a\0b",
}


def controls(text: str) -> list[str]:
    return [c for c in text if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or c in "\u202e\u2066\u2069"]


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_control_characters_are_shown_and_nothing_else_changes(text):
    found = shown(f"é {text} 日\n\tend")
    assert controls(found) == []
    assert found.startswith("é ") and found.endswith(" 日\n\tend") and "\\" in found
    assert shown(found) == found


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_a_screen_obeys_nothing_wherever_the_text_stands(text):
    out = io.StringIO()
    screen = Screen(file=out)
    table = Table("name", box=None)
    table.add_row(text)
    table.add_row(Text(text))
    for one in (text, Text(text), Text.assemble(("x", "bold"), text), table):
        screen.print(one)
    assert controls(out.getvalue()) == []


def test_a_screen_reads_no_markup_and_breaks_no_line():
    out = io.StringIO()
    screen = Screen(file=out)
    path = "/".join(["folder [/bold] :smile: [red]"] * 30)
    screen.print(path, style="red")
    assert out.getvalue() == path + "\n"


def test_progress_bars_are_drawn_and_nothing_beyond_them():
    bar = "\r\x1b[2K\x1b[1A\x1b[?25l\x1b[1;31m50%\x1b[0m\x1b[?25h\n"
    assert drawn(bar) == bar
    assert drawn("\x1b]0;t\x07") == "\\x1b]0;t\\x07"
    assert drawn("\x1b[6n\x9b\u202e") == "\\x1b[6n\\x9b\\u202e"
    assert drawn(f"\x1b[{'1' * 40}m").startswith("\\x1b")


PROGRAM = """
import logging, sys
from training.terminal import Screen, lost, prepare
prepare()
{body}
"""


def program(root, body: str, **options) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(root), **options.pop("env", {})}
    command = [sys.executable, "-c", PROGRAM.format(body=body)]
    return subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True, **options)


WRITE = """
for n in range(4000):
    print("a line of output that is long enough to fill a pipe", n)
Screen().print("with rich")
print("all was written", file=sys.stderr)
"""


def test_a_reader_that_goes_away_does_not_end_the_program(root):
    reading, writing = os.pipe()
    os.close(reading)
    done = program(root, WRITE, stdout=writing)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "all was written\n")


def test_a_closed_standard_output_is_no_error_and_its_number_goes_to_no_file(root, tmp_path):
    body = WRITE + f"open({str(tmp_path / 'file')!r}, 'w').close(); import os; os.write(1, b'x')"
    done = program(root, body, preexec_fn=lambda: (os.close(0), os.close(1)))
    assert (done.returncode, done.stderr) == (0, "all was written\n")
    assert (tmp_path / "file").read_text() == ""


def test_a_full_disk_under_standard_output_is_reported(root):
    with Path("/dev/full").open("w") as full:
        done = program(root, WRITE + "print(lost(), file=sys.stderr)", stdout=full)
    assert done.returncode == 0
    assert done.stderr.splitlines() == ["all was written", "No space left on device"]


@pytest.mark.parametrize("encoding", ["ascii", "iso8859-1", "utf-8"])
def test_characters_that_the_terminal_lacks_become_escapes(root, encoding):
    body = "print('naïve 中文 \\ud800', flush=True)\nScreen().print('中文')\nlogging.warning('中文 \\x1b[2J')"
    done = program(root, body, stdout=subprocess.PIPE, env={"PYTHONIOENCODING": encoding}, encoding=encoding)
    assert done.returncode == 0
    chinese = "中文" if encoding == "utf-8" else "\\u4e2d\\u6587"
    naive = "na\\xefve" if encoding == "ascii" else "naïve"
    assert done.stdout == f"{naive} {chinese} \\ud800\n{chinese}\n"
    assert done.stderr == f"{chinese} \\x1b[2J\n"


def test_a_traceback_shows_control_characters_too(root):
    done = program(root, "raise RuntimeError('a server said \\x1b]0;owned\\x07')", stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: a server said \\x1b]0;owned\\x07"
