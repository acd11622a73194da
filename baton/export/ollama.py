"""A Modelfile for Ollama, beside a GGUF file: FROM, TEMPLATE in the syntax of Go's text/template, PARAMETER stop.

Ollama does not read the Jinja template of a GGUF file. Its own says what stands around each message, so what the Jinja
template puts there is learned by rendering conversations, and the result is compared with it on 50 others. A template
that does more (one that cuts messages, or reads the date) cannot be held.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from data.config import WorldSource
from data.errors import DataError
from data.rendering import Renderer
from data.world import chats
from handoff.errors import HandoffError
from handoff.files import quoted

if TYPE_CHECKING:
    from data.encode import Encoder

CHATS = 50
_SYSTEM, _FIRST, _REPLY, _SECOND = "QSystemQ", "QFirstQ", "QReplyQ", "QSecondQ"
_SAMPLING = ("temperature", "top_p", "top_k", "min_p")

Turn = dict[str, str]


@dataclass(frozen=True)
class Around:
    """What a chat template puts around messages."""

    opening: str
    """Before everything, if the first message is no system message."""
    system: tuple[str, str]
    """Before a system message, which is the first one, and after it."""
    user: tuple[str, str]
    assistant: tuple[str, str]
    header: str
    """Before the next answer."""

    def go(self) -> str:
        """The template for Ollama."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        cases = []
        for role, (before, after) in roles.items():
            end = f"{{{{ if not $last }}}}{_go(after)}{{{{ end }}}}" if role == "assistant" else _go(after)
            cases.append(f'if eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{end}')
        opening = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.opening)}{{{{ end }}}}'
        return (
            f"{opening if self.opening else ''}"
            "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f"{{{{ {'{{ else '.join(cases)}{{{{ end }}}}"
            f'{{{{ if and $last (ne .Role "assistant") }}}}{_go(self.header)}{{{{ end }}}}{{{{ end }}}}'
        )

    def rendered(self, turns: Sequence[Turn]) -> str:
        """What that template makes of a conversation that ends with a question."""
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        text = "" if turns[0]["role"] == "system" else self.opening
        for turn in turns:
            before, after = roles[turn["role"]]
            text += before + turn["content"] + after
        return text + self.header


def _go(text: str) -> str:
    """A text between Go's actions."""
    return text.replace("{{", '{{ "{{" }}')


def learn(encoder: "Encoder") -> Around:
    """What the encoder's chat template puts around messages, without the token that llama.cpp puts first by itself.

    Raises:
        HandoffError: there is no template, or it is more than texts around messages.
    """
    place = encoder.tokenizer.name_or_path
    if encoder.lacks:
        raise HandoffError(f"{place}: {encoder.lacks}, so there is nothing for Ollama to talk with; export it to gguf")
    renderer = Renderer(encoder.tokenizer.chat_template, encoder.tokenizer.special_tokens_map)
    if renderer.clock():
        raise HandoffError(f"{place}: its chat template reads the date, which Ollama's cannot; export it to gguf")
    system, first = {"role": "system", "content": _SYSTEM}, {"role": "user", "content": _FIRST}
    reply, second = {"role": "assistant", "content": _REPLY}, {"role": "user", "content": _SECOND}
    try:
        whole, bare, closed, answered = renderer(
            [
                ([system, first, reply, second], True, None),
                ([first, reply, second], True, None),
                ([first], False, None),
                ([first, reply], False, None),
            ]
        )
        head, before_first, before_reply, before_second, tail = _cut(whole, [_SYSTEM, _FIRST, _REPLY, _SECOND])
        beginning = _cut(bare, [_FIRST, _REPLY, _SECOND])[0]
        after_answer, after_user = _cut(answered, [_FIRST, _REPLY])[2], _cut(closed, [_FIRST])[1]
    except (DataError, ValueError) as error:
        raise _other(place) from error
    # What ends one message and begins the next is one text. A conversation that is over may end otherwise.
    before_user = before_second.removeprefix(after_answer)
    if not (before_first.endswith(before_user) and beginning.endswith(before_user)):
        before_user = _beginning([text[::-1] for text in (before_first, before_second, beginning)])[::-1]
    if not (before_reply.startswith(after_user) and tail.startswith(after_user)):
        after_user = _beginning([before_reply, tail])
    around = Around(
        opening=beginning.removesuffix(before_user),
        system=(head, before_first.removesuffix(before_user)),
        user=(before_user, after_user),
        assistant=(before_reply.removeprefix(after_user), before_second.removesuffix(before_user)),
        header=tail.removeprefix(after_user),
    )
    if differing(around, renderer) is not None:
        raise _other(place)
    return _without_bos(around, encoder)


def _other(place: str) -> HandoffError:
    return HandoffError(
        f"{place}: its chat template is more than texts around messages, which Ollama's cannot hold; export it to gguf"
    )


def _beginning(texts: Sequence[str]) -> str:
    """What all these texts begin with."""
    letters = enumerate(zip(*texts, strict=False))
    end = next((place for place, each in letters if len(set(each)) > 1), min(map(len, texts)))
    return texts[0][:end]


def _cut(text: str, marks: Sequence[str]) -> list[str]:
    """The pieces of a text around these marks, each of which is in it once. Raises ValueError."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise ValueError(mark)
        before, _, text = text.partition(mark)
        pieces.append(before)
    return [*pieces, text]


def _without_bos(around: Around, encoder: "Encoder") -> Around:
    text = encoder.tokenizer.bos_token
    adds = encoder.tokenizer.backend_tokenizer.encode("").ids[:1] == [encoder.bos_id]
    if not adds or not text:
        return around
    before, after = around.system
    return Around(
        opening=around.opening.removeprefix(text),
        system=(before.removeprefix(text), after),
        user=around.user,
        assistant=around.assistant,
        header=around.header,
    )


def conversations(count: int = CHATS) -> list[list[Turn]]:
    """Conversations that end with a question, of several lengths, with and without a system message."""
    rng = random.Random(0)
    world = WorldSource.model_validate({"source": "world", "kind": "chats", "size": count * 3, "split": "validation"})
    given = iter([chat.messages for chat in chats(world)])
    found = []
    for place in range(count):
        turns = [{"role": "system", "content": f"Answer in {rng.randint(1, 9)} words.\nBe kind."}] if place % 2 else []
        for messages in islice(given, place % 3 + 1):
            turns += [{"role": m.role, "content": m.content} for m in messages[-2:]]
        found.append(turns[:-1])
    return found


def differing(around: Around, renderer: Renderer) -> list[Turn] | None:
    """The first of the conversations that the chat template renders otherwise; None if there is none."""
    talks = conversations()
    for turns, wanted in zip(talks, renderer([(turns, True, None) for turns in talks]), strict=True):
        if around.rendered(turns) != wanted:
            return turns
    return None


def modelfile(file: str, encoder: "Encoder", generation: dict[str, Any]) -> str:
    """The Modelfile of a GGUF file that lies beside it.

    Args:
        file: its name.
        encoder: the model's encoder.
        generation: the content of its generation_config.json.

    Raises:
        HandoffError: Ollama's template cannot hold the chat template, or a text cannot be written in a Modelfile.
    """
    template = learn(encoder).go()
    stops = [encoder.tokenizer.convert_ids_to_tokens(token) for token in encoder.stop_ids]
    for text in (template, *stops):
        if '"""' in text:
            raise HandoffError(f'{quoted(text)} has """ in it, which a Modelfile cannot hold; export it to gguf')
    lines = [f"FROM ./{file}", f'TEMPLATE """{template}"""', *(f'PARAMETER stop """{text}"""' for text in stops)]
    if generation.get("do_sample"):
        lines += [f"PARAMETER {key} {generation[key]}" for key in _SAMPLING if generation.get(key) is not None]
    return "\n".join(lines) + "\n"
