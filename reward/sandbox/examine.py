"""The process that has the tests. It alone decides and reports; the program is another process that it asks.

A test is `assert candidate(2) == 4`, and `candidate` is a stand-in for the program's function (`remote`). The program
never sees a test, an expected value, or the pipe for the verdict: nothing that it changes in its interpreter reaches
this one.

The tests are counted in units: a statement with an assert in it, at the top level or in the body of a function. An
assert of a constant (`assert True`) is none.
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

from reward.sandbox.remote import Link, Unsupported
from reward.sandbox.values import BadMessage, Gone

_BUILTINS: Final = frozenset(vars(builtins))
_UNIT = "try: pass\nexcept BaseException as _unit_error: _unit_failed({0}, _unit_error)\nelse: _unit_passed({0})"
_LONGEST_REASON = 300


class _Enough(BaseException):
    """A unit failed, and the others need not be tried."""


class Examiner:
    """Runs one job's tests and writes what comes of them, a line of JSON each, to the pipe for the verdict."""

    def __init__(self, link: Link, verdict: int, job: dict[str, Any]) -> None:
        """`job`: the fields of `pool.Job`. `verdict`: the pipe's descriptor."""
        self._link = link
        self._verdict = verdict
        self._job = job
        self._passed: set[int] = set()

    def run(self) -> None:
        random.seed(0)  # the same program gets the same score, whenever it is examined
        try:
            units, code = instrument(self._job["tests"])
            definitions, statements = split(self._job["setup"])
        except (SyntaxError, ValueError) as error:
            self._say(fault=f"the tests or their setup are no Python: {error}")
            return
        if units == 0:
            self._say(fault="the tests hold no assert")
            return
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
            self._say(note=describe(error))

    def _names(self, wanted: set[str], modules: set[str]) -> dict[str, Any]:
        """The names that the tests start with: the program's, the helpers of the text to complete, modules."""
        entry = self._job["entry_point"]
        # A built-in is never the program's, which could make abs() say what it likes; but tests that name nothing else
        # are tests of a function that is called like one, which must then be there.
        own = wanted - _BUILTINS
        asked = own | {entry} if entry else own or wanted
        names = self._link.names(sorted(asked))
        needed = {entry} if entry else asked - own
        if needed and not needed & names.keys():
            raise NameError(f"the program does not define {' or '.join(sorted(needed))}")
        theirs = {name: value for name, value in names.items() if name == entry}
        self._run_given(names)
        names |= theirs
        # Tests that rely on a module which the program imports get their own, not one that the program made.
        names |= {name: importlib.import_module(name) for name in modules & sys.stdlib_module_names}
        ours = {"__name__": "tests", "_unit_passed": self._unit_passed, "_unit_failed": self._unit_failed}
        return {**names, **ours}

    def _run_given(self, names: dict[str, Any]) -> None:
        """What the program was to complete runs here too, so that the tests have its helpers from a trusted source."""
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
        self._say(failed=unit, why=describe(error))
        if self._job["stop_at_first"]:
            raise _Enough

    def _say(self, **what: Any) -> None:
        os.write(self._verdict, json.dumps(what).encode() + b"\n")


def describe(error: BaseException) -> str:
    if isinstance(error, Gone):
        return "the program's process ended"
    return f"{type(error).__name__}: {error}"[:_LONGEST_REASON]


@dataclass(frozen=True)
class Code:
    """Compiled statements, the names that they read, and those that they read as `name.attribute`."""

    code: CodeType
    names: set[str]
    modules: set[str]


def _code(tree: ast.Module, body: list[ast.stmt], name: str) -> Code:
    """`body` in place of the tree's own, with the names that the tree has."""
    nodes = list(ast.walk(tree))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    bases = [node.value for node in nodes if isinstance(node, ast.Attribute)]
    modules = {node.id for node in bases if isinstance(node, ast.Name)}
    return Code(compile(ast.fix_missing_locations(ast.Module(body, [])), name, "exec"), names, modules)


def instrument(tests: str) -> tuple[int, Code]:
    """The number of units, and the tests with each unit reporting. Raises SyntaxError."""
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
    """The setup's classes and imports, to be run beside the program, and the other statements. Raises SyntaxError."""
    tree = ast.parse(setup)
    beside = (ast.ClassDef, ast.Import, ast.ImportFrom)
    definitions = ast.Module([node for node in tree.body if isinstance(node, beside)], [])
    rest = [node for node in tree.body if not isinstance(node, ast.ClassDef)]
    return ast.unparse(definitions), _code(tree, rest, "<setup>")
