"""For every key of every stage: a one-letter slip gets the right suggestion, and some code reads the key."""

import ast
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml
from pydantic import BaseModel

from training.recipe import RecipeError, TopLevel, load_recipe
from training.recipe_errors import models_in
from training.registry import Registry

STAGES = Registry().names


def test_the_stages_are_found():
    assert {"tokenizer", "pretrain", "sft", "reward_model", "ppo", "dpo", "evaluate"} <= set(STAGES)


def tags(model: type[BaseModel]) -> dict[str, str]:
    """The key that selects a member of a union: {"source": "world"}."""
    return {
        name: get_args(info.annotation)[0]
        for name, info in model.model_fields.items()
        if get_origin(info.annotation) is Literal and info.is_required() and len(get_args(info.annotation)) == 1
    }


def places(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], type[BaseModel]]]:
    """Every model inside a section with the keys that lead to it; "0" for the entry of a list, and a metric for that
    of an object of metrics."""
    yield path, model
    for name, info in model.model_fields.items():
        kind = str(info.annotation)
        entry = ("0",) if "list[" in kind or "tuple[" in kind else ("eval_loss",) if kind.startswith("dict[") else ()
        for inner in models_in(info.annotation):
            yield from places(inner, (*path, name, *entry))


def nested(path: tuple[str, ...], content: dict[str, Any]) -> Any:
    """`content` under the keys of `path`."""
    value: Any = content
    for part in reversed(path):
        value = [value] if part == "0" else {part: value}
    return value


def slip(word: str, known: set[str]) -> str:
    """The word with one letter changed, lost, doubled or swapped with the next; not another key."""
    dice = random.Random(word)
    while True:
        at = dice.randrange(len(word))
        kind = dice.choice(["change", "lose", "double", "swap"])
        letter = dice.choice("abcdefghijklmnopqrstuvwxyz")
        result = {
            "change": word[:at] + letter + word[at + 1 :],
            "lose": word[:at] + word[at + 1 :],
            "double": word[:at] + word[at] + word[at:],
            "swap": word[:at] + word[at : at + 2][::-1] + word[at + 2 :],
        }[kind]
        if result not in known and result and not result.startswith("_"):
            return result


PLACES = [(stage, path, model) for stage in STAGES for path, model in places(Registry().config_class(stage))]


@pytest.mark.parametrize(
    ("stage", "path", "model"), PLACES, ids=[f"{s}.{'.'.join(p)}-{m.__name__}" for s, p, m in PLACES]
)
def test_a_one_letter_slip_gets_a_suggestion(tmp_path, stage, path, model):
    keys = set(model.model_fields)
    known = keys.union(*(inner.model_fields for _, inner in places(model)))  # a key of an inner place gets other advice
    slips = {key: slip(key, known) for key in keys - tags(model).keys() if len(key) > 1}
    section = nested(path, tags(model) | dict.fromkeys(slips.values(), 1)) | {"stage": stage}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump({"name": "r", "stages": {"mine": section}}))
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    lines = str(caught.value).splitlines()
    for key, wrong in slips.items():
        name = ".".join(("mine", *path, wrong))
        (line,) = [line for line in lines if f": {name}: unknown key" in line]
        suggested = line.partition("did you mean ")[2].partition("?")[0].split(" or ")
        assert key in suggested, line


def test_a_one_letter_slip_at_the_top_level_gets_a_suggestion(tmp_path):
    for key in TopLevel.model_fields:
        (tmp_path / "r.yaml").write_text(f"{slip(key, set(TopLevel.model_fields))}: 1\n")
        with pytest.raises(RecipeError, match=f"did you mean {key}?"):
            load_recipe(tmp_path / "r.yaml")


# ---- every key is read


class Reads(ast.NodeVisitor):
    """Names that a module reads as attributes. A model's validators do not count as reading its values."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if not any("validator" in ast.unparse(decorator) for decorator in node.decorator_list):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.ctx, ast.Load):
            self.names.add(node.attr)
        self.generic_visit(node)


def attributes(files: list[Path]) -> set[str]:
    reads = Reads()
    for file in files:
        reads.visit(ast.parse(file.read_text(encoding="utf-8")))
    return reads.names


@pytest.mark.parametrize("stage", STAGES)
def test_every_key_is_read_by_code(root, stage):
    files = [*(root / "stages" / stage).rglob("*.py"), *(root / "training").rglob("*.py")]
    for package in ("data", "reward", "rollout"):
        files += (root / package).rglob("*.py")
    read = attributes(files)
    unread = {
        ".".join((stage, *path, key))
        for path, model in places(Registry().config_class(stage))
        for key in model.model_fields.keys() - tags(model).keys() - read
    }
    # The loader reads `stage` from the text, since it decides which model reads the rest.
    assert unread - {f"{stage}.stage"} == set()


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward_model", "dpo"])
def test_a_training_of_no_steps_is_refused(stage, tmp_path):
    """It would otherwise train as many steps as `num_train_epochs` needs."""
    keys = {"stage": stage, "parent": "org/model", "data": [{"source": "world", "kind": "chats"}]}
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "stages": {"s": {**keys, "train": {"max_steps": 0}}}}))
    with pytest.raises(RecipeError, match=r"s\.train: max_steps 0 would train nothing: give at least 1, or -1"):
        load_recipe(path)
    load_recipe(path, ["s.train.max_steps=1"])


def test_each_stage_has_a_learning_rate_of_its_own(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "name: rates\n"
        "stages:\n"
        "  tokenizer: {vocab_size: 300, data: [{source: world, kind: documents}]}\n"
        "  pretrain: {parent: tokenizer, model: {architecture: llama}, data: [{source: world, kind: documents}]}\n"
        "  further: {stage: pretrain, parent: pretrain, data: [{source: world, kind: documents}]}\n"
        "  light: {stage: pretrain, parent: pretrain, adapter: {}, data: [{source: world, kind: documents}]}\n"
        "  sft: {parent: pretrain, data: [{source: world, kind: chats}]}\n"
        "  reward: {stage: reward_model, parent: sft, data: [{source: world, kind: preferences}]}\n"
        "  dpo: {parent: sft, data: [{source: world, kind: preferences}]}\n"
        "  adapter: {stage: dpo, parent: sft, adapter: {}, data: [{source: world, kind: preferences}]}\n"
        "  ppo: {parent: sft, reward: [{model: reward}], data: [{source: world, kind: prompts}]}\n"
    )
    sections = load_recipe(path).sections
    rates = {name: vars(s.config.train)["learning_rate"] for name, s in sections.items() if name != "tokenizer"}
    assert rates == pytest.approx(
        {
            **{"pretrain": 3e-4, "further": 3e-5, "light": 3e-4, "sft": 2e-5, "reward": 1e-5},
            **{"dpo": 1e-6, "adapter": 1e-5, "ppo": 1e-6},
        }
    )
    assert vars(sections["ppo"].config.train)["critic_learning_rate"] == 9e-6
