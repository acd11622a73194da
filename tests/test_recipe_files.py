"""The repository's recipes: each loads, and its header states its purpose and the expected metric.

Those of open-weight models fit the hardware that they name, and are rehearsed: two in `make test`, all of them with
`BATON_RECIPES=all` (a minute).
"""

import os
import re
from pathlib import Path

import pytest
import yaml

from baton.plan import plan
from tests import hub
from tests.rehearsing import rehearsed
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


REAL = {
    path.stem: path for path in RECIPES if any(f" {name}" in path.read_text(encoding="utf-8") for name in hub.MODELS)
}
USUAL = ("qwen3-0.6b", "llama-3.1-8b")
"""SFT, GRPO and evaluation of all weights; SFT, reward model and PPO with adapters."""


def parents(path: Path) -> set[str]:
    """The models of the hub that a recipe starts from."""
    stages = yaml.safe_load(path.read_text(encoding="utf-8"))["stages"].values()
    return {section["parent"] for section in stages if "/" in section.get("parent", "")}


def test_there_is_a_recipe_for_every_model_of_the_hub_and_each_method_is_shown():
    assert set(USUAL) <= REAL.keys() and len(REAL) == len(hub.MODELS)
    assert {model for path in REAL.values() for model in parents(path)} == set(hub.MODELS)
    shown = {s.stage for path in REAL.values() for s in load_recipe(path).sections.values()}
    assert {"sft", "dpo", "reward_model", "ppo", "evaluate"} <= shown


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_fits_the_hardware_that_its_recipe_names(name, tmp_path, monkeypatch, root):
    head = REAL[name].read_text(encoding="utf-8").split("name:")[0]
    command = re.search(r"baton plan recipes/(\S+)\.yaml --gpu (\S+)(?: --launch (\S+))?", head)
    assert command is not None and command.group(1) == name
    monkeypatch.chdir(tmp_path)
    for model in parents(REAL[name]):
        hub.write_sizes(tmp_path, model)
    launch = command.group(3)
    found = plan(REAL[name], (), None if launch is None else root / launch, command.group(2))
    assert [section.name for section in found.sections if not section.fits] == []
    gib = int(re.search(r"(\d+) GB", head).group(1))
    assert found.device.memory <= gib * 2**30, "the command plans for the hardware of the line above it"


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL if os.environ.get("BATON_RECIPES") == "all" else USUAL)
def test_a_real_models_recipe_is_rehearsed(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    hub.write_data(tmp_path)
    for model in parents(REAL[name]):
        hub.write_model(tmp_path, model)
    assert rehearsed(REAL[name]) == 0
