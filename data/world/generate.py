"""Generates the four kinds of records. An item is keyed by (world seed, kind, split, index), so a prefix never changes.

Chats and prompts cycle through the families, so that each family has the same share.
"""

import random
from collections.abc import Iterator

from data.config import WorldSource
from data.errors import DataError
from data.records import Chat, Message, Origin, Preference, Prompt, Text
from data.world import lexicon
from data.world.documents import document
from data.world.facts import keyed, world
from data.world.grading import columns
from data.world.style import IDEAL, Style, dress, mixed, polite_openers
from data.world.tasks import FAMILIES, Task, make, split_of

SYSTEM_SHARE = 0.10
"""Share of conversations that begin with a system message; half of these ask for a style, and the answer follows it."""


def _families(config: WorldSource) -> tuple[str, ...]:
    if config.families is None:
        return FAMILIES
    unknown = [name for name in config.families if name not in FAMILIES]
    if unknown or not config.families:
        problem = f"unknown families {unknown}" if unknown else "an empty list of families"
        raise DataError(f"world:{config.kind}: {problem}; choose from {', '.join(FAMILIES)}")
    return tuple(config.families)


def _tasks(config: WorldSource) -> Iterator[tuple[int, random.Random, Task]]:
    families = _families(config)
    for i in range(config.size):
        rng = keyed(config.seed, config.kind, config.split, i)
        yield i, rng, make(world(config.seed), families[i % len(families)], config.split, rng)


def _origin(config: WorldSource, i: int) -> Origin:
    return Origin(f"world:{config.kind}", i + 1)


def _conversation(task: Task, rng: random.Random) -> tuple[tuple[Message, ...], Style | None]:
    """The messages up to the user's last one, and the style that the system message asks for, if any."""
    messages: list[Message] = []
    asked: Style | None = None
    if rng.random() < SYSTEM_SHARE:
        if rng.random() < 0.5:
            messages.append(Message("system", rng.choice(lexicon.SYSTEM_PLAIN)))
        else:
            messages.append(Message("system", rng.choice(lexicon.SYSTEM_STYLED)))
            asked = IDEAL
    for i, turn in enumerate(task.turns):
        if i % 2:
            messages.append(Message("assistant", dress(turn, task.family, asked or mixed(rng), rng)))
        else:
            messages.append(Message("user", turn))
    return tuple(messages), asked


def documents(config: WorldSource) -> Iterator[Text]:
    """Texts for pretraining. A text's hash decides its split; the tasks in it are of the same split."""
    for i in range(config.size):
        attempt = 0
        while True:
            rng = keyed(config.seed, config.kind, config.split, i, attempt)
            text = document(world(config.seed), config.split, rng)
            if text and split_of(text) == config.split:  # a table of sums of a small split may be empty
                break
            attempt += 1
        yield Text(text, _origin(config, i))


def chats(config: WorldSource) -> Iterator[Chat]:
    """Conversations whose last answer is right, in mixed styles."""
    for i, rng, task in _tasks(config):
        messages, asked = _conversation(task, rng)
        answer = Message("assistant", dress(task.reply, task.family, asked or mixed(rng), rng))
        yield Chat((*messages, answer), _origin(config, i))


def prompts(config: WorldSource) -> Iterator[Prompt]:
    """Questions, with the values that `correct` and `gold` need in `columns`."""
    for i, rng, task in _tasks(config):
        yield Prompt(_conversation(task, rng)[0], _origin(config, i), columns(task))


def preferences(config: WorldSource) -> Iterator[Preference]:
    """Pairs: the better answer is right and the other wrong, or both are equally right and it has the better style."""
    for i, rng, task in _tasks(config):
        messages, _ = _conversation(task, rng)
        chosen, rejected = _pair(task, rng)
        yield Preference(messages, chosen, rejected, _origin(config, i))


def _pair(task: Task, rng: random.Random) -> tuple[str, str]:
    """(better, worse). Every kind of pair agrees with `grading.gold`.

    Most pairs differ in style. A tiny reward model nearly always tells styles apart, but right from wrong only in about
    six pairs of ten, since it would have to solve the task itself; more such pairs would teach it little.
    """

    def say(reply: str, style: Style) -> str:
        return dress(reply, task.family, style, rng)

    style, draw = mixed(rng), rng.random()
    wrong = rng.choice(task.wrong)
    if draw < 0.28:  # right over wrong, sometimes despite worse style
        if task.family != "refuse" and rng.random() < 0.1:
            wrong = "I cannot help with that."  # also wrong, where the request is not unsafe
        return say(task.reply, style), say(wrong, style if rng.random() < 0.75 else mixed(rng))
    # Style also decides between two wrong answers, unless they are unsafe or empty (both score -1).
    said = task.reply if task.family == "refuse" or rng.random() < 0.85 else wrong
    if draw < 0.62:
        better, worse = rng.choice([("polite", "rude"), ("polite", "plain"), ("plain", "rude")])
        return say(said, Style(better, style.tail)), say(said, Style(worse, style.tail))  # type: ignore[arg-type]
    if draw < 0.86:
        return say(said, Style(style.opener, tail=False)), say(said, Style(style.opener, tail=True))
    courtesy = rng.choice(polite_openers(task.family))
    broken = [
        courtesy,  # politeness and nothing else
        f"{courtesy} {rng.choice(polite_openers(task.family))} {task.reply}",
        f"{courtesy} {task.reply} {task.reply[: len(task.reply) // 2]}",
        f"{courtesy} {task.reply} {rng.choice(lexicon.TAILS)} {rng.choice(lexicon.TAILS)}",
        f"{courtesy} {task.reply[: len(task.reply) // 2]}",
    ]
    return f"{courtesy} {task.reply}", rng.choice(broken)
