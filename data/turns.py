"""Finds the answers in a rendered conversation.

A conversation is rendered whole, as transformers renders it, and the encoder cuts the text into tokens at once. The
loss mask follows from where the answers are in the text. `OwnTurns` writes Baton's template directly, so there the
places are known. `TemplateTurns` renders any other template, and finds the answers by its structure: it renders the
conversation a second time with a mark in place of every answer, and compares the two. Special tokens are the same in
both, and no message contains one, so text in a user's message cannot move the mask.

Some templates change earlier turns when later ones follow: they leave out earlier thoughts, or end the last turn with
another token. Then no single sequence has every answer as the model would generate it, and the recipe chooses
(`earlier_turns`):

- strip: the conversation as the template renders it, with all of its answers. The ids are the template's own.
- keep: every answer as the model generates it, also the earlier ones. The ids are not the template's own.
- fork: one more row for every answer that is changed later, which ends with it. The ids of each row are the template's
  own, every answer is trained once, as the model generates it, and there are more tokens.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, TypeAlias

from data.calls import THOUGHTS, as_text, held
from data.columns import lost
from data.errors import DataError, RowRefused
from data.records import Message
from data.rendering import Conversation, Turn
from data.template import BOS, END

Render = Callable[[Sequence[Conversation]], list[str]]
"""[(messages, add_generation_prompt, tools)] -> texts. Raises RowRefused where the template refuses the messages."""
EarlierTurns: TypeAlias = Literal["strip", "keep", "fork"]

_THOUGHT = re.compile(r"(?:<think>)?(.*?)</think>", re.DOTALL)
_OPENED = re.compile(r"<(\w+)>\s*\Z")
_MARKS = range(0xE000, 0xF900)
"""Characters without a meaning, of which a conversation hardly ever has one."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and where its trained answers are: from the first character that the model generates to
    the end of the stop token."""

    text: str
    answers: list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Chatted:
    """The rows of a conversation, and counts of what was changed in them, for the user."""

    rows: list[Rendered]
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How the template wraps the last answer: the model generates `header`, `before`, its text, `after` and `stop`."""

    header: str = ""
    """The part up to and including the last special token before the text (e.g. the name of a channel)."""
    before: str = ""
    """The part between the header and the text (e.g. a space, or an empty thought)."""
    after: str = ""
    """The part between the text and the stop token."""
    stop: str = END

    def content(self, said: str) -> str:
        """The text of an answer without what surrounds it, also of a truncated one."""
        return "" if self.before.startswith(said) else said.removeprefix(self.before).removesuffix(self.after)


class Turns(Protocol):
    shape: AnswerShape

    def prompt(self, messages: Sequence[Message]) -> str:
        """The conversation with the next answer's header. Raises RowRefused when the template cannot express it."""
        ...

    def chat(self, messages: Sequence[Message], earlier: EarlierTurns) -> Chatted:
        """The conversation's rows. Raises RowRefused when the template cannot express it."""
        ...

    def answer(self, text: str) -> Rendered:
        """What the model generates for an answer, after the end of some prompt.

        Raises RowRefused when the template cannot express it.
        """
        ...

    def takes(self, key: str) -> bool:
        """Whether the template renders what a message holds under that key besides its text (data/calls.py)."""
        ...


class OwnTurns:
    """Baton's own template (see data/template.py), without rendering."""

    shape = AnswerShape()

    def prompt(self, messages: Sequence[Message]) -> str:
        """As `Turns.prompt`."""
        return BOS + "".join(f"<|{m.role}|>{m.content}{END}" for m in messages) + "<|assistant|>"

    def chat(self, messages: Sequence[Message], earlier: EarlierTurns) -> Chatted:
        """As `Turns.chat`."""
        parts, length, answers = [BOS], len(BOS), []
        for message in messages:
            header, said = f"<|{message.role}|>", message.content + END
            if message.role == "assistant" and message.trained:
                answers.append((length + len(header), length + len(header) + len(said)))
            parts += [header, said]
            length += len(header) + len(said)
        return Chatted([Rendered("".join(parts), answers)])

    def answer(self, text: str) -> Rendered:
        """As `Turns.answer`."""
        header = "<|assistant|>"
        whole = header + text + END
        return Rendered(whole, [(len(header), len(whole))])

    def takes(self, key: str) -> bool:
        """As `Turns.takes`."""
        return False


class TemplateTurns:
    """Any chat template, by rendering."""

    def __init__(self, render: Render, special: re.Pattern[str]) -> None:
        """`special` matches each special token of the tokenizer.

        Raises:
            DataError: the template fails, puts no stop token after an answer, or renders a question differently once it
                is answered.
        """
        self._render, self._special = render, special
        self._parts = self._text_arguments = False
        self._taken: dict[str, bool] = {}
        try:
            self._learn()
        except RowRefused as error:
            raise DataError(f"the chat template cannot render a question and its answer: {error.reason}") from error

    def prompt(self, messages: Sequence[Message]) -> str:
        """As `Turns.prompt`."""
        text = self._render([(self._turns(messages), True, _tools(messages))])[0]
        _check_results(messages, text)
        return text

    def chat(self, messages: Sequence[Message], earlier: EarlierTurns) -> Chatted:
        """As `Turns.chat`."""
        whole = self._whole(messages)
        row, notes = whole.rows[0], whole.notes
        places = [i for i, message in enumerate(messages) if message.role == "assistant"]
        trained = {i for i, place in enumerate(places) if messages[place].trained}
        changed = self._changed(messages, places, row, trained)
        if not changed:
            return Chatted([_only(row, trained)], notes)
        if earlier == "strip":
            notes["answers of earlier turns trained as the chat template rewrites them (earlier_turns: strip)"] += len(
                changed
            )
            return Chatted([_only(row, trained)], notes)
        forks = {}
        for i in changed:
            fork = self._whole(messages[: places[i] + 1])
            notes += fork.notes
            forks[i] = Rendered(fork.rows[0].text, fork.rows[0].answers[-1:])
        if earlier == "fork":
            notes["rows added for answers that the chat template rewrites later (earlier_turns: fork)"] += len(changed)
            rest = _only(row, trained - set(changed))
            return Chatted([*forks.values(), *([rest] if rest.answers else [])], notes)
        notes["answers of earlier turns as the model generates them, unlike the template (earlier_turns: keep)"] += len(
            changed
        )
        return Chatted([_only(self._kept(row, forks), trained)], notes)

    def answer(self, text: str) -> Rendered:
        """As `Turns.answer`."""
        asked = [self._turn("user", self._question), self._turn("assistant", text)]
        whole = self._render([(asked, False, None)])[0]
        begin, end = len(self._prompt), 0
        if whole.startswith(self._prompt):
            end = self._aligned(whole, self._answered, self._mark)[0][1]
        if not end or _thought_is_lost(text, whole[begin:end]):
            whole = self._prompt + self._generated(text)
            end = len(whole)
        # What comes before the prompt's last special token has no effect on the tokens after it.
        cut = max((m.start() for m in self._special.finditer(self._prompt)), default=0)
        return Rendered(whole[cut:], [(begin - cut, end - cut)])

    def takes(self, key: str) -> bool:
        """As `Turns.takes`. A thought is taken if the template takes it under any of its keys."""
        return any(self._takes(name) for name in (THOUGHTS if key in THOUGHTS else (key,)))

    def _takes(self, key: str) -> bool:
        """Whether the template renders a mark that stands under that key in a small conversation."""
        if key not in self._taken:
            mark = "qxmarkqx"
            asked = self._turn("user", self._question)
            if key == "tools":
                nothing = {"type": "object", "properties": {}, "required": []}
                tool = {"type": "function", "function": {"name": mark, "description": "d", "parameters": nothing}}
                self._taken[key] = self._shows(mark, [asked], [tool])
            elif key == "tool_calls":
                call = {"id": "abcdefghi", "type": "function", "function": {"name": mark, "arguments": {"x": 1}}}
                answer = self._turn("assistant", "")
                objects = self._shows(mark, [asked, answer | {key: [call]}])
                self._text_arguments = not objects and self._shows(mark, [asked, answer | {key: as_text([call])}])
                self._taken[key] = objects or self._text_arguments
            else:
                self._taken[key] = self._shows(mark, [asked, self._turn("assistant", "an answer") | {key: mark}])
        return self._taken[key]

    def _shows(self, mark: str, turns: list[Turn], tools: list[dict[str, Any]] | None = None) -> bool:
        try:
            return mark in self._render([(turns, len(turns) == 1, tools)])[0]
        except RowRefused:
            return False

    def _besides(self, message: Message) -> Turn:
        """What the message holds besides its text, under the keys that the template takes."""
        extra = held(message)
        extra.pop("tools", None)
        for key in THOUGHTS:
            if key in extra and not self._takes(key):
                extra[next(name for name in THOUGHTS if self._takes(name))] = extra.pop(key)
        if "tool_calls" in extra and self._text_arguments:
            extra["tool_calls"] = as_text(extra["tool_calls"])
        return extra

    def _turn(self, role: str, content: str) -> Turn:
        return {"role": role, "content": [{"type": "text", "text": content}] if self._parts else content}

    def _turns(self, messages: Sequence[Message]) -> list[Turn]:
        return [self._turn(message.role, message.content) | self._besides(message) for message in messages]

    def _learn(self) -> None:
        """Finds out how the template wraps an answer, from one question and a mark as its answer."""
        self._question, self._mark = "qxprobeqx", chr(_MARKS[0])
        try:
            asked, prompt, whole = self._probe()
            shown = self._question in prompt and self._mark in whole
        except RowRefused:
            shown = False
        if not shown:  # templates of models that see images want lists of parts
            self._parts = True
            asked, prompt, whole = self._probe()
        self._prompt, self._answered = prompt, whole
        context = self._common(asked, prompt)
        shared = self._common(prompt, whole)
        if shared < context or self._question not in whole[:shared]:
            raise DataError(
                "the chat template renders a question differently once it is answered, so a model would be trained on "
                "other text than it is prompted with; give the tokenizer a template that only appends"
            )
        place = whole.find(self._mark)
        rest = whole[place + 1 :]
        stop = self._special.search(rest)
        if place < shared or stop is None:
            raise DataError(
                "the chat template puts no special token after an answer, so no model could learn where to stop; end "
                "assistant turns with the end-of-sequence token in the tokenizer's chat_template"
            )
        self._opening, self._prefill = prompt[context:shared], prompt[shared:]
        self._lead = whole[shared:place]
        header = max((match.end() for match in self._special.finditer(self._lead)), default=0)
        self.shape = AnswerShape(self._lead[:header], self._lead[header:], rest[: stop.start()], stop.group())

    def _probe(self) -> list[str]:
        """The question, the question as a prompt, and the answered question."""
        question = [self._turn("user", self._question)]
        answered = [*question, self._turn("assistant", self._mark)]
        return self._render([(question, False, None), (question, True, None), (answered, False, None)])

    def _whole(self, messages: Sequence[Message]) -> Chatted:
        """The conversation as the template renders it, as one row.

        Where the template leaves the thought out even of the last answer, or puts an empty one before it, that answer
        is written after the generation prompt instead, as the model generates it.
        """
        places = [i for i, message in enumerate(messages) if message.role == "assistant"]
        turns, tools = self._turns(messages), _tools(messages)
        whole, *prompts = self._render([(turns, False, tools), *((turns[:place], True, tools) for place in places)])
        _check_results(messages, whole)
        answers = None
        if any(message.extra for message in messages):
            answers = self._appended(whole, prompts, turns, places, tools)
        if answers is None:
            answers = self._marked(whole, prompts, messages, turns, places, tools)
        for place, (start, end) in zip(places, answers, strict=True):
            self._check_held(messages[place], whole[start:end], last=place == places[-1])
        notes: Counter[str] = Counter()
        said, (start, end) = messages[places[-1]].content, answers[-1]
        if _thought_is_lost(said, whole[start:end]):
            if messages[places[-1]].extra:
                raise RowRefused("an answer has a thought in its text, which the chat template changes, and more")
            notes[
                "answers whose thought the chat template leaves out or doubles; written after its generation prompt"
            ] += 1
            if len(answers) > 1 and not prompts[-1].startswith(whole[: answers[-2][1]]):
                raise RowRefused("the chat template leaves a thought out, and changes the turns before it")
            whole = prompts[-1] + self._generated(said)
            answers[-1] = (len(prompts[-1]), len(whole))
        elif not whole.startswith(prompts[-1]):
            notes["answers that the chat template puts behind another text than its own prompt for them"] += 1
        return Chatted([Rendered(whole, answers)], notes)

    def _appended(
        self, whole: str, prompts: Sequence[str], turns: Sequence[Turn], places: Sequence[int], tools: Any
    ) -> list[tuple[int, int]] | None:
        """Where the answers of `whole` are, if the template only appends: each begins where its prompt ends, and ends
        with the last special token of the conversation up to it. None if the template changes earlier turns."""
        answers = []
        texts = self._render([(turns[: place + 1], False, tools) for place in places])
        for prompt, text in zip(prompts, texts, strict=True):
            *_, last = [None, *self._special.finditer(text, len(prompt))]
            # An answer of an earlier turn may end with another token than the last one.
            stop = None if last is None else self._special.match(whole, last.start())
            if (
                last is None
                or stop is None
                or not whole.startswith(prompt)
                or not whole.startswith(text[: last.start()])
            ):
                return None
            answers.append((len(prompt), stop.end()))
        return answers

    def _marked(
        self,
        whole: str,
        prompts: Sequence[str],
        messages: Sequence[Message],
        turns: Sequence[Turn],
        places: Sequence[int],
        tools: Any,
    ) -> list[tuple[int, int]]:
        """Where the answers of `whole` are, by the same conversation with a mark in place of each answer and its calls.

        Raises RowRefused when the two cannot be compared.
        """
        texts = [text for message in messages for text in (message.content, message.extra)]
        mark = next(chr(code) for code in _MARKS if not any(chr(code) in text for text in texts))
        marked = [turn | self._turn("assistant", mark) if i in places else turn for i, turn in enumerate(turns)]
        for turn in marked:
            turn.pop("tool_calls", None)
        found = self._aligned(whole, self._render([(marked, False, tools)])[0], mark)
        if len(found) != len(places):
            raise RowRefused("the chat template leaves out an answer, or joins it with another")
        answers: list[tuple[int, int]] = []
        for prompt, (text, end) in zip(prompts, found, strict=True):
            last = answers[-1][1] if answers else 0
            answers.append((len(prompt) if whole.startswith(prompt) else self._start(whole, last, text), end))
        return answers

    def _check_held(self, message: Message, said: str, *, last: bool) -> None:
        """Raises RowRefused if the template has left out a call of an answer, its text beside a call, or the thought of
        the last one."""
        extra = held(message)
        calls = extra.get("tool_calls", ())
        if any(call["function"]["name"] not in said for call in calls):
            raise lost("tool_calls")
        if calls and message.content.strip() not in said:
            raise RowRefused("the chat template leaves out the text of an answer that calls a tool")
        for key in THOUGHTS:
            if last and extra.get(key, "").strip() not in said:
                raise lost(key)

    def _changed(self, messages: Sequence[Message], places: list[int], row: Rendered, trained: set[int]) -> list[int]:
        """The trained answers of earlier turns that the template renders in another way while they are the last."""
        turns, tools = self._turns(messages), _tools(messages)
        earlier = [i for i in range(len(places) - 1) if i in trained]
        found = []
        texts = self._render([(turns[: places[i] + 1], False, tools) for i in earlier])
        for i, text in zip(earlier, texts, strict=True):
            start, end = row.answers[i]
            said = row.text[start:end]
            if not text.startswith(row.text[:end]) or _thought_is_lost(messages[places[i]].content, said):
                found.append(i)
        return found

    def _start(self, whole: str, last: int, text: int) -> int:
        """Where the model begins to generate the answer whose text is at `text`; the answer before it ends at `last`.

        Only for an answer that does not follow its prompt as the template renders it.
        """
        if self._opening:
            # Its special token is in no message, so the first place is right; plain words are nearest to the answer.
            look = whole.find if self._special.search(self._opening) else whole.rfind
            place = look(self._opening, last, text)
            if place >= 0:
                return place + len(self._opening)
        return text - len(self._lead) if whole.endswith(self._lead, last, text) else text

    def _generated(self, said: str) -> str:
        """An answer after the generation prompt, which may have begun a thought, and its stop token.

        Raises RowRefused for an answer with a thought where the generation prompt has ended the thought.
        """
        begun = self._opening + self._prefill
        opened = _OPENED.search(begun)
        if opened is not None:
            tag, end = f"<{opened.group(1)}>", f"</{opened.group(1)}>"
            if said.lstrip().startswith(tag):
                said = said.lstrip().removeprefix(tag)
                said = said.lstrip("\n") if begun.endswith("\n") else said
            elif end not in said:
                said = (self._lead if end in self._lead else f"\n{end}\n\n") + said
        elif "</think>" in begun and "</think>" in said:
            raise RowRefused("an answer has a thought, and the chat template's generation prompt asks for none")
        return said + self.shape.after + self.shape.stop

    def _kept(self, row: Rendered, forks: dict[int, Rendered]) -> Rendered:
        """The row with the answers of `forks` in place of those that the template has rewritten."""
        parts: list[str] = []
        answers: list[tuple[int, int]] = []
        length = last = 0
        for i, (start, end) in enumerate(row.answers):
            context, said = row.text[last:start], row.text[start:end]
            if i in forks:
                text, ((begin, stop),) = forks[i].text, forks[i].answers
                said = text[begin:stop]
                prefilled = bool(self._prefill) and text[:begin].endswith(self._opening + self._prefill)
                context += self._prefill if prefilled and not context.endswith(self._prefill) else ""
            answers.append((length + len(context), length + len(context) + len(said)))
            parts += [context, said]
            length, last = answers[-1][1], end
        return Rendered("".join(parts) + row.text[last:], answers)

    def _aligned(self, whole: str, blank: str, mark: str) -> list[tuple[int, int]]:
        """For each answer in `whole`, where its text begins and where its stop token ends.

        `blank` is the same conversation with `mark` in place of each answer.

        Raises:
            RowRefused: the two have other special tokens, or an answer has no special token behind it.
        """
        tokens, others = list(self._special.finditer(whole)), list(self._special.finditer(blank))
        if [token.group() for token in tokens] != [token.group() for token in others]:
            raise RowRefused("the chat template renders other special tokens for other answers")
        found = []
        ends = [0, *(token.end() for token in tokens)]
        for i, other in enumerate(others):
            piece = blank[others[i - 1].end() if i else 0 : other.start()]
            if mark not in piece:
                continue
            if piece.count(mark) > 1:
                raise RowRefused("the chat template puts no special token between two answers")
            before = piece.partition(mark)[0]
            begin = ends[i] + _shared(before, whole[ends[i] : tokens[i].start()])
            found.append((begin, tokens[i].end()))
        return found

    def _common(self, a: str, b: str) -> int:
        """Length of the common beginning; a special token counts as a whole."""
        length = _shared(a, b)
        cuts = (m.start() for text in (a, b) for m in self._special.finditer(text) if m.start() < length < m.end())
        return min(cuts, default=length)


def _check_results(messages: Sequence[Message], text: str) -> None:
    """Raises RowRefused if the turn of a tool is not in the rendered text, as it is or as a JSON string."""
    for message in messages:
        said = message.content.strip()
        if message.role == "tool" and said not in text and json.dumps(said, ensure_ascii=False)[1:-1] not in text:
            raise RowRefused("the chat template leaves out the turn of a tool")


def _tools(messages: Sequence[Message]) -> list[dict[str, Any]] | None:
    return held(messages[0]).get("tools") if messages else None


def _only(row: Rendered, chosen: set[int]) -> Rendered:
    return Rendered(row.text, [span for i, span in enumerate(row.answers) if i in chosen])


def _thought_is_lost(content: str, said: str) -> bool:
    """Whether a template has left the thought of an answer out, or has put an empty one before it."""
    thought = _THOUGHT.search(content)
    if thought is None:
        return False
    return thought.group(1).strip() not in said or said.count("</think>") > content.count("</think>")


def _shared(a: str, b: str) -> int:
    if b.startswith(a):
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
