"""The tests' view of a program in another process: a link to it, and stand-ins for its functions and objects.

The program sees the arguments of calls, one call at a time, and its results are rebuilt here from Python's own types.
An object that is not a plain value stays in its process and is a `Remote` here. A forged object must not be able to
pass for every value, so a `Remote` is limited in three ways. It equals a plain value only if the plain value that it
holds does (a named tuple). An operation with a plain operand must not give a plain result, since the operand may be
what the test expects. And operations meant only for plain values are refused. All other operations on a program's own
class are answered by the program.
"""

import builtins
import importlib
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final

from reward.sandbox.values import BadMessage, Peer, decode, encode

# Operations for which a forged object could give the wanted answer without having computed anything.
_NOT_ASKED: Final = frozenset(
    {
        "startswith",
        "endswith",
        "issubset",
        "issuperset",
        "isdisjoint",
        "difference",
        "symmetric_difference",
        "intersection",
        "union",
    }
)


class Unsupported(BaseException):
    """The tests use an object that cannot be sent to another process: a fault of the data, not of the program."""


class NotSent(Exception):
    """A value that cannot be sent, when the program's own values may be its cause: the test fails, and no more."""


class ProgramError(Exception):
    """The program raised an exception for which the tests have no name."""


class Link:
    """Sends requests to the program's process. All methods raise `values.Gone` when it has ended."""

    def __init__(self, descriptor: int) -> None:
        self._peer = Peer(descriptor, self._serve)
        self._functions: list[Callable[..., Any]] = []
        self._exceptions: dict[str, type[Exception]] = {}
        self._heard = False
        """Whether the tests hold a value that the program chose."""

    def load(self, definitions: str, alternatives: list[str]) -> None:
        """Runs the program's text there: the first alternative that compiles."""
        self._ask(["load", definitions, alternatives])

    def names(self, wanted: list[str]) -> dict[str, Any]:
        """The wanted global names that the program defines."""
        found = self._ask(["names", wanted])
        if not isinstance(found, list) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in found):
            raise BadMessage("no names")
        names = {name: value for name, value in found if isinstance(name, str) and name in wanted}
        self._heard = not all(isinstance(value, Remote | type) for value in names.values())
        return names

    def call(self, target: Any, *args: Any, **keywords: Any) -> Any:
        """Calls a function of the program, or of the standard library in the program's process.

        If the call returns None, lists, dicts and sets among the arguments are updated as the call left them, for
        functions that change their arguments. A call that returns an answer changes no argument, since a test may
        compare the answer with it.
        """
        given = [encode(arg, self._refer) for arg in args]
        named = [[name, encode(value, self._refer)] for name, value in keywords.items()]
        message = ["call", encode(target, self._refer), given, named]
        try:
            return self._ask(message, args)
        except StopIteration:
            if target is next:
                raise
            # Let through, it would end `all(map(...))` of the tests, and that would be true.
            raise ProgramError("StopIteration") from None

    def get(self, remote: "Remote", name: str) -> Any:
        return self.call(getattr, remote, name)

    def set(self, remote: "Remote", name: str, value: Any) -> None:
        self.call(setattr, remote, name, value)

    def plain(self, remote: "Remote") -> Any:
        """The plain container in an object whose class inherits from one. Raises TypeError for other objects."""
        return self._ask(["plain", self._refer(remote)])

    def _ask(self, message: list[Any], args: tuple[Any, ...] = ()) -> Any:
        try:
            answer = self._peer.ask(message)
        except ValueError as error:
            raise self._not_sent(str(error)) from error
        self._heard = self._heard or message[0] in ("call", "plain")
        match answer:
            case ["value", raw, list(changes)]:
                value = decode(raw, self._object)
                if value is None:
                    self._apply(changes, args)
                return value
            case ["raise", list(names), str(text)]:
                raise self._exception(names, text[:500])
            case _:
                raise BadMessage("no answer")

    def _apply(self, changes: list[Any], args: tuple[Any, ...]) -> None:
        for change in changes:
            match change:
                case [int(place), raw] if 0 <= place < len(args):
                    value, target = decode(raw, self._object), args[place]
                    if type(value) is not type(target):
                        raise BadMessage("another type")
                    if isinstance(target, list | bytearray):
                        target[:] = value
                    elif isinstance(target, dict | set):
                        target.clear()
                        target.update(value)
                case _:
                    raise BadMessage("no change")

    def _serve(self, message: list[Any]) -> list[Any]:
        """Runs a function of the tests for the program, which got it as an argument."""
        self._heard = True
        match message:
            case ["callback", int(number), list(args)] if 0 <= number < len(self._functions):
                try:
                    result = self._functions[number](*(decode(arg, self._object) for arg in args))
                    return ["value", encode(result, self._refer), []]
                except Exception as error:
                    return ["raise", [type(error).__name__], str(error)]
            case _:
                raise BadMessage("no callback")

    def _exception(self, names: list[Any], text: str) -> Exception:
        """The exception of the first class in the list that the tests know."""
        for name in names:
            kind = self._exceptions.get(name) if isinstance(name, str) else None
            kind = kind or _built_in_exception(name)
            if kind is not None:
                try:
                    return kind(text)
                except TypeError:  # UnicodeDecodeError and its like want more
                    break
        return ProgramError(f"{names[0] if names else '?'}: {text}")

    def _object(self, raw: list[Any]) -> Any:
        match raw:
            case ["ref", int(number)]:
                return Remote(self, number)
            case ["exception", [str(name), *line]]:
                if (own := _built_in_exception(name)) is not None:
                    return own
                base = next((kind for kind in map(_built_in_exception, line) if kind is not None), Exception)
                return self._exceptions.setdefault(name, type(name, (base,), {}))
            case _:
                raise BadMessage("no value")

    def _refer(self, value: Any) -> list[Any]:
        if type(value) is Remote:
            return ["ref", value._remote_number]
        if callable(value):
            module, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
            if module in sys.stdlib_module_names and name and _found(module, name) is value:
                return ["standard", module, name]
            self._functions.append(value)
            return ["function", len(self._functions) - 1]
        raise self._not_sent(
            f"the tests pass a {type(value).__name__}, which cannot be sent to the program's process; pass plain "
            "values, or define the class in `test_setup_code`, which also runs in the program's process"
        )

    def _not_sent(self, why: str) -> BaseException:
        return NotSent(why) if self._heard else Unsupported(why)


def _built_in_exception(name: Any) -> type[Exception] | None:
    kind = vars(builtins).get(name) if isinstance(name, str) else None
    return kind if isinstance(kind, type) and issubclass(kind, Exception) else None


def _found(module: str, name: str) -> Any:
    held: Any = importlib.import_module(module)
    for part in name.split("."):
        held = getattr(held, part, None)
    return held


class Remote:
    """A function, class or object of the program."""

    __slots__ = ("_remote_link", "_remote_number")
    _remote_link: Link
    _remote_number: int

    def __init__(self, link: Link, number: int) -> None:
        object.__setattr__(self, "_remote_link", link)
        object.__setattr__(self, "_remote_number", number)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return self._remote_link.call(self, *args, **keywords)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in _NOT_ASKED:
            raise AttributeError(f"the program returned an object instead of a plain value; its {name} is not used")
        return self._remote_link.get(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._remote_link.set(self, name, value)

    def __eq__(self, other: object) -> bool:
        if type(other) is Remote:
            return (
                other._remote_number == self._remote_number or self._remote_link.call(operator.eq, self, other) is True
            )
        try:
            return bool(self._remote_link.plain(self) == other)
        except TypeError:
            return False

    def __hash__(self) -> int:
        return hash(self._remote_number)

    def __bool__(self) -> bool:
        return self._remote_link.call(bool, self) is True

    def __iter__(self) -> Iterator[Any]:
        there = self._remote_link.call(iter, self)
        while True:
            try:
                yield self._remote_link.call(next, there)
            except StopIteration:
                return

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and self._remote_link.call(isinstance, instance, self) is True


def _asked(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operation whose operands, if any, reveal nothing about what the test expects."""

    def method(self: Remote, *args: Any) -> Any:
        return self._remote_link.call(function, self, *args)

    return method


def _combined(function: Callable[..., Any], swapped: bool = False) -> Callable[..., Any]:
    """A binary operation; with a plain operand its result must be an object, not a plain value."""

    def method(self: Remote, other: Any) -> Any:
        result = (
            self._remote_link.call(function, other, self) if swapped else self._remote_link.call(function, self, other)
        )
        if type(other) is not Remote and type(result) is not Remote:
            raise TypeError("the program returned an object that behaves like a plain value, instead of a plain value")
        return result

    return method


def _ordered(function: Callable[..., Any]) -> Callable[..., Any]:
    def method(self: Remote, other: Any) -> bool:
        if type(other) is Remote:
            return self._remote_link.call(function, self, other) is True
        return bool(function(self._remote_link.plain(self), other))

    return method


def _give_operators() -> None:
    for function in (len, repr, next, operator.neg, operator.getitem, operator.setitem, operator.delitem):
        setattr(Remote, f"__{function.__name__}__", _asked(function))
    setattr(Remote, "__str__", _asked(str))  # noqa: B010 (mypy takes a method for a constant)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor"):
        plain = name.rstrip("_")
        setattr(Remote, f"__{plain}__", _combined(getattr(operator, name)))
        setattr(Remote, f"__r{plain}__", _combined(getattr(operator, name), swapped=True))
    for name in ("lt", "le", "gt", "ge"):
        setattr(Remote, f"__{name}__", _ordered(getattr(operator, name)))


_give_operators()
