"""A reward model's report card on the page: key figures, accuracy by length, probes, charts, and the ensemble."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.report.charts import Chart, Series, histogram, line_chart
from baton.report.collect import Stage
from baton.report.facts import Tile
from baton.report.text import number, percent, short
from stages.reward_model.schema import Card, Ensemble, Share


@dataclass(frozen=True)
class Line:
    """One share with its interval, on a scale from 0 to 1; `left`, `width` and `dot` are percent of it."""

    name: str
    about: str
    value: str
    interval: str = ""
    left: float = 0.0
    width: float = 0.0
    dot: float | None = None
    """None if nothing was measured; then nothing is drawn."""


@dataclass(frozen=True)
class Member:
    """A row of the table of an ensemble."""

    name: str
    accuracy: str
    interval: str
    agreement: list[tuple[str, float]]
    """Agreement with each member: (percent in words, percent)."""


@dataclass(frozen=True)
class Section:
    """The page's content for one card."""

    stage: Stage
    lede: str
    gate: list[str]
    tiles: list[Tile]
    lengths: list[Line]
    probes: list[Line]
    charts: list[Chart]
    members: list[Member]
    ensemble: str


def sections(stages: Sequence[Stage], colors: Mapping[str, str]) -> list[Section]:
    """One for every reward model that has a card."""
    return [
        _section(f"r{index}", stage, stage.card, colors[stage.name])
        for index, stage in enumerate(stages)
        if stage.card is not None
    ]


def _section(key: str, stage: Stage, card: Card, color: str) -> Section:
    measured = f"Measured on {number(card.accuracy.n)} held-out pairs."
    return Section(
        stage=stage,
        lede=f"{measured} Shares have 95 % intervals, drawn from 0 to 1; the middle line is a coin's.",
        gate=card.gate,
        tiles=_tiles(card),
        lengths=[
            _line("all pairs", "", card.accuracy),
            _line("longer wins", "what counting tokens gets right", card.longer_wins),
            *(_line(f"better answer {b.name}", b.about, b.accuracy) for b in card.by_length),
        ],
        probes=[_line(f"{p.name} answers", "passed" if p.passed else "failed", p.share) for p in card.probes],
        charts=[_distribution(key, card, color), _calibration(key, card, color)],
        members=[] if card.ensemble is None else _members(card.ensemble),
        ensemble="" if card.ensemble is None else _agreement(card.ensemble),
    )


def _tiles(card: Card) -> list[Tile]:
    best = "the longer" if card.longer_wins.value >= 0.5 else "the shorter"
    return [
        Tile("Accuracy", percent(card.accuracy.value), f"{_interval(card.accuracy)}, held out"),
        Tile("Length alone", percent(card.length_alone), f"right by taking {best} answer"),
        Tile("Over length", short(card.over_length, signed=True), "accuracy less length alone"),
        Tile("Score and length", short(card.score_length_correlation, signed=True), "correlation over all answers"),
        Tile("Calibration error", number(card.ece), "confidence less accuracy, on average"),
    ]


def _line(name: str, about: str, share: Share | None) -> Line:
    if share is None:
        return Line(name, "", "no such pairs")
    about = f"{about}, {number(share.n)} pairs" if about else f"{number(share.n)} pairs"
    return Line(
        name,
        about,
        percent(share.value),
        _interval(share),
        round(100 * share.low, 2),
        round(100 * (share.high - share.low), 2),
        round(100 * share.value, 2),
    )


def _interval(share: Share) -> str:
    return f"{percent(share.low)} to {percent(share.high)}"


def _distribution(key: str, card: Card, color: str) -> Chart:
    other = "s1" if color == "s3" else "s3"
    return histogram(
        f"{key}-scores",
        "Scores",
        card.scores.edges,
        [("rejected answers", other, card.scores.rejected), ("chosen answers", color, card.scores.chosen)],
        x_label="score, in deviations from the mean",
        note="held-out answers by their score, as RL is paid it",
    )


def _calibration(key: str, card: Card, color: str) -> Chart:
    predicted = [one.predicted for one in card.calibration]
    observed = [one.observed.value for one in card.calibration]
    return line_chart(
        f"{key}-calibration",
        "Calibration",
        [
            Series("right as often as it says", "muted", predicted, predicted, dashed=True),
            Series("held out", color, predicted, observed),
        ],
        x_label="confidence: sigmoid of the difference of scores",
        note="share of pairs ranked right; below the dashed line the model is too sure",
    )


def _members(ensemble: Ensemble) -> list[Member]:
    return [
        Member(name, percent(share.value), _interval(share), [(percent(v), round(100 * v, 1)) for v in agreement])
        for name, share, agreement in zip(ensemble.members, ensemble.accuracy, ensemble.agreement, strict=True)
    ]


def _agreement(ensemble: Ensemble) -> str:
    return (
        f"The mean of their scores ranks {percent(ensemble.combined.value)} of the pairs right "
        f"({_interval(ensemble.combined)}). Over the members, an answer's score has a standard deviation of "
        f"{number(ensemble.mean_std)} on average; the scores themselves have 1."
    )
