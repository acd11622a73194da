"""A reader of the part of Go's text/template that Ollama's templates use, written from its documentation
(https://pkg.go.dev/text/template) and not from what `baton export` writes."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_ACTION = re.compile(r"\{\{(?P<left>- )?\s*(?P<body>.*?)\s*(?P<right> -)?\}\}", re.DOTALL)
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|:=|[()|]|[^\s()|,]+|,')


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """What Ollama makes of the messages."""
    data = {"Messages": [{"Role": m["role"], "Content": m["content"]} for m in messages]}
    pieces = _pieces(template)
    tree, rest = _parse(pieces, 0)
    assert rest == len(pieces)
    return _run(tree, data, {"$": data})


def _pieces(template: str) -> list[tuple[str, str]]:
    found, place, trim = [], 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trim else text
        text = text.rstrip() if match["left"] else text
        found += [("text", text), ("action", match["body"])]
        place, trim = match.end(), bool(match["right"])
    text = template[place:]
    return [*found, ("text", text.lstrip() if trim else text)]


def _parse(pieces: Sequence[tuple[str, str]], place: int) -> tuple[list[Any], int]:
    nodes: list[Any] = []
    while place < len(pieces):
        kind, body = pieces[place]
        word = body.split(" ")[0] if kind == "action" else ""
        if word in ("else", "end"):
            return nodes, place
        if word in ("if", "range"):
            node, place = _block(word, body[len(word) :], pieces, place + 1)
            nodes.append(node)
            continue
        nodes.append((kind, body))
        place += 1
    return nodes, place


def _block(word: str, condition: str, pieces: Sequence[tuple[str, str]], place: int) -> tuple[Any, int]:
    inner, place = _parse(pieces, place)
    body = pieces[place][1]
    if body == "end":
        return (word, condition, inner, []), place + 1
    rest = body.removeprefix("else").strip()
    if rest.startswith("if "):
        node, place = _block("if", rest[2:], pieces, place + 1)
        return (word, condition, inner, [node]), place
    assert not rest
    other, place = _parse(pieces, place + 1)
    return (word, condition, inner, other), place + 1


def _run(nodes: Sequence[Any], dot: Any, names: dict[str, Any]) -> str:
    text = ""
    for node in nodes:
        kind, body = node[0], node[1]
        if kind == "text":
            text += body
        elif kind == "action":
            name, assigns, expression = body.partition(":=")
            if assigns:
                names[name.strip()] = _value(expression, dot, names)
            else:
                text += str(_value(body, dot, names))
        elif kind == "if":
            text += _run(node[2] if _value(body, dot, names) else node[3], dot, dict(names))
        else:
            variables, _, expression = body.partition(":=")
            index, element = (name.strip() for name in variables.split(","))
            for place, item in enumerate(_value(expression, dot, names)):
                text += _run(node[2], item, {**names, index: place, element: item})
    return text


def _value(expression: str, dot: Any, names: Mapping[str, Any]) -> Any:
    tokens = _TOKEN.findall(expression)
    found, rest = _call(tokens, 0, dot, names)
    assert rest == len(tokens), expression
    return found


def _call(tokens: Sequence[str], place: int, dot: Any, names: Mapping[str, Any]) -> tuple[Any, int]:
    """A function with its operands, or one operand, up to a closing bracket or the end."""
    function = tokens[place] if re.fullmatch(r"[a-z]+", tokens[place]) else None
    place += function is not None
    operands = []
    while place < len(tokens) and tokens[place] != ")":
        operand, place = _operand(tokens, place, dot, names)
        operands.append(operand)
    if function is None:
        (only,) = operands
        return only, place
    return _FUNCTIONS[function](*operands), place


def _operand(tokens: Sequence[str], place: int, dot: Any, names: Mapping[str, Any]) -> tuple[Any, int]:
    token = tokens[place]
    if token == "(":
        found, place = _call(tokens, place + 1, dot, names)
        assert tokens[place] == ")"
        place += 1
        if place < len(tokens) and re.fullmatch(r"\.\w+", tokens[place]):
            return found[tokens[place][1:]], place + 1
        return found, place
    if token.startswith('"'):
        return token[1:-1], place + 1
    if token.isdigit():
        return int(token), place + 1
    name, *fields = token.split(".")
    found = names[name] if name else dot
    for field in fields:
        found = found[field]
    return found, place + 1


_FUNCTIONS = {
    "eq": lambda one, *others: any(one == other for other in others),
    "ne": lambda one, other: one != other,
    "not": lambda one: not one,
    "and": lambda *each: next((one for one in each if not one), each[-1]),
    "len": len,
    "slice": lambda items, start: items[start:],
    "index": lambda items, place: items[place],
}
