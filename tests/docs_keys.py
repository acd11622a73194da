"""docs/keys.md: every key that a recipe may have, from the classes that read it.

python tests/docs_keys.py        writes the page again
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from data.config import SourceConfig
from reward.config import RewardConfig
from stages.evaluate.tasks import ScoreConfig, TaskConfig
from training.inputs import without_effect
from training.recipe import TopLevel
from training.recipe_errors import models_in
from training.registry import Registry

PAGE = Path(__file__).resolve().parent.parent / "docs" / "keys.md"
HEAD = """\
# Every key of a recipe

This page is made from the classes that read a recipe: `python tests/docs_keys.py` writes it again, and a test compares.
For a recipe of your own, `baton config recipes/tiny.yaml` prints every value that will be used and where it comes from.

An unknown key, a wrong type, a value out of range and a key that the stage would not read are errors: the message names
the file, the line and the key that was meant, and nothing is started. Keys that begin with `x-` are yours, for notes
and YAML anchors.

† The result does not depend on this key: another value leaves a finished stage up to date, and lets an unfinished one
resume.
"""
FOOT = "Next: [the command line](commands.md)\n"
SOURCES = models_in(SourceConfig)
SHARED: dict[type[BaseModel], str] = {
    **{
        source: f"An entry of `data:`, source: {get_args(source.model_fields['source'].annotation)[0]}"
        for source in SOURCES
    },
    RewardConfig: "An entry of `reward:`",
    ScoreConfig: "An entry of a task's `scores:`, of kind answers",
    **{
        task: f"An entry of evaluate's `tasks:`, kind: {get_args(task.model_fields['kind'].annotation)[0]}"
        for task in models_in(TaskConfig)
    },
}
"""Classes that several stages have, under a heading of their own."""
_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    """The whole page."""
    registry = Registry()
    parts = [HEAD, *_section("The recipe itself", "", TopLevel)]
    for stage in registry.names:
        parts += _section(f"{stage}", f"A section that runs `stages/{stage}`.", registry.config_class(stage))
    for model, title in SHARED.items():
        parts += _section(title, "", model)
    return "\n".join([*parts, FOOT])


def _section(title: str, words: str, model: type[BaseModel]) -> Iterator[str]:
    yield f"## {title}\n"
    if words:
        yield f"{words}\n"
    yield "| key | type | default | |\n| --- | --- | --- | --- |"
    yield from _rows(model, "")
    yield ""


def _rows(model: type[BaseModel], prefix: str) -> Iterator[str]:
    """A line for each key; the keys of a mapping follow it. Of what extends a shared class, the keys that it adds."""
    said, kinds = documented(model)
    known = {
        name for shared in SHARED if model is not shared and issubclass(model, shared) for name in shared.model_fields
    }
    for name, field in model.model_fields.items():
        if name in known:
            continue
        inner = [found for found in models_in(field.annotation) if found not in SHARED]
        default = _default(field, nested=bool(inner))
        mark = " †" if name in without_effect(model) else ""
        cells = (f"`{prefix}{name}`{mark}", _cell(_kind(kinds[name], field)), default, _cell(said.get(name, "")))
        yield f"| {' | '.join(cells)} |"
        for found in inner:
            yield from _rows(found, f"{prefix}{name}.")


def documented(model: type[BaseModel]) -> tuple[dict[str, str], dict[str, str]]:
    """The text under each field, and its annotation as it is written; inherited fields too."""
    said: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if owner is BaseModel or not issubclass(owner, BaseModel):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, [*body.body[1:], None]):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                kinds[statement.target.id] = ast.unparse(statement.annotation)
                if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                    said[statement.target.id] = " ".join(str(after.value.value).split())
    return said, kinds


def _kind(annotation: str, field: FieldInfo) -> str:
    """`Literal['a', 'b'] | None` as `a`, `b` or null; numbers with their range."""
    choices = [str(value) for part in (field.annotation, *get_args(field.annotation)) for value in _choices(part)]
    rest = re.sub(r"Literal\[.*?\]", "", annotation)
    plain = ["dict"] if rest.startswith("dict") else [part.strip() for part in rest.split("|") if part.strip()]
    names = {"None": "null", "bool": "true or false", "str": "text", "int": "whole number", "float": "number"}
    words = [f"`{choice}`" for choice in dict.fromkeys(choices)]
    for part in plain:
        entries = re.fullmatch(r"list\[(.*)\]", part)
        config = part.endswith(("Config", "Arguments", "Gate"))
        words.append("list" if entries else "mapping" if config or part.startswith("dict") else names.get(part, part))
    bounds = [
        f"{sign} {getattr(entry, name)}"
        for entry in field.metadata
        for name, sign in _BOUNDS.items()
        if name in vars(type(entry)).get("__dataclass_fields__", {})
    ]
    return ", ".join(words) + (f"; {', '.join(bounds)}" if bounds else "")


def _choices(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if str(annotation).startswith("typing.Literal") else ()


def _default(field: FieldInfo, *, nested: bool) -> str:
    if field.is_required():
        return "**needed**"
    value = field.get_default(call_default_factory=True)
    if nested or value is PydanticUndefined or value in ([], {}, ""):
        return ""
    said = str(value).lower() if isinstance(value, bool) else str(value).replace("\n", "\\n")
    return f"`{'null' if value is None else said}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
