"""What a stage package says about itself, so that no other code has to know single stages. No torch here.

Every `stages/<stage>/config.py` has a `DECLARATION`; only its caption is required:

    DECLARATION = Declaration("instruction tuning", targets=("sft",), compared=TRAINER_LINE, charts=(LOSS,))

The runner, replay, the report and chat read declarations through `training.registry.Registry.declaration`.
"""

from dataclasses import dataclass
from typing import Literal

from handoff.manifest import Kind

Role = Literal["policy", "critic", "reference", "reward"]


@dataclass(frozen=True)
class HeldModel:
    """A model that a section has in memory while it runs. `models(config)` in a stage's config.py lists them."""

    role: Role
    parent: str
    """Reference that the model comes from: a section, a directory or a hub id."""
    trained: bool = False
    """Whether the stage updates its weights."""
    note: str = ""
    """What else a reader should know, e.g. that the weights are random at the start."""

    def __str__(self) -> str:
        words = [word for word in ("trained" if self.trained else "", self.note) if word]
        return f"{self.role} from {self.parent}" + (f" ({', '.join(words)})" if words else "")


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    metric: str
    """Key in metrics.jsonl."""
    label: str
    color: str = ""
    """A colour of the report's style sheet, and the line is dashed; empty: the stage's own colour, and solid."""


@dataclass(frozen=True)
class Chart:
    """A chart of the report. It is drawn when at least one of its metrics was logged."""

    title: str
    lines: tuple[Line, ...]
    note: str = ""


def held_out(metric: str, label: str = "held out") -> Line:
    """A line of held-out data: dashed, in the colour of text."""
    return Line(metric, label, "ink")


@dataclass(frozen=True)
class PathChart:
    """Two metrics of the same steps against each other."""

    title: str
    x: str
    y: str
    """Keys in metrics.jsonl."""
    x_label: str
    y_label: str
    note: str = ""


@dataclass(frozen=True)
class PartsChart:
    """All metrics that begin with a prefix, a line each; drawn when there are at least two."""

    title: str
    prefix: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the report for one stage alone, headed by the stage's caption."""

    lede: str
    """Sentence under the heading; `{parent}` is replaced by the name of the stage's parent."""
    x_label: str = "step"
    """What the charts' horizontal axis counts."""
    path: PathChart | None = None
    """Drawn before the charts."""
    parts: PartsChart | None = None
    """Drawn after the charts."""
    phases: tuple[str, ...] = ()
    """Names of the metrics `time/<name>`, in seconds, of which the share in the stage's time is shown."""


@dataclass(frozen=True)
class Declaration:
    """One stage package. A stage that is unknown here is `Declaration(name)`."""

    caption: str
    """What the stage does, in a few words: "instruction tuning"."""
    targets: tuple[str, ...] = ()
    """Targets of the Makefile that run up to a section of this stage; the first one is the usual."""
    publishes: Kind = "causal_lm"
    """Kind of what it publishes."""
    distributed: bool = True
    """Whether a launch file starts it on several processes. False: it runs on one, whatever the launch file says, and
    the imports of a training are not loaded ahead for it."""
    compared: tuple[str, ...] = ()
    """Metrics of a step that `baton replay` compares; a line that has the first one is a line of training. Empty: the
    stage has no steps."""
    answers: Literal["no", "tuned", "aligned"] = "no"
    """Whether people can talk to its model: it was `tuned` to answer, or `aligned` to what they prefer as well."""
    headline: tuple[tuple[str, str], ...] = ()
    """(metric of the manifest, what it is), the most telling first; tables show the first two that are there."""
    charts: tuple[Chart, ...] = ()
    """Charts of the report. Empty: one for each metric that was logged at two steps or more."""
    section: Section | None = None
    """A section of its own in the report; None: its charts stand with those of the other stages."""
    missing: str = ""
    """What the report says when the run has no such stage, e.g. "no reward model"; empty: nothing."""


TRAINER_LINE = ("loss", "grad_norm")
"""`compared` of the stages that train with a Trainer."""

# Charts that several stages have.
LOSS = Chart("loss", (Line("loss", "train"), held_out("eval_loss")))
BITS_PER_BYTE = Chart("bits per byte", (held_out("eval_bits_per_byte"),), "on held-out documents")
TOKEN_ACCURACY = Chart(
    "token accuracy",
    (Line("mean_token_accuracy", "train"), held_out("eval_mean_token_accuracy")),
    "supervised tokens predicted right",
)
STOP_RATE = Chart("stop rate", (held_out("eval_stop_rate"),), "greedy answers that end at a stop token")


def pair_charts(accuracy: str, margin: str) -> tuple[Chart, Chart]:
    """The charts of a stage that learns from pairs, from its metrics' names; of held-out pairs they are eval_<name>."""
    return (
        Chart(
            "pair accuracy",
            (
                Line(accuracy, "train"),
                held_out(f"eval_{accuracy}"),
                Line("eval_length_accuracy", "length alone", "muted"),
            ),
            "pairs with the chosen answer ranked first",
        ),
        Chart(
            "margin",
            (Line(margin, "train"), held_out(f"eval_{margin}")),
            "chosen answer's reward less the rejected one's",
        ),
    )
