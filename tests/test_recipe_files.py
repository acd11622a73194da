"""The repository's recipes: each loads, and its header states its purpose and the expected metric."""

import re
from pathlib import Path

import pytest

from training.recipe import load_recipe

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


def test_the_recipes_named_by_make_targets_and_docs_exist():
    assert {"tiny", "real"} <= {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_loads_and_runs_under_its_own_name(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert set(recipe.order()) == set(recipe.sections)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_begins_with_purpose_hardware_command_and_expected_metric(path):
    head = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8")).group()
    for word in ("Purpose:", "Hardware:", "Command:", "Expected:"):
        assert re.search(rf"^# {word} +\S", head, re.MULTILINE), f"{path.name} begins without a line `# {word} ...`"
