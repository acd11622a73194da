"""The forms in which chat templates write a tool call.

    JsonForm     begin {"name": NAME, "arguments": {...}} between {...} end         Qwen 2.5 and 3, Hermes, Llama 3
    TaggedForm   begin NAME, then for each argument open KEY middle VALUE close, then end     Qwen 3.5, Nemotron, GLM

Both are learned from what the template makes of a probe.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

NAME, KEYS, VALUES = "probed_name", ("probed_key", "second_key"), ("probed value", "second value")
ARGUMENTS = dict(zip(KEYS, VALUES, strict=True))
_OF_ARGUMENTS = ("arguments", "parameters", "args")
_NAMED = re.compile(r"[\w.:/-]+")

Call: TypeAlias = tuple[str, dict[str, Any]]
Schemas: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The schema of each tool's arguments."""


class Form(Protocol):
    """How calls are written."""

    @property
    def marker(self) -> str:
        """The text by which calls are recognised; empty if an answer with a call has nothing before it."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """Everything that stands around names and arguments."""
        ...

    def next(self, text: str, schemas: Schemas) -> tuple[Call, str] | None:
        """The call with which the text begins, and the text behind it; None if it begins with none."""
        ...


@dataclass(frozen=True)
class JsonForm:
    """A call is a JSON object."""

    begin: str
    call: str
    """The probe's object."""
    between: str
    """Empty if the template has no answer with two calls."""
    end: str

    @property
    def marker(self) -> str:
        """As `Form.marker`."""
        return self.begin.strip()

    @property
    def parts(self) -> tuple[str, ...]:
        """As `Form.parts`."""
        return self.begin, self.between, self.end

    def around(self, name: str) -> tuple[str, str]:
        """What stands before and behind the arguments of a call of this tool."""
        before, _, after = self.call.partition(json.dumps(ARGUMENTS))
        quoted = json.dumps(name, ensure_ascii=False)
        return before.replace(json.dumps(NAME), quoted), after.replace(json.dumps(NAME), quoted)

    def next(self, text: str, schemas: Schemas) -> tuple[Call, str] | None:
        """As `Form.next`."""
        text = text.lstrip()
        for part in (self.end, self.marker, ",", "["):
            text = text.removeprefix(part.strip()).lstrip()
        try:
            value, length = json.JSONDecoder().raw_decode(text)
        except (ValueError, RecursionError):
            return None
        found = read_object(value)
        return None if found is None else (found, text[length:])


def read_object(value: Any) -> Call | None:
    """The call that a JSON object says."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = next((value[key] for key in _OF_ARGUMENTS if key in value), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except (ValueError, RecursionError):
            return None
    return (value["name"], given) if isinstance(given, dict) else None


@dataclass(frozen=True)
class TaggedForm:
    """Name, keys and values stand between tags. A value that is no text is JSON."""

    begin: str
    named: str
    """Behind the name."""
    open: str
    middle: str
    close: str
    end: str
    between: str

    @property
    def marker(self) -> str:
        """As `Form.marker`."""
        return self.begin.split()[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """As `Form.parts`."""
        return self.begin, self.named, self.open, self.middle, self.close, self.end, self.between

    def next(self, text: str, schemas: Schemas) -> tuple[Call, str] | None:
        """As `Form.next`. White space around tags may differ."""
        rest = _after(text, self.begin)
        name = None if rest is None else _NAMED.match(rest)
        if name is None or rest is None:
            return None
        rest = _after(rest[name.end() :], self.named)
        properties = schemas.get(name.group(), {}).get("properties", {})
        arguments: dict[str, Any] = {}
        while rest is not None and (opened := _after(rest, self.open)) is not None:
            key, middle, value = opened.partition(self.middle.strip())
            value, close, rest_ = value.partition(self.close.strip())
            if not middle or not close:
                return None
            # The line breaks that the tags themselves have do not belong to the value.
            value = value.removeprefix(_lead(self.middle)).removesuffix(_trail(self.close))
            arguments[key.strip()] = _typed(value, properties.get(key.strip(), {}))
            rest = rest_
        rest = None if rest is None else _after(rest, self.end)
        return None if rest is None else ((name.group(), arguments), rest)


def _after(text: str, part: str) -> str | None:
    """The text behind `part`, with which it begins but for white space; None if it does not."""
    text = text.lstrip()
    for word in part.split():
        text = text.lstrip()
        if not text.startswith(word):
            return None
        text = text[len(word) :]
    return text


def _lead(middle: str) -> str:
    return middle[len(middle.rstrip()) :]


def _trail(close: str) -> str:
    return close[: len(close) - len(close.lstrip())]


def _typed(text: str, schema: Any) -> Any:
    """The value: a text where the schema takes one, or where it is no JSON."""
    if isinstance(schema, Mapping) and (schema.get("type") == "string" or text in schema.get("enum", ())):
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def learn(one: str, two: str | None) -> JsonForm | TaggedForm | None:
    """The form of an answer with the probe's call, and of one with two of them; None if it is another."""
    return _learn_json(one, two) or _learn_tagged(one, two)


def _learn_json(one: str, two: str | None) -> JsonForm | None:
    place = one.find(json.dumps(NAME))
    start = one.rfind("{", 0, place) if place >= 0 else -1
    if start < 0:
        return None
    try:
        value, length = json.JSONDecoder().raw_decode(one[start:])
    except ValueError:
        return None
    call = one[start : start + length]
    if read_object(value) != (NAME, ARGUMENTS) or json.dumps(ARGUMENTS) not in call:
        return None
    between = two.partition(call)[2].partition(call)[0] if two is not None and two.count(call) == 2 else ""
    return JsonForm(_last_word(one[:start]), call, between, one[start + length :])


def _learn_tagged(one: str, two: str | None) -> TaggedForm | None:
    marks = (NAME, KEYS[0], VALUES[0], KEYS[1], VALUES[1])
    if any(one.count(mark) != 1 for mark in marks) or [one.find(m) for m in marks] != sorted(
        one.find(m) for m in marks
    ):
        return None
    begin, named, middle, close, again, end = re.split("|".join(map(re.escape, marks)), one)
    shared = next((n for n in range(min(len(named), len(close)), 0, -1) if named[-n:] == close[-n:]), 0)
    opening = named[len(named) - shared :]
    named, close = named[: len(named) - shared], close[: len(close) - shared]
    begin = re.split(r"</[^>]*>", begin)[-1].lstrip()  # an empty thought may stand before it
    if again != middle or not close.strip() or not end.startswith(close) or not opening.strip() or not begin.strip():
        return None
    end = end[len(close) :]
    whole = begin + one.partition(begin)[2]
    between = two.partition(whole)[2].partition(whole)[0] if two is not None and two.count(whole) == 2 else ""
    made = TaggedForm(begin, named, opening, middle, close, end, between)
    found = made.next(whole, {})
    return made if found is not None and found[0] == (NAME, ARGUMENTS) and not found[1].strip() else None


def _last_word(text: str) -> str:
    """The last word with the white space behind it. Before it stand an answer's header and an empty thought."""
    cut = len(text.rstrip())
    while cut and not text[cut - 1].isspace():
        cut -= 1
    return text[cut:]
