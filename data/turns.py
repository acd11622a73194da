"""Splits a conversation into alternating contexts (given to the model) and answers (written by the model).

The loss mask follows from this split. It uses the structure of the template and never searches for marker strings in
rendered text, so a marker inside a user's message cannot move the mask. `OwnTurns` writes Baton's template directly,
which is fast because it needs no rendering. `TemplateTurns` renders prefixes of the conversation with any other chat
template. A test checks that both agree.

An answer is followed by the stop token, which the encoder adds as an id. Text that a template puts after the stop token
(often a line break) begins the next context.
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

    A prompt has one more context than answers.
    """

    contexts: list[str]
    answers: list[str]


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How the template wraps an answer: `header`, `said(text)`, `stop`. The model has to generate all three."""

    header: str = ""
    """The part up to and including the last special token before the text (e.g. the name of a channel)."""
    before: str = ""
    """The part between the header and the text (e.g. a space, or an empty thought)."""
    after: str = ""
    """The part between the text and the stop token."""
    stop: str = END
    trims: bool = False
    """Whether the template strips white space from both ends of an answer."""

    def said(self, content: str) -> str:
        return f"{self.before}{content.strip() if self.trims else content}{self.after}"

    def content(self, said: str) -> str:
        """The inverse of `said`: the text of an answer, also of a truncated one."""
        return "" if self.before.startswith(said) else said.removeprefix(self.before).removesuffix(self.after)


class Turns(Protocol):
    shape: AnswerShape

    def split(self, messages: Sequence[Message], generation: bool) -> Split:
        """Splits a conversation. `generation`: it is a prompt, and its last context ends with the next answer's header.

        Raises RowRefused when the template cannot express the conversation.
        """
        ...


class OwnTurns:
    """Baton's own template (see data/template.py), without rendering."""

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
    """Any chat template, by rendering prefixes: an answer is what follows the generation prompt in the rendering."""

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
        """For a template that changes earlier turns (e.g. removes earlier reasoning).

        As a prompt, the changed text is what the model should see. For training it is refused: no single sequence has
        every answer after the context in which the model would have generated it.
        """
        if generation:
            return Split([whole], [])
        raise RowRefused("the chat template rewrites earlier turns")


def _learn(render: Render, special: re.Pattern[str]) -> AnswerShape:
    """Finds out how the template wraps an answer, by rendering a conversation with a known, unique answer."""
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
