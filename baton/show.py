"""`baton config`: a recipe with every value that will be used, as YAML, each with its source beside it.

Comments name the models that each section will have in memory, and where their weights come from.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from training.recipe import Recipe, Section
from training.registry import Registry

_WIDTH = 60


def show_recipe(recipe: Recipe, section: Section | None = None) -> str:
    """The whole recipe, or one section of it without its name (keys start at the margin)."""
    if section is not None:
        lines = [*_models(section, 0), *_lines(section.resolved, section.provenance, "", 0)]
    else:
        top = {key: value for key, value in recipe.resolved().items() if key != "stages"}
        lines = [*_lines(top, recipe.provenance, "", 0), "stages:"]
        for one in recipe.sections.values():
            lines += [f"  {one.name}:", *_models(one, 4)]
            lines += _lines(one.resolved, one.provenance, "", 4)
    return "\n".join(lines) + "\n"


def _models(section: Section, indent: int) -> list[str]:
    """A comment for each model that the section holds."""
    held = Registry().models(section.stage, section.config)
    return [f"{' ' * indent}# holds {model}" for model in held]


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
