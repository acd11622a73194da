"""The pages of the documentation as data, and what must hold for each of them: `problems`.

Every block is fenced, and the words after its language say what a test does with it:

    ```sh run                    run in order, in a small working folder; the exit code is 0
    ```sh not run: <reason>      only checked: its programs, options, recipes and overrides exist
    ```yaml recipe [PATH]        a whole recipe; with PATH, the commands find it there
    ```yaml sections             whole sections, beside those of recipes/tiny.yaml
    ```yaml keys                 keys laid over the sections of recipes/tiny.yaml
    ```yaml data                 entries of a `data:` list
    ```yaml reward               entries of a `reward:` list
    ```yaml not checked: <reason>
    ```<language> file PATH      a file that the commands and recipes find there
    ```text                      output, a tree, a drawing
    ```mermaid                   a drawing

Paths that are named must exist, except those with NAME in them. `<!-- planned: PATH ... -->` excepts what is to come;
once it has come, the comment is a mistake.
"""

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer.main
import yaml
from pydantic import TypeAdapter, ValidationError
from typer.core import TyperCommand, TyperGroup
from typer.exceptions import Exit, TyperException

from baton.cli import app
from data.config import SourceConfig
from handoff.errors import UserError
from reward.compose import Composition
from reward.config import RewardConfig
from tests.docs_work import read_yaml
from training.recipe import load_recipe

FENCE = re.compile(r"^( *)```(\S*) *(.*)$")
FOLDERS = "baton|stages|training|rollout|reward|handoff|data|recipes|slurm|kubernetes|tests|benchmarks|docs"
PATH = re.compile(rf"(?<![\w./<>*-])((?:{FOLDERS})/[\w.-][\w./-]*[\w/]|[\w-]+\.(?:toml|lock))(?![\w*])")
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")
PLANNED = re.compile(r"<!-- planned: (.*?)-->", re.DOTALL)
# Programs that are not ours, and words of the shell.
FOREIGN = {"pip", "vllm", "kubectl", "sbatch", "srun", "scontrol", "export", "source", "exit", "if", "then", "fi", "ls"}
OUTPUT = {"text", "mermaid"}
RUNS = "runs/"


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    """Of its first line, from 1."""
    language: str
    marker: str
    """The words after the language."""
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Page:
    """A page without its blocks, and these."""

    name: str
    """Path from the root of the repository."""
    prose: str
    blocks: list[Block]
    mistakes: list[str]


@dataclass
class Book:
    """All pages in the order in which they are read, and the repository they are about."""

    root: Path
    pages: list[Page]
    files: dict[str, str] = field(init=False)
    """Files that the pages define, by path."""

    def __post_init__(self) -> None:
        self.files = {}
        for block in (block for page in self.pages for block in page.blocks):
            kind, _, path = block.marker.partition(" ")
            if kind in ("file", "recipe") and path:
                self.files[path] = block.text


def read_page(root: Path, name: str) -> Page:
    return parse(name, (root / name).read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Page:
    """A page's blocks and the rest of it, with the number of lines kept."""
    prose: list[str] = []
    blocks: list[Block] = []
    mistakes: list[str] = []
    opened: tuple[int, str, str, str] | None = None
    inside: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        fence = FENCE.match(line)
        if opened is None:
            if fence:
                opened, inside = (number, *fence.groups()), []
            elif re.match(r"(?: {4}|\t)\S", line) and (not prose or not prose[-1].strip()):
                mistakes.append(f"{name}:{number}: an indented block; fence it and say what a test does with it")
            prose.append("" if fence else line)
            continue
        prose.append("")
        first, indent, language, marker = opened
        if fence and not fence.group(2):
            blocks.append(Block(name, first + 1, language, marker.strip(), "\n".join(inside) + "\n"))
            opened = None
        else:
            inside.append(line.removeprefix(indent))
    if opened is not None:
        mistakes.append(f"{name}:{opened[0]}: a block that does not end")
    return Page(name, "\n".join(prose), blocks, mistakes)


def read_book(root: Path) -> Book:
    """README.md, docs/index.md, then the other pages in the order in which the index links them."""
    index = read_page(root, "docs/index.md")
    linked = [os.path.normpath(f"docs/{target.partition('#')[0]}") for target in LINK.findall(index.prose)]
    names = dict.fromkeys(name for name in linked if name.startswith("docs/") and (root / name).is_file())
    names.pop("docs/index.md", None)
    return Book(root, [read_page(root, "README.md"), index, *(read_page(root, name) for name in names)])


def pages_on_disk(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")}


# ---- what must hold


def problems(book: Book, page: Page) -> list[str]:
    """Everything that is wrong with a page, each with its place."""
    found = [*page.mistakes, *_links(book, page), *_paths(book, page), *_inline(book, page)]
    for block in page.blocks:
        found += [f"{block.where}: {message}" for message in _block(book, block)]
    return found


def anchors(page: Page) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for title in re.findall(r"^#+ +(.+?) *$", page.prose, re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        count = found.get(slug, 0)
        found[slug] = count + 1
        names.add(f"{slug}-{count}" if count else slug)
    return names


def _links(book: Book, page: Page) -> Iterator[str]:
    for number, line in enumerate(page.prose.splitlines(), 1):
        for target in LINK.findall(line):
            if re.match(r"[a-z]+:", target):
                continue
            path, _, anchor = target.partition("#")
            name = os.path.normpath(Path(page.name).parent / path) if path else page.name
            where = f"{page.name}:{number}: link to {target}"
            if name != page.name and not (book.root / name).exists():
                yield f"{where}: there is no {name}"
            elif anchor and name.endswith(".md"):
                other = page if name == page.name else read_page(book.root, name)
                if anchor not in anchors(other):
                    yield f"{where}: {name} has no heading of that name"


def _paths(book: Book, page: Page) -> Iterator[str]:
    planned = {path for text in PLANNED.findall(page.prose) for path in text.split()}
    for path in sorted(planned):
        if (book.root / path).exists():
            yield f"{page.name}: {path} is marked as planned and exists; take it out of the comment"
    # Of the prose without comments and the targets of links, line by line.
    prose = re.sub(r"<!--.*?-->", lambda found: "\n" * found.group().count("\n"), page.prose, flags=re.DOTALL)
    texts = [(1, LINK.sub("", prose)), *((block.line, block.text) for block in page.blocks)]
    for first, text in texts:
        for number, line in enumerate(re.sub(r"https?://\S+", "", text).splitlines(), first):
            for path in PATH.findall(line):
                name = path.rstrip("./")
                excepted = planned | book.files.keys()
                if excepted.isdisjoint((name, path)) and "NAME" not in name and not (book.root / name).exists():
                    yield f"{page.name}:{number}: there is no {path}"


def _inline(book: Book, page: Page) -> Iterator[str]:
    """Commands in running text name sub-commands, options and targets that exist; the rest of them may be a pattern."""
    for number, line in enumerate(page.prose.splitlines(), 1):
        for span in re.findall(r"`([^`]+)`", line):
            words = span.split()
            if words[0] == "baton" and len(words) > 1:
                message = _options(words[1], [word.partition("=")[0] for word in words if word.startswith("-")])
            elif words[0] == "make" and len(words) > 1:
                message = _targets(book.root, [word for word in words[1:] if "=" not in word])
            else:
                continue
            if message:
                yield f"{page.name}:{number}: `{span}`: {message}"


def _block(book: Book, block: Block) -> Iterator[str]:
    kind, _, rest = block.marker.partition(" ")
    if block.language in OUTPUT and not block.marker:
        return
    if kind == "file" and rest:
        return
    if block.language == "sh" and (kind == "run" or re.match(r"not run: \S", block.marker)):
        yield from check_commands(book, block.text)
    elif block.language == "yaml" and kind in _YAML:
        yield from _yaml(book, kind, block.text)
    elif block.language != "yaml" or not re.match(r"not checked: \S", block.marker):
        yield f"```{block.language} {block.marker}: say what a test does with it (tests/docs_pages.py)"


# ---- commands


def check_commands(book: Book, text: str) -> Iterator[str]:
    """What is wrong with the lines of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        lexer.whitespace_split = True
        try:
            words = list(lexer)
        except ValueError as error:
            yield f"{line}: {error}"
            continue
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set(";&|"):
                message = _command(book, command) if command else None
                if message:
                    yield f"{shlex.join(command)}: {message}"
                command = []
            else:
                command.append(word)


def _command(book: Book, words: Sequence[str]) -> str | None:
    words = [word for number, word in enumerate(words) if not _is_setting(words[: number + 1])]
    if not words:
        return None
    name, rest = Path(words[0]).name, list(words[1:])
    if name in ("srun", "then"):
        return _command(book, rest)
    if name == "baton":
        return _baton(book, rest)
    if name == "make":
        return _make(book, rest)
    if name == "accelerate":
        return _accelerate(book, rest)
    if name in ("python", "pytest"):
        return _python(book, ["-m", "pytest", *rest] if name == "pytest" else rest)
    return None if name in FOREIGN else f"no program {name}; one that is not ours goes into FOREIGN"


def _is_setting(words: Sequence[str]) -> bool:
    """Whether the last of these words is VARIABLE=value before any program."""
    return all(re.match(r"\w+=", word) for word in words)


def commands() -> dict[str, TyperCommand]:
    """The sub-commands of baton."""
    group = typer.main.get_command(app)
    assert isinstance(group, TyperGroup)
    return dict(group.commands)


def _options(name: str, options: Sequence[str]) -> str | None:
    known = commands()
    if name.startswith("-"):
        return None
    if name not in known:
        return f"baton has no command {name}; there are {', '.join(known)}"
    there = {option for parameter in known[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
    missing = [option for option in options if option not in there | {"--help", "-h"}]
    return f"baton {name} has no option {missing[0]}" if missing else None


def _baton(book: Book, words: list[str]) -> str | None:
    if not words or words[0].startswith("-"):
        return None
    message = _options(words[0], [])
    if message:
        return message
    command = commands()[words[0]]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            given = command.make_context("baton", words[1:]).params
    except Exit:  # --help
        return None
    except TyperException as error:
        return error.format_message()
    if not given.keys() & {"recipe", "target"}:
        return None
    target = given.get("recipe") or given.get("target")
    if target is None:  # `baton doctor` may do without
        return _file(book, given.get("launch"))
    target = str(target)
    if target.startswith(RUNS) and not target.endswith(".yaml"):
        return None
    sections = [*(given.get("to") or []), *(given.get("force") or []), *(given.get("compare") or [])]
    sections += [name for name in (given.get("section"), given.get("stage"), given.get("model")) if name]
    return _file(book, given.get("launch")) or _recipe(book, target, given.get("overrides") or [], None, sections)


def _file(book: Book, path: Any) -> str | None:
    return None if path is None or (book.root / path).is_file() else f"no file {path}"


def _recipe(
    book: Book, path: str, overrides: Sequence[str], section: str | None, sections: Sequence[str] = ()
) -> str | None:
    """Whether a recipe of the repository or of the pages loads with these overrides, and has these sections."""
    if path in book.files:
        text = book.files[path]
    elif (book.root / path).is_file():
        text = (book.root / path).read_text(encoding="utf-8")
    else:
        return f"no recipe {path}"
    return _loads(text, overrides, section, sections)


def _loads(
    text: str, overrides: Sequence[str] = (), section: str | None = None, sections: Sequence[str] = ()
) -> str | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        # A parent in runs/ is made by a command of the pages; here any folder will do.
        for parent in re.findall(rf"\b{RUNS}[\w./-]*\w", " ".join([text, *overrides])):
            (Path(folder) / parent).mkdir(parents=True, exist_ok=True)
        try:
            with contextlib.chdir(folder):
                recipe = load_recipe(path, overrides, section=section)
        except UserError as error:
            return str(error).replace(f"{path}:", "line ")
    missing = [name for name in sections if name not in recipe.sections]
    if missing:
        return f"no section {missing[0]}"
    entries = [entry for one in recipe.sections.values() if one.stage == "ppo" for entry in one.config.reward]
    return next((message for entry in entries if (message := _arguments(entry))), None)


def _targets(root: Path, targets: Sequence[str]) -> str | None:
    there = set(re.findall(r"^([\w-]+):", (root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = [target for target in targets if re.fullmatch(r"[a-z-]+", target) and target not in there]
    return f"no target {missing[0]}" if missing else None


def _make(book: Book, words: list[str]) -> str | None:
    """The commands that make would run are as good as typed."""
    message = _targets(book.root, [word for word in words if "=" not in word])
    if message:
        return message
    with tempfile.TemporaryDirectory() as folder:
        for name in ("Makefile", "pyproject.toml", "requirements.lock", "requirements-test.lock"):
            shutil.copyfile(book.root / name, Path(folder) / name)
        (Path(folder) / ".venv").mkdir()
        for mark in (".ready", ".ready-test"):
            (Path(folder) / ".venv" / mark).touch()
        done = subprocess.run(["make", "-n", *words], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip()
    ours = [line for line in done.stdout.splitlines() if line.startswith((".venv/bin/baton", ".venv/bin/python"))]
    return next(check_commands(book, "\n".join(ours)), None)


def _accelerate(book: Book, words: list[str]) -> str | None:
    if "-m" not in words or words[0] != "launch":
        return "expected accelerate launch --config_file FILE -m MODULE ..."
    at = words.index("-m")
    file = words[words.index("--config_file") + 1] if "--config_file" in words[:at] else None
    return _file(book, file) or _python(book, words[at:])


def _python(book: Book, words: list[str]) -> str | None:
    if not words or words[0] != "-m":
        return _file(book, words[0]) if words and not words[0].startswith("-") else None
    module, rest = words[1], words[2:]
    if find_spec(module) is None:
        return f"no module {module}"
    if module == "pytest":
        paths = [word.partition("::")[0] for word in rest if word.startswith("tests/")]
        return next((message for message in (_file(book, path) for path in paths) if message), None)
    if not module.startswith("stages."):
        return None
    section = rest[rest.index("--section") + 1] if "--section" in rest else module.removeprefix("stages.")
    plain = [word for word in rest if word not in ("--section", section)]
    return _recipe(book, plain[0], plain[1:], section, [section])


# ---- recipes and parts of them


def _yaml(book: Book, kind: str, text: str) -> Iterator[str]:
    try:
        value = read_yaml(text)
    except ValueError as error:
        yield str(error)
        return
    if kind in ("data", "reward"):
        entries = value if isinstance(value, list) else [value]
        yield from _entries(kind, entries)
        return
    if kind == "recipe":
        message = _loads(text)
    else:
        tiny = read_yaml((book.root / "recipes" / "tiny.yaml").read_text(encoding="utf-8"))
        unknown = sorted(value.keys() - tiny["stages"].keys()) if kind == "keys" else []
        if unknown:
            yield f"recipes/tiny.yaml has no section {unknown[0]}"
            return
        tiny["stages"] = _over(tiny["stages"], value) if kind == "keys" else tiny["stages"] | value
        message = _loads(yaml.safe_dump(tiny, sort_keys=False))
    if message:
        yield message


_YAML = ("recipe", "sections", "keys", "data", "reward")


def _entries(kind: str, entries: Sequence[Any]) -> Iterator[str]:
    adapter: TypeAdapter[Any] = TypeAdapter(SourceConfig if kind == "data" else RewardConfig)
    for entry in entries:
        try:
            valid = adapter.validate_python(entry)
        except ValidationError as error:
            first = error.errors()[0]
            yield f"{entry}: {'.'.join(map(str, first['loc']))}: {first['msg']}"
            continue
        message = _arguments(valid) if kind == "reward" else None
        if message:
            yield f"{entry}: {message}"


def _arguments(entry: RewardConfig) -> str | None:
    """What is wrong with the `args` of one of our own functions."""
    if entry.function is None or ":" in entry.function:
        return None
    try:
        Composition([entry], {})
    except UserError as error:
        return str(error)
    return None


def _over(below: Any, above: Any) -> Any:
    """The keys of `above` laid over those of `below`."""
    if not isinstance(below, Mapping) or not isinstance(above, Mapping):
        return above
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}
