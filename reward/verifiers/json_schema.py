"""Checks that a completion is JSON that a schema accepts."""

import functools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import regex
from jsonschema import SchemaError, ValidationError, validators
from referencing import Registry
from referencing.exceptions import Unresolvable

from data.records import Message
from reward.functions import RewardError, one_form
from reward.golds_check import by_calling
from reward.verifiers.golds import row_error

_FENCED = re.compile(r"```(?:json)?[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL | re.IGNORECASE)


PATTERN_SECONDS = 2.0
"""Wall time limit for one match of a schema's `pattern`; a string that takes longer does not match."""


class NotStrict(ValueError):
    """Text that Python's parser accepts but the JSON standard (RFC 8259) forbids or leaves undefined."""


def json_schema(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    schema: Any = None,
    column: str = "schema",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion is JSON that the schema accepts, else 0; None where a row's schema is null.

    The JSON must be the whole completion, bare or in one code fence, without text around it, comments, trailing commas,
    NaN, Infinity or repeated keys.

    Args:
        schema: one schema for all rows, in the recipe's `args:`; or the prompts' column of this name. A schema is an
            object or its JSON, of draft 2020-12 unless its `$schema` says otherwise. References to other documents are
            not fetched.
        column: another column that holds the schemas, when `schema` is not given.

    Raises:
        RewardError: a missing or invalid schema.

    >>> json_schema([], ['{"n": 1}', '{"n": "1"}', '```json\\n{"n": 2}\\n```', 'n: 1'],
    ...     schema={"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]})
    [1.0, 0.0, 1.0, 0.0]
    """
    if schema is None:
        schema = columns.get(column)
    if schema is None:
        raise RewardError(
            f"`json_schema` needs a schema: set `args: {{schema: ...}}`, or add a column `{column}` to the prompts"
        )
    per_row = schema if isinstance(schema, list) else [schema] * len(completions)
    if len(per_row) != len(completions):
        raise RewardError("`json_schema`: `schema` in `args:` is a list; a schema is an object (or its JSON)")
    out: list[float | None] = []
    for row, (one, text) in enumerate(zip(per_row, completions, strict=True)):
        try:
            out.append(None if one is None else float(_accepts(_validator(_canonical(one)), one_form(text))))
        except (SchemaError, Unresolvable, regex.error, ValueError) as error:
            reason = error.message if isinstance(error, SchemaError) else str(error)
            raise row_error("json_schema", prompts, row, f"the schema cannot be used: {reason}") from error
    return out


def json_schema_unreadable(rows: int, columns: Mapping[str, Any], **args: Any) -> dict[int, str]:
    """The rows whose schema cannot be used, and why."""
    return by_calling(json_schema, rows, columns, **args)


def strict_json(text: str) -> Any:
    """The value of a JSON text, bare or alone in a code fence.

    Raises:
        ValueError, RecursionError: the text is not strict JSON.

    >>> strict_json('{"a": [1, 2.5, null]}')
    {'a': [1, 2.5, None]}
    """
    fenced = _FENCED.fullmatch(text.strip())
    return json.loads(
        fenced[1] if fenced else text,
        parse_constant=_no_constant,
        parse_float=_finite,
        object_pairs_hook=_no_key_twice,
    )


def _canonical(schema: Any) -> str:
    """The schema as canonical text, used as a cache key. Raises ValueError."""
    parsed = json.loads(schema) if isinstance(schema, str) else schema
    return one_form(json.dumps(parsed, sort_keys=True, ensure_ascii=False))


@functools.lru_cache(maxsize=256)
def _validator(schema: str) -> Any:
    """Raises SchemaError, ValueError."""
    parsed = json.loads(schema)
    if not isinstance(parsed, dict | bool):
        raise ValueError(f"{schema[:80]} is not an object")
    draft = validators.validator_for(parsed, default=validators.validator_for(True))
    draft.check_schema(parsed)
    # An empty registry: without one, jsonschema would fetch references from the network.
    return validators.extend(draft, {"pattern": _pattern})(parsed, registry=Registry())


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    """The keyword `pattern` with a time limit, since the policy could write text that makes a match very slow."""
    if isinstance(instance, str):
        try:
            found = regex.search(pattern, instance, timeout=PATTERN_SECONDS)
        except TimeoutError:
            found = None
        if found is None:
            yield ValidationError("does not match the pattern")


def _accepts(validator: Any, text: str) -> bool:
    try:
        value = strict_json(text)
    except (ValueError, RecursionError):
        return False
    try:
        return bool(validator.is_valid(value))
    except (RecursionError, OverflowError):  # nested too deep, or an integer too large for `multipleOf: 0.1`
        return False


def _no_constant(name: str) -> float:
    raise NotStrict(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise NotStrict(f"{text} is too large for a number")
    return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise NotStrict("a key occurs twice")
    return dict(pairs)
