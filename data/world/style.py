"""The style of an answer: an opener before the reply, a rambling tail after it.

The answers in training chats are mixed on purpose: some polite, some plain, some rude, some rambling. Instruction
tuning learns the mixture; the later stages learn from preferences which style is better.
"""

import random
from dataclasses import dataclass
from typing import Literal

from data.world import lexicon

Opener = Literal["polite", "plain", "rude"]

POLITE_SHARE, PLAIN_SHARE = 0.40, 0.25
"""The rest is rude. Polite answers are common enough that a policy reaches them within a KL of 2 nats from SFT."""
TAIL_SHARE = 0.30


@dataclass(frozen=True, slots=True)
class Style:
    opener: Opener
    tail: bool


IDEAL = Style("polite", tail=False)


def mixed(rng: random.Random) -> Style:
    """A random style, as in training chats."""
    draw = rng.random()
    opener: Opener = "polite" if draw < POLITE_SHARE else "plain" if draw < POLITE_SHARE + PLAIN_SHARE else "rude"
    return Style(opener, rng.random() < TAIL_SHARE)


def polite_openers(family: str) -> tuple[str, ...]:
    """The polite openers of a family. A refusal is polite with an apology; "Sure!" before it would not be."""
    return lexicon.SORRY if family == "refuse" else lexicon.POLITE


def dress(reply: str, family: str, style: Style, rng: random.Random) -> str:
    """The reply in this style."""
    parts = [reply]
    if style.opener != "plain":
        parts.insert(0, rng.choice(polite_openers(family) if style.opener == "polite" else lexicon.RUDE))
    if style.tail:
        parts.append(rng.choice(lexicon.TAILS))
    return " ".join(parts)
