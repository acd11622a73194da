"""Mistakes about the models that a recipe names are found before anything starts."""

import json
import shutil
from pathlib import Path

import pytest

from baton.runner import run_pipeline
from baton.status import State, overview
from handoff.errors import UserError
from tests.hostile_models import write_good
from training.recipe import RecipeError, load_recipe
from training.references import check_compared, check_models

PAIRS = "[{source: world, kind: preferences, split: test}]"
WORLD = "[{source: world, kind: prompts, size: 4}]"
RECIPE = f"""\
name: r
stages:
  words: {{stage: tokenizer, data: [{{source: world, kind: documents}}]}}
  base: {{stage: pretrain, parent: words, data: [{{source: world, kind: documents}}]}}
  taught: {{stage: sft, parent: base, data: [{{source: world, kind: chats}}]}}
  judge: {{stage: reward_model, parent: base, data: [{{source: world, kind: preferences}}], eval_data: {PAIRS}}}
  aligned: {{stage: ppo, parent: taught, reward: [{{model: judge}}], data: {WORLD}}}
  answers: {{stage: generate, parent: taught, data: {WORLD}, scores: [{{model: judge}}]}}
  table:
    stage: evaluate
    models: [taught, aligned]
    tasks: [{{name: world, data: {WORLD}, scores: [{{model: judge}}]}}]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def language_model(tmp_path: Path) -> Path:
    return write_good(tmp_path / "elsewhere")


def scorer(folder: Path, model: Path) -> Path:
    """A directory with the settings of a reward model."""
    shutil.copytree(model, folder)
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("taught.parent=words", r"taught\.parent: words publishes a tokenizer, and taught needs a language model here"),
        ("base.parent=judge", "judge publishes a reward model, and base needs a language model or a tokenizer here"),
        ("aligned.reward=[{model: taught}]", r"reward\.0\.model: taught publishes a language model, .* this recipe: j"),
        ("aligned.critic=base", r"aligned\.critic: base publishes a language model, and aligned needs a reward model"),
        ("aligned.monitor=[{model: words}]", r"aligned\.monitor\.0\.model: words publishes a tokenizer"),
        ("judge.ensemble_with=[taught]", r"judge\.ensemble_with\.0: taught publishes a language model"),
        ("answers.scores=[{model: taught}]", r"answers\.scores\.0\.model: taught publishes a language model"),
        (
            "table.tasks.0.scores=[{models: [judge, aligned]}]",
            r"table\.tasks\.0\.scores\.0\.models\.1: aligned publishes a language mod",
        ),
        ("table.models=[taught, judge]", r"table\.models\.1: judge publishes a reward model, and table needs a langu"),
        (
            "table.tasks.0.scores=[{model: nosuch}]",
            r"table\.tasks\.0\.scores\.0\.model: nosuch is not a section of this recipe",
        ),
    ],
)
def test_a_section_of_another_kind_is_a_mistake_in_the_recipe(recipe, override, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(recipe, [*(["aligned.eval_data=" + WORLD] if "monitor" in override else []), override])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("aligned", "reward=[{model: FOLDER}]"),
        ("aligned", "critic=FOLDER"),
        ("judge", "ensemble_with=[FOLDER]"),
        ("answers", "scores=[{model: FOLDER}]"),
        ("table", "tasks.0.scores=[{model: FOLDER}]"),
    ],
)
def test_a_folder_that_is_no_reward_model_is_refused_before_the_first_stage(section, key, recipe, language_model):
    override = f"{section}.{key.replace('FOLDER', str(language_model))}"
    loaded = load_recipe(recipe, [override])
    place = override.partition("=")[0]
    message = rf"command line: {place}.*: {language_model} is a language model, and a reward model is needed here"
    with pytest.raises(RecipeError, match=message):
        run_pipeline(loaded, [], [], None, dry_run=False)
    assert not loaded.run_dir.exists()
    found = overview(loaded)
    assert found[section].state is State.BLOCKED and "needed here" in found[section].reasons[0]
    assert run_pipeline(loaded, [], [], None, dry_run=True) == 2


def test_a_model_that_is_read_under_two_keys_is_named_by_the_wrong_one(recipe, language_model):
    loaded = load_recipe(
        recipe, [f"table.models=[taught, {language_model}]", f"table.tasks.0.scores=[{{model: {language_model}}}]"]
    )
    with pytest.raises(RecipeError, match=r"table\.tasks\.0\.scores\.0\.model: .* is a language model"):
        check_models(loaded, ["table"], fetch=False)


@pytest.mark.parametrize("section", ["base", "taught", "judge", "aligned", "answers"])
def test_a_parent_of_the_wrong_kind_or_that_is_none_is_refused_before_the_first_stage(
    section, recipe, language_model, tmp_path
):
    (tmp_path / "empty").mkdir()
    for folder, why in (
        (scorer(tmp_path / "scorer", language_model), "is a reward model"),
        ("empty", "is not a checkpoint"),
    ):
        loaded = load_recipe(recipe, [f"{section}.parent={folder}"])
        with pytest.raises(RecipeError, match=rf"command line: {section}\.parent: .*({why})"):
            run_pipeline(loaded, [], [], None, dry_run=False)
        assert not loaded.run_dir.exists()


def test_two_models_of_one_name_are_refused_before_the_first_stage(recipe, language_model, tmp_path):
    other = tmp_path / "copies" / "elsewhere"
    shutil.copytree(language_model, other)
    loaded = load_recipe(recipe, [f"table.models=[taught, {language_model}, {other}]"])
    with pytest.raises(RecipeError, match=r"table\.models\.2: .* are both called elsewhere in the table; rename"):
        run_pipeline(loaded, [], [], None, dry_run=False)
    named = tmp_path / "taught"
    language_model.rename(named)
    loaded = load_recipe(recipe, [f"table.models=[taught, {named}]"])
    with pytest.raises(RecipeError, match=r"table\.models\.1: .* and taught are both called taught"):
        run_pipeline(loaded, [], [], None, dry_run=False)
    assert not loaded.run_dir.exists()


def test_an_evaluation_without_any_model_says_at_once_what_makes_one(recipe, language_model):
    loaded = load_recipe(recipe)
    for dry_run in (False, True):
        with pytest.raises(UserError, match=r"none of taught, aligned .*`baton run .*r.yaml --to aligned --to table`"):
            run_pipeline(loaded, ["table"], [], None, dry_run=dry_run)
    assert not loaded.run_dir.exists()
    check_compared(loaded, ["taught", "table"], "baton run r.yaml")  # one is made just before
    check_compared(load_recipe(recipe, [f"table.models=[{language_model}]"]), ["table"], "baton run r.yaml")
