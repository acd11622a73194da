"""How an answer is said: an opener before the reply, a rambling tail after it.

The answers of the training chats are mixed on purpose: some polite, some plain, some rude, some rambling. Instruction
tuning copies the mixture; it is left to the preferences, and to what is trained on them, to choose.
"""

import random
from dataclasses import dataclass
from typing import Literal

from data.world import lexicon

Opener = Literal["polite", "plain", "rude"]

POLITE_SHARE, PLAIN_SHARE = 0.40, 0.25
"""The rest is rude. Polite answers are common enough that a policy reaches them within 2 nats of the tuned model."""
TAIL_SHARE = 0.30


@dataclass(frozen=True, slots=True)
class Style:
    opener: Opener
    tail: bool


IDEAL = Style("polite", tail=False)


def mixed(rng: random.Random) -> Style:
    """A style as training chats have it."""
    draw = rng.random()
    opener: Opener = "polite" if draw < POLITE_SHARE else "plain" if draw < POLITE_SHARE + PLAIN_SHARE else "rude"
    return Style(opener, rng.random() < TAIL_SHARE)


def polite_openers(family: str) -> tuple[str, ...]:
    """A refusal is polite with an apology; "Sure!" before it helps nobody."""
    return lexicon.SORRY if family == "refuse" else lexicon.POLITE


def dress(reply: str, family: str, style: Style, rng: random.Random) -> str:
    """The reply as someone of that style says it."""
    parts = [reply]
    if style.opener != "plain":
        parts.insert(0, rng.choice(polite_openers(family) if style.opener == "polite" else lexicon.RUDE))
    if style.tail:
        parts.append(rng.choice(lexicon.TAILS))
    return " ".join(parts)
