"""Answers that follow a JSON schema, or that are calls of tools: llguidance says which tokens may come next."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

from baton.serve.call_forms import JsonForm, TaggedForm
from baton.serve.served import Served
from baton.serve.tools import CallForm
from rollout.live import Constraint

# Between the parts of JSON a model may put some white space, and cannot fill its answer with it.
_SPACES = {"whitespace_flexible": True, "whitespace_pattern": r"[ \n]{0,16}"}
_MOST = 2**18  # characters of a grammar


class GrammarError(ValueError):
    """The schema cannot be followed: it has a mistake, or a keyword that llguidance does not know."""


class Grammars:
    """The grammars of one model."""

    def __init__(self, served: Served) -> None:
        encoder = served.encoder
        self._special = encoder.special_ids
        self._tokenizer: LLTokenizer = llguidance.hf.from_tokenizer(
            encoder.tokenizer, n_vocab=encoder.vocab_size, eos_token=list(encoder.stop_ids)
        )

    @classmethod
    def of(cls, served: Served) -> "Grammars":
        """Those of this model; made when they are needed first."""
        if served not in _known:
            _known[served] = cls(served)
        return _known[served]

    def json(self, schema: Any) -> Callable[[], Constraint]:
        """JSON that the schema allows. Raises GrammarError."""
        return self._made(f"start: {_json(schema)}")

    def calls(
        self, form: CallForm, tools: Sequence[Mapping[str, Any]], *, text: bool, many: bool
    ) -> Callable[[], Constraint]:
        """One call of one of the tools, or with `many` several. `text`: any text may come before calls, or no calls.

        Raises:
            GrammarError: as `json`.
        """
        rules = self._rules(form, tools, many)
        if not text:
            start = [f"start: {self._literal(form.begin)} calls"]
        elif not form.marker:
            start = ["start: calls | TEXT", r"TEXT: /[^\{\s](.|\n)*/"]
        else:
            rest = self._literal(form.begin.partition(form.marker)[2])
            start = [f"start: begun {rest} calls | TEXT", "TEXT: /(.|\\n)*/"]
            marker = self._literal(form.marker)
            # A lazy lexeme ends where the marker does; a special token ends the text before it by itself.
            start.append(f"begun{'' if self._special(form.marker) else '[lazy]'}: TEXT {marker}")
        return self._made("\n".join([*start, *rules]))

    def calls_or_json(
        self, form: CallForm, tools: Sequence[Mapping[str, Any]], schema: Any
    ) -> Callable[[], Constraint]:
        """A call of one of the tools, or JSON that the schema allows. Raises GrammarError."""
        start = [f"start: {self._literal(form.begin)} calls | answer", f"answer: {_json(schema)}"]
        return self._made("\n".join([*start, *self._rules(form, tools, many=False)]))

    def _rules(self, form: CallForm, tools: Sequence[Mapping[str, Any]], many: bool) -> list[str]:
        """What comes after the beginning."""
        rules = []
        for i, tool in enumerate(tools):
            function = tool["function"]
            schema = function.get("parameters") or {"type": "object"}
            if isinstance(form, JsonForm):
                before, after = form.around(function["name"])
                rules.append(f"call_{i}: {self._literal(before)} {_json(schema)} {self._literal(after)}")
            else:
                rules += self._tagged(form, i, function["name"], schema)
        one = " | ".join(f"call_{i}" for i in range(len(tools)))
        if isinstance(form, JsonForm):
            between, end = form.between, form.end
        else:  # a call has its own end
            between, end = form.between + form.begin, ""
        more = f"({self._literal(between)} call)*" if many and form.between else ""
        return [*rules, f"call: {one}", f"calls: call {more} {self._literal(end)}"]

    def _tagged(self, form: TaggedForm, number: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """The rules of a call whose arguments stand between tags, in the order of the schema."""
        parts, rules = [], []
        required = schema.get("required", [])
        for j, (key, own) in enumerate(schema.get("properties", {}).items()):
            value = f"value_{number}_{j}"
            rules.append(f"{value}: {self._value(own, schema)}")
            part = " ".join(
                [self._literal(form.open + key + form.middle), value, self._literal(form.close)],
            )
            parts.append(part if key in required else f"({part})?")
        head, tail = self._literal(name + form.named), self._literal(form.end)
        return [*rules, f"call_{number}: {head} {' '.join(parts)} {tail}"]

    def _value(self, schema: Any, whole: Mapping[str, Any]) -> str:
        """A value between tags: a text as it is, and without a tag; everything else as JSON."""
        if isinstance(schema, dict) and schema.get("enum") and all(isinstance(one, str) for one in schema["enum"]):
            return " | ".join(self._literal(one) for one in schema["enum"])
        if isinstance(schema, dict) and schema.get("type") == "string":
            least, most = schema.get("minLength", 0), schema.get("maxLength", "")
            return f"/[^<]{{{least},{most}}}/"
        return _json({**schema, **{key: whole[key] for key in ("$defs", "definitions") if key in whole}})

    def _literal(self, text: str) -> str:
        """The text in a grammar; special tokens stand there by their ids."""
        parts, place = [], 0
        for start, end, token in self._special(text):
            parts += [json.dumps(text[place:start])] if start > place else []
            parts.append(f"<[{token}]>")
            place = end
        return " ".join([*parts, *([json.dumps(text[place:])] if place < len(text) else [])])

    def _made(self, grammar: str) -> Callable[[], Constraint]:
        if len(grammar) > _MOST:
            raise GrammarError(f"it is longer than {_MOST} characters")
        first = LLMatcher(self._tokenizer, LLMatcher.grammar_from_lark(grammar), log_level=0)
        if first.is_error():
            raise GrammarError(f"it cannot be followed: {first.get_error().strip().splitlines()[0][:300]}")
        return lambda: _Bound(first.deep_copy())


_known: WeakKeyDictionary[Served, Grammars] = WeakKeyDictionary()


class _Bound:
    """The grammar of one answer."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def allowed(self) -> torch.Tensor:
        """As `Constraint.allowed`."""
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise GrammarError(self._matcher.get_error().splitlines()[0])
        return torch.from_numpy(np.unpackbits(mask, bitorder="little").astype(bool))

    def advance(self, token: int) -> bool:
        """As `Constraint.advance`."""
        self._matcher.consume_token(token)
        return self._matcher.is_stopped()


def _json(schema: Any) -> str:
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError("a schema is an object")
    return "%json " + json.dumps({**schema, "x-guidance": _SPACES})
