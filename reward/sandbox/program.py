"""The process that runs the program. Nothing in it is secret, and nothing in it is trusted.

It loads the program's text and then serves the tests' process: it calls a function, or gives the plain value of an
object. The program may change this code too, but that gains it nothing: it can only answer calls with values, which it
may do anyway.
"""

import importlib
import os
import random
import sys
import types
from collections.abc import Callable
from typing import Any

from reward.sandbox.values import Gone, Peer, decode, encode

_CHANGEABLE = (list, dict, set, bytearray)
_CONTAINERS = (list, tuple, dict, set, frozenset)


class Program:
    """The loaded program, and those of its objects to which the tests hold references."""

    def __init__(self, descriptor: int) -> None:
        self._peer = Peer(descriptor, self._answer)
        self._module = types.ModuleType("program")
        self._objects: list[Any] = []
        self._numbers: dict[int, int] = {}

    def run(self) -> None:
        """Serves requests until the tests' side closes."""
        os.environ.clear()
        sys.argv[:] = ["program"]
        sys.modules["program"] = self._module
        random.seed(0)  # so that the same program always gets the same score
        try:
            self._peer.listen()
        except Gone:
            return

    def _answer(self, message: list[Any]) -> list[Any]:
        handlers: dict[str, Callable[..., list[Any]]] = {
            "load": self._load,
            "names": self._names,
            "call": self._call,
            "plain": self._plain,
        }
        try:
            return handlers[message[0]](*message[1:])
        except BaseException as error:
            try:
                text = str(error)[:500]
            except BaseException:
                text = ""
            return ["raise", [kind.__name__ for kind in type(error).__mro__], text]

    def _load(self, definitions: str, alternatives: list[str]) -> list[Any]:
        """Runs the first of the texts that compiles, after the definitions that come with the tests."""
        exec(compile(definitions, "<setup>", "exec"), self._module.__dict__)
        for text in alternatives[:-1]:
            try:
                code = compile(text, "<program>", "exec")
                break
            except (SyntaxError, ValueError):
                continue
        else:
            code = compile(alternatives[-1], "<program>", "exec")
        exec(code, self._module.__dict__)
        return ["value", None, []]

    def _names(self, wanted: list[str]) -> list[Any]:
        """The wanted names that the program defines, without modules, which the tests import themselves."""
        names = self._module.__dict__
        there = [name for name in wanted if name in names and not isinstance(names[name], types.ModuleType)]
        return ["value", ["list", *(["tuple", name, encode(names[name], self._refer)] for name in there)], []]

    def _call(self, target: Any, args: list[Any], keywords: list[list[Any]]) -> list[Any]:
        given = [decode(arg, self._object) for arg in args]
        named = {name: decode(value, self._object) for name, value in keywords}
        result = decode(target, self._object)(*given, **named)
        changes = []
        for i, value in enumerate(given):
            if type(value) in _CHANGEABLE:
                after = encode(value, self._refer)
                if after != args[i]:
                    changes.append([i, after])
        return ["value", encode(result, self._refer), changes]

    def _plain(self, target: Any) -> list[Any]:
        """The plain value of an object whose class inherits from a container, such as a named tuple."""
        held = decode(target, self._object)
        for kind in _CONTAINERS:
            if isinstance(held, kind):
                return ["value", encode(kind(held), self._refer), []]
        raise TypeError(f"{type(held).__name__} is not a plain value")

    def _refer(self, value: Any) -> list[Any]:
        if isinstance(value, type) and issubclass(value, Exception):
            return ["exception", [kind.__name__ for kind in value.__mro__]]
        number = self._numbers.setdefault(id(value), len(self._objects))
        if number == len(self._objects):
            self._objects.append(value)  # which also keeps its id from being used again
        return ["ref", number]

    def _object(self, raw: list[Any]) -> Any:
        if raw[0] == "ref":
            return self._objects[raw[1]]
        if raw[0] == "standard":
            held: Any = importlib.import_module(raw[1])
            for part in raw[2].split("."):
                held = getattr(held, part)
            return held
        assert raw[0] == "function", raw
        return self._function(raw[1])

    def _function(self, number: int) -> Callable[..., Any]:
        """A stand-in for a function that the tests passed as an argument."""

        def function(*args: Any) -> Any:
            answer = self._peer.ask(["callback", number, [encode(arg, self._refer) for arg in args]])
            if answer[0] == "raise":
                raise RuntimeError(answer[2])
            return decode(answer[1], self._object)

        return function
