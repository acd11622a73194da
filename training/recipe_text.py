"""Reads a recipe's YAML text with the place of every value, and applies overrides from the command line.

Where YAML 1.1 is surprising, the rules of version 1.2 apply: `3e-3` is a number; `on`, `off`, `yes`, `no`, `12:30` and
`2026-01-01` are words; `010` is ten. Keys given twice, tags, numbers that are not finite and a `#` that cuts a text are
errors. All errors of the text are collected before any is raised. No torch here.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from training.terminal import shown

KeyPath: TypeAlias = tuple[str | int, ...]
"""The path of keys to a value: ("stages", "sft", "data", 0, "size")."""

COMMAND_LINE = "command line"

_INT = re.compile(r"[-+]?[0-9](?:_?[0-9])*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9](?:_?[0-9])*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_CUT = re.compile(r" #[^\s#]")
_DEEPEST = 40
_MOST_VALUES = 100_000
_LARGEST_INT = 2**63
_TOO_DEEP = f"more than {_DEEPEST} levels of keys and lists in each other"
_CONSTANTS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass(frozen=True, order=True)
class Problem:
    """One mistake. `where` is `file:line` or "command line"; `line` orders the report."""

    line: int
    where: str
    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.key}: {self.message}" if self.key else f"{self.where}: {self.message}"


@dataclass
class Document:
    """Plain values, and for every key path the place of its value: `file:line` or "command line"."""

    file: str
    value: Any = None
    places: dict[KeyPath, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    unreadable: set[KeyPath] = field(default_factory=set)
    """Values that the text does not give, so that nothing more is said about them."""

    def place(self, path: KeyPath) -> str:
        """The place of a value, or of the nearest enclosing value that the recipe gives."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, f"{self.file}:1")

    def complain(self, path: KeyPath, message: str, key: str | None = None) -> None:
        """Records a mistake in the value at `path`. `key`: its name in the message, by default its dotted path."""
        where = self.place(path)
        line = -1 if where == COMMAND_LINE else int(where.rpartition(":")[2])
        self.problems.append(Problem(line, where, dotted(path) if key is None else key, message))


def dotted(path: KeyPath) -> str:
    """A value's name on the command line, which omits `stages.` before a section."""
    shown = path[1:] if len(path) > 1 and path[0] == "stages" else path
    return ".".join(str(part) for part in shown)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`, did you mean x?` with the nearest known word or several equally near ones, or an empty string."""
    choices = list(known)
    near = difflib.get_close_matches(word, choices, n=3, cutoff=0.6)
    if not near:
        near = [choice for choice in choices if choice.lower() == word.lower()]
    if not near:
        return ""
    best = difflib.SequenceMatcher(None, near[0], word).ratio()
    equal = [choice for choice in near if difflib.SequenceMatcher(None, choice, word).ratio() > best - 0.001]
    return f", did you mean {' or '.join(equal)}?"


def read_document(path: Path) -> Document:
    """Reads a recipe file. The result's `problems` lists the mistakes in its text."""
    document = Document(str(path))
    document.places[()] = f"{path}:1"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        folder = path.parent
        siblings = [str(other) for other in sorted(folder.glob("*.y*ml"))] if folder.is_dir() else []
        document.problems.append(Problem(0, str(path), "", "no such recipe" + did_you_mean(str(path), siblings)))
        return document
    except IsADirectoryError:
        document.problems.append(Problem(0, str(path), "", "is a folder, a recipe is a YAML file"))
        return document
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        document.problems.append(Problem(line, f"{path}:{line}", "", "not UTF-8 text; save the file as UTF-8"))
        return document
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        document.problems.append(Problem(0, str(path), "", f"cannot be read: {os_reason(error)}"))
        return document
    node = _compose(text, document, lambda line: f"{path}:{line}")
    if node is not None:
        document.value = _Reader(document, lambda line: f"{path}:{line}").read(node, ())
    return document


def os_reason(error: OSError | ValueError) -> str:
    """What is wrong, without the errno and the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def apply_override(document: Document, path: tuple[str, ...], text: str) -> None:
    """Applies one `key=value` of the command line to the document; `text` is read as YAML.

    A number names an entry of a list: `("stages", "sft", "data", "0", "size")`.
    """
    holder: Any = document.value
    place: KeyPath = ()
    for part in path[:-1]:
        key = _key(holder, part)
        place = (*place, key)
        if isinstance(holder, dict) and key not in holder:
            holder[key] = {}
            document.places[place] = COMMAND_LINE
        elif isinstance(holder, list) and not _is_entry(holder, key):
            return _no_entry(document, path, place, holder)
        if holder[key] is None:
            holder[key] = {}
        holder = holder[key]
        if not isinstance(holder, dict | list):
            message = f"{dotted(place)} is {holder!r}, it has no keys"
            document.problems.append(Problem(-1, COMMAND_LINE, dotted(path), message))
            return None
    key = _key(holder, path[-1])
    place = (*place, key)
    if isinstance(holder, list) and not _is_entry(holder, key):
        return _no_entry(document, path, place, holder)
    for known in [known for known in document.places if known[: len(place)] == place]:
        del document.places[known]
    document.places[place] = COMMAND_LINE
    problems = len(document.problems)
    node = _compose(text, document, lambda line: COMMAND_LINE, dotted(place))
    if len(document.problems) == problems:
        holder[key] = None if node is None else _Reader(document, lambda line: COMMAND_LINE).read(node, place)
    return None


def _key(holder: Any, part: str) -> str | int:
    return int(part) if isinstance(holder, list) and re.fullmatch("[0-9]{1,9}", part) else part


def _is_entry(holder: list[Any], key: str | int) -> bool:
    return isinstance(key, int) and key < len(holder)


def _no_entry(document: Document, path: tuple[str, ...], place: KeyPath, holder: list[Any]) -> None:
    message = f"{dotted(place[:-1])} is a list of {len(holder)}, its entries are numbered from 0"
    document.problems.append(Problem(-1, COMMAND_LINE, dotted(path), message))


class _Words(yaml.SafeLoader):
    """A YAML loader that keeps every plain scalar as text; `_Reader` interprets it."""

    yaml_implicit_resolvers: dict[str, Any] = {"<": [("tag:yaml.org,2002:merge", re.compile("^<<$"))]}  # noqa: RUF012


def _compose(text: str, document: Document, where: Callable[[int], str], key: str = "") -> yaml.Node | None:
    loader = None
    try:
        loader = _Words(text)
        return loader.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        hint = "; indent with spaces, not with tabs" if "'\\t'" in str(error.problem) else ""
        if where(line) == COMMAND_LINE:
            line, hint = -1, hint or "; put the value in quotes"
        document.problems.append(Problem(line, where(line), key, f"not valid YAML: {error.problem}{hint}"))
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        problem = f"not valid YAML: the character {shown(chr(error.character))} at position {error.position}"
        document.problems.append(Problem(line if where(line) != COMMAND_LINE else -1, where(line), key, problem))
    except RecursionError:
        document.problems.append(Problem(0, where(1), key, f"not valid YAML: {_TOO_DEEP}"))
    finally:
        if loader is not None:
            loader.dispose()
    return None


class _Reader:
    """Converts composed nodes to plain values and records the place of each."""

    def __init__(self, document: Document, where: Callable[[int], str]) -> None:
        self.document = document
        self.where = where
        self.open: list[yaml.Node] = []  # the enclosing nodes: an alias to one of them would recurse for ever
        self.count = 0

    def read(self, node: yaml.Node, path: KeyPath) -> Any:
        if any(node is outer for outer in self.open):
            return self._unreadable(path, "refers to itself")
        self.count += 1
        if self.count >= _MOST_VALUES or len(self.open) >= _DEEPEST:
            if self.count <= _MOST_VALUES:
                many = f"the recipe has more than {_MOST_VALUES:,} values; an anchor that is used again counts again"
                self._unreadable(path, many if self.count == _MOST_VALUES else _TOO_DEEP)
            return None
        self.open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self._placed(item, item, (*path, row)) for row, item in enumerate(node.value)]
            assert isinstance(node, yaml.ScalarNode)
            return self._scalar(node, path)
        finally:
            self.open.pop()

    def _placed(self, key: yaml.Node, node: yaml.Node, path: KeyPath) -> Any:
        self.document.places[path] = self.where(key.start_mark.line + 1)
        return self.read(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        result: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.document.complain(path, "a key must be a word")
                continue
            if key.tag == "tag:yaml.org,2002:merge":
                continue
            line = key.start_mark.line + 1
            name = str(key.value)
            if _NO_TEXT.search(name):
                self.document.complain(path, f"the key {shown(name)} holds a character that no text has")
                continue
            if name in lines:
                message = f"given twice, first in line {lines[name]}"
                self.document.problems.append(Problem(line, self.where(line), dotted((*path, name)), message))
                continue
            lines[name] = line
            result[name] = self._placed(key, value, (*path, name))
        for name, key, value in self._merged(node, path):
            if name not in result:
                result[name] = self._placed(key, value, (*path, name))
        return result

    def _merged(self, node: yaml.MappingNode, path: KeyPath) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """The keys that `<<: *anchor` adds, without those that the mapping itself gives."""
        for key, value in node.value:
            if key.tag != "tag:yaml.org,2002:merge":
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    self.document.complain(path, "`<<` needs an anchor of a mapping: `<<: *name`")
                    continue
                if any(source is outer for outer in self.open):
                    self.document.complain(path, "refers to itself")
                    continue
                self.open.append(source)
                yield from ((str(name.value), name, entry) for name, entry in source.value)
                yield from self._merged(source, path)
                self.open.pop()

    def _scalar(self, node: yaml.ScalarNode, path: KeyPath) -> Any:
        text = str(node.value)
        if node.tag != "tag:yaml.org,2002:str":
            return self._unreadable(path, f"the YAML tag {node.tag} is not read here; write the value without a tag")
        if _NO_TEXT.search(text):
            return self._unreadable(path, f"{shown(text)} holds a character that no text has")
        if node.style is not None:  # quoted or a block: always text
            return text
        if text in _CONSTANTS or text.lower() in ("null", "true", "false"):
            return _CONSTANTS[text.lower()]
        if _INT.fullmatch(text):
            digits = text.replace("_", "")
            base = 16 if "0x" in digits else 8 if "0o" in digits else 10
            if len(digits) < 100 and abs(number := int(digits, base)) < _LARGEST_INT:
                return number
            return self._unreadable(path, f"a whole number of {len(digits)} digits is too large (below 2^63)")
        if _FLOAT.fullmatch(text):
            digits = text.replace("_", "")
            value = math.nan if digits.lower() == ".nan" else float(digits.lower().replace(".inf", "inf"))
            return value if math.isfinite(value) else self._unreadable(path, f"{text} is not a finite number")
        mark = node.end_mark
        if mark.buffer is not None and _CUT.match(mark.buffer, mark.pointer):
            return self._unreadable(
                path,
                f"{text} ends here, since ` #` begins a comment in YAML: put the value in quotes if # belongs to it, "
                "or a space behind the # if it does not",
            )
        return text

    def _unreadable(self, path: KeyPath, message: str) -> None:
        self.document.complain(path, message)
        self.document.unreadable.add(path)
