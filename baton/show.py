"""`baton config`: prints a recipe as YAML with every resolved value and its source."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from training.recipe import Recipe, Section

_WIDTH = 60


def show_recipe(recipe: Recipe, section: Section | None = None) -> str:
    """The whole recipe, or one section of it without its name (keys start at the margin)."""
    if section is not None:
        lines = list(_lines(section.resolved, section.provenance, "", 0))
    else:
        top = {key: value for key, value in recipe.resolved().items() if key != "stages"}
        lines = [*_lines(top, recipe.provenance, "", 0), "stages:"]
        for one in recipe.sections.values():
            lines.append(f"  {one.name}:")
            lines += _lines(one.resolved, one.provenance, "", 4)
    return "\n".join(lines) + "\n"


def _lines(value: Any, sources: Mapping[str, str], path: str, indent: int) -> Iterator[str]:
    """The lines of a mapping or of a list that holds mappings."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        here = f"{path}.{key}" if path else str(key)
        head = f"{' ' * indent}{key}:" if isinstance(value, dict) else f"{' ' * indent}-"
        if isinstance(value, list) and isinstance(inner, dict) and inner:
            first, *rest = _lines(inner, sources, here, indent + 2)
            yield f"{' ' * indent}- {first.lstrip()}"
            yield from rest
        elif _holds_more(inner):
            yield head
            yield from _lines(inner, sources, here, indent + 2)
        else:
            text = f"{head} {_scalar(inner)}"
            yield f"{text:{_WIDTH}}  # {sources[here]}" if here in sources else text


def _holds_more(value: Any) -> bool:
    if isinstance(value, list):
        return any(isinstance(entry, dict) for entry in value)
    return isinstance(value, dict) and bool(value)


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
