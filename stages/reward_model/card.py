"""Computes the report card of a reward model from its scores on held-out pairs. Pure functions of numbers.

Legend: N pairs, each with a chosen (better) and a rejected answer.

1. Accuracy and all other shares have Wilson's interval (`training.measure.wilson`).
2. Length. A reward model may prefer long answers as such, and a policy then learns to write long ones. Singhal et al.
   2023 (arXiv:2310.03716) attribute much of the gain of RLHF to this. So the card compares the accuracy with that of
   length alone, and splits it by the relative length of the two answers.
3. Calibration. Under the model of Bradley and Terry 1952 the better answer wins with probability sigmoid(difference of
   scores). Expected calibration error: Guo et al. 2017 (arXiv:1706.04599), eq. 3, over bins of equal width.
4. Probes. The better answer must score higher than spoilt copies of it, or a policy could learn to write such answers.
5. Agreement with other reward models (Coste et al. 2023, arXiv:2310.02743): scores on which they disagree are doubtful.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from data.sampling import shuffled
from stages.reward_model.config import CardGate
from stages.reward_model.schema import CalibrationBin, Card, Ensemble, Histogram, LengthBucket, Probe, Share
from training.measure import wilson

Row = dict[str, list[int]]

CALIBRATION_BINS = 10
HISTOGRAM_BINS = 24
PROBE_SHARE = 0.8
"""Share that a probe must reach to pass if the gate does not set `min_probes`."""
_TELLING_CORRELATION = 0.6
_TELLING_PAIRS = 10
_LENGTHS = (
    ("much shorter", "half as long or less"),
    ("shorter", "by more than a tenth"),
    ("about as long", "within a tenth"),
    ("longer", "by more than a tenth"),
    ("much longer", "twice as long or more"),
)
# Maximum number of other rows that are searched for a row's off-topic answer.
_CANDIDATES = 32


def preferred(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    """1 where `better` is larger, ½ where the two are equal, else 0."""
    wins: np.ndarray = (better > worse) + 0.5 * (better == worse)
    return wins


def share(right: np.ndarray) -> Share:
    """Mean of values in {0, ½, 1}, at least one, with Wilson's interval."""
    low, high = wilson(float(right.sum()), len(right))
    value = float(right.mean())
    return Share(value=value, low=max(0.0, min(low, value)), high=min(1.0, max(high, value)), n=len(right))


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation; 0 if either input is constant."""
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])


def pair_metrics(chosen: np.ndarray, rejected: np.ndarray, lengths: np.ndarray) -> dict[str, float]:
    """Metrics on held-out pairs that are logged during training.

    Args:
        chosen, rejected: scores (N,).
        lengths: tokens of the chosen and of the rejected answers (N, 2).
    """
    accuracy = share(preferred(chosen, rejected))
    longer = float(preferred(lengths[:, 0], lengths[:, 1]).mean())
    return {
        "accuracy": accuracy.value,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "margin": float((chosen - rejected).mean()),
        "loss": float(np.logaddexp(0, rejected - chosen).mean()),
        "length_alone": max(longer, 1 - longer),
        "score_length_correlation": correlation(np.concatenate([chosen, rejected]), lengths.T.reshape(-1)),
    }


def by_length(right: np.ndarray, lengths: np.ndarray) -> list[LengthBucket]:
    """Accuracy by relative length (chosen − rejected) / longer; ±½ if one answer is twice as long as the other."""
    relative = (lengths[:, 0] - lengths[:, 1]) / lengths.max(-1)  # (N,) in (−1, 1)
    size = np.select([np.abs(relative) >= 0.5, np.abs(relative) > 0.1], [2, 1], 0)
    bucket = 2 + (np.sign(relative) * size).astype(int)
    return [
        LengthBucket(name=name, about=about, accuracy=share(right[bucket == i]) if (bucket == i).any() else None)
        for i, (name, about) in enumerate(_LENGTHS)
    ]


def calibration(margins: np.ndarray) -> tuple[float, list[CalibrationBin]]:
    """Expected calibration error and its bins; empty bins are left out.

    A pair's confidence is the model's probability for the answer it prefers: sigmoid of the absolute margin.
    """
    confidence = 1 / (1 + np.exp(-np.abs(margins)))  # (N,) in [½, 1]
    right = preferred(margins, np.zeros_like(margins))
    edges = np.linspace(0.5, 1, CALIBRATION_BINS + 1)
    place = np.clip(np.digitize(confidence, edges) - 1, 0, CALIBRATION_BINS - 1)
    bins = [
        CalibrationBin(
            low=float(edges[i]),
            high=float(edges[i + 1]),
            predicted=float(confidence[place == i].mean()),
            observed=share(right[place == i]),
        )
        for i in range(CALIBRATION_BINS)
        if (place == i).any()
    ]
    ece = sum(b.observed.n * abs(b.observed.value - b.predicted) for b in bins) / len(margins)
    return float(ece), bins


def histogram(chosen: np.ndarray, rejected: np.ndarray) -> Histogram:
    """Counts of both over the same bins of equal width."""
    edges = np.histogram_bin_edges(np.concatenate([chosen, rejected]), HISTOGRAM_BINS)
    counts = [np.histogram(scores, edges)[0].tolist() for scores in (chosen, rejected)]
    return Histogram(edges=edges.tolist(), chosen=counts[0], rejected=counts[1])


def spoilt_answers(pairs: Sequence[Row], stop_id: int) -> dict[str, list[list[int] | None]]:
    """For each probe, one spoilt answer per pair: the chosen answer emptied, repeated three times or cut off half-way,
    or another prompt's chosen answer (None if no different one is found)."""
    order = shuffled(len(pairs), 0, "off-topic").tolist()
    other: list[list[int] | None] = [None] * len(pairs)
    for place, row in enumerate(order):
        for step in range(1, min(len(pairs), _CANDIDATES + 1)):
            candidate = pairs[order[(place + step) % len(pairs)]]
            if all(candidate[key] != pairs[row][key] for key in ("prompt_ids", "chosen_ids")):
                other[row] = candidate["chosen_ids"]
                break
    answers = [pair["chosen_ids"] for pair in pairs]
    return {
        "empty": [[stop_id] for _ in answers],
        "repeated": [[*ids[:-1] * 3, ids[-1]] for ids in answers],
        "truncated": [ids[: max(1, len(ids) // 2)] for ids in answers],
        "off-topic": other,
    }


def probed(name: str, chosen: np.ndarray, spoilt: np.ndarray, asked: float | None) -> Probe:
    """A probe's result from scores (N,) of chosen and of spoilt answers, NaN where there is no spoilt one.

    asked: the gate's `min_probes`.
    """
    there = ~np.isnan(spoilt)
    if not there.any():
        return Probe(name=name, share=None, passed=True)
    found = share(preferred(chosen[there], spoilt[there]))
    return Probe(name=name, share=found, passed=found.value >= (PROBE_SHARE if asked is None else asked))


def agreement(members: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Ensemble:
    """Agreement computed from {member: its normalised scores of chosen and rejected answers, each (N,)}."""
    scores = np.stack([np.stack(pair) for pair in members.values()])  # (members, 2, N)
    choice = preferred(scores[:, 0], scores[:, 1])  # (members, N)
    mean = scores.mean(0)
    return Ensemble(
        members=list(members),
        accuracy=[share(row) for row in choice],
        combined=share(preferred(mean[0], mean[1])),
        agreement=[[float((a == b).mean()) for b in choice] for a in choice],
        mean_std=float(scores.std(0).mean()),
    )


def make_card(
    chosen: np.ndarray,
    rejected: np.ndarray,
    lengths: np.ndarray,
    probes: Mapping[str, np.ndarray],
    gate: CardGate,
    ensemble: Ensemble | None = None,
) -> Card:
    """Computes the card.

    Args:
        chosen, rejected: raw scores (N,).
        lengths: tokens of the chosen and of the rejected answers (N, 2).
        probes: scores (N,) of spoilt answers, NaN where there is none.
        gate: the recipe's conditions.
        ensemble: agreement with other models, if any.
    """
    metrics = pair_metrics(chosen, rejected, lengths)
    right = preferred(chosen, rejected)
    both = np.concatenate([chosen, rejected])
    deviation = both.std() or 1.0
    ece, bins = calibration(chosen - rejected)
    card = Card(
        accuracy=share(right),
        margin=metrics["margin"],
        loss=metrics["loss"],
        longer_wins=share(preferred(lengths[:, 0], lengths[:, 1])),
        length_alone=metrics["length_alone"],
        over_length=metrics["accuracy"] - metrics["length_alone"],
        by_length=by_length(right, lengths),
        score_length_correlation=metrics["score_length_correlation"],
        margin_length_correlation=correlation(chosen - rejected, lengths[:, 0] - lengths[:, 1]),
        ece=ece,
        calibration=bins,
        scores=histogram((chosen - both.mean()) / deviation, (rejected - both.mean()) / deviation),
        probes=[probed(name, chosen, spoilt, gate.min_probes) for name, spoilt in probes.items()],
        ensemble=ensemble,
        findings=[],
        gate=[],
    )
    return card.model_copy(update={"findings": findings(card), "gate": failures(card, gate)})


def findings(card: Card) -> list[str]:
    """Reasons not to train a policy against the model, each a phrase that follows the model's name."""
    found = []
    if card.accuracy.low <= card.length_alone:
        found.append(
            f"ranks {_percent(card.accuracy.value)} of the held-out pairs right, which is not clearly more than length "
            f"alone would ({_percent(card.length_alone)})"
        )
    if abs(card.score_length_correlation) >= _TELLING_CORRELATION:
        longer = card.score_length_correlation > 0
        against = [b.accuracy for b in (card.by_length[:2] if longer else card.by_length[3:]) if b.accuracy is not None]
        n, right = sum(part.n for part in against), sum(part.n * part.value for part in against)
        if not n or wilson(right, n)[0] <= 0.5:
            where = f"held-out pairs whose better answer is the {'shorter' if longer else 'longer'} one"
            found.append(
                f"follows length: the correlation of score and length is {card.score_length_correlation:.2f}, and "
                + (f"of the {n} {where} it ranks {_percent(right / n)} right" if n else f"there are no {where}")
            )
    for bucket in card.by_length:
        part = bucket.accuracy
        if part is not None and part.n >= _TELLING_PAIRS and part.high < 0.5:
            found.append(
                f"is right in only {_percent(part.value)} of the {part.n} pairs whose better answer is {bucket.name}"
            )
    for probe in card.probes:
        if probe.share is not None and not probe.passed:
            found.append(
                f"scores {probe.name} answers above good ones in {_percent(1 - probe.share.value)} of the cases"
            )
    return found


def failures(card: Card, gate: CardGate) -> list[str]:
    """The gate's conditions that the card does not meet, each as a text that names the key."""
    low, correlated = card.accuracy.low, abs(card.score_length_correlation)
    found = []
    if gate.min_accuracy is not None and card.accuracy.value < gate.min_accuracy:
        found.append(
            f"it ranks {_percent(card.accuracy.value)} of {card.accuracy.n} held-out pairs right; min_accuracy is "
            f"{_percent(gate.min_accuracy)}"
        )
    if gate.min_accuracy_low is not None and low < gate.min_accuracy_low:
        found.append(
            f"the 95 % interval of its accuracy on {card.accuracy.n} held-out pairs begins at {_percent(low)}; "
            f"min_accuracy_low is {_percent(gate.min_accuracy_low)}"
        )
    if gate.min_over_length is not None and card.over_length < gate.min_over_length:
        found.append(
            f"length alone would rank {_percent(card.length_alone)} of the pairs right, and it ranks "
            f"{_percent(card.accuracy.value)}, a difference of {card.over_length:.3f}; min_over_length is "
            f"{gate.min_over_length:g}"
        )
    if gate.max_length_correlation is not None and correlated > gate.max_length_correlation:
        found.append(
            f"the correlation of an answer's score with its length is {card.score_length_correlation:.2f}; "
            f"max_length_correlation is {gate.max_length_correlation:g}"
        )
    for probe in card.probes:
        if gate.min_probes is not None and probe.share is not None and not probe.passed:
            found.append(
                f"{probe.name} answers score below good ones in {_percent(probe.share.value)} of the cases; min_probes "
                f"is {_percent(gate.min_probes)}"
            )
    if gate.max_ece is not None and card.ece > gate.max_ece:
        found.append(f"its confidence is off by {card.ece:.3f} on average (ECE); max_ece is {gate.max_ece:g}")
    return found


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0") + " %"
