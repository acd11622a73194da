"""Tool calls in the form in which a model's own chat template writes them.

The form is learned from the template: it renders an answer with a call of a known name and arguments, and what stands
around these is how the model was taught to write calls. So a call that the model writes is read as training wrote it,
for every template that writes a call as a JSON object with the name and the arguments.
"""

import json
import secrets
import string
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from baton.answering import Answering
from data.calls import holding, with_tools
from data.errors import DataError
from data.records import Message

_NAME, _KEY, _VALUE = "probed_name", "probed_key", "probed value"
_ARGUMENTS = ("arguments", "parameters", "args")
_TOOL = {
    "type": "function",
    "function": {
        "name": _NAME,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {_KEY: {"type": "string", "description": "Any."}},
            "required": [_KEY],
        },
    },
}
_LETTERS = string.ascii_letters + string.digits
_known: WeakKeyDictionary[Answering, "CallForm | None"] = WeakKeyDictionary()


@dataclass(frozen=True)
class CallForm:
    """How calls are written: begin call (between call)* end."""

    begin: str
    call: str
    """A call's JSON, with the probe's name and arguments."""
    between: str
    """Empty if the template has no answer with two calls."""
    end: str
    has_special: bool
    """Whether special tokens of the tokenizer stand around calls."""

    @property
    def marker(self) -> str:
        """The text by which calls are recognised; empty if an answer with a call has nothing before it."""
        return self.begin.strip()

    def around(self, name: str) -> tuple[str, str]:
        """What stands before and behind the arguments of a call of this tool."""
        before, _, after = self.call.partition(json.dumps({_KEY: _VALUE}))
        quoted = json.dumps(name, ensure_ascii=False)
        return before.replace(json.dumps(_NAME), quoted), after.replace(json.dumps(_NAME), quoted)


def read_form(model: Answering) -> CallForm | None:
    """How this model writes calls; None if its template renders none, or in a form that cannot be read back."""
    if model not in _known:
        _known[model] = None if model.as_text else _learned(model)
    return _known[model]


def _learned(model: Answering) -> CallForm | None:
    one, two = _rendered(model, 1), _rendered(model, 2)
    if one is None or (place := one.find(json.dumps(_NAME))) < 0:
        return None
    start = one.rfind("{", 0, place)
    if start < 0:
        return None
    try:
        value, length = json.JSONDecoder().raw_decode(one[start:])
    except ValueError:
        return None
    call, end = one[start : start + length], one[start + length :]
    if _read(value) != (_NAME, {_KEY: _VALUE}) or json.dumps({_KEY: _VALUE}) not in call:
        return None
    begin = one[:start]
    cut = len(begin.rstrip())  # only the last word: before it stand the header of the answer, and an empty thought
    while cut and not begin[cut - 1].isspace():
        cut -= 1
    begin = begin[cut:]
    between = ""
    if two is not None and two.count(call) == 2:
        between = two.partition(call)[2].partition(call)[0]
    special = any(model.encoder.special_ids(part) for part in (begin, end, between))
    return CallForm(begin, call, between, end, bool(special))


def _rendered(model: Answering, calls: int) -> str | None:
    """What the model is taught to write where it makes so many calls, without the stop token."""
    made = [
        {"type": "function", "id": f"probe000{i}", "function": {"name": _NAME, "arguments": {_KEY: _VALUE}}}
        for i in range(calls)
    ]
    asked = with_tools((Message("user", "Probe."),), [_TOOL])
    try:
        ids, mask = model.encoder.chat([*asked, holding(Message("assistant", ""), {"tool_calls": made})])
    except DataError:
        return None
    said = [token for token, own in zip(ids, mask, strict=True) if own]
    if said and said[-1] in model.encoder.stop_ids:
        said = said[:-1]
    return model.encoder.text(said, special=True)


def _read(value: Any) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    given = next((value[key] for key in _ARGUMENTS if key in value), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return None
    return (value["name"], given) if isinstance(given, dict) else None


class CallReader:
    """Separates the calls of an answer from its text while it arrives."""

    def __init__(self, form: CallForm, model: Answering, *, many: bool) -> None:
        """`many`: whether more than the first call counts."""
        self._form, self._model, self._many = form, model, many
        self._held = ""
        self._calling = self._begun = False
        self.calls: list[dict[str, Any]] = []
        """The calls, once the answer has ended."""

    def add(self, text: str) -> str:
        """Takes more of the answer; returns what of it is certainly not a call."""
        self._held += text
        if self._calling:
            return ""
        marker = self._form.marker
        if not marker:
            self._calling = not self._begun and self._held.lstrip().startswith("{")
            if self._calling or not self._held.strip():
                return ""
            self._begun = True
            return self._give(len(self._held))
        place = self._held.find(marker)
        if place >= 0:
            self._calling = True
            return self._give(place)
        kept = next((n for n in range(len(marker) - 1, 0, -1) if self._held.endswith(marker[:n])), 0)
        return self._give(len(self._held) - kept)

    def finish(self) -> str:
        """Reads the calls, at the end of the answer; returns the text that turns out to be none."""
        rest = self._held
        while self._calling:
            text = rest.lstrip().removeprefix(self._form.between.strip() or self._form.marker).lstrip()
            text = text.removeprefix(self._form.marker).lstrip().removeprefix("[" if not self.calls else ",").lstrip()
            try:
                value, length = json.JSONDecoder().raw_decode(text)
            except ValueError:
                break
            found = _read(value)
            if found is None:
                break
            if self._many or not self.calls:
                self.calls.append(_call(*found))
            rest = text[length:]
            end = self._form.end.strip()
            rest = rest.lstrip().removeprefix(end) if end else rest
        if self.calls:
            rest = ""  # what follows a call is not for the reader
        self._held = ""
        return self._plain(rest)

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return self._plain(text)

    def _plain(self, text: str) -> str:
        return self._model.encoder.without_special(text) if self._form.has_special else text


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # Nine letters, because some templates take no other ids.
    identity = "".join(secrets.choice(_LETTERS) for _ in range(9))
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
