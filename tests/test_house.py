"""The house rules that a machine can check: who imports whom, sizes, docstrings, lock file, the tree in the README."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

OURS = frozenset({"baton", "stages", "training", "rollout", "reward", "data", "handoff", "benchmarks"})
MAY_IMPORT = {
    "handoff": frozenset(),
    "data": frozenset({"handoff"}),
    "rollout": frozenset({"data", "handoff"}),
    "reward": frozenset({"data", "handoff", "rollout"}),
    "training": frozenset({"data", "handoff", "rollout", "reward"}),
    "stages": frozenset({"data", "handoff", "rollout", "reward", "training"}),
    "baton": OURS - {"baton", "benchmarks"},
}
SHARED_WITHOUT_TORCH = ("training.recipe", "training.config", "training.inputs", "training.run", "training.registry")
FORBIDDEN = {
    "a path of a developer's machine": r"(?<![\w.}])/(?:work|root|home/\w+)/",
    "the address of a registry": r"files\.python" + r"hosted\.org|download\.py" + r"torch\.org|py" + r"pi\.org",
}


def tracked(root: Path) -> list[str]:
    """Paths of the files that git has, as far as they are there."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in done.stdout.split("\0") if name and (root / name).is_file()]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything that a file imports, inside functions too; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            for alias in node.names:
                yield node.lineno, f"{node.module}.{alias.name}"


def stage_packages(root: Path) -> list[str]:
    return sorted(path.parent.name for path in (root / "stages").glob("*/__init__.py"))


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_those_below_it(root, package):
    files = sorted((root / package).rglob("*.py"))
    assert files
    wrong = [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in files
        for line, name in imports(path)
        if (top := name.split(".")[0]) in OURS and top != package and top not in MAY_IMPORT[package]
    ]
    assert wrong == []


def test_a_stage_imports_no_other_stage(root):
    stages = stage_packages(root)
    assert "sft" in stages and "ppo" in stages
    wrong = [
        f"{path.relative_to(root)}:{line}: {name}"
        for stage in stages
        for path in sorted((root / "stages" / stage).rglob("*.py"))
        for line, name in imports(path)
        if name.startswith("stages.") and (other := name.split(".")[1]) in stages and other != stage
    ]
    assert wrong == []


def test_every_stage_and_package_has_its_files_and_says_what_it_is(root):
    folders = [root / package for package in OURS] + [root / "stages" / stage for stage in stage_packages(root)]
    silent = [
        str(folder.relative_to(root))
        for folder in folders
        if not ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8")))
    ]
    assert silent == []
    for stage in stage_packages(root):
        for name in ("__main__.py", "config.py", "train.py"):
            assert (root / "stages" / stage / name).is_file(), f"stages/{stage}/{name}"


def test_every_module_says_what_it_is_and_no_file_is_long(root):
    files = [root / name for name in tracked(root) if name.endswith(".py")]
    assert len(files) > 100
    texts = {str(path.relative_to(root)): path.read_text(encoding="utf-8") for path in files}
    assert [name for name, text in texts.items() if len(text.splitlines()) > 500] == []
    assert [name for name, text in texts.items() if text and not ast.get_docstring(ast.parse(text))] == []


def test_what_only_looks_at_recipes_and_runs_needs_no_torch(root):
    modules = [f"handoff.{path.stem}" for path in sorted((root / "handoff").glob("*.py")) if path.stem != "__init__"]
    modules += [*SHARED_WITHOUT_TORCH, *(f"stages.{stage}.config" for stage in stage_packages(root)), "baton.cli"]
    modules += ["baton.runner", "baton.status"]
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = [m for m in ('torch', 'transformers', 'datasets', 'trl', 'accelerate') if m in sys.modules]\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", sorted(OURS))
def test_an_imported_package_is_the_repositorys_own(root, package):
    """`data` and `reward` are names that other distributions could bring, too."""
    found = importlib.import_module(package).__file__
    assert found is not None and Path(found).parent == root / package


def test_no_tracked_file_knows_a_machine_or_a_registry(root):
    patterns = {what: re.compile(pattern) for what, pattern in FORBIDDEN.items()}
    found = [
        f"{name}: {what}: {match.group()}"
        for name in tracked(root)
        for what, pattern in patterns.items()
        if (match := pattern.search((root / name).read_text(encoding="utf-8")))
    ]
    assert found == []


def test_the_patterns_of_the_test_above_find_what_they_are_for():
    user, registry = "/ho" + "me/ann/x", "https://py" + "pi.org/simple"
    assert re.search(FORBIDDEN["a path of a developer's machine"], user)
    assert re.search(FORBIDDEN["the address of a registry"], registry)


def test_the_lock_file_has_exact_versions_and_no_addresses(root):
    lines = (root / "requirements.lock").read_text(encoding="utf-8").splitlines()
    locked = [line for line in lines if not line.startswith("#")]
    assert any(line.startswith("torch==") for line in locked)
    assert [line for line in locked if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
    names = [re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower() for line in locked]
    assert [name for name in set(names) if names.count(name) > 1] == []


def test_the_tests_that_keep_the_promises_exist(root):
    """docs/reliability.md names a test for each line of its tables."""
    text = (root / "docs" / "reliability.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/\w+\.py)::(\w+)`", text)
    assert len(named) > 30
    there = {
        name: {node.name for node in ast.walk(ast.parse((root / name).read_text(encoding="utf-8")))
               if isinstance(node, ast.FunctionDef)}
        for name in {name for name, _ in named}
    }  # fmt: skip
    assert [f"{name}::{test}" for name, test in named if test not in there[name]] == []
    promises = text.partition("## The fault campaign")[0]  # behind it the tables are of figures
    rows = [
        line for line in promises.splitlines() if line.startswith("| ") and not line.startswith(("| promise", "| ---"))
    ]
    assert [row for row in rows if "::test_" not in row] == []


def test_the_tree_in_the_readme_is_the_one_that_is_here(root):
    text = (root / "README.md").read_text(encoding="utf-8")
    block = re.search(r"^## The tree\n+```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block is not None, "README.md: no fenced block under `## The tree`"
    path: list[str] = []
    named = []
    for line in block.group(1).splitlines():
        indent = len(line) - len(line.lstrip(" "))
        depth, odd = divmod(indent, 2)
        assert not odd and depth <= len(path), f"README.md: indent of {line!r}"
        path[depth:] = [line.split()[0]]
        named.append("".join(path))
        assert all(folder.endswith("/") for folder in path[:-1]), f"README.md: {line!r} lies in a file"
    assert [name for name in named if not (root / name).exists()] == []
    assert [name for name in named if name.endswith("/") != (root / name).is_dir()] == []

    top = {name.rstrip("/") for name in named if "/" not in name.rstrip("/")}
    here = {name.split("/")[0] for name in tracked(root)}
    assert top == {name for name in here if not name.startswith(".")} - {"README.md"}
