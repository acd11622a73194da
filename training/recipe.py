"""Recipes: one YAML file for a whole pipeline, with a section for each stage. Strict, typed and fast: no torch here.

    name: tiny                    # runs/tiny receives everything
    seed: 42
    data_root: ../shared/data     # optional: where `source: file` paths start
    output_root: runs             # optional
    x-notes: anything             # keys that begin with x- are yours (notes, YAML anchors); Baton ignores them
    stages:
      tokenizer: {...}            # keys: those of stages/tokenizer/config.py
      reward: {stage: reward_model, parent: sft, ...}

The `Config` in `stages/<stage>/config.py` defines a section's keys, and the function `parents` there its parents (see
`training/registry.py`). A parent is a section, a checkpoint directory, or a model id of the hub, `organisation/name`.
A section whose rows are read as data (`source: stage`) is a parent, too.

Overrides, `section.key.key=value`, follow the same rules as the file. The value is YAML, and a number names an entry of
a list (`sft.data.0.size=100`). All mistakes in a recipe are reported together, in one `RecipeError`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from data.config import FileSource, StageSource
from handoff.errors import UserError
from handoff.gguf import is_gguf
from handoff.manifest import KIND_WORDS, kinds_in_words
from training.config import StageConfig
from training.recipe_errors import Translator
from training.recipe_text import (
    COMMAND_LINE,
    Document,
    KeyPath,
    Problem,
    apply_override,
    did_you_mean,
    dotted,
    read_document,
)
from training.registry import Registry
from training.strict import Strict

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")
_RUN_NAME = re.compile(r"[A-Za-z](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_VARIABLE = re.compile(r"\$(?:\{\w+\}|[A-Za-z_]\w*)")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
DATA_ROLE = "data:"
"""Begins the roles of parents whose rows a section reads: `data:generate`."""
_RESERVED_SECTIONS = ("logs", "stages", "name", "seed", "data_root", "output_root")


class RecipeError(UserError):
    """An unusable recipe. The message has one line per mistake: `file:line: section.key: what is wrong`."""


class TopLevel(Strict):
    """The keys of a recipe outside its sections."""

    name: str = Field(min_length=1)
    """Name of the run's folder: `<output_root>/<name>`."""
    seed: int = Field(default=42, ge=0, lt=2**32)
    """The seed from which all randomness of the run is derived."""
    data_root: str | None = None
    """Folder to which the `path` of file sources is relative; by default the working directory."""
    output_root: str = "runs"
    """Folder for all runs."""
    stages: dict[str, dict[str, Any] | None] = Field(min_length=1)
    """The sections, by name."""


@dataclass(frozen=True)
class Section:
    """One stage of a recipe."""

    name: str
    stage: str
    """The stage package that runs it."""
    config: Any
    """An instance of that package's `config.Config`."""
    parents: dict[str, str]
    """Role -> section, checkpoint directory or hub id. They are required; sections among them run first. The role of a
    stage whose rows are read is `data:` and its name."""
    soft_parents: dict[str, str]
    """Role -> section, directory or hub id. Sections among them run before this one if they run at all; not required.
    The roles of models that are compared with each other begin with `models:`."""
    resolved: dict[str, Any]
    """Every key with its value, defaults included, as plain values."""
    provenance: dict[str, str]
    """Dotted key -> "default", "<file>:<line>" or "command line"."""

    @property
    def references(self) -> dict[str, str]:
        """`parents` and `soft_parents` together."""
        return self.parents | self.soft_parents

    def place(self, role: str) -> str:
        """Where the recipe names the parent of that role, for messages: `<file>:<line>: sft.parent`."""
        _, _, *path = find(self, self.references[role], role)
        leaf = next(n for n in range(len(path), -1, -1) if n == 0 or ".".join(map(str, path[:n])) in self.provenance)
        origin = self.provenance.get(".".join(map(str, path[:leaf])), "")
        return f"{origin}: {'.'.join(map(str, (self.name, *path)))}"


@dataclass(frozen=True)
class Recipe:
    """A recipe, read, with overrides applied, and checked."""

    path: Path
    name: str
    seed: int
    data_root: Path | None
    output_root: Path
    sections: dict[str, Section]
    """By name, in the order of the file."""
    overrides: tuple[str, ...] = ()
    """Overrides as given on the command line, so that another process can load the same recipe."""
    provenance: dict[str, str] = field(default_factory=dict)
    """Of the keys outside the sections."""

    @property
    def run_dir(self) -> Path:
        """The folder for everything that the recipe produces."""
        return self.output_root / self.name

    def section(self, name: str) -> Section:
        """A section by name. Raises RecipeError when there is none."""
        if name not in self.sections:
            raise RecipeError(
                f"{self.path}: no section {name}{did_you_mean(name, self.sections) or _among(self.sections)}"
            )
        return self.sections[name]

    def order(self, targets: Sequence[str] | None = None) -> list[str]:
        """Section names with parents first, otherwise in the order of the file.

        With `targets`: only these and the sections that they need. Soft parents affect the order, but are not added.
        """
        wanted = set(self.sections)
        if targets is not None:
            wanted = set()
            waiting = [self.section(name).name for name in targets]
            while waiting:
                name = waiting.pop()
                if name not in wanted:
                    wanted.add(name)
                    waiting += self.needs(name)
        result: list[str] = []
        while len(result) < len(wanted):
            ready = (n for n in self.sections if n in wanted and n not in result and self._is_ready(n, wanted, result))
            result.append(next(ready))
        return result

    def needs(self, name: str) -> list[str]:
        """The sections among a section's parents."""
        return [ref for ref in dict.fromkeys(self.sections[name].parents.values()) if ref in self.sections]

    def _is_ready(self, name: str, wanted: set[str], done: list[str]) -> bool:
        before = [*self.needs(name), *self.sections[name].soft_parents.values()]
        return all(other in done for other in before if other in wanted)

    def resolved(self) -> dict[str, Any]:
        """The whole recipe as plain values, defaults included."""
        return {
            "name": self.name,
            "seed": self.seed,
            "data_root": None if self.data_root is None else str(self.data_root),
            "output_root": str(self.output_root),
            "stages": {name: section.resolved for name, section in self.sections.items()},
        }

    def explain(self) -> dict[str, str]:
        """The origin of each value of `resolved()`: `sft.train.max_steps` -> `recipes/tiny.yaml:31`."""
        result = dict(self.provenance)
        for name, section in self.sections.items():
            result |= {f"{name}.{key}": place for key, place in section.provenance.items()}
        return result


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), section: str | None = None, registry: Registry | None = None
) -> Recipe:
    """Reads and checks a recipe.

    With `section`, an override may also be relative to that section (`train.learning_rate=1e-4`), unless its first word
    is a section or a top-level key. Raises RecipeError with every mistake found.
    """
    document = read_document(Path(path))
    if not isinstance(document.value, dict):
        if not document.problems:
            document.complain((), "is empty" if document.value is None else "must hold keys: name, stages, ...")
        _refuse(document)
    loader = _Loader(document, registry or Registry())
    for override in overrides:
        loader.override(override, section)
    recipe = loader.recipe(Path(path), tuple(overrides))
    if section is not None:
        recipe.section(section)
    return recipe


def _refuse(document: Document) -> None:
    """Raises RecipeError with the mistakes found so far, in the order of the file."""
    if document.problems:
        raise RecipeError("\n".join(str(problem) for problem in sorted(set(document.problems))))


def _among(names: Iterable[str]) -> str:
    return f"; there are {', '.join(names)}"


class _Loader:
    """The steps from a document to a recipe."""

    def __init__(self, document: Document, registry: Registry) -> None:
        self.document = document
        self.registry = registry

    def override(self, text: str, section: str | None) -> None:
        key, equals, value = text.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            self._bad_override(text, "an override has the form section.key=value")
            return
        given = self.document.value.get("stages")
        sections = list(given) if isinstance(given, dict) else []
        if path[0] in sections:
            if len(path) == 1:
                self._bad_override(key, f"is a section; set one of its keys: {key}.key=value")
                return
            apply_override(self.document, ("stages", *path), value)
        elif path[0] in TopLevel.model_fields and path[0] != "stages":
            apply_override(self.document, path, value)
        elif section is not None and section in sections:
            apply_override(self.document, ("stages", section, *path), value)
        else:
            self._bad_override(key, self._unknown_start(path, sections))

    def _unknown_start(self, path: tuple[str, ...], sections: Sequence[str]) -> str:
        known = [name for name in TopLevel.model_fields if name != "stages"]
        if path[0] == "stages" and len(path) > 1:
            return f"leave out `stages.`: {'.'.join(path[1:])}=..."
        hint = did_you_mean(path[0], [*sections, *known])
        if not hint and sections:
            hint = f", write for example {sections[-1]}.{'.'.join(path)}"
        return f"{path[0]} is neither a section ({', '.join(sections)}) nor one of {', '.join(known)}{hint}"

    def _bad_override(self, key: str, message: str) -> None:
        self.document.problems.append(Problem(-1, COMMAND_LINE, key, message))

    def recipe(self, path: Path, overrides: tuple[str, ...]) -> Recipe:
        raw = {key: value for key, value in self.document.value.items() if not key.startswith("x-")}
        top = self._validate(TopLevel, raw, (), "the recipe")
        given = raw.get("stages")
        sections: dict[str, Section] = {}
        for name, content in given.items() if isinstance(given, dict) else ():
            section = self._section(name, {} if content is None else content)
            if section is not None:
                sections[name] = section
        if isinstance(top, TopLevel) and not _RUN_NAME.fullmatch(top.name):
            self.document.complain(
                ("name",),
                f"'{top.name}' cannot name a folder: a letter, then at most 99 letters, digits, -, _ and dots inside",
            )
        places = {key: self._folder(top, key) for key in ("data_root", "output_root")}
        for section in sections.values():
            self._check_paths(section)
            self._check_references(section, list(given or {}))
            self._check_kinds(section, sections)
        self._check_cycles(sections)
        _refuse(self.document)
        assert isinstance(top, TopLevel)
        return Recipe(
            path=path,
            name=top.name,
            seed=top.seed,
            data_root=places["data_root"],
            output_root=places["output_root"] or Path(),
            sections=sections,
            overrides=overrides,
            provenance={key: self._source((key,)) for key in TopLevel.model_fields if key != "stages"},
        )

    def _folder(self, top: BaseModel | None, key: str) -> Path | None:
        """The folder that a key outside the sections names."""
        value = None if top is None else vars(top)[key]
        if value is None:
            return None
        self._refuse_variables((key,), value)
        try:
            return Path(value).expanduser()
        except RuntimeError:
            self.document.complain((key,), f"{value}: there is no such user; write the whole path")
            return None

    def _check_paths(self, section: Section) -> None:
        named = [source.path for source in section.config.sources() if isinstance(source, FileSource)]
        for value in dict.fromkeys([*named, *section.references.values()]):
            self._refuse_variables(find(section, value), value)

    def _refuse_variables(self, path: KeyPath, value: str) -> None:
        if _VARIABLE.search(value):
            message = f"{value}: a recipe's variables are not replaced; the shell does it on the command line: "
            self.document.complain(path, f"{message}{dotted(path)}=...")

    def _validate(self, model: type[BaseModel], raw: Any, prefix: KeyPath, stage: str) -> BaseModel | None:
        """Validates with pydantic's strict JSON rules: a list may become a tuple, but text never becomes a number."""
        try:
            return model.model_validate_json(json.dumps(raw))
        except ValidationError as error:
            others = self.registry.config_classes if prefix else dict[str, type[BaseModel]]
            Translator(self.document, prefix, stage, model, others).add(raw, error.errors(include_url=False))
            return None

    def _section(self, name: str, raw: Any) -> Section | None:
        where: KeyPath = ("stages", name)
        if not _NAME.fullmatch(name) or name in _RESERVED_SECTIONS:
            self.document.complain(
                where,
                "cannot name a section: a letter, then at most 99 letters, digits, - and _"
                + (f"; {name} is reserved" if name in _RESERVED_SECTIONS else ""),
            )
            return None
        if not isinstance(raw, dict):
            return None  # the top level has already reported this
        stage = raw.get("stage", name)
        if stage not in self.registry.names:
            at = (*where, "stage") if "stage" in raw else where
            hint = did_you_mean(str(stage), self.registry.names) or _among(self.registry.names)
            more = "" if "stage" in raw else "; a section with a name of its own says `stage: <which>`"
            self.document.complain(at, f"there is no stage {stage}{hint}{more}")
            return None
        model = self.registry.config_class(stage)
        config = self._validate(model, raw | {"stage": stage}, where, stage)
        if config is None:
            return None
        assert isinstance(config, StageConfig)
        resolved = config.model_dump(mode="json")
        return Section(
            name=name,
            stage=stage,
            config=config,
            parents=self.registry.parents(stage, config)
            | {f"{DATA_ROLE}{s.name}": s.name for s in config.sources() if isinstance(s, StageSource)},
            soft_parents=self.registry.soft_parents(stage, config),
            resolved=resolved,
            provenance={".".join(map(str, p)): self._source((*where, *p)) for p in leaves(resolved)},
        )

    def _source(self, path: KeyPath) -> str:
        places = self.document.places
        return next((places[path[:n]] for n in range(len(path), 0, -1) if self._gave(path, n)), "default")

    def _gave(self, path: KeyPath, length: int) -> bool:
        """Whether the recipe gives the first `length` parts of a path, with a value that holds the rest of it."""
        if path[:length] not in self.document.places:
            return False
        value = self.document.value
        for part in path[:length]:
            value = value[part]
        return length == len(path) or not isinstance(value, dict | list)

    def _check_references(self, section: Section, names: Sequence[str]) -> None:
        for role, ref in section.references.items():
            rows = role.startswith(DATA_ROLE)
            if ref == section.name:
                self.document.complain(
                    find(section, ref, role), "a stage cannot " + ("read its own rows" if rows else "start from itself")
                )
            elif (
                ref in names
                or _is_folder(ref)
                or _VARIABLE.search(ref)
                or (not rows and (is_hub_id(ref) or is_gguf(ref)))
            ):
                continue
            else:
                hint = did_you_mean(ref, names) or _among(names)
                kinds = (
                    "is not a section of this recipe or an existing folder"
                    if rows
                    else "is not a section of this recipe, an existing folder or .gguf file, or a hub id "
                    "(organisation/name)"
                )
                self.document.complain(find(section, ref, role), f"{ref} {kinds}{hint}")

    def _check_kinds(self, section: Section, sections: Mapping[str, Section]) -> None:
        """Rows are read from sections that publish rows, and a model of each role is of a kind that fits it."""
        refs = section.references.items()
        for role, other in ((role, sections[ref]) for role, ref in refs if ref in sections and ref != section.name):
            rows = role.startswith(DATA_ROLE)
            made = self.registry.declaration(other.stage).publishes
            wanted = self.registry.declaration(section.stage).kinds(role)
            if rows and not other.config.publishes_rows:
                makers = [name for name, one in sections.items() if one.config.publishes_rows and name != section.name]
                hint = f"; {', '.join(makers)} of this recipe does" if makers else ""
                message = f"{section.name} reads the rows of {other.name}, and stage {other.stage} publishes none{hint}"
            elif not rows and other.config.publishes_rows:
                message = (
                    f"{other.name} publishes rows, and {section.name} needs a model here; rows are read under `data`: "
                    f"{{source: stage, name: {other.name}}}"
                )
            elif not rows and made not in wanted:
                fitting = [
                    one.name
                    for one in sections.values()
                    if one is not section and self.registry.declaration(one.stage).publishes in wanted
                ]
                hint = f"; in this recipe: {', '.join(fitting)}" if fitting else ""
                message = (
                    f"{other.name} publishes {KIND_WORDS[made]}, and {section.name} needs {kinds_in_words(wanted)} "
                    f"here{hint}"
                )
            else:
                continue
            self.document.complain(find(section, other.name, role), message)

    def _check_cycles(self, sections: Mapping[str, Section]) -> None:
        graph = {
            name: [ref for ref in section.references.values() if ref in sections and ref != name]
            for name, section in sections.items()
        }
        done: set[str] = set()

        def visit(name: str, trail: tuple[str, ...]) -> None:
            if name in trail:
                circle = [*trail[trail.index(name) :], name]
                if not self.document.problems:
                    self.document.complain(("stages", name), f"sections wait for each other: {' <- '.join(circle)}")
                return
            if name not in done:
                for ref in graph[name]:
                    visit(ref, (*trail, name))
                done.add(name)

        for name in graph:
            visit(name, ())


def find(section: Section, ref: str, role: str = "") -> KeyPath:
    """The key path of a reference in a section: of several, one under the key that the role is called by, if there is
    one."""
    found: list[KeyPath] = []
    for path in leaves({key: value for key, value in section.resolved.items() if key != "stage"}):
        value: Any = section.resolved
        for part in path:
            value = value[part]
        if value == ref:
            found.append(path)
        elif isinstance(value, list) and ref in value:
            found.append((*path, value.index(ref)))
    key = role.partition(":")[0]

    def fits(path: KeyPath) -> bool:
        # The role of a reward model is `reward:`, whichever list of rewards names it, as `model` or among `models`.
        if key == "reward":
            return len(path) >= 3 and not {"model", "models"}.isdisjoint(path[-2:])
        return str(path[0]).startswith(key)

    found.sort(key=fits, reverse=True)  # those that fit first, and otherwise in the order of the recipe
    return ("stages", section.name, *(found[0] if found else ()))


def is_hub_id(ref: str) -> bool:
    """Whether it has the form `organisation/name` and does not begin with an existing folder, as a path would."""
    return _HUB_ID.fullmatch(ref) is not None and not _is_folder(ref.split("/")[0])


def _is_folder(ref: str) -> bool:
    with suppress(OSError, RuntimeError):  # a name that is too long, an unknown user after ~
        return Path(ref).expanduser().is_dir()
    return False


def leaves(value: Any, path: KeyPath = ()) -> Iterable[KeyPath]:
    """The key paths of all values that hold no further keys; a list of plain values is one value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and any(isinstance(entry, dict) for entry in value):
        for row, inner in enumerate(value):
            yield from leaves(inner, (*path, row))
    else:
        yield path
