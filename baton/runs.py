"""Finds the folder of the run that a command names. Imports no torch."""

from pathlib import Path

from handoff.errors import UserError
from training.recipe import load_recipe


def run_dir_of(target: Path) -> Path:
    """The folder of a run; `target` is that folder or the run's recipe. Raises UserError when there is no such run."""
    if target.is_dir():
        return target
    if not target.exists() and target.suffix not in (".yaml", ".yml"):
        raise UserError(f"{target}: no such run; `baton run <recipe>` makes one")
    run_dir = load_recipe(target).run_dir
    if not run_dir.is_dir():
        raise UserError(f"{run_dir}: nothing has been run yet; make it with `baton run {target}`")
    return run_dir
