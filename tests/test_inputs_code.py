"""The code that a stage's result depends on is the closure of its imports, so that no file can be forgotten."""

import subprocess
import sys

import pytest

from training.closure import code_files
from training.registry import Registry

OURS = ("stages", "training", "rollout", "reward", "data", "handoff")


IMPORTED = f"""
import importlib, sys
for stage in sys.argv[1:]:
    for name in [name for name in sys.modules if name.split(".")[0] in {OURS!r}]:
        del sys.modules[name]
    importlib.import_module(f"stages.{{stage}}.train")
    print(stage, *(m.__file__ for n, m in sorted(sys.modules.items()) if n.split(".")[0] in {OURS!r}))
"""


def test_the_closure_holds_every_module_that_a_stage_loads(root):
    """The reference is the set of modules that Python loads when it imports the stage's training module."""
    stages = Registry().names
    command = [sys.executable, "-c", IMPORTED, *stages]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = {line.split()[0]: set(line.split()[1:]) for line in done.stdout.splitlines()}
    assert found.keys() == set(stages)
    for stage, loaded in found.items():
        assert len(loaded) > 20
        assert loaded <= {str(path) for path in code_files(stage)}, stage


@pytest.mark.parametrize(
    "file",
    [
        "reward/verifiers/maths.py",  # named as text, `reward.verifiers.maths:math_equal`
        "reward/sandbox/server.py",
        "reward/judge_text.py",
        "data/world/grading.py",  # imported inside a function
        "handoff/contract.py",
        "training/engines/launch.py",
        "rollout/attention.py",
    ],
)
def test_the_closure_of_reinforcement_learning_reaches_what_it_runs(root, file):
    assert root / file in code_files("ppo")


def test_a_stage_does_not_depend_on_another_stage_or_on_the_command(root):
    folders = {path.relative_to(root).parts[:2] for path in code_files("sft")}
    assert {parts for parts in folders if parts[0] == "stages"} == {("stages", "__init__.py"), ("stages", "sft")}
    assert not any(parts[0] in ("baton", "benchmarks") for parts in folders)
