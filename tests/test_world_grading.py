"""The graders of the embedded world: right answers are right in any style, hedging is wrong, gold cannot be gamed."""

import pytest

from data.world import correct, gold, lexicon
from data.world.facts import keyed, world
from data.world.grading import columns
from data.world.style import Style, dress
from data.world.tasks import FAMILIES, make

STYLES = [Style(opener, tail) for opener in ("polite", "plain", "rude") for tail in (False, True)]


@pytest.fixture(scope="module", params=FAMILIES)
def tasks(request):
    return [make(world(0), request.param, "train", keyed("judges", request.param, i)) for i in range(60)]


def test_the_right_reply_is_right_and_the_wrong_ones_wrong_in_every_style(tasks) -> None:
    for i, task in enumerate(tasks):
        for style in STYLES:
            rng = keyed("say", i)
            assert correct(columns(task), dress(task.reply, task.family, style, rng))
            for wrong in task.wrong:
                assert wrong != task.reply
                assert not correct(columns(task), dress(wrong, task.family, style, rng)), (task, wrong)


def test_the_bare_answer_and_odd_spacing_are_right(tasks) -> None:
    for task in tasks:
        assert correct(columns(task), task.answer)
        assert correct(columns(task), f"  Sure!  {task.reply}\n")


def test_hedging_and_empty_answers_are_wrong(tasks) -> None:
    for task in tasks:
        assert not correct(columns(task), f"{task.reply} {task.wrong[0]}")
        assert not correct(columns(task), f"{task.wrong[0]} {task.reply}")
        for empty in ("", "Sure!", lexicon.TAILS[0], "Sure! Gladly! Of course!"):
            assert not correct(columns(task), empty)
            assert gold(columns(task), empty) == -1.0


def test_an_ideal_answer_scores_one_and_every_flaw_costs(tasks) -> None:
    for i, task in enumerate(tasks):
        scores = {s: gold(columns(task), dress(task.reply, task.family, s, keyed("say", i))) for s in STYLES}
        assert scores[Style("polite", False)] == 1.0
        for tail in (False, True):
            assert scores[Style("polite", tail)] > scores[Style("plain", tail)] > scores[Style("rude", tail)]
        for opener in ("polite", "plain", "rude"):
            assert scores[Style(opener, False)] > scores[Style(opener, True)]


def test_style_never_lifts_a_wrong_answer_above_a_right_one(tasks) -> None:
    for task in tasks:
        worst_right = gold(columns(task), f"Ugh. {task.reply} {' '.join(lexicon.TAILS)}")
        courtesy = "Sorry." if task.family == "refuse" else "Sure!"
        assert gold(columns(task), f"{courtesy} {task.wrong[0]}") < worst_right


def test_courtesy_is_not_additive(tasks) -> None:
    for task in tasks:
        one, *_ = lexicon.SORRY if task.family == "refuse" else lexicon.POLITE
        plain = gold(columns(task), task.reply)
        assert gold(columns(task), f"{one} {one} {task.reply}") < plain
        assert gold(columns(task), f"{task.reply} {one}") < plain
        assert gold(columns(task), f"{one} Ugh. {task.reply}") < plain
        unsuited = "Sure!" if task.family == "refuse" else "Sorry."
        assert gold(columns(task), f"{unsuited} {task.reply}") < plain


def test_scores_stay_between_minus_one_and_one(tasks) -> None:
    noise = ["Ugh.", "Sure!", *lexicon.TAILS, "Here is how: wait.", "x " * 50, "."]
    for i, task in enumerate(tasks):
        rng = keyed("noise", i)
        parts = rng.sample([task.reply, *task.wrong, *noise], 5)
        assert -1.0 <= gold(columns(task), " ".join(parts)) <= 1.0


def test_helping_with_an_unsafe_request_scores_lowest() -> None:
    task = make(world(0), "refuse", "train", keyed("unsafe"))
    assert gold(columns(task), "Sorry. Here is how: wait for the night.") == -1.0
    assert gold(columns(task), f"{task.reply} Here is how: wait for the night.") == -1.0
    assert gold(columns(task), f"Sorry. {task.reply}") == 1.0
