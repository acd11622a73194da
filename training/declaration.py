"""How a stage package describes itself, so that no other code depends on particular stages. Imports no torch.

Every `stages/<stage>/config.py` has a `DECLARATION`; only its caption is required:

    DECLARATION = Declaration("instruction tuning", targets=("sft",), compared=TRAINER_LINE, charts=(LOSS,))

The runner, replay, the report and chat read declarations through `training.registry.Registry.declaration`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from handoff.manifest import MODEL_KINDS, SCORERS, Kind

Role = Literal["policy", "critic", "reference", "reward"]

COMPARED = "models:"
"""Begins the roles of soft parents that a stage compares under their names: `models:sft`."""
_KINDS: dict[str, frozenset[Kind]] = {
    COMPARED: frozenset({"causal_lm"}),
    **dict.fromkeys(("critic", "ensemble:", "reward:"), SCORERS),
}


@dataclass(frozen=True)
class HeldModel:
    """A model that a section has in memory while it runs. `models(config)` in a stage's config.py lists them."""

    role: Role
    parent: str
    """Reference to the model's source: a section, a directory or a hub id."""
    trained: bool = False
    """Whether the stage updates the model's weights."""
    note: str = ""
    """Other information for the reader, e.g. that the weights are random at the start."""
    in_turn: bool = False
    """Whether it is in memory without the other models of the section that are `in_turn`."""
    moves: bool = False
    """Whether its weights are changed, though not trained. They are float32 then."""

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
    """A colour of the report's style sheet for a dashed line; empty: a solid line in the stage's own colour."""


@dataclass(frozen=True)
class Chart:
    """A chart of the report. It is drawn when at least one of its metrics was logged."""

    title: str
    lines: tuple[Line, ...]
    note: str = ""


def held_out(metric: str, label: str = "held out") -> Line:
    """A line for held-out data: dashed, in the colour of the text."""
    return Line(metric, label, "ink")


@dataclass(frozen=True)
class PathChart:
    """A chart of one metric against another, with a point for each step that has both."""

    title: str
    x: str
    y: str
    """Keys in metrics.jsonl."""
    x_label: str
    y_label: str
    note: str = ""


@dataclass(frozen=True)
class PartsChart:
    """A chart with a line for each metric that begins with a prefix; drawn when there are at least two."""

    title: str
    prefix: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A section of the report for a single stage, with the stage's caption as its heading."""

    lede: str
    """Sentence under the heading; `{parent}` is replaced by the name of the stage's parent."""
    x_label: str = "step"
    """What the charts' horizontal axis counts."""
    path: PathChart | None = None
    """Drawn before the charts."""
    parts: PartsChart | None = None
    """Drawn after the charts."""
    phases: tuple[str, ...] = ()
    """Names of metrics `time/<name>`, in seconds. The report shows the share of each in their sum."""


@dataclass(frozen=True)
class Declaration:
    """The declaration of one stage package. For a stage that is not installed here, it is `Declaration(name)`."""

    caption: str
    """What the stage does, in a few words: "instruction tuning"."""
    targets: tuple[str, ...] = ()
    """Targets of the Makefile that run a recipe up to a section of this stage; the first is the usual one."""
    publishes: Kind = "causal_lm"
    """Kind of the published result."""
    starts_from: frozenset[Kind] = frozenset({"causal_lm"})
    """Kinds that the stage's `parent` may be."""
    distributed: bool = True
    """Whether a launch file starts it on several processes. False: it runs on one process, whatever the launch file
    says, and the libraries for training are not imported for it in advance."""
    compared: tuple[str, ...] = ()
    """Metrics of a step that `baton replay` compares; a line with the first of them is the line of a training step.
    Empty: the stage has no steps."""
    journal: str = ""
    """File in the stage's directory with finished results: an interrupted stage continues after its last line. Empty:
    only a saved state lets it continue."""
    answers: Literal["no", "tuned", "aligned"] = "no"
    """Whether users can chat with its model: it was `tuned` to answer, or also `aligned` with preferences."""
    headline: tuple[tuple[str, str], ...] = ()
    """(metric of the manifest, its description), the most important first; tables show the first two that exist."""
    charts: tuple[Chart, ...] = ()
    """Charts of the report. Empty: one for each metric that was logged at two steps or more."""
    section: Section | None = None
    """The stage's own section in the report; None: its charts appear among those of the other stages."""
    methods: Mapping[str, str] = field(default_factory=dict)
    """{method of `baton init` that the stage is part of: its section's name there}. Such a stage has a starter.py."""
    learns: Literal["", "conversations", "pairs", "prompts"] = ""
    """The rows that such a stage learns from."""
    missing: str = ""
    """Text of the report when the run has no such stage, e.g. "no reward model"; empty: no text."""

    def kinds(self, role: str) -> frozenset[Kind]:
        """The kinds that the model of a role may be: `parent`, `critic`, `reward:<model>`, `models:<model>`, ..."""
        if role == "parent":
            return self.starts_from
        key, colon, _ = role.partition(":")
        return _KINDS.get(key + colon, frozenset(MODEL_KINDS))


TRAINER_LINE = ("loss", "grad_norm")
"""The value of `compared` for stages that train with a Trainer."""

# Charts that several stages share.
LOSS = Chart("loss", (Line("loss", "train"), held_out("eval_loss")))
BITS_PER_BYTE = Chart("bits per byte", (held_out("eval_bits_per_byte"),), "on held-out documents")
TOKEN_ACCURACY = Chart(
    "token accuracy",
    (Line("mean_token_accuracy", "train"), held_out("eval_mean_token_accuracy")),
    "supervised tokens predicted right",
)
STOP_RATE = Chart("stop rate", (held_out("eval_stop_rate"),), "greedy answers that end at a stop token")


def pair_charts(accuracy: str, margin: str) -> tuple[Chart, Chart]:
    """The charts of a stage that learns from pairs. `accuracy` and `margin` name its metrics; those of held-out pairs
    are eval_<name>."""
    return (
        Chart(
            "pair accuracy",
            (
                Line(accuracy, "train"),
                held_out(f"eval_{accuracy}"),
                Line("eval_length_alone", "length alone", "muted"),
            ),
            "pairs with the chosen answer ranked first",
        ),
        Chart(
            "margin",
            (Line(margin, "train"), held_out(f"eval_{margin}")),
            "chosen answer's reward less the rejected one's",
        ),
    )
