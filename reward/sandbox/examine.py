"""The process that runs the tests. It alone decides and reports; the program runs in another process.

In a test such as `assert candidate(2) == 4`, `candidate` is a stand-in for the program's function (`remote`). The
program never sees a test, an expected value or the pipe for the verdict, and no change that it makes to its own
interpreter reaches this process.

The tests are counted in units: statements that contain an assert, at the top level or in the body of a function. An
assert of a constant (`assert True`) does not count.
"""

import ast
import builtins
import importlib
import itertools
import json
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any, Final

from reward.sandbox.remote import Link, NotSent, Unsupported
from reward.sandbox.values import BadMessage, Gone

_BUILTINS: Final = frozenset(vars(builtins))
_UNIT = "try: pass\nexcept BaseException as _unit_error: _unit_failed({0}, _unit_error)\nelse: _unit_passed({0})"
_LONGEST_REASON = 300


class _Enough(BaseException):
    """A unit failed, and the job asks to stop at the first failure."""


class Examiner:
    """Runs one job's tests and writes each result as a line of JSON to the pipe for the verdict."""

    def __init__(self, link: Link, verdict: int, job: dict[str, Any]) -> None:
        """`job`: the fields of `pool.Job`. `verdict`: the pipe's descriptor."""
        self._link = link
        self._verdict = verdict
        self._job = job
        self._passed: set[int] = set()
        self._failed: set[int] = set()

    def run(self) -> None:
        random.seed(0)  # so that the same program always gets the same score
        if fault := flaw(self._job["tests"], self._job["setup"]):
            self._say(fault=fault)
            return
        units, code = instrument(self._job["tests"])
        definitions, statements = split(self._job["setup"])
        self._say(units=units)
        try:
            self._link.load(definitions, self._job["program"])
            names = self._names(code.names | statements.names, code.modules | statements.modules)
            exec(statements.code, names)
            exec(code.code, names)
            self._say(done=True)
        except _Enough:
            return
        except Unsupported as error:
            self._say(fault=str(error))
        except BaseException as error:
            self._note(error)

    def _names(self, wanted: set[str], modules: set[str]) -> dict[str, Any]:
        """The names given to the tests: the program's, the helpers in the text to complete, and modules."""
        entry = self._job["entry_point"]
        # The tests never take a built-in from the program, which could redefine abs() to forge results. Only if they
        # name nothing else do they test a function with a built-in's name, which the program must then define.
        own = wanted - _BUILTINS
        asked = own | {entry} if entry else own or wanted
        names = self._link.names(sorted(asked))
        needed = {entry} if entry else asked - own
        if needed and not needed & names.keys():
            raise NameError(f"the program does not define {' or '.join(sorted(needed))}")
        theirs = {name: value for name, value in names.items() if name == entry}
        self._run_given(names)
        names |= theirs
        # Tests that rely on a module imported by the program get the real module, not the program's object.
        names |= {name: importlib.import_module(name) for name in modules & sys.stdlib_module_names}
        ours = {"__name__": "tests", "_unit_passed": self._unit_passed, "_unit_failed": self._unit_failed}
        return {**names, **ours}

    def _run_given(self, names: dict[str, Any]) -> None:
        """Runs the text to complete here too, so that the tests take its helpers from a trusted source."""
        try:
            code = compile(self._job["given"], "<given>", "exec")
        except (SyntaxError, ValueError):
            return  # text that is Python only when it is completed
        exec(code, names)

    def _unit_passed(self, unit: int) -> None:
        if unit not in self._passed:
            self._passed.add(unit)
            self._say(passed=unit)

    def _unit_failed(self, unit: int, error: BaseException) -> None:
        if isinstance(error, _Enough | Gone | BadMessage | Unsupported):
            raise error
        if not self._failed:
            self._note(error)
        if unit not in self._failed:
            self._failed.add(unit)
            self._say(failed=unit)
        if self._job["stop_at_first"]:
            raise _Enough

    def _note(self, error: BaseException) -> None:
        """Reports the first failure, in words."""
        self._say(why=describe(error), not_sent=isinstance(error, NotSent))

    def _say(self, **what: Any) -> None:
        """Writes a line, so short that the pipe takes it whole or not at all. A unit gets at most two."""
        cut = {key: value[:_LONGEST_REASON] if isinstance(value, str) else value for key, value in what.items()}
        os.write(self._verdict, json.dumps(cut).encode() + b"\n")


def flaw(tests: str, setup: str) -> str:
    """What is wrong with tests, whatever the program; empty if nothing is."""
    try:
        units, _ = instrument(tests)
        split(setup)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"the tests or their setup are not valid Python: {error}"
    return "" if units else "the tests contain no assert"


def describe(error: BaseException) -> str:
    if isinstance(error, Gone):
        return "the program's process ended"
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Code:
    """Compiled statements, the names that they read, and the names that they read as `name.attribute`."""

    code: CodeType
    names: set[str]
    modules: set[str]


def _code(tree: ast.Module, body: list[ast.stmt], name: str) -> Code:
    """Compiles `body` in place of the tree's own, with the names that the tree reads."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bases = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    modules = {node.id for node in bases if isinstance(node, ast.Name)}
    return Code(compile(ast.fix_missing_locations(ast.Module(body, [])), name, "exec"), names, modules)


def instrument(tests: str) -> tuple[int, Code]:
    """The number of units, and the tests changed so that each unit reports its result. Raises SyntaxError."""
    numbers = itertools.count()
    body = _wrapped(ast.parse(tests).body, numbers)
    return next(numbers), _code(ast.parse(tests), body, "<tests>")


def _wrapped(body: list[ast.stmt], numbers: Iterator[int]) -> list[ast.stmt]:
    out: list[ast.stmt] = []
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            statement.body = _wrapped(statement.body, numbers)
        elif any(isinstance(n, ast.Assert) and not isinstance(n.test, ast.Constant) for n in ast.walk(statement)):
            unit = ast.parse(_UNIT.format(next(numbers))).body[0]
            assert isinstance(unit, ast.Try)
            unit.body, statement = [statement], unit
        out.append(statement)
    return out


def split(setup: str) -> tuple[str, Code]:
    """The setup's classes and imports, which run in the program's process, and its other statements. Raises
    SyntaxError."""
    tree = ast.parse(setup)
    beside = (ast.ClassDef, ast.Import, ast.ImportFrom)
    definitions = ast.Module([node for node in tree.body if isinstance(node, beside)], [])
    rest = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    return ast.unparse(definitions), _code(tree, rest, "<setup>")
