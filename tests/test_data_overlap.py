"""Held-out rows that are also training rows are counted by content, and too many are refused (data/overlap.py)."""

from typing import Any

import pytest

from data.accounting import Accounting
from data.errors import DataError
from data.overlap import check_held_out, shared_rows
from data.records import Chat, Message, Origin, Preference, Prompt, Text
from data.rows import Chats, Documents, Pairs, Prompts, Rows, Texts
from tests.row_sets import encode
from tests.test_data_encode import own

WORDS = ["ann", "bob", "cat", "dog", "elf", "fox", "gnu", "hen", "imp", "jay", "kit", "lad", "man", "nun", "owl", "pig"]
KINDS = ["documents", "chats", "pairs", "prompts", "texts"]


def rows(kind: str, numbers: range) -> Rows[Any]:
    """A row for each number, from a file of its own."""
    words = [WORDS[n] for n in numbers]
    origins = [Origin(f"{numbers}", n) for n in numbers]
    asked = [(Message("user", f"say {word}"),) for word in words]
    if kind == "documents":
        return encode(Documents(), [Text(f"{w} and {w}", o) for w, o in zip(words, origins)], own(), Accounting())
    if kind == "chats":
        chats = [Chat((*q, Message("assistant", w)), o) for q, w, o in zip(asked, words, origins)]
        return encode(Chats(64, "drop"), chats, own(), Accounting())
    if kind == "pairs":
        pairs = [Preference(q, w, "no", o) for q, w, o in zip(asked, words, origins)]
        return encode(Pairs(64, "drop"), pairs, own(), Accounting())
    if kind == "prompts":
        prompts = [Prompt(q, o, {"file": str(numbers)}) for q, o in zip(asked, origins)]
        return encode(Prompts(64), prompts, own(), Accounting())
    return encode(Texts(Text), [Text(w, o) for w, o in zip(words, origins)], None, Accounting())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_in_both_are_counted_by_their_content(kind: str) -> None:
    train = rows(kind, range(12))
    assert shared_rows(train, rows(kind, range(12, 16))) == 0
    assert shared_rows(train, rows(kind, range(9, 16))) == 3
    assert shared_rows(train, rows(kind, range(12))) == 12


def test_too_many_are_refused_and_a_few_are_said() -> None:
    train = rows("pairs", range(12))
    assert check_held_out(train, rows("pairs", range(12, 16)), 0.5, "reward") == ""
    some = rows("pairs", range(8, 16))
    assert check_held_out(train, some, 0.5, "reward") == "4 of 8 held-out rows are also training rows"
    with pytest.raises(
        DataError, match=r"reward\.eval_data: 4 of 8 held-out rows are also training rows .*at most 20%"
    ):
        check_held_out(train, some, 0.2, "reward")
