"""Which charts a run has: from the names of the metrics that its stages logged to drawings.

Trainer-like stages log `loss`, `eval_loss` and, by stage, accuracies and margins; the policy-gradient stage logs TRL's
names (`objective/kl`, ...). A metric that was not logged makes no chart.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from baton.report.charts import SERIES_COLORS, Chart, Series, line_chart, path_chart
from baton.report.collect import Stage
from baton.report.text import duration

# (title, [(metric, label, colour)], note); a chart is drawn when at least one of its metrics was logged. A line without
# a colour has the stage's; the others are dashed.
_TRAINING = [
    ("loss", [("loss", "train", ""), ("eval_loss", "held out", "ink")], ""),
    ("bits per byte", [("eval_bits_per_byte", "held out", "ink")], "on held-out documents"),
    (
        "token accuracy",
        [("mean_token_accuracy", "train", ""), ("eval_mean_token_accuracy", "held out", "ink")],
        "supervised tokens predicted right",
    ),
    ("stop rate", [("eval_stop_rate", "held out", "ink")], "greedy answers that end at a stop token"),
    (
        "pair accuracy",
        [
            ("accuracy", "train", ""),
            ("rewards/accuracies", "train", ""),
            ("eval_accuracy", "held out", "ink"),
            ("eval_rewards/accuracies", "held out", "ink"),
            ("eval_length_accuracy", "length alone", "muted"),
        ],
        "pairs with the chosen answer ranked first",
    ),
    (
        "margin",
        [
            ("margin", "train", ""),
            ("rewards/margins", "train", ""),
            ("eval_margin", "held out", "ink"),
            ("eval_rewards/margins", "held out", "ink"),
        ],
        "chosen answer's reward less the rejected one's",
    ),
    (
        "drift of chosen answers",
        [("eval_chosen_logratio_per_token", "held out", "ink")],
        "nats per token; far below 0 is collapse",
    ),
]
_POLICY = [
    (
        "Score",
        [("objective/scores", "sampled", ""), ("eval/scores", "held out", "ink")],
        "of an answer, all rewards summed",
    ),
    (
        "Monitor",
        [("eval/monitor", "held out", "ink"), ("eval/length_controlled_scores", "score at constant length", "ink")],
        "not trained on; falling while the score rises is over-optimisation",
    ),
    ("KL from the parent", [("objective/kl", "sampled", ""), ("eval/kl", "held out", "ink")], "nats per answer"),
    (
        "Answer length",
        [("completions/mean_length", "sampled", ""), ("eval/mean_length", "held out", "ink")],
        "tokens",
    ),
    ("Entropy", [("objective/entropy", "entropy", "")], "nats per answer; a fall to zero is collapse"),
    (
        "Repetition",
        [("completions/repetition", "sampled", ""), ("eval/repetition", "held out", "ink")],
        "share of an answer's 4-grams said before",
    ),
    (
        "Prompts without signal",
        [("frac_reward_zero_std", "share", "")],
        "all answers had the same reward",
    ),
    ("Disagreement", [("objective/disagreement", "deviation", "")], "of the ensemble's members on an answer"),
    ("Answers cut off", [("completions/clipped_ratio", "share", "")], "share that did not stop by itself"),
    ("Score less KL penalty", [("objective/rlhf_reward", "reward", "")], "what the policy is really paid"),
    ("Critic's loss", [("loss/value_avg", "value loss", "")], "squared error of the foreseen return"),
    (
        "Critic's foresight",
        [("val/explained_variance", "explained variance", "")],
        "share of the returns' variance it explains",
    ),
    (
        "Clipped share",
        [("policy/clipfrac_avg", "policy", ""), ("val/clipfrac_avg", "critic", "ink")],
        "of tokens whose update hit the clip range",
    ),
    (
        "KL of one update",
        [("policy/approxkl_avg", "KL", "")],
        "policy that wrote the answers to updated one",
    ),
]
_PHASES = ("generate", "score", "value", "policy", "reference", "exchange", "advantage", "train", "sync", "save")


@dataclass(frozen=True)
class Phase:
    """Share of a stage's time that one phase took, in percent, and how long that was."""

    name: str
    percent: float
    text: str
    color: str


@dataclass(frozen=True)
class Policy:
    """The curves of one policy-gradient stage."""

    stage: Stage
    path: Chart | None
    charts: list[Chart]
    phases: list[Phase]


def training_charts(stages: Sequence[Stage], colors: Mapping[str, str]) -> list[Chart]:
    """The curves of every stage that optimises a loss over data: first all losses, then the rest."""
    charts = []
    for title, wanted, note in _TRAINING:
        for index, stage in enumerate(stages):
            if is_policy(stage):
                continue
            key = f"t{index}-{title.replace(' ', '-')}"
            chart = _chart(key, f"{stage.name} · {title}", stage, wanted, colors[stage.name], note)
            if chart:
                charts.append(chart)
    return charts


def policies(stages: Sequence[Stage], colors: Mapping[str, str]) -> list[Policy]:
    """The curves of every policy-gradient stage (PPO, GRPO, ...)."""
    found = []
    for index, stage in enumerate(stages):
        if not is_policy(stage):
            continue
        drawn = [
            _chart(f"p{index}-{number}", title, stage, wanted, colors[stage.name], note, x_label="iteration")
            for number, (title, wanted, note) in enumerate(_POLICY)
        ]
        drawn.append(_parts(f"p{index}-parts", stage))
        found.append(Policy(stage, _path(f"p{index}-path", stage), [c for c in drawn if c], _phases(stage)))
    return found


def is_policy(stage: Stage) -> bool:
    """Whether the stage learns from its own answers."""
    return stage.has("objective/kl") or stage.has("objective/scores")


def _chart(
    key: str,
    title: str,
    stage: Stage,
    wanted: Sequence[tuple[str, str, str]],
    color: str,
    note: str,
    x_label: str = "step",
) -> Chart | None:
    lines = []
    for metric, label, own_color in wanted:
        steps, values = stage.series(metric)
        if steps:
            lines.append(Series(label, own_color or color, steps, values, dashed=bool(own_color)))
    return line_chart(key, title, lines, x_label=x_label, note=note) if lines else None


def _parts(key: str, stage: Stage) -> Chart | None:
    """The rewards that make up the score, where there are several."""
    names = sorted({name for row in stage.metrics for name in row if name.startswith("rewards/") and stage.has(name)})
    if len(names) < 2:
        return None
    lines = [
        Series(name.removeprefix("rewards/"), f"s{index % SERIES_COLORS}", *stage.series(name))
        for index, name in enumerate(names)
    ]
    return line_chart(key, "Rewards by source", lines, x_label="iteration", note="before their weights")


def _path(key: str, stage: Stage) -> Chart | None:
    kls = dict(zip(*stage.series("objective/kl")))
    scores = dict(zip(*stage.series("objective/scores")))
    points = [(step, kls[step], scores[step]) for step in sorted(kls.keys() & scores.keys())]
    if len(points) < 2:
        return None
    return path_chart(
        key,
        "Reward against KL",
        points,
        x_label="KL from the parent, nats",
        y_label="score",
        note="up and left is better: more for less change",
    )


def _phases(stage: Stage) -> list[Phase]:
    sums = {name: sum(stage.series(f"time/{name}")[1]) for name in _PHASES}
    total = sum(sums.values())
    if total <= 0:
        return []
    return [
        Phase(name, 100 * seconds / total, duration(seconds), f"s{index}")
        for index, (name, seconds) in enumerate(sums.items())
        if seconds > 0
    ]
