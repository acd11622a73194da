"""Answers that follow a JSON schema, or that are calls of tools: llguidance says which tokens may come next."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLTokenizer

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
        """One call of one of the tools, or with `many` several; `text`: or an answer without calls.

        Raises:
            GrammarError: as `json`.
        """
        return self._made("\n".join([f"start: {'calls | TEXT' if text else 'calls'}", *self._rules(form, tools, many)]))

    def calls_or_json(
        self, form: CallForm, tools: Sequence[Mapping[str, Any]], schema: Any
    ) -> Callable[[], Constraint]:
        """A call of one of the tools, or JSON that the schema allows. Raises GrammarError."""
        rules = [rule for rule in self._rules(form, tools, many=False) if not rule.startswith("TEXT")]
        return self._made("\n".join(["start: calls | answer", f"answer: {_json(schema)}", *rules]))

    def _rules(self, form: CallForm, tools: Sequence[Mapping[str, Any]], many: bool) -> list[str]:
        rules = []
        for i, tool in enumerate(tools):
            function = tool["function"]
            before, after = form.around(function["name"])
            schema = function.get("parameters") or {"type": "object"}
            rules.append(f"call_{i}: {self._literal(before)} {_json(schema)} {self._literal(after)}")
        one = " | ".join(f"call_{i}" for i in range(len(tools)))
        more = f"({self._literal(form.between)} call)*" if many and form.between else ""
        first = form.marker[:1] or "{"
        rules += [f"call: {one}", f"calls: {self._literal(form.begin)} call {more} {self._literal(form.end)}"]
        rules.append(f"TEXT: /[^\\s{_escaped(first)}](.|\\n)*/")
        return rules

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


def _escaped(character: str) -> str:
    return "\\" + character if character in "[]{}()/\\^-<|" else character
