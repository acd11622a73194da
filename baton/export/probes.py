"""Texts by which two programs that should read and answer alike are compared. The same ones at every call."""

import random
import unicodedata
from collections.abc import Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING

from data.config import WorldSource
from data.errors import RowRefused
from data.records import Message
from data.world import chats, documents

if TYPE_CHECKING:
    from data.encode import Encoder

STRINGS, POSITIONS = 1000, 500
ANSWER = 64
"""Tokens of the greedy answer."""
_LENGTH = 64  # tokens of a row
_CHARACTERS = (
    "abcdefghijklmnopqrstuvwxyz",
    "ABCDEFGHIJKLMNOPQRSTUVWXYZ",
    "0123456789",
    " \t\n",
    ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+~`",
    "äöüßéèêñçøåæœšžłő",
    "абвгдежзийклмнопрстуфхцчшщ",
    "αβγδεζηθικλμνξοπρστυφχψω",
    "的一是不了人我在有他这中大来上国",
    "かなカナ한국어",
    "שלוםعربيहिन्दीไทย",
    "😀🎉🚀❤️👩‍💻🏳️‍🌈",
    "–—…“”‘’«»·•€£¥°±×÷≤≥≠∞√",
)
_PHRASES = (
    "I'll say what you're doing; they've gone, we'd stay, it's HERS and HE'S THERE.",
    "  two spaces   three\n\n\nlines\r\nand\ttabs\t\tend  ",
    "def f(x: int) -> str:\n    return f'{x:>10}'  # 3.14159 and 1,000,000\n",
    "https://example.org/a/b?c=d&e=f#g user@example.org 2024-02-29T12:34:56Z",
    "naïve façade, Ærøskøbing, Straße, œuvre; 東京都, 안녕하세요, Привет, שלום",
    "1234567890 12 123 1234 0x1F 1e-9 ½ ² ³ №5",
    "...!!!???;;; --- === >>> <<< ### $$$ %%% ((())) [[]] {{}}",
    "ALLCAPS CamelCase snake_case kebab-case don'T CAN'T we'Ve",
)
_QUESTION = "What is the capital of France?"


def strings(encoder: "Encoder", count: int = STRINGS, *, composed: bool = False) -> list[str]:
    """Texts to be cut into tokens: prose, code, the vocabulary's own tokens in any order, and characters of many
    scripts. None has a special token's text.

    Args:
        composed: only texts whose characters are composed (NFC).
    """
    rng = random.Random(0)
    prose = [document.text for document in documents(_world("documents"))]
    special = set(encoder.tokenizer.all_special_ids) | set(encoder.tokenizer.added_tokens_decoder)
    ids = [token for token in range(encoder.vocab_size) if token not in special]
    found: list[str] = [*_PHRASES]
    while len(found) < count:
        kind = len(found) % 4
        if kind == 0:
            text = rng.choice(prose)
            start = rng.randrange(len(text))
            text = text[start : start + rng.randint(1, 200)]
        elif kind == 1:
            text = encoder.decode([rng.choice(ids) for _ in range(rng.randint(1, 12))]).replace("\ufffd", "")
        elif kind == 2:
            text = "".join(rng.choice(rng.choice(_CHARACTERS)) for _ in range(rng.randint(1, 40)))
        else:
            one = rng.choice(_PHRASES)
            text = rng.choice(["", " ", "\n", "7"]) + one[rng.randrange(len(one)) :] + rng.choice(prose)[:40]
        text = unicodedata.normalize("NFC", text) if composed else text
        if text and encoder.refusal(text) is None:
            found.append(text)
    return found


def rows(encoder: "Encoder", count: int = POSITIONS) -> list[list[int]]:
    """Rows of ids with at least `count` tokens that follow another one: conversations, if there is a template, and
    documents."""
    talks: Sequence[list[int]] = ()
    if not encoder.lacks:
        made = encoder.chats([chat.messages for chat in chats(_world("chats"))])
        talks = [row[0][0] for row in made if not isinstance(row, RowRefused)][:4]
    texts = encoder.documents([document.text for document in documents(_world("documents"))])
    found: list[list[int]] = []
    for row in islice(chain(talks, texts), len(talks) + len(texts)):
        if sum(len(one) - 1 for one in found) >= count:
            break
        if len(row) > 1:
            found.append(row[:_LENGTH])
    return found


def question(encoder: "Encoder") -> list[int]:
    """A prompt whose answer should end; empty for a model without a chat template."""
    return [] if encoder.lacks else encoder.prompt([Message("user", _QUESTION)])


def _world(kind: str) -> WorldSource:
    return WorldSource.model_validate({"source": "world", "kind": kind, "size": 40, "split": "validation"})
