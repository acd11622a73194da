"""Reward for programs: what an answer defines is run against unit tests, in the sandbox of docs/sandbox.md.

    reward:
      - function: code_tests
        args: {timeout: 5, memory_mb: 512, credit: fraction, require: [network, filesystem]}

The tests are columns of the prompts' data, in one of three shapes: `tests` (a script, or a list of statements),
MBPP's `test_list` with `test_setup_code`, or HumanEval's `test` with `entry_point`, where the prompt is the beginning
of the program. A row that has none of them is given no opinion.
"""

import functools
import re
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.records import Message
from reward.functions import RewardError
from reward.sandbox.confine import Limits
from reward.sandbox.pool import Job, Outcome, Sandbox

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"python", "py", "python3"})
_WALL_FACTOR = 4  # eight programs share two cores on a small machine
_COLUMNS = "`tests`, or `test_list` (MBPP), or `test` and `entry_point` (HumanEval)"


@dataclass(frozen=True)
class Tests:
    """A row's tests, in whatever columns they came."""

    script: str
    setup: str = ""
    given: str = ""
    entry_point: str = ""


def code_tests(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    tests: Sequence[str | list[str] | None] | None = None,
    test_list: Sequence[list[str] | None] | None = None,
    test_setup_code: Sequence[str | None] | None = None,
    test: Sequence[str | None] | None = None,
    entry_point: Sequence[str | None] | None = None,
    timeout: int = 5,
    memory_mb: int = 512,
    disk_mb: int = 16,
    workers: int = 8,
    credit: Literal["all", "fraction"] = "all",
    require: Sequence[str] = ("network", "filesystem"),
    **columns: Any,
) -> list[float | None]:
    """1 where the answer's program passes all of its tests, else 0; None for rows without tests.

    Args:
        tests, test_list, test_setup_code, test, entry_point: columns, see above.
        timeout: CPU seconds (whole) for a program, and again for its tests; four times as long by the clock.
        memory_mb: address space of a program, Python's own 30 MB included.
        disk_mb: what it may write to its private folder.
        workers: programs at once.
        credit: `fraction` gives the share of the tests' assert statements that hold instead of 0.
        require: protections without which nothing is run: network, filesystem, processes. One that cannot be had and
            is not required is warned of.

    Raises:
        RewardError: a column is missing or broken, an argument is out of range, or the sandbox cannot be had.
    """
    limits = _limits(timeout, memory_mb, disk_mb)
    if credit not in ("all", "fraction"):
        raise RewardError(f"code_tests: `credit` is {credit!r}; use all or fraction")
    named = {"tests": tests, "test_list": test_list, "test": test}
    if all(column is None for column in named.values()):
        raise RewardError(f"code_tests: the prompts' data has no column with tests; it needs {_COLUMNS}")
    given = {**named, "test_setup_code": test_setup_code, "entry_point": entry_point, "prompt": columns.get("prompt")}
    wanted = []
    for i, prompt in enumerate(prompts):
        row = {name: column[i] for name, column in given.items() if column is not None and column[i] is not None}
        wanted.append(_tests(row, prompt, f"code_tests: row {i} ({_label(prompt)})"))
    jobs = {
        i: Job(_programs(completions[i], row), row.script, row.setup, row.given, row.entry_point, credit == "all")
        for i, row in enumerate(wanted)
        if row is not None
    }
    outcomes = dict(zip(jobs, _sandbox(workers, tuple(require)).map(list(jobs.values()), limits), strict=True))
    for i, outcome in outcomes.items():
        if outcome.fault:
            raise RewardError(f"code_tests: row {i} ({_label(prompts[i])}): {outcome.fault}")
    return [_value(outcomes[i], credit) if i in outcomes else None for i in range(len(completions))]


def _value(outcome: Outcome, credit: str) -> float:
    return outcome.share if credit == "fraction" else float(outcome.all_passed)


@functools.cache
def _sandbox(workers: int, require: tuple[str, ...]) -> Sandbox:
    """One for the process, kept between steps. Raises RewardError when what is required cannot be had."""
    if not isinstance(workers, int) or workers < 1:
        raise RewardError(f"code_tests: `workers` is {workers!r}; give a whole number from 1")
    sandbox = Sandbox(workers)
    sandbox.require(require)
    open_to = [what for what, layers in sandbox.protections().items() if not layers]
    if open_to:
        warnings.warn(
            f"code_tests runs programs of the model that can reach the {', '.join(open_to)} here; docs/sandbox.md",
            stacklevel=3,
        )
    return sandbox


def _limits(timeout: int, memory_mb: int, disk_mb: int) -> Limits:
    for name, value, least in (("timeout", timeout, 1), ("memory_mb", memory_mb, 64), ("disk_mb", disk_mb, 1)):
        if not isinstance(value, int) or value < least:
            raise RewardError(f"code_tests: `{name}` is {value!r}; give a whole number from {least}")
    return Limits(timeout, timeout * 1000 * _WALL_FACTOR, memory_mb, disk_mb)


def _tests(row: dict[str, Any], prompt: tuple[Message, ...], where: str) -> Tests | None:
    """The tests of a row. Raises RewardError for columns that do not fit."""
    kinds = [name for name in ("tests", "test_list", "test") if name in row]
    if not kinds:
        return None
    if len(kinds) > 1:
        raise RewardError(f"{where} has tests in {' and '.join(f'`{k}`' for k in kinds)}; keep one of these columns")
    kind = kinds[0]
    value, setup = row[kind], _text(row, "test_setup_code", where)
    if kind != "test":
        if isinstance(value, str) and kind == "tests":
            return Tests(value, setup)
        if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
            return Tests("\n".join(value), setup)
        wants = "a list of Python statements" if kind == "test_list" else "Python text or a list of statements"
        raise RewardError(f"{where}: `{kind}` is {value!r:.80}; expected {wants}")
    entry = _text(row, "entry_point", where)
    if not entry.isidentifier():
        raise RewardError(f"{where}: `test` needs `entry_point`, the name of the function under test; got {entry!r}")
    script = f"{_text(row, 'test', where)}\ncheck({entry})\n"
    return Tests(script, setup, _beginning(row, prompt, entry, where), entry)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name, "")
    if not isinstance(value, str):
        raise RewardError(f"{where}: `{name}` is {value!r:.80}; expected text")
    return value


def _label(prompt: tuple[Message, ...]) -> str:
    return repr(textwrap.shorten(prompt[-1].content, 60, placeholder="…")) if prompt else "no prompt"


def _beginning(row: dict[str, Any], prompt: tuple[Message, ...], entry: str, where: str) -> str:
    """What the program begins with: the column `prompt`, else the fenced code of the user's turn, or all of it."""
    if "prompt" in row:
        return _text(row, "prompt", where)
    said = prompt[-1].content if prompt else ""
    text = extract(said)
    return text if _defines(text, entry) else ""


def extract(answer: str) -> str:
    """The program in an answer: its last fence marked as Python, else its last unmarked one, else all of it.

    A fence that is not closed, as in an answer that was cut off, reaches to the end.

    >>> extract("So:\\n```python\\nx = 1\\n```\\nor\\n```python\\nx = 2\\n```\\nDone.")
    'x = 2\\n'
    >>> extract("x = 3")
    'x = 3'
    """
    fences = [(mark.lower(), body) for mark, body in _FENCE.findall(answer)]
    for marks in (_PYTHON, frozenset({""})):
        bodies = [body for mark, body in fences if mark in marks]
        if bodies:
            return textwrap.dedent(bodies[-1]) if bodies[-1].lstrip("\n").startswith((" ", "\t")) else bodies[-1]
    return answer


def _defines(text: str, name: str) -> bool:
    return re.search(rf"^(?:async\s+)?def\s+{re.escape(name)}\b", text, re.MULTILINE) is not None


def _programs(completion: str, tests: Tests) -> list[str]:
    """Readings of a completion, most likely first; the sandbox takes the first that is Python."""
    code = extract(completion)
    if not tests.entry_point or not tests.given:
        return [code]
    if _defines(code, tests.entry_point):
        # The imports and helpers of the beginning are there, too, as the prompt promised.
        return [f"{tests.given}\n{code}", code]
    # Only the body; a tokenizer or a template may have taken its first indent.
    body = code.strip("\n")
    return [f"{tests.given}\n{body}", f"{tests.given}\n    {body}", f"{tests.given}\n{textwrap.indent(body, '    ')}"]
