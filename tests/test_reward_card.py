"""The report card of a reward model: each statement against an independent calculation, from numbers alone."""

import json
import math

import numpy as np
import pytest

from data.sampling import uniform
from stages.reward_model import card as cards
from stages.reward_model.card import (
    agreement,
    by_length,
    calibration,
    correlation,
    failures,
    make_card,
    pair_metrics,
    preferred,
    share,
    spoilt_answers,
)
from stages.reward_model.config import DECLARATION, CardGate

N = 400


def pair(chosen, rejected, prompt=1):
    return {"prompt_ids": [prompt], "chosen_ids": [5] * chosen + [2], "rejected_ids": [6] * rejected + [2]}


def made(margins, lengths=None, gate=None, probes=None, ensemble=None):
    """A card from the differences of scores; lengths do not vary unless given."""
    chosen = np.asarray(margins, dtype=float)
    lengths = np.full((len(chosen), 2), 5.0) if lengths is None else np.asarray(lengths, dtype=float)
    return make_card(chosen, np.zeros(len(chosen)), lengths, probes or {}, gate or CardGate(), ensemble)


def test_shares_have_wilsons_interval():
    half = share(np.array([1.0] * 10 + [0.0] * 10))
    assert (half.value, half.n) == (0.5, 20)
    assert (half.low, half.high) == pytest.approx((0.29930, 0.70070), abs=1e-4)  # Wilson 1927, by hand
    sure = share(np.ones(20))
    assert sure.low == pytest.approx(0.83887, abs=1e-4) and sure.high == 1.0


def test_pair_metrics_by_hand():
    metrics = pair_metrics(np.array([2.0, 0.0, 1.0]), np.array([1.0, 0.0, 3.0]), np.full((3, 2), 3.0))
    assert metrics["accuracy"] == 0.5  # right, a tie, wrong
    assert metrics["margin"] == pytest.approx(-1 / 3)
    assert metrics["loss"] == pytest.approx(np.mean([np.log1p(np.exp(-1)), np.log(2), np.log1p(np.exp(2))]))
    assert metrics["score_length_correlation"] == 0  # lengths do not vary
    assert metrics["length_alone"] == 0.5


def test_length_alone_is_one_number_whichever_way_round():
    """The stage's headline and the card give the same number, also where the shorter answer is mostly better."""
    lengths = np.array([[3.0, 8.0], [4.0, 9.0], [2.0, 7.0], [9.0, 1.0], [5.0, 6.0]])
    scores = np.arange(5.0)
    metrics, card = (
        pair_metrics(scores, scores[::-1], lengths),
        make_card(scores, scores[::-1], lengths, {}, CardGate()),
    )
    assert metrics["length_alone"] == card.length_alone == pytest.approx(0.8)
    assert card.longer_wins.value == pytest.approx(0.2)
    shown = {metric for metric, label in DECLARATION.headline if "length alone" in label}
    drawn = {line.metric for chart in DECLARATION.charts for line in chart.lines if line.label == "length alone"}
    assert shown == drawn == {"eval_length_alone"}


def test_accuracy_by_length():
    lengths = np.array([[5, 10], [6, 10], [9, 10], [10, 10], [10, 9], [10, 8], [10, 6], [10, 5], [10, 1]], dtype=float)
    right = np.array([1.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0, 0.0])
    found = {bucket.name: bucket.accuracy for bucket in by_length(right, lengths)}
    assert list(found) == ["much shorter", "shorter", "about as long", "longer", "much longer"]
    assert {name: (s.value, s.n) for name, s in found.items()} == {
        "much shorter": (1.0, 1), "shorter": (0.0, 1), "about as long": (0.5, 3), "longer": (1.0, 2),
        "much longer": (0.0, 2),
    }  # fmt: skip
    assert [bucket.accuracy for bucket in by_length(right[:1], lengths[:1])][1:] == [None] * 4


def brute_force_ece(margins):
    """Guo et al. 2017, eq. 3, as a loop over pairs."""
    bins = {}
    for margin in margins:
        confidence = 1 / (1 + math.exp(-abs(margin)))
        right = 1.0 if margin > 0 else 0.5 if margin == 0 else 0.0
        bins.setdefault(min(int((confidence - 0.5) * 20), 9), []).append((confidence, right))
    gap = 0.0
    for rows in bins.values():
        gap += abs(sum(c for c, _ in rows) - sum(r for _, r in rows))
    return gap / len(margins)


def test_calibration_against_a_loop():
    margins = 6 * uniform(N, 0, "margins") - 2
    ece, bins = calibration(margins)
    assert ece == pytest.approx(brute_force_ece(margins), abs=1e-12) and ece > 0.05
    assert sum(b.observed.n for b in bins) == N
    assert all(b.low <= b.predicted <= b.high for b in bins)
    assert calibration(np.zeros(3))[0] == 0.0  # uncertain, and calibrated
    assert calibration(np.full(3, 1000.0))[0] == pytest.approx(0.0)


def test_calibration_tells_an_honest_model_from_an_overconfident_one():
    size = 3 * uniform(20000, 0, "size")
    right = uniform(20000, 0, "right") < 1 / (1 + np.exp(-size))
    honest = np.where(right, size, -size)
    assert calibration(honest)[0] < 0.02
    assert calibration(4 * honest)[0] > 0.15
    ece, bins = calibration(honest / 4)  # underconfident: right more often than predicted
    assert ece > 0.1 and all(b.observed.value > b.predicted for b in bins)


def test_the_histogram_counts_every_answer_in_units_of_the_deviation():
    margins = 6 * uniform(N, 0, "margins") - 2
    found = made(margins).scores
    assert sum(found.chosen) == sum(found.rejected) == N and len(found.edges) == len(found.chosen) + 1
    both = np.concatenate([margins, np.zeros(N)])
    low, high = ((value - both.mean()) / both.std() for value in (both.min(), both.max()))
    assert (found.edges[0], found.edges[-1]) == pytest.approx((low, high))
    assert max(found.rejected) == N, "they all have the same score"


def test_probes_alter_answers_as_described():
    pairs = [{"prompt_ids": [row], "chosen_ids": [5, 6, row, 2], "rejected_ids": [2]} for row in range(10, 16)]
    found = spoilt_answers(pairs, 2)
    assert found["empty"] == [[2]] * 6
    assert found["repeated"][0] == [5, 6, 10, 5, 6, 10, 5, 6, 10, 2]
    assert found["truncated"][1] == [5, 6]
    answers = [row["chosen_ids"] for row in pairs]
    assert sorted(found["off-topic"]) == sorted(answers), "each answer is used once"
    assert all(mine != other for mine, other in zip(answers, found["off-topic"], strict=True))


def test_an_off_topic_answer_is_of_another_prompt_and_another_text():
    same_answer = [pair(3, 1, prompt) for prompt in (1, 2, 3)]
    same_prompt = [pair(length, 1) for length in (3, 4, 5)]
    for pairs in (same_answer, same_prompt, [pair(3, 1)]):
        assert spoilt_answers(pairs, 2)["off-topic"] == [None] * len(pairs)
    mixed = [*same_answer, pair(7, 1, 4)]
    answers = spoilt_answers(mixed, 2)["off-topic"]
    assert answers[:3] == [mixed[3]["chosen_ids"]] * 3 and answers[3] == mixed[0]["chosen_ids"]


def test_a_probe_passes_from_the_gates_share_on():
    chosen = np.ones(10)
    spoilt = np.array([0.0] * 8 + [2.0] * 2)
    for asked, passed in ((None, True), (0.8, True), (0.81, False)):
        (found,) = made(chosen, probes={"empty": spoilt}, gate=CardGate(min_probes=asked)).probes
        assert (found.share.value, found.passed) == (0.8, passed)
    (without,) = made(chosen, probes={"off-topic": np.where(spoilt > 1, np.nan, spoilt)}).probes
    assert (without.share.value, without.share.n) == (1.0, 8)
    (nothing,) = made(chosen, probes={"off-topic": np.full(10, np.nan)}, gate=CardGate(min_probes=1.0)).probes
    assert nothing.share is None and nothing.passed


def test_agreement_by_hand():
    members = {
        "a": (np.array([1.0, 1.0, 0.0, 0.0]), np.zeros(4)),
        "b": (np.array([3.0, -1.0, 1.0, 0.0]), np.zeros(4)),
        "c": (np.array([1.0, 1.0, 1.0, 1.0]), np.zeros(4)),
    }
    found = agreement(members)
    assert found.members == ["a", "b", "c"]
    assert [s.value for s in found.accuracy] == [0.75, 0.625, 1.0]
    assert found.agreement == [[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]
    stds = [np.std(column) for column in ([1, 3, 1], [1, -1, 1], [0, 1, 1], [0, 0, 1])]
    assert found.mean_std == pytest.approx(sum(stds) / 8)  # the rejected answers' scores are all equal
    assert found.combined.value == 1.0


def biased(noise: float = 0.05):
    """Pairs with the longer answer chosen in 85 %, and scores that are mostly the length."""
    longer = uniform(N, 0, "longer") < 0.85
    short, long = 4 + (8 * uniform(N, 0, "short")).astype(int), 14 + (16 * uniform(N, 0, "long")).astype(int)
    lengths = np.stack([np.where(longer, long, short), np.where(longer, short, long)], -1).astype(float)
    scores = 0.1 * lengths + noise * uniform((N, 2), 0, "noise")
    return scores[:, 0], scores[:, 1], lengths


def test_a_length_biased_model_is_flagged():
    chosen, rejected, lengths = biased()
    card = make_card(chosen, rejected, lengths, {}, CardGate())
    assert card.accuracy.value > 0.8 and card.accuracy.value == card.longer_wins.value
    assert card.over_length == 0.0
    assert card.score_length_correlation > 0.99 and card.margin_length_correlation > 0.99
    assert "which is not clearly more than length alone would" in card.findings[0]
    assert card.findings[1] == (
        "follows length: the correlation of score and length is 1.00, and of the 60 held-out pairs whose better answer "
        "is the shorter one it ranks 0 % right"
    )
    assert [finding.split(" better answer is ")[1] for finding in card.findings[2:]] == ["much shorter", "shorter"]
    assert all(finding.startswith("is right in only 0 % of the ") for finding in card.findings[2:])
    assert card.gate == []  # the gate is empty

    mirrored = make_card(
        -rejected, -chosen, lengths[:, ::-1], {}, CardGate()
    )  # shorter is better, without other signal
    assert "better answer is the longer one it ranks 0 % right" in mirrored.findings[1] and mirrored.over_length < 0.01
    always = lengths[:, 0] > lengths[:, 1]
    blind = make_card(chosen[always], rejected[always], lengths[always], {}, CardGate())
    assert blind.findings[1].endswith("there are no held-out pairs whose better answer is the shorter one")


def test_a_model_may_prefer_short_answers_where_it_knows_better_too():
    """Score and length correlate, but it is also right where length misleads: a property of the data, no fault."""
    chosen, rejected, lengths = biased()
    right = make_card(np.maximum(chosen, rejected), np.minimum(chosen, rejected), lengths, {}, CardGate())
    assert abs(right.score_length_correlation) > 0.6 and right.findings == []


def test_a_good_model_has_no_findings():
    _, _, lengths = biased()
    better = uniform(N, 0, "margin") + np.where(uniform(N, 0, "right") < 0.95, 0.2, -1.2)
    card = make_card(better, np.zeros(N), lengths, {"empty": np.full(N, -5.0)}, CardGate())
    assert card.findings == [] and card.over_length > 0.05


def test_every_demand_of_the_gate_says_what_is_wrong():
    chosen, rejected, lengths = biased()
    spoilt = {"empty": chosen - 1, "repeated": chosen + 1}
    card = make_card(chosen, rejected, lengths, spoilt, CardGate(min_probes=0.9))
    right, ece = card.accuracy.value, card.ece
    percent = f"{100 * right:.1f}".removesuffix(".0")
    demands = {
        "min_accuracy": (right, f"it ranks {percent} % of 400 held-out pairs right; min_accuracy is "),
        "min_accuracy_low": (card.accuracy.low, "the 95 % interval of its accuracy on 400 held-out pairs begins at "),
        "min_over_length": (
            0.0,
            f"length alone would rank {percent} % of the pairs right, and it ranks {percent} %, a ",
        ),
        "max_length_correlation": (card.score_length_correlation, "the correlation of an answer's score with its "),
        "max_ece": (ece, f"its confidence is off by {ece:.3f} on average (ECE); max_ece is "),
    }
    for key, (reached, said) in demands.items():
        stricter = math.nextafter(reached, 2 if key.startswith("min") else -2)
        assert failures(card, CardGate(**{key: reached})) == []
        (reason,) = failures(card, CardGate(**{key: stricter}))
        assert reason.startswith(said) and key in reason
    assert card.gate == ["repeated answers score below good ones in 0 % of the cases; min_probes is 90 %"]
    assert set(demands) | {"min_probes", "metrics"} == set(CardGate.model_fields), "a demand without a test"


@pytest.mark.parametrize("margins", [[0.0], [1.0], [-1.0, 2.0], [0.0, 0.0, 0.0], [1e9, -1e9]])
def test_a_card_of_few_or_odd_numbers_can_be_written(margins):
    card = made(margins, probes={"empty": np.zeros(len(margins))})
    again = cards.Card.model_validate(json.loads(json.dumps(card.model_dump(mode="json"), allow_nan=False)))
    assert again == card
    assert correlation(np.zeros(3), np.arange(3.0)) == 0.0
    assert preferred(np.array([1.0, 0.0, -1.0]), np.zeros(3)).tolist() == [1.0, 0.5, 0.0]
