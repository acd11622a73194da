"""What a turn holds besides its text: tool calls, a thought, and, on a conversation's first turn, the tools.

A chat template renders them where it takes them (data/turns.py). They travel in `Message.extra` as one JSON object,
with the keys by which templates know them: `tools`, `tool_calls`, `reasoning_content`, `tool_call_id`, `name`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from data.errors import RowRefused
from data.records import Message

THOUGHTS: Final = ("reasoning_content", "thinking", "reasoning")
"""Keys of a turn's thought. A row's own is used under the one that the template takes."""
OF_RESULTS: Final = ("name", "tool_call_id")
"""Keys of a tool's turn that say which call it answers."""
_MEND = "each is {type: function, function: {name, arguments}}, with an object of arguments"


def held(message: Message) -> dict[str, Any]:
    """What the message holds besides its text."""
    found: dict[str, Any] = json.loads(message.extra) if message.extra else {}
    return found


def holding(message: Message, extra: Mapping[str, Any]) -> Message:
    """The message with these keys besides its own."""
    both = {**held(message), **extra}
    return replace(message, extra=json.dumps(both, ensure_ascii=False)) if both else message


def with_tools(messages: tuple[Message, ...], tools: Sequence[Any]) -> tuple[Message, ...]:
    """The conversation with the tools that its answers may call."""
    return (holding(messages[0], {"tools": list(tools)}), *messages[1:]) if messages and tools else messages


def read_calls(value: Any) -> list[dict[str, Any]]:
    """The calls of a turn: OpenAI's list, or its older `function_call`. Arguments that are JSON text become objects.

    Raises:
        RowRefused: it is none of them.
    """
    calls = []
    for given in value if isinstance(value, list) else [value]:
        call = parsed(given)
        if not isinstance(call, dict):
            raise RowRefused("`tool_calls` cannot be read", _MEND)
        bare = "function" not in call
        function = call if bare else call["function"]
        arguments = parsed(function.get("arguments", {})) if isinstance(function, dict) else None
        if not isinstance(arguments, dict) or not isinstance(function.get("name"), str):
            raise RowRefused("`tool_calls` cannot be read", _MEND)
        around = {"type": "function"} if bare else {key: part for key, part in call.items() if key != "function"}
        calls.append({**around, "function": {**function, "arguments": arguments}})
    return calls


def read_tools(value: Any, key: str) -> list[dict[str, Any]]:
    """The tools of a row, given as a list or as its JSON text. A bare function, {name, parameters}, becomes a tool.

    Raises:
        RowRefused: they are none.
    """
    tools = parsed(value)
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise RowRefused(f"`{key}` cannot be read", "it is a list of objects, each of which describes a tool")
    return [
        {"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool for tool in tools
    ]


def parsed(value: Any) -> Any:
    """The value of a JSON text; any other value as it is."""
    if isinstance(value, str):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def as_text(calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The calls with their arguments as JSON text, which some templates want."""
    return [
        {
            **call,
            "function": {
                **call["function"],
                "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
            },
        }
        for call in calls
    ]
