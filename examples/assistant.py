"""An assistant with tools: the model asks for calls, this program makes them, and the model answers from their results.

baton serve Qwen/Qwen3-0.6B
python -m examples.assistant --model Qwen/Qwen3-0.6B "How much is 17 * 23, and what day is 2026-03-01?"
"""

import argparse
import ast
import datetime
import json
import operator
from collections.abc import Callable
from typing import Any

from openai import OpenAI

_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculate(expression: str) -> str:
    """The value of an expression of numbers, + - * / and parentheses; nothing else is run.

    >>> calculate("2 * (3 + 4)"), calculate("__import__('os')")
    ('14', 'error: only numbers, + - * / and parentheses')
    """

    def value(node: ast.AST) -> Any:
        if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            return node.value
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
            return _OPERATIONS[type(node.op)](value(node.left), value(node.right))
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -value(node.operand)
        raise ValueError("only numbers, + - * / and parentheses")

    try:
        return str(value(ast.parse(expression[:200], mode="eval").body))
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError) as error:
        return f"error: {'the expression cannot be read' if isinstance(error, SyntaxError) else error}"


def weekday(date: str) -> str:
    """The day of the week of a date, YYYY-MM-DD."""
    try:
        return datetime.date.fromisoformat(date).strftime("%A")
    except ValueError as error:
        return f"error: {error}"


TOOLS: dict[str, tuple[Callable[[str], str], str, str]] = {
    "calculate": (calculate, "expression", "Computes an expression of numbers, + - * / and parentheses."),
    "weekday": (weekday, "date", "Says the day of the week of a date, YYYY-MM-DD."),
}


def described() -> list[Any]:
    """The tools as requests have them."""
    found = []
    for name, (_, argument, words) in TOOLS.items():
        schema = {
            "type": "object",
            "properties": {argument: {"type": "string", "maxLength": 60}},
            "required": [argument],
            "additionalProperties": False,
        }
        found.append({"type": "function", "function": {"name": name, "description": words, "parameters": schema}})
    return found


def answer(client: OpenAI, model: str, question: str, *, rounds: int = 4, first: str = "auto") -> tuple[str, list[str]]:
    """The answer, and the calls that were made. `first`: the tool choice of the first round."""
    messages: list[Any] = [{"role": "user", "content": question}]
    made: list[str] = []
    for number in range(rounds):
        last = number == rounds - 1
        choice = "none" if last else first if number == 0 else "auto"
        reply = client.chat.completions.create(
            model=model, messages=messages, tools=described(), tool_choice=choice, temperature=0, max_tokens=200
        )  # type: ignore[call-overload]
        message = reply.choices[0].message
        if not message.tool_calls:
            return message.content or "", made
        messages.append(message.model_dump(exclude_none=True))
        for call in message.tool_calls:
            result = run(call.function.name, call.function.arguments)
            made.append(f"{call.function.name}({call.function.arguments}) = {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    raise AssertionError("the last round has no tools")


def run(name: str, arguments: str) -> str:
    """A call's result. What the model writes is not trusted: a wrong call gives an error that it can read."""
    if name not in TOOLS:
        return f"error: there is no tool {name}"
    function, argument, _ = TOOLS[name]
    given = json.loads(arguments)
    if not isinstance(given.get(argument), str):
        return f"error: {name} needs the text {argument}"
    return function(given[argument])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--model", required=True)
    given = parser.parse_args()
    text, made = answer(OpenAI(base_url=given.base_url, api_key="none"), given.model, given.question)
    print("\n".join([*made, text]))


if __name__ == "__main__":
    main()
