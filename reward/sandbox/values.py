"""The messages between a program and its tests: plain values as JSON; never a pickle, never code.

JSON has no tuples, sets or large integers, so a value without a JSON type is a list whose first item names its kind.
For other objects the program's side keeps the object and sends a reference; the tests' side sends references to its
own functions and refuses everything else. Whatever bytes a program sends, the tests' side builds only values of
Python's own types from them, whose `==` a program cannot redefine.
"""

import datetime
import json
import os
import struct
from array import array
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any, Final

LARGEST: Final = 8 << 20
"""Limit on the bytes of one message; both the sender and the reader refuse a larger one."""
_EXACT: Final = 1 << 53  # larger integers are sent as hex, since a JSON reader may convert them to floats
_LENGTH: Final = struct.Struct("!I")
_TIMES: Final = (datetime.date, datetime.datetime, datetime.time)

Other = Callable[[Any], list[Any]]
OtherBack = Callable[[list[Any]], Any]


class Gone(BaseException):
    """The other side closed its end or died. Not an Exception, so `except Exception` in a test does not catch it."""


class BadMessage(BaseException):
    """The other side sent a malformed message."""


def encode(value: Any, other: Other) -> Any:
    """JSON for a value. `other` encodes objects that are not plain values."""
    kind = type(value)
    if value is None or kind is bool or kind is str or kind is float:
        return value
    if isinstance(value, int):
        return int(value) if -_EXACT < value < _EXACT else ["int", hex(value)]
    if kind in (list, tuple, set, frozenset, deque):
        return [kind.__name__, *(encode(item, other) for item in value)]
    if kind in (dict, Counter, OrderedDict, defaultdict):
        name = "dict" if kind is defaultdict else kind.__name__
        return [name, *([encode(k, other), encode(v, other)] for k, v in value.items())]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind in (bytes, bytearray):
        return [kind.__name__, value.hex()]
    if kind is range:
        return ["range", *(encode(n, other) for n in (value.start, value.stop, value.step))]
    if kind is Decimal:
        return ["Decimal", str(value)]
    if kind is Fraction:
        return ["Fraction", encode(value.numerator, other), encode(value.denominator, other)]
    if kind is array:
        return ["array", value.typecode, value.tobytes().hex()]
    if kind in _TIMES:
        return [kind.__name__, value.isoformat()]
    if kind is datetime.timedelta:
        return ["timedelta", value.days, value.seconds, value.microseconds]
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    return other(value)


def decode(raw: Any, other: OtherBack) -> Any:
    """The value from `encode`'s JSON. `other` decodes objects that are not plain values. Raises BadMessage."""
    if not isinstance(raw, list):
        if isinstance(raw, dict):
            raise BadMessage("an object")
        return raw
    try:
        decoder = _DECODERS.get(raw[0])
        return other(raw) if decoder is None else decoder(raw, other)
    except (IndexError, TypeError, ValueError, ArithmeticError, AttributeError, KeyError) as error:
        raise BadMessage(repr(error)) from error


def _items(raw: list[Any], other: OtherBack) -> list[Any]:
    return [decode(item, other) for item in raw[1:]]


def _pairs(raw: list[Any], other: OtherBack) -> list[tuple[Any, Any]]:
    return [(decode(key, other), decode(value, other)) for key, value in raw[1:]]


def _array(raw: list[Any], _: OtherBack) -> Any:
    made: array[Any] = array(raw[1])
    made.frombytes(bytes.fromhex(raw[2]))
    return made


_DECODERS: Final[dict[str, Callable[[list[Any], OtherBack], Any]]] = {
    "int": lambda raw, _: int(raw[1], 16),
    "list": _items,
    "tuple": lambda raw, other: tuple(_items(raw, other)),
    "set": lambda raw, other: set(_items(raw, other)),
    "frozenset": lambda raw, other: frozenset(_items(raw, other)),
    "deque": lambda raw, other: deque(_items(raw, other)),
    "dict": lambda raw, other: dict(_pairs(raw, other)),
    "Counter": lambda raw, other: Counter(dict(_pairs(raw, other))),
    "OrderedDict": lambda raw, other: OrderedDict(_pairs(raw, other)),
    "complex": lambda raw, _: complex(raw[1], raw[2]),
    "bytes": lambda raw, _: bytes.fromhex(raw[1]),
    "bytearray": lambda raw, _: bytearray.fromhex(raw[1]),
    "range": lambda raw, other: range(*_items(raw, other)),
    "Decimal": lambda raw, _: Decimal(raw[1]),
    "Fraction": lambda raw, other: Fraction(*_items(raw, other)),
    "array": _array,
    "timedelta": lambda raw, _: datetime.timedelta(*raw[1:]),
    "date": lambda raw, _: datetime.date.fromisoformat(raw[1]),
    "datetime": lambda raw, _: datetime.datetime.fromisoformat(raw[1]),
    "time": lambda raw, _: datetime.time.fromisoformat(raw[1]),
}


class Peer:
    """One end of the socket. It sends requests, and serves the other end's requests while it waits for an answer."""

    def __init__(self, descriptor: int, serve: Callable[[list[Any]], list[Any]]) -> None:
        self._descriptor = descriptor
        self._serve = serve

    def ask(self, message: list[Any]) -> list[Any]:
        """Returns the answer: ["value", ...] or ["raise", ...]. Raises Gone, BadMessage, ValueError (too large)."""
        write_message(self._descriptor, message)
        while True:
            got = _checked(read_message(self._descriptor))
            if got[0] in ("value", "raise"):
                return got
            write_message(self._descriptor, self._serve(got))

    def listen(self) -> None:
        """Serves requests until the other end closes, then raises Gone."""
        while True:
            write_message(self._descriptor, self._serve(_checked(read_message(self._descriptor))))


def _checked(message: Any) -> list[Any]:
    if not isinstance(message, list) or not message or not isinstance(message[0], str):
        raise BadMessage("the message is neither a request nor an answer")
    return message


def write_message(descriptor: int, message: Any) -> None:
    """Raises ValueError for a message that is too large, Gone when the other end is closed."""
    body = json.dumps(message, separators=(",", ":")).encode()
    if len(body) > LARGEST:
        raise ValueError(f"a value of {len(body)} bytes; the limit between a program and its tests is {LARGEST} bytes")
    left = memoryview(_LENGTH.pack(len(body)) + body)
    try:
        while left:
            left = left[os.write(descriptor, left) :]
    except OSError as error:
        raise Gone from error


def read_message(descriptor: int) -> Any:
    """Raises Gone at the end of the stream, BadMessage for malformed data."""
    length = _LENGTH.unpack(_read(descriptor, _LENGTH.size))[0]
    if length > LARGEST:
        raise BadMessage(f"{length} bytes")
    try:
        return json.loads(_read(descriptor, length))
    except (ValueError, RecursionError) as error:
        raise BadMessage(repr(error)) from error


def _read(descriptor: int, length: int) -> bytes:
    parts = []
    while length:
        try:
            part = os.read(descriptor, min(length, 1 << 20))
        except OSError as error:
            raise Gone from error
        if not part:
            raise Gone
        parts.append(part)
        length -= len(part)
    return b"".join(parts)
