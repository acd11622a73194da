"""Reward for programs: runs the program in an answer against unit tests, in the sandbox that docs/sandbox.md describes.

    reward:
      - function: code_tests
        args: {timeout: 5, memory_mb: 512, credit: fraction, require: [network, filesystem]}

The tests are columns of the prompts' data, in one of three shapes: `tests` (a script, or a list of statements),
MBPP's `test_list` with `test_setup_code`, or HumanEval's `test` with `entry_point`, where the prompt is the beginning
of the program. A row without tests scores None.
"""

import functools
import logging
import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from data.records import Message
from reward.functions import RewardError
from reward.sandbox.confine import Limits
from reward.sandbox.examine import flaw
from reward.sandbox.pool import Job, Outcome, Sandbox

log = logging.getLogger(__name__)

_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_PYTHON = frozenset({"python", "py", "python3"})
_WALL_FACTOR = 4  # wall time per CPU second: on a small machine, eight programs share two cores
_COLUMNS = "`tests`, or `test_list` (MBPP), or `test` and `entry_point` (HumanEval)"


@dataclass(frozen=True)
class Tests:
    """A row's tests, in one form for all column shapes."""

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
        tests, test_list, test_setup_code, test, entry_point: columns; see the module's docstring.
        timeout: CPU seconds (a whole number) for the program, and as many for its tests. The wall-clock limit is four
            times this.
        memory_mb: address space of a program, including about 30 MB for Python itself.
        disk_mb: limit on what a program may write to its private folder.
        workers: number of programs that run at once.
        credit: `all` scores 1 or 0; `fraction` scores the share of the tests' assert statements that hold.
        require: protections that must be available (network, filesystem, processes); otherwise nothing runs. A missing
            protection that is not required causes a warning.

    Raises:
        RewardError: a column is missing or invalid, an argument is out of range, or the sandbox is not available.
    """
    limits = _limits(timeout, memory_mb, disk_mb)
    if credit not in ("all", "fraction"):
        raise RewardError(f"code_tests: `credit` is {credit!r}; use all or fraction")
    named = {"tests": tests, "test_list": test_list, "test": test}
    if all(column is None for column in named.values()):
        raise RewardError(f"code_tests: the prompts' data has no column with tests; it needs {_COLUMNS}")
    given = {**named, "test_setup_code": test_setup_code, "entry_point": entry_point, "prompt": columns.get("prompt")}
    wanted = [
        _tests(_row(given, i), prompt, f"code_tests: row {i} ({_label(prompt)})") for i, prompt in enumerate(prompts)
    ]
    jobs = {
        i: Job(_programs(completions[i], row), row.script, row.setup, row.given, row.entry_point, credit == "all")
        for i, row in enumerate(wanted)
        if row is not None
    }
    outcomes = dict(zip(jobs, _sandbox(workers, tuple(require)).map(list(jobs.values()), limits), strict=True))
    for i, outcome in outcomes.items():
        if outcome.fault:
            raise RewardError(f"code_tests: row {i} ({_label(prompts[i])}): {outcome.fault}")
    not_sent = [i for i, outcome in outcomes.items() if outcome.not_sent]
    if not_sent:
        row = not_sent[0]
        log.warning(
            "code_tests: %d programs failed since a value of their tests could not be sent to them, for example in row "
            "%d (%s): %s. Where that happens to every program of a row, mend its tests",
            len(not_sent),
            row,
            _label(prompts[row]),
            outcomes[row].why,
        )
    return [_value(outcomes[i], credit) if i in outcomes else None for i in range(len(completions))]


def code_tests_unreadable(rows: int, columns: Mapping[str, Any], **args: Any) -> dict[int, str]:
    """The rows whose tests are not valid, and why. Nothing is run."""
    found: dict[int, str] = {}
    given = {name: columns.get(name) for name in ("tests", "test_list", "test_setup_code", "test", "entry_point")}
    for i in range(rows):
        try:
            row = _tests(_row(given, i), (), "the row")
            why = "" if row is None else flaw(row.script, row.setup)
        except RewardError as error:
            why = str(error)
        if why:
            found[i] = why
    return found


def _row(columns: Mapping[str, Any], i: int) -> dict[str, Any]:
    return {name: column[i] for name, column in columns.items() if column is not None and column[i] is not None}


def _value(outcome: Outcome, credit: str) -> float:
    return outcome.share if credit == "fraction" else float(outcome.all_passed)


@functools.cache
def _sandbox(workers: int, require: tuple[str, ...]) -> Sandbox:
    """The process's sandbox, kept between steps. Raises RewardError when a required protection is not available."""
    if not isinstance(workers, int) or workers < 1:
        raise RewardError(f"code_tests: `workers` is {workers!r}; give a whole number from 1")
    sandbox = Sandbox(workers)
    sandbox.require(require)
    open_to = [what for what, layers in sandbox.protections().items() if not layers]
    if open_to:
        warnings.warn(
            f"code_tests: on this machine the model's programs can reach the {', '.join(open_to)}; see docs/sandbox.md",
            stacklevel=3,
        )
    return sandbox


def _limits(timeout: int, memory_mb: int, disk_mb: int) -> Limits:
    for name, value, least in (("timeout", timeout, 1), ("memory_mb", memory_mb, 64), ("disk_mb", disk_mb, 1)):
        if not isinstance(value, int) or value < least:
            raise RewardError(f"code_tests: `{name}` is {value!r}; give a whole number from {least}")
    return Limits(timeout, timeout * 1000 * _WALL_FACTOR, memory_mb, disk_mb)


def _tests(row: dict[str, Any], prompt: tuple[Message, ...], where: str) -> Tests | None:
    """The tests of a row, or None. Raises RewardError for invalid columns."""
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
    """The beginning of the program: the column `prompt`, else the fenced code in the user's turn, else all of it."""
    if "prompt" in row:
        return _text(row, "prompt", where)
    said = prompt[-1].content if prompt else ""
    text = extract(said)
    return text if _defines(text, entry) else ""


def extract(answer: str) -> str:
    """The program in an answer: the last fence marked as Python, else the last unmarked fence, else the whole answer.

    A fence that is not closed, as in a truncated answer, extends to the end.

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
    """Possible programs in a completion, most likely first; the sandbox runs the first that is valid Python."""
    code = extract(completion)
    if not tests.entry_point or not tests.given:
        return [code]
    if _defines(code, tests.entry_point):
        # The completion may rely on the imports and helpers that the prompt gave.
        return [f"{tests.given}\n{code}", code]
    # The completion is only the function's body; a tokenizer or template may have removed its first indent.
    body = code.strip("\n")
    return [f"{tests.given}\n{body}", f"{tests.given}\n    {body}", f"{tests.given}\n{textwrap.indent(body, '    ')}"]
