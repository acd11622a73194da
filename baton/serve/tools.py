"""Tool calls in the form in which a model's own chat template writes them.

The form is learned from the template: it renders an answer with a call of a known name and arguments, and what stands
around these is how the model was taught to write calls. So a call that the model writes is read as training wrote it.
"""

import json
import secrets
import string
from collections.abc import Sequence
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from baton.answering import Answering
from baton.serve.call_forms import ARGUMENTS, NAME, JsonForm, Schemas, TaggedForm, learn
from data.calls import holding, with_tools
from data.errors import DataError
from data.records import Message

CallForm: TypeAlias = JsonForm | TaggedForm
_TOOL = {
    "type": "function",
    "function": {
        "name": NAME,
        "description": "Probes.",
        "parameters": {
            "type": "object",
            "properties": {key: {"type": "string", "description": "Any."} for key in ARGUMENTS},
            "required": list(ARGUMENTS),
        },
    },
}
_LETTERS = string.ascii_letters + string.digits
_known: WeakKeyDictionary[Answering, CallForm | None] = WeakKeyDictionary()


def read_form(model: Answering) -> CallForm | None:
    """How this model writes calls; None if its template renders none, or in a form that cannot be read back."""
    if model not in _known:
        one = None if model.as_text else _rendered(model, 1)
        _known[model] = None if one is None else learn(one, _rendered(model, 2))
    return _known[model]


def _rendered(model: Answering, calls: int) -> str | None:
    """What the model is taught to write where it makes so many calls, without the stop token."""
    made = [
        {"type": "function", "id": f"probe000{i}", "function": {"name": NAME, "arguments": ARGUMENTS}}
        for i in range(calls)
    ]
    asked = with_tools((Message("user", "Probe."),), [_TOOL])
    try:
        ids, mask = model.chat([*asked, holding(Message("assistant", ""), {"tool_calls": made})])
    except DataError:
        return None
    said = [token for token, own in zip(ids, mask, strict=True) if own]
    if said and said[-1] in model.encoder.stop_ids:
        said = said[:-1]
    return model.encoder.text(said, special=True)


def has_special(form: CallForm, model: Answering) -> bool:
    """Whether special tokens of the tokenizer stand around calls, so that they have to be seen."""
    return any(model.encoder.special_ids(part) for part in form.parts)


class CallReader:
    """Separates the calls of an answer from its text while it arrives."""

    def __init__(self, form: CallForm, model: Answering, tools: Sequence[dict[str, Any]], *, many: bool) -> None:
        """`many`: whether more than the first call counts."""
        self._form, self._many = form, many
        self._schemas: Schemas = {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in tools}
        self._encoder = model.encoder if has_special(form, model) else None
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
        rest, self._held = self._held, ""
        while self._calling and (found := self._form.next(rest, self._schemas)) is not None:
            (name, arguments), rest = found
            if self._many or not self.calls:
                self.calls.append(_call(name, arguments))
        return "" if self.calls else self._plain(rest)  # what follows a call is not for the reader

    def _give(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return self._plain(text)

    def _plain(self, text: str) -> str:
        return text if self._encoder is None else self._encoder.without_special(text)


def _call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    # Nine letters, because some templates take no other ids.
    identity = "".join(secrets.choice(_LETTERS) for _ in range(9))
    return {
        "id": identity,
        "type": "function",
        "function": {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)},
    }
