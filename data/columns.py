"""One row's columns and turns, with a record of what a reader did with each of them.

Published data has many more keys than any reader uses. A key is used, or the accounting names it as not read, or the
row is refused: without `images` or `chat_template_kwargs` a row is no example of what its author wrote. Tools, calls
and thoughts go on to the chat template (data/calls.py). The source's `ignore` says which keys to leave out on purpose.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from data.calls import OF_RESULTS, THOUGHTS, holding, parsed, read_calls, read_tools
from data.errors import DataError, RowRefused
from data.records import Message, Origin, Role

ROLES: Final[dict[str, Role]] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

_MEDIA = ("images", "image", "audios", "audio", "videos", "video")
_TOOLS = ("tools", "functions")
# What the model would have to see to give the answer. Nothing renders it yet.
_OF_PROMPTS = ("history", "chat_template_kwargs", *_MEDIA)
_CALLS = ("tool_calls", "function_call")
_OF_TURNS = ("train_detail", *_MEDIA)

LABELS: Final = ("label", "kto_tag")
"""Columns that judge the row's answer: true is good, false is bad."""
SHARES: Final = ("weight", "loss_weight", "sample_weight", "train", "trainable")
"""Columns, and keys of turns, that weigh a row or a turn in the loss."""
_TURN_SHARES: Final = (*SHARES, "loss")
SYSTEM: Final = ("system", "system_prompt")


def is_empty(value: Any) -> bool:
    """Whether a value says nothing: null, no text, an empty list, or only such values inside."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, Mapping):
        return all(is_empty(part) for part in value.values())
    if isinstance(value, (list, tuple)):
        return all(is_empty(part) for part in value)
    return value is None


def truth(value: Any) -> bool | None:
    """True or false as data files write it: a boolean, 1 or 0, or one of them as text; None for anything else."""
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().casefold())
    return bool(value) if isinstance(value, (bool, int, float)) and value in (0, 1) else None


@dataclass
class Columns:
    """A row's columns, with a record of which were read."""

    values: Mapping[str, Any]
    origin: Origin
    format: str
    expected: str
    """What the format expects, for messages."""
    needs_answer: bool
    ignore: frozenset[str] = frozenset()
    """Columns and keys of turns that are left out on purpose."""
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    turn_keys: set[str] = field(default_factory=set)
    """Keys of turns that were not read."""

    def has(self, name: str) -> bool:
        """Whether the column exists and is not empty; an empty optional column counts as absent."""
        return name not in self.ignore and self.values.get(name) is not None

    def says(self, name: str) -> bool:
        """As `has`, but a value that says nothing counts as absent, too."""
        return self.has(name) and not is_empty(self.values[name])

    def get(self, *names: str) -> Any:
        """The first of these columns that the row has.

        Raises:
            DataError: the row has none of them, or the value is null.
        """
        for name in names:
            if name in self.values and name not in self.ignore:
                self.used.add(name)
                if self.values[name] is None:
                    raise DataError(f"{self.origin}: `{name}` is null; give it a value, or remove the row")
                return self.values[name]
        left_out = [name for name in names if name in self.ignore]
        if left_out:
            raise DataError(f"{self.origin}: `ignore` leaves out `{left_out[0]}`, without which the row cannot be read")
        raise DataError(
            f"{self.origin}: no column {' or '.join(f'`{n}`' for n in names)}; the row has "
            f"{', '.join(self.values) or 'none'}. Format {self.format} expects {self.expected}"
        )

    def text(self, *names: str) -> str:
        """As `get`, for a column that must hold text."""
        value = self.get(*names)
        if not isinstance(value, str):
            name = next(n for n in names if n in self.used)
            raise DataError(f"{self.origin}: `{name}` is {type(value).__name__}; expected text")
        return value

    def rest(self) -> dict[str, Any]:
        """The columns that were not read."""
        return {name: value for name, value in self.values.items() if name not in self.used or name in self.ignore}

    def unread(self) -> list[str]:
        """Names of the columns that were not read, say something, and are not left out on purpose."""
        return [name for name in self.rest() if self.says(name)]

    def check_rest(self, judged: bool) -> None:
        """Checks the columns that no reader used. `judged`: the row's answer is used.

        Raises:
            RowRefused: the row is labelled as bad, weighs nothing, or means something else without such a column.
        """
        for name in LABELS if judged else ():
            good = truth(self.values.get(name)) if self.has(name) else None
            if good is False:
                raise RowRefused(
                    f"labelled as a bad answer ({name}: false)",
                    "for a stage that learns from bad answers make pairs, `chosen` and `rejected`; "
                    + _without(name, "to use it all the same"),
                )
            if good:
                self.used.add(name)
        self.check_shares()
        for name in (*_OF_PROMPTS, *(THOUGHTS if self.needs_answer else ())):
            if name not in self.used and self.says(name) and self.values[name] is not False:
                raise lost(name)

    def check_shares(self) -> None:
        """Checks how much the row weighs in the loss. For prompts, these are columns like any other.

        Raises:
            RowRefused: nothing, or another share than the whole.
        """
        for name in SHARES if self.needs_answer else ():
            if self.has(name):
                if not _share(name, self.values[name]):
                    raise RowRefused(f"`{name}` is 0", _without(name, "to use it all the same"))
                self.used.add(name)

    def tools(self) -> list[dict[str, Any]]:
        """The tools that the row's answers may call. For prompts they stay a column, too, for the reward functions."""
        found = [name for name in _TOOLS if self.says(name) and self.values[name] is not False]
        if not found:
            return []
        if len(found) > 1:
            raise lost(found[1])
        if self.needs_answer:
            self.used.add(found[0])
        return read_tools(self.values[found[0]], found[0])

    def turns(self, value: Any, column: str) -> tuple[Message, ...]:
        """A list of turns, each {role, content} or {from, value}."""
        if not isinstance(value, list):
            hint = "; in a table they are JSON text, so use a .jsonl file" if isinstance(value, str) else ""
            raise DataError(f"{self.origin}: `{column}` is {type(value).__name__}; expected a list of turns{hint}")
        return tuple(self.turn(turn, f"{column}[{i}]") for i, turn in enumerate(value))

    def turn(self, turn: Any, place: str) -> Message:
        """One turn. `place` names it in messages.

        Raises:
            DataError: it is no turn, or of an unknown role.
            RowRefused: it has a key without which it would mean something else.
        """
        if not isinstance(turn, dict):
            raise DataError(
                f"{self.origin}: `{place}` is {type(turn).__name__}; expected {{role, content}} or {{from, value}}"
            )
        who, what = ("from", "value") if "from" in turn else ("role", "content")
        told = {
            key
            for key in (*_OF_TURNS, *_CALLS, *_TOOLS, *THOUGHTS)
            if key in turn and key not in self.ignore and turn[key] is not False and not is_empty(turn[key])
        }
        for key in _OF_TURNS:
            if key in told:
                raise lost(key)
        said = turn.get(what)
        if said is None and any(turn.get(key) for key in _CALLS):
            said = ""
        if turn.get(who) is None or said is None:
            missing = who if turn.get(who) is None else what
            state = "is null" if missing in turn else "is missing"
            raise DataError(
                f"{self.origin}: `{place}.{missing}` {state}; the turn has {', '.join(turn)}; remove the row or give it"
            )
        role = ROLES.get(turn[who]) if isinstance(turn[who], str) else None
        if role is None:
            raise DataError(f"{self.origin}: `{place}.{who}` is {turn[who]!r:.60}; known roles are {', '.join(ROLES)}")
        results = OF_RESULTS if role == "tool" else ()
        self._unread_keys(turn, (who, what, *_TURN_SHARES, *_CALLS, *_TOOLS, *THOUGHTS, *results))
        extra: dict[str, Any] = {
            key: str(turn[key]) for key in results if key not in self.ignore and not is_empty(turn.get(key))
        }
        text = self.content(said, f"{place}.{what}")
        if turn[who] == "function_call" and isinstance(parsed(text), dict):  # how ShareGPT writes a call
            text, extra = "", {**extra, "tool_calls": read_calls(text)}
        extra |= self._extra(turn, role, told)
        return holding(Message(role, text, self._trained(turn, role)), extra)

    def _extra(self, turn: dict[str, Any], role: Role, told: set[str]) -> dict[str, Any]:
        """The calls and the thought of an answer, and the tools that a system's turn describes.

        Raises RowRefused for those of a turn where no template looks for them.
        """
        extra: dict[str, Any] = {}
        places: tuple[tuple[Role, tuple[str, ...]], ...] = (
            ("assistant", _CALLS), ("assistant", THOUGHTS), ("system", _TOOLS),
        )  # fmt: skip
        for owner, keys in places:
            found = [key for key in keys if key in told]
            if found and role != owner:
                raise lost(found[0])
            if len(found) > 1 and any(turn[key] != turn[found[0]] for key in found):
                raise lost(found[1])
            for key in found[:1]:
                if keys is _CALLS:
                    extra["tool_calls"] = read_calls(turn[key])
                elif keys is _TOOLS:
                    extra["tools"] = read_tools(turn[key], key)
                elif isinstance(turn[key], str):
                    extra[key] = turn[key]
                else:
                    raise lost(key)
        return extra

    def _trained(self, turn: dict[str, Any], role: Role) -> bool:
        """Whether the loss counts the turn, if it is an answer."""
        trained = True
        for key in _TURN_SHARES:
            if key in turn and turn[key] is not None and key not in self.ignore:
                share = _share(key, turn[key])
                if role == "assistant":
                    trained = trained and share
                elif share:
                    self.notes.append(f"`{key}` of turns that are not answers: they are never trained on")
        return trained

    def content(self, value: Any, place: str) -> str:
        """Text, or a list of text parts {type: text, text: ...} (some data has `value` instead of `text`)."""
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise DataError(
                f"{self.origin}: `{place}` is {type(value).__name__}; expected text or a list of text parts"
            )
        texts = []
        for i, part in enumerate(value):
            what = "text" if isinstance(part, dict) and "text" in part else "value"
            text = part.get(what) if isinstance(part, dict) and part.get("type") == "text" else None
            if not isinstance(text, str):
                raise DataError(f"{self.origin}: `{place}[{i}]` is not a text part; only text can be trained on")
            self._unread_keys(part, ("type", what))
            texts.append(text)
        return "".join(texts)

    def _unread_keys(self, turn: dict[str, Any], known: tuple[str, ...]) -> None:
        self.turn_keys.update(
            key for key, value in turn.items() if key not in known and key not in self.ignore and not is_empty(value)
        )


def _share(key: str, value: Any) -> bool:
    """Whether the loss counts what has this weight. Raises RowRefused for a weight between, as no loss is weighted."""
    share = truth(value)
    if share is None:
        raise RowRefused(f"`{key}` is neither 0 nor 1", _without(key, "to train on the whole row"))
    return share


def lost(key: str) -> RowRefused:
    """The refusal of a row that means something else without `key`."""
    return RowRefused(f"`{key}` would be lost", f"write it into the text, or {_without(key, 'to train without it')}")


def _without(key: str, why: str) -> str:
    return f"set `ignore: [{key}]` in the source {why}"
