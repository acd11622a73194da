"""Rehearsals in the test's own process: each stage is run as its module runs it, without starting a new process."""

import io
import os
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from baton import runner
from baton.rehearse import rehearse
from baton.supervisor import Start
from training.recipe import Recipe, Section
from training.run import main


class Ran:
    """A stage that has run already."""

    def __init__(self, code: int) -> None:
        self._code = code

    def send(self, signum: int) -> None:
        """Does nothing: the stage has ended."""

    def wait(self) -> int:
        """The exit code."""
        return self._code


def start_of(recipe: Recipe, section: Section, launch: Path | None, **given: object) -> Start:
    """As `baton.runner.start_of`, in this process."""
    arguments = [str(recipe.path), *recipe.overrides, "--section", section.name]

    def begin(descriptor: int) -> Ran:
        code, said = 0, io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            try:
                main(section.stage, arguments)
            except SystemExit as end:
                code = int(end.code or 0)
        os.write(descriptor, said.getvalue().encode())
        return Ran(code)

    return Start(["python", "-m", f"stages.{section.stage}", *arguments], begin)


def rehearsed(path: Path, *overrides: str, to: Sequence[str] = (), keep: bool = False) -> int:
    """The exit code of `baton rehearse`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "start_of", start_of)
        return rehearse(path, overrides, to, None, keep=keep)
