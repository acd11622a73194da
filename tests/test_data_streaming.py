"""Text that is given out while its tokens arrive: together it is the whole, and nothing of it is taken back."""

import random

import pytest

from data.streaming import Streamed
from tests.test_chat_templates import TEMPLATES, encoder
from tests.test_data_encode import own

WORDS = ["naïve café", "日本語", "🙂🙂", "a  b\n", "<think>", "</think>\n\n", "Sort the words: pear, apple. "]
ENCODERS = {"own": own, **{name: lambda name=name: encoder(TEMPLATES[name]) for name in ("qwen3", "gemma3", "gptoss")}}


def streamed(made, ids, stops=(), form="answer"):
    said = Streamed(made, stops, form=form)
    pieces = []
    for token in ids:
        pieces.append(said.add(token))
        if said.stopped:
            break
    pieces.append(said.finish())
    assert "".join(pieces) == said.text
    return pieces, said


@pytest.mark.parametrize("name", ENCODERS)
def test_pieces_make_the_whole_text(name):
    """Texts, their tokens shuffled, and any ids: the last two are hardly ever text."""
    made = ENCODERS[name]()
    for seed in range(12):
        chance = random.Random(seed)
        ids = made.document("".join(chance.choices(WORDS, k=20)))[made.text_part]
        if seed % 3 == 1:
            chance.shuffle(ids)
        elif seed % 3 == 2:
            ids = [chance.randrange(made.vocab_size) for _ in range(150)]
        pieces, _ = streamed(made, ids, form="text")
        if seed % 3 == 0:
            assert "".join(pieces) == made.text(ids)
            assert not any("�" in piece for piece in pieces) and sum(map(bool, pieces)) > 20
        else:
            assert "".join(pieces).replace("�", "") == made.text(ids).replace("�", "")
        tokens, _ = streamed(made, ids[:40], form="tokens")
        assert "".join(tokens) == made.text(ids[:40], special=True)
        answer, _ = streamed(made, ids[:40])
        assert "".join(answer) == made.decode(ids[:40]).removesuffix(made.ending)


@pytest.mark.parametrize("length", [5, 400])
def test_nothing_from_a_stop_text_on_is_given_out(length):
    made = own()
    text = "pear apple " * (length // 5) + "ENDE after"
    ids = made.document(text)[made.text_part]
    _, said = streamed(made, ids, ["END", "never"])
    assert said.stopped and said.text == text.partition("END")[0]
    assert streamed(made, ids, ["never", "ENDX"])[1].text == text
    assert streamed(made, made.document("it is EN")[made.text_part], ["END"])[1].text == "it is EN"
    assert streamed(made, ids, ["ENDE", "END"])[1].text == text.partition("END")[0]
