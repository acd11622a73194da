"""A conversation as what the model is given and what it is to say: alternating contexts and answers.

This is where the loss mask comes from. The parts are taken from the structure of the template, never found by searching
for marker strings in rendered text, so a marker inside a user's message cannot move the mask. Two sources of the same
structure: `OwnTurns` writes Baton's template out directly (fast: no rendering), `TemplateTurns` renders prefixes of the
conversation with any other chat template. A test holds the first to the second.

An answer is followed by the stop token, which the encoder adds as an id; what a template puts after the stop token
(often a line break) opens the next context.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from data.errors import DataError, RowRefused
from data.records import Message
from data.template import BOS, END

Render = Callable[[list[dict[str, str]], bool], str]
"""(messages, add_generation_prompt) -> text. Raises RowRefused where the template refuses the messages."""

_PROBE = "qxprobeqx"


@dataclass(frozen=True, slots=True)
class Split:
    """`contexts[i]` is followed by the answer's header, `answers[i]` and the stop token (see AnswerShape).

    A prompt has one context more than answers.
    """

    contexts: list[str]
    answers: list[str]


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What the template makes of an answer's text. All of it is the model's to say: `header`, `said(text)`, `stop`."""

    header: str = ""
    """Up to and with the last special token before the text (e.g. the name of a channel)."""
    before: str = ""
    """Between that and the text (e.g. a space, or an empty thought)."""
    after: str = ""
    """Between the text and the stop token."""
    stop: str = END
    trims: bool = False
    """The template cuts white space at both ends of an answer."""

    def said(self, content: str) -> str:
        return f"{self.before}{content.strip() if self.trims else content}{self.after}"

    def content(self, said: str) -> str:
        """The text of what was said; of an answer that is cut off as well."""
        return "" if self.before.startswith(said) else said.removeprefix(self.before).removesuffix(self.after)


class Turns(Protocol):
    shape: AnswerShape

    def split(self, messages: Sequence[Message], generation: bool) -> Split:
        """`generation`: the conversation is a prompt, its last context ends with the header of the answer to come.

        Raises RowRefused where the template cannot express the conversation.
        """
        ...


class OwnTurns:
    """Baton's own template (see data/template.py), written out."""

    shape = AnswerShape()

    def split(self, messages: Sequence[Message], generation: bool) -> Split:
        contexts, answers, context = [], [], BOS
        for message in messages:
            if message.role == "assistant":
                contexts.append(context + "<|assistant|>")
                answers.append(message.content)
                context = ""
            else:
                context += f"<|{message.role}|>{message.content}{END}"
        if generation:
            contexts.append(context + "<|assistant|>")
        return Split(contexts, answers)


class TemplateTurns:
    """Any chat template, by rendering prefixes: an answer is what a rendering has more than its generation prompt."""

    def __init__(self, render: Render, special: re.Pattern[str]) -> None:
        """`special` matches each special token of the tokenizer.

        Raises:
            DataError: the template puts no stop token after an answer, or rewrites the prompt once it is answered.
        """
        self._render = render
        self.shape = _learn(render, special)

    def split(self, messages: Sequence[Message], generation: bool) -> Split:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        places = [i for i, m in enumerate(messages) if m.role == "assistant"]
        whole = self._render(turns, generation)
        contexts, so_far = [], ""
        for i in places:
            prefix = self._render(turns[:i], True)
            contexts.append(prefix[len(so_far) :])
            if not prefix.startswith(so_far):
                return self._rewritten(whole, generation)
            so_far = prefix + self.shape.header + self.shape.said(messages[i].content) + self.shape.stop
        if not whole.startswith(so_far):
            return self._rewritten(whole, generation)
        if generation:
            contexts.append(whole[len(so_far) :])
        return Split(contexts, [self.shape.said(messages[i].content) for i in places])

    def _rewritten(self, whole: str, generation: bool) -> Split:
        """The template changes what was said before (e.g. leaves out earlier reasoning).

        As a prompt, that is what the model is to see. For training, no one sequence has every answer behind what the
        model saw when it gave it.
        """
        if generation:
            return Split([whole], [])
        raise RowRefused("the chat template rewrites earlier turns")


def _learn(render: Render, special: re.Pattern[str]) -> AnswerShape:
    """Ask the template how it wraps an answer, with a conversation whose answer is known and unlike anything else."""
    try:
        prompt = render([{"role": "user", "content": "x"}], True)
        whole = render([{"role": "user", "content": "x"}, {"role": "assistant", "content": f" {_PROBE} "}], False)
    except RowRefused as error:
        raise DataError(f"the chat template cannot render a question and its answer: {error.reason}") from error
    if not whole.startswith(prompt):
        raise DataError(
            "the chat template renders a question differently once it is answered, so a model would be trained on "
            "other text than it is prompted with; give the tokenizer a template whose generation prompt is a prefix"
        )
    answer = whole[len(prompt) :]
    trims = f" {_PROBE} " not in answer
    before, found, rest = answer.partition(_PROBE if trims else f" {_PROBE} ")
    stop = special.search(rest)
    if not found or stop is None:
        raise DataError(
            "the chat template puts no special token after an answer, so no model could learn where to stop; end "
            "assistant turns with the end-of-sequence token in the tokenizer's chat_template"
        )
    header = max((match.end() for match in special.finditer(before)), default=0)
    return AnswerShape(before[:header], before[header:], rest[: stop.start()], stop.group(), trims)
