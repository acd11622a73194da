"""The house rules that a machine can check: who imports whom, sizes, docstrings, lock file, the tree in the README."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import get_args

import pytest

from handoff.manifest import Kind

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
SHARED_WITHOUT_TORCH = (
    "training.recipe",
    "training.config",
    "training.declaration",
    "training.inputs",
    "training.run",
    "training.registry",
    "training.shapes",
    "training.cost",
    "training.engines.shares",
    "training.terminal",
)
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


def components(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycles of a graph: its strongly connected components of more than one node, and nodes with an edge to
    themselves (Tarjan 1972)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            place = stack.index(node)
            component = sorted(stack[place:])
            del stack[place:]
            if len(component) > 1 or node in graph[node]:
                found.append(component)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules among `files` that it imports, anywhere in it: in functions and for type checkers too."""
    graph = {}
    for module, path in files.items():
        names = {name for _, name in imports(path)}
        # `from a import b` names the module a.b where there is one, else something in the module a.
        graph[module] = {name if name in files else name.rpartition(".")[0] for name in names} & files.keys()
    return graph


def modules_of(root: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Dotted name -> file of every module."""
    paths = [path for package in packages for path in (root / package).rglob("*.py")]
    named = {".".join(path.relative_to(root).with_suffix("").parts): path for path in paths}
    return {name.removesuffix(".__init__"): path for name, path in named.items()}


def literals(path: Path) -> Iterator[tuple[int, str]]:
    """(line, value) of every string literal of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.lineno, node.value


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


def test_no_modules_import_each_other(root):
    files = modules_of(root, OURS)
    assert len(files) > 150
    assert components(import_graph(files)) == []


def test_the_test_above_sees_imports_in_functions_and_for_type_checkers(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "__init__.py").write_text("")
    (tmp_path / "a" / "one.py").write_text("from a import two\n")
    (tmp_path / "a" / "two.py").write_text("def f():\n    from a.three import x\n")
    (tmp_path / "a" / "three.py").write_text("if TYPE_CHECKING:\n    import a.one\n")
    (tmp_path / "a" / "four.py").write_text("import a.one\n")
    assert components(import_graph(modules_of(tmp_path, ["a"]))) == [["a.one", "a.three", "a.two"]]


def test_no_code_outside_stages_names_a_stage(root):
    """What belongs to one stage is declared by it. `tokenizer` and `reward_model` are kinds of what is published, too:
    these stand in handoff/, which defines the kinds, and in lines that say `kind`."""
    stages, kinds = set(stage_packages(root)), set(get_args(Kind))
    wrong = []
    for package in sorted(MAY_IMPORT.keys() - {"stages"}):
        for path in sorted((root / package).rglob("*.py")):
            lines = path.read_text(encoding="utf-8").splitlines()
            for line, value in literals(path):
                kind = value in kinds and (package == "handoff" or "kind" in lines[line - 1])
                if value in stages and not kind:
                    wrong.append(f"{path.relative_to(root)}:{line}: {value}")
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
    modules += ["baton.runner", "baton.status", "baton.plan", "baton.plan_shown", "baton.doctor.recipe"]
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    heavy = [m for m in ('torch', 'transformers', 'datasets', 'trl', 'accelerate') if m in sys.modules]\n"
        "    assert not heavy, f'{module} imports {heavy}'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


DISTRIBUTED = re.compile(
    r"deepspeed|fsdp|^ddp$|distributeddataparallel|zero_stage|^(local_)?rank$|world_size|all_gather|^gather(_\w+|ed\w*)$"
    r"|all_reduce|broadcast|^torch\.distributed"
)
# What a manifest records about the engine that ran; what vLLM's own weight transfer is called; nothing else.
MAY_NAME_ENGINES = {
    "handoff/manifest.py": {"zero_stage"},
    "rollout/vllm_weights.py": {"_broadcast", "packed_nccl_broadcast_producer"},
}


def names_of(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every variable, attribute, argument, import and keyword; and texts that are an engine's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.keyword) and node.arg is not None:
            yield node.value.lineno, node.arg
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in ("deepspeed", "fsdp2", "ddp"):
            yield node.lineno, node.value


def test_engines_ranks_and_collectives_are_named_in_their_package_alone(root):
    """Elsewhere code asks `training.engines.protocol.Engine`, and works under an engine that it has never heard of."""
    wrong = [
        f"{name}:{line}: {found}"
        for package in ("baton", "stages", "training", "rollout", "reward", "handoff", "data")
        for path in sorted((root / package).rglob("*.py"))
        if not (name := str(path.relative_to(root))).startswith("training/engines/")
        for line, found in names_of(ast.parse(path.read_text(encoding="utf-8")))
        if DISTRIBUTED.search(found.lower())
        and not found.startswith(("training.engines.", "vllm."))
        and found not in MAY_NAME_ENGINES.get(name, set())
    ]
    assert wrong == []


def test_the_search_for_engines_finds_them():
    code = "import deepspeed\nfrom torch.distributed import all_gather\nassert engine.name == 'fsdp2' and rank == 0\n"
    found = [name for _, name in names_of(ast.parse(code)) if DISTRIBUTED.search(name.lower())]
    assert sorted(found) == ["deepspeed", "fsdp2", "rank", "torch.distributed.all_gather"]


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


def test_the_lock_files_have_exact_versions_and_no_addresses(root):
    files = ("requirements.lock", "requirements-test.lock")
    lines = [line for name in files for line in (root / name).read_text(encoding="utf-8").splitlines()]
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
