"""Translates pydantic's errors about a section into plain messages: key, place, expected value, suggestion.

It also collects the names of all keys from the models, to suggest the right spelling of a misspelt key, the stage to
which a key belongs, or the right place of a misplaced key. No torch here.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import ErrorDetails

from training.recipe_text import Document, KeyPath, did_you_mean, dotted
from training.strict import Strict

_EXPECTED = {
    "bool_type": "true or false",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "dict_type": "a mapping of keys",
    "model_type": "a mapping of keys",
    "none_required": "null",
}
_RANGE = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
    "multiple_of": ("multiple_of", "a multiple of"),
}
_OTHER_BOOLEANS = {"on": "true", "yes": "true", "off": "false", "no": "false"}
_SHOWN_KEYS = 12


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may have, through unions, `Annotated`, lists and mappings."""
    origin = get_origin(annotation)
    if origin is None:
        return [annotation] if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
    if origin is Literal:
        return []
    arguments = get_args(annotation)
    found: list[type[BaseModel]] = []
    for argument in arguments[:1] if origin is Annotated else arguments:
        found += [model for model in models_in(argument) if model not in found]
    return found


def keys_of(model: type[BaseModel]) -> Iterator[tuple[str, ...]]:
    """Every key that a section of this model may hold, at any depth; the entries of a list share their keys."""
    for name, info in model.model_fields.items():
        yield (name,)
        for inner in models_in(info.annotation):
            yield from ((name, *rest) for rest in keys_of(inner))


def _models_at(model: type[BaseModel], raw: Any, path: KeyPath) -> list[type[BaseModel]]:
    """The models that the mapping at `path` of a section may have, without those that its own keys rule out."""
    models, value = [model], raw
    own = False  # whether the next key is one of the user's, in a mapping of models
    for part in path:
        value = value[part]
        if own:
            own = False
        elif isinstance(part, str):
            kinds = [outer.model_fields[part].annotation for outer in models if part in outer.model_fields]
            models = [inner for kind in kinds for inner in models_in(kind)]
            own = any(get_origin(kind) is dict for kind in kinds)
        if isinstance(value, dict) and not own:
            fitting = [inner for inner in models if _fits(inner, value)]
            models = fitting or models
    return models


def _fits(model: type[BaseModel], value: Mapping[str, Any]) -> bool:
    """Whether the value may be of this member of a union; false if a key (`source: world`) selects another member."""
    for name, info in model.model_fields.items():
        if get_origin(info.annotation) is Literal and info.is_required() and name in value:
            allowed = get_args(info.annotation)
            if len(allowed) == 1 and value[name] not in allowed:
                return False
    return True


class Translator:
    """Adds the errors of one section to the document's problems.

    `others` returns the models of all stages by name; it is called only for an unknown key.
    """

    def __init__(
        self,
        document: Document,
        prefix: KeyPath,
        stage: str,
        model: type[BaseModel],
        others: Callable[[], Mapping[str, type[BaseModel]]],
    ) -> None:
        self.document = document
        self.prefix = prefix
        self.stage = stage
        self.model = model
        self.others = others

    def add(self, raw: Mapping[str, Any], errors: Sequence[ErrorDetails]) -> None:
        """Records all errors; if several members of a union refuse one value, their errors become one message."""
        located = [(*_locate(raw, error), error) for error in errors]
        messages: dict[KeyPath, list[str]] = {}
        for path, tags, error in located:
            if not _is_best_member(tags, located):
                continue
            known = messages.setdefault(path, [])
            message = self._message(raw, path, error)
            if message not in known:
                known.append(message)
        for path, parts in messages.items():
            if (*self.prefix, *path) in self.document.unreadable:
                continue
            expected = [part.removeprefix("expected ") for part in parts if part.startswith("expected ")]
            rest = [part for part in parts if not part.startswith("expected ")]
            value = _get(raw, path)
            if expected:
                rest.insert(0, f"expected {' or '.join(expected)}, not {_show(value)}{_boolean_hint(value, expected)}")
            self.document.complain((*self.prefix, *path), "; ".join(rest))

    def _message(self, raw: Mapping[str, Any], path: KeyPath, error: ErrorDetails) -> str:
        kind, context = error["type"], error.get("ctx", {})
        if kind == "extra_forbidden":
            return self._unknown(raw, path)
        if kind == "missing":
            return "missing, this key is required"
        if kind in _EXPECTED:
            return "expected " + _EXPECTED[kind]
        if kind in _RANGE:
            name, words = _RANGE[kind]
            return f"{_show(_get(raw, path))} is out of range, it must be {words} {context[name]:g}"
        if kind in ("literal_error", "union_tag_invalid"):
            words = str(context["expected"] if kind == "literal_error" else context["expected_tags"])
            choices = re.findall(r"'([^']*)'", words)
            given = context["tag"] if kind == "union_tag_invalid" else _get(raw, path)
            if len(choices) < 2:
                return "expected " + words.replace("'", "")
            return f"{_show(given)} is none of {', '.join(choices)}{did_you_mean(str(given), choices)}"
        if kind == "union_tag_not_found":
            return f"missing, {_tag_choices(self.model, raw, path, str(context['discriminator']).strip(chr(39)))}"
        if kind == "too_short":
            return f"needs at least {_count(context['min_length'], 'entry', 'entries')}"
        if kind == "too_long":
            return f"takes at most {_count(context['max_length'], 'entry', 'entries')}"
        if kind == "string_too_short":
            return f"needs at least {_count(context['min_length'], 'character', 'characters')}"
        if kind in ("value_error", "assertion_error"):
            return str(context["error"])
        return error["msg"].replace("Input should", "should")

    def _unknown(self, raw: Mapping[str, Any], path: KeyPath) -> str:
        key = str(path[-1])
        models = list(_models_at(self.model, raw, path[:-1]))
        reasons = [m.refused[key] for m in models if issubclass(m, Strict) and key in m.refused]
        if reasons:
            return reasons[0]
        siblings = sorted({name for model in models for name in model.model_fields})
        here = did_you_mean(key, siblings)
        others = {stage: set(keys_of(model)) for stage, model in self.others().items() if stage != self.stage}
        names = tuple(str(part) for part in path if isinstance(part, str))
        owners = sorted(stage for stage, keys in others.items() if names in keys) or sorted(
            stage for stage, keys in others.items() if any(path_[-1] == key for path_ in keys)
        )
        elsewhere = sorted({".".join(keys) for keys in keys_of(self.model) if keys[-1] == key})
        if elsewhere:
            section = dotted(self.prefix)
            return f"unknown key here, its place is {' or '.join(f'{section}.{place}' for place in elsewhere)}"
        if owners:
            return f"unknown key{here or '.'} {key} is a key of {' and '.join(owners)}, not of {self.stage}"
        if here:
            return "unknown key" + here
        shown = ", ".join(siblings[:_SHOWN_KEYS]) + (", ..." if len(siblings) > _SHOWN_KEYS else "")
        return f"unknown key, known here: {shown}" if siblings else "unknown key"


def _locate(raw: Any, error: ErrorDetails) -> tuple[KeyPath, tuple[tuple[KeyPath, str], ...]]:
    """The path of a value in the section, and the union members that pydantic names on the way to it."""
    path: KeyPath = ()
    tags: list[tuple[KeyPath, str]] = []
    holder = raw
    for position, part in enumerate(error["loc"]):
        last = position == len(error["loc"]) - 1
        if isinstance(holder, dict) and isinstance(part, str):
            if part in holder or (last and error["type"] == "missing"):
                path, holder = (*path, part), holder.get(part)
            else:
                tags.append((path, part))
        elif isinstance(holder, list) and isinstance(part, int) and part < len(holder):
            path, holder = (*path, part), holder[part]
    return path, tuple(tags)


def _is_best_member(
    tags: tuple[tuple[KeyPath, str], ...],
    located: Sequence[tuple[KeyPath, tuple[tuple[KeyPath, str], ...], ErrorDetails]],
) -> bool:
    """Whether each union on the way was read as the member with the fewest errors, which the user probably meant."""
    for path, tag in tags:
        counts: dict[str, int] = {}
        for _, other_tags, _ in located:
            for other_path, other in other_tags:
                if other_path == path:
                    counts[other] = counts.get(other, 0) + 1
        if tag != min(counts, key=lambda name: counts[name]):
            return False
    return True


def _tag_choices(model: type[BaseModel], raw: Mapping[str, Any], path: KeyPath, key: str) -> str:
    choices = [
        str(choice)
        for member in _models_at(model, raw, path)
        if key in member.model_fields
        for choice in get_args(member.model_fields[key].annotation)
    ]
    return f"set `{key}:` to {' or '.join(choices)}"


def _get(raw: Any, path: KeyPath) -> Any:
    for part in path:
        raw = raw.get(part) if isinstance(raw, dict) else raw[part]
    return raw


def _show(value: Any) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return f"'{value}'" if isinstance(value, str) else str(value)


def _boolean_hint(value: Any, expected: Sequence[str]) -> str:
    if isinstance(value, str) and any("true or false" in words for words in expected):
        word = _OTHER_BOOLEANS.get(value.lower())
        return f": write {word}" if word else ""
    return ""


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
