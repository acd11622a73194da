"""Checks the models that a recipe's sections name, before any of them is loaded. Imports no torch.

Whether one section may start from another is known from the recipe alone (training/recipe.py). Here are the models from
outside of the recipe: directories, GGUF files, and models of the hub.
"""

from collections.abc import Sequence

from handoff.errors import UserError
from handoff.manifest import KIND_WORDS, kinds_in_words
from handoff.parent import look
from handoff.stage import StageDir
from training.declaration import COMPARED
from training.recipe import DATA_ROLE, Recipe, RecipeError, is_hub_id
from training.registry import Registry


def check_models(recipe: Recipe, names: Sequence[str], *, fetch: bool) -> None:
    """Checks every model from outside of the recipe that one of these sections names.

    Args:
        fetch: also those of the hub, which are downloaded unless they are here.

    Raises:
        RecipeError: there is no such model, or it is of another kind than its key wants; or two models that are
            compared have one name. The message names the key.
    """
    for name in names:
        section = recipe.sections[name]
        declaration = Registry().declaration(section.stage)
        compared: dict[str, str] = {}
        for role, ref in section.references.items():
            if role.startswith(DATA_ROLE):
                continue
            called = ref
            if ref not in recipe.sections and (fetch or not is_hub_id(ref)):
                wanted = declaration.kinds(role)
                try:
                    kind, called = look(ref, recipe.run_dir)
                except UserError as error:
                    raise RecipeError(f"{section.place(role)}: {error}") from error
                if kind not in wanted:
                    found = f"{ref} is {KIND_WORDS[kind]}, and {kinds_in_words(wanted)} is needed here"
                    raise RecipeError(f"{section.place(role)}: {found}")
            if role.startswith(COMPARED) and compared.setdefault(called, role) != role:
                first = section.references[compared[called]]
                raise RecipeError(
                    f"{section.place(role)}: {ref} and {first} are both called {called} in the table; rename the "
                    "directory of one of them"
                )


def check_gates(recipe: Recipe, names: Sequence[str]) -> None:
    """Checks that a gate which compares a section with its parent finds the parent among the section's models. Raises
    RecipeError."""
    for name in names:
        section = recipe.sections[name]
        for model in section.config.compared_with_parents():
            parent = recipe.sections[model].parents.get("parent") if model in recipe.sections else None
            if parent is not None and parent not in section.soft_parents.values():
                raise RecipeError(
                    f"{recipe.path}: {name}.gate: {model} is to be no worse than its parent {parent}, which is not "
                    f"evaluated: add it to {name}.models"
                )


def check_compared(recipe: Recipe, names: Sequence[str], command: str) -> None:
    """Checks that each section which compares models will find one of them.

    Args:
        names: the sections that are about to run.
        command: the one that runs the whole recipe, for the message.

    Raises:
        UserError: none of its models has been made, and none is about to be.
    """
    for name in names:
        compared = [ref for role, ref in recipe.sections[name].soft_parents.items() if role.startswith(COMPARED)]
        if compared and not any(
            ref in names or ref not in recipe.sections or StageDir(recipe.run_dir / ref).manifest() is not None
            for ref in compared
        ):
            raise UserError(
                f"{name} compares the models that are there, and none of {', '.join(compared)} has been made yet. "
                f"`{command} --to {compared[-1]} --to {name}` makes {compared[-1]} first, with what it needs; "
                f"`{command}` makes them all"
            )
