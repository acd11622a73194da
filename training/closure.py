"""The code on which a result depends: all files that a stage imports, and those that a user's reward function imports.

The files are found by reading import statements, without running them. No torch here.
"""

import ast
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

from handoff.files import canonical_hash, sha256_file

_ROOT = Path(__file__).resolve().parent.parent
_NAMED = re.compile(r"[a-z_]+(\.[a-z_]+)+:\w+")
_MAY_NAME = re.compile(rb"[a-z_]\.[a-z_.]+:\w")
"""Found in a file that has such a string; few others have it, and to look at every part of a file takes long."""


@cache
def code_fingerprint(stage: str) -> str:
    """Hash of the code that computes the result: all of the repository's files that the stage imports, directly or
    indirectly."""
    return canonical_hash({str(file.relative_to(_ROOT)): sha256_file(file) for file in code_files(stage)})


def code_files(stage: str) -> list[Path]:
    """The repository's files that the stage imports, directly or indirectly, sorted.

    Imports inside functions count, and so do strings of the form `module:name`, which name reward functions. Of a
    package inside a package all files count, because the sandbox starts some of its files as programs.
    """
    waiting = sorted((_ROOT / "stages" / stage).rglob("*.py"))
    found = set(waiting)
    while waiting:
        new = set(_imported(waiting.pop())) - found
        found |= new
        waiting += new
    return sorted(found)


@cache
def _imported(file: Path) -> list[Path]:
    """The repository's files that a file imports: modules, and the packages that contain them."""
    source = file.read_bytes()
    tree = ast.parse(source)
    names = set(_imports(tree, ()))
    if _MAY_NAME.search(source):
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMED.fullmatch(node.value):
                names.add(node.value.partition(":")[0])
    return [path for name in names for path in _files(name)]


@cache
def _files(name: str) -> list[Path]:
    """The repository's files that importing this dotted name needs."""
    parts = name.split(".")
    if parts[0] not in _tops():
        return []
    files = _modules(_ROOT, parts)
    inner = _ROOT.joinpath(*parts[:2])
    if len(parts) > 1 and (inner / "__init__.py").is_file():
        files += sorted(inner.rglob("*.py"))
    return files


@cache
def _tops() -> set[str]:
    """The names of the repository's folders and of its modules outside of folders."""
    return {path.name.partition(".")[0] for path in _ROOT.iterdir()}


def function_fingerprint(function: str) -> str:
    """Hash of the code of a user's reward function, `package.module:name`: its module, and what this imports from the
    user's own folders. The standard library and other installed packages do not count."""
    return canonical_hash({name: sha256_file(path) for name, path in _function_files(function.partition(":")[0])})


def _function_files(module: str) -> list[tuple[str, Path]]:
    """(path relative to its folder of modules, file), sorted. Empty if the module is not found."""
    top = module.partition(".")[0]
    own, installed = _folders()
    waiting, found = [module], dict[Path, Path]()  # file -> its folder of modules
    asked = {module}
    while waiting:
        name = waiting.pop()
        folders = [*own, *installed] if name.split(".")[0] == top else own
        for folder, path in _located(name, folders):
            if path in found:
                continue
            found[path] = folder
            if path.suffix == ".py":
                new = set(_imports_of(path, path.relative_to(folder).parent.parts)) - asked
                asked |= new
                waiting += new
    return sorted((path.relative_to(folder).as_posix(), path) for path, folder in found.items())


def _folders() -> tuple[list[Path], list[Path]]:
    """The folders in which modules are looked for: the user's own, and those of installed packages. Those of the
    standard library are in neither."""
    places = sysconfig.get_paths()
    standard = {Path(places[key]).resolve() for key in ("stdlib", "platstdlib")}
    packages = {Path(places[key]).resolve() for key in ("purelib", "platlib")}
    every = dict.fromkeys(Path(entry).resolve() for entry in (*sys.path, ""))
    rest = [path for path in every if path.is_dir() and path not in standard and path.parent not in standard]
    installed = [path for path in every if path in packages or path.name in ("site-packages", "dist-packages")]
    return [path for path in rest if path not in installed], installed


def _located(name: str, folders: Sequence[Path]) -> Iterator[tuple[Path, Path]]:
    """(folder, file) for the module and the packages that contain it, from the first folder that has it."""
    parts = name.split(".")
    for folder in folders:
        files = _modules(folder, parts)
        if files:
            yield from ((folder, path) for path in files)
            return


def _modules(folder: Path, parts: Sequence[str]) -> list[Path]:
    """The files of a dotted name below a folder: the packages' and the module's own."""
    endings = ("/__init__.py", ".py", *EXTENSION_SUFFIXES)
    bases = ("/".join(parts[:length]) for length in range(1, len(parts) + 1))
    return [path for base in bases for ending in endings if (path := folder / (base + ending)).is_file()]


def _imports_of(path: Path, package: tuple[str, ...]) -> set[str]:
    try:
        return set(_imports(ast.parse(path.read_bytes()), package))
    except (SyntaxError, ValueError):  # a broken module imports nothing; importing it names the mistake
        return set()


_BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")
"""The fields in which a statement holds other statements."""


def _imports(tree: ast.AST, package: tuple[str, ...]) -> Iterable[str]:
    """Dotted names of everything that a module of `package` imports. `from a import b` may name a module or something
    inside one, so it gives a and a.b."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        # No expression holds an import, and most of a file is expressions.
        waiting += (inner for block in _BLOCKS for inner in getattr(node, block, ()))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            start = ".".join([*above, *([node.module] if node.module else [])])
            if start:
                yield start
            yield from (f"{start}.{alias.name}" if start else alias.name for alias in node.names)
