"""What Baton uses of other libraries without a promise: each name is still there, and none is missing from the list."""

import ast
import importlib
import inspect
import os
from pathlib import Path
from types import ModuleType

import pytest

from training.engines.upstream import PRIVATE, PrivateName

SOURCES = ("baton", "stages", "training", "rollout", "reward", "handoff", "data")


def owner(private: PrivateName) -> object:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    module, _, name = private.owner.partition(":")
    found = importlib.import_module(module)
    return getattr(found, name) if name else found


@pytest.mark.parametrize("private", PRIVATE, ids=lambda private: f"{private.owner.split(':')[-1]}.{private.name}")
def test_a_private_name_is_still_there_with_the_same_arguments(private: PrivateName) -> None:
    place = owner(private)
    if private.parameters is None:
        assert isinstance(place, ModuleType | type)
        assert private.name in inspect.getsource(place), f"{private.owner} no longer has {private.name}: {private.why}"
        return
    assert callable(getattr(place, private.name, None)), f"{private.owner}.{private.name} is gone: {private.why}"
    found = inspect.signature(getattr(place, private.name)).parameters
    assert tuple(name for name in found if name not in ("self", "cls")) == private.parameters


def own_names(trees: list[ast.Module]) -> set[str]:
    """Private names that our own code defines: functions, classes, assignments and attributes of self."""
    names: set[str] = set()
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            names.add(node.attr)
    return names


def foreign_private_names(trees: list[ast.Module]) -> set[str]:
    """Private attributes that are read or written somewhere and that our own code does not define."""
    used = {
        node.attr
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
    }
    return used - own_names(trees)


# Of the standard library, documented there in spite of their underscore; and operators of torch, which are data.
PROMISED = {"_exit", "_dynamo", "_linear_pointwise", "_is_mkldnn_bf16_supported", "_reorder_linear_weight"}


def test_every_private_name_that_is_used_is_in_the_list(root: Path) -> None:
    files = [path for package in SOURCES for path in sorted((root / package).rglob("*.py"))]
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in files]
    assert foreign_private_names(trees) - PROMISED <= {private.name for private in PRIVATE}


def test_the_search_finds_a_private_name() -> None:
    tree = ast.parse("class A:\n    def _own(self):\n        self._mine = other._theirs\n        self._own()\n")
    assert foreign_private_names([tree]) == {"_theirs"}


def test_every_private_method_that_is_overridden_is_in_the_list() -> None:
    from stages.dpo.train import Trainer as DpoTrainer
    from stages.reward_model.train import Trainer as RewardTrainer
    from stages.sft.train import Trainer as SftTrainer
    from training.trainer import StageTrainer

    listed = {private.name for private in PRIVATE}
    for kind in (StageTrainer, DpoTrainer, RewardTrainer, SftTrainer):
        upstream = {name for base in kind.__mro__ if base.__module__.split(".")[0] in ("trl", "transformers")
                    for name in vars(base)}  # fmt: skip
        ours = {name for name in vars(kind) if name.startswith("_") and not name.startswith("__")}
        assert ours & upstream <= listed
