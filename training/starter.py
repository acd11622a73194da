"""What `baton init` writes into a recipe: the facts, and how a stage turns them into keys with reasons. No torch.

A stage that is part of a method has `stages/<stage>/starter.py` with `section(given) -> list[Line]`; its declaration
says in which methods it is (`Declaration.methods`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from training.config import ADAPTER_RATE

RowKind = Literal["conversations", "pairs", "prompts"]
_CHARACTERS = 3
"""Characters of a token; English has about four, code and other languages fewer."""
_TEMPLATE = 64
"""Tokens that a chat template adds to a row."""
_LARGE = 500_000_000
"""Parameters from which on an adapter is trained: all weights would need 16 bytes each, 8 GB."""
_DEEP = 1_000_000_000
"""Parameters from which on activations are computed again."""
_MICRO_TOKENS = 8192


@dataclass(frozen=True)
class Line:
    """One key of a section. `key` is dotted; `tasks[].name` is one of the only entry of a list `tasks`. A list of
    values is written with one entry a line."""

    key: str
    value: str | int | float | Sequence[str]
    reason: str


@dataclass(frozen=True)
class FoundData:
    """One source of data, as `baton init` found it."""

    entry: str
    """The keys of the source, as YAML without braces."""
    kind: RowKind
    rows: int | None
    """None: more than were looked at."""
    prompt: int
    """Characters of the longest prompt that was looked at."""
    answer: int
    """Characters of the longest answer."""
    reward: str | None = None
    """The reward that can check an answer to its prompts, as YAML; None: no function can."""
    holdout: float = 0.0
    """Share that is held out; 0: there are too few rows."""

    def part(self, split: str) -> str:
        """The source as an entry of `data:`."""
        held = f", holdout: {self.holdout:g}, split: {split}" if self.holdout else ""
        return f"{{{self.entry}{held}}}"


@dataclass(frozen=True)
class Given:
    """The facts from which a section is written."""

    model: str
    parameters: int
    window: int | None
    data: Sequence[FoundData]
    parent: str
    """The section, or model, that the next one starts from."""
    policies: Sequence[str] = ()
    """The models so far, the one that was named first."""
    scorer: str | None = None
    """The section with a reward model."""
    method: str = ""

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained."""
        return self.parameters >= _LARGE

    def of(self, *kinds: RowKind) -> list[FoundData]:
        """The sources of the first of these kinds that there are any of."""
        return next((found for kind in kinds if (found := [one for one in self.data if one.kind == kind])), [])


def parent_line(given: Given) -> Line:
    """The section's parent."""
    return Line("parent", given.parent, "what the section starts from")


def data_lines(sources: Sequence[FoundData], why: str, *, held_out: bool = True) -> list[Line]:
    """`data:` and, where rows are held out, `eval_data:`."""
    lines = [Line("data", [one.part("train") for one in sources], why)]
    if held_out and (held := [one.part("validation") for one in sources if one.holdout]):
        lines.append(Line("eval_data", held, "rows that are never trained on; the split test is kept for `evaluate`"))
    return lines


def tokens(characters: int, given: Given, *, least: int = 64, share: float = 1.0) -> int:
    """A power of two of tokens in which so many characters and a template fit, or a share of the model's window."""
    need, size = characters / _CHARACTERS + _TEMPLATE, least
    while size < need:
        size *= 2
    return size if given.window is None else min(size, int(given.window * share))


def length_line(sources: Sequence[FoundData], given: Given) -> Line:
    """`max_length`, from the longest row."""
    longest = max(one.prompt + one.answer for one in sources)
    size = min(tokens(longest, given, least=128), 4096)
    return Line(
        "max_length", size, f"the longest row looked at has {longest:,} characters, about {_CHARACTERS} a token"
    )


def adapter_lines(given: Given, r: int, why: str) -> list[Line]:
    """`adapter:`, where the model is large."""
    if not given.adapted:
        return []
    whole = f"all {given.parameters / 1e9:.2g} B weights would need {16 * given.parameters / 1e9:.0f} GB to train"
    return [
        Line("adapter.r", r, why),
        Line("adapter.lora_alpha", 32, f"docs/adapters.md: whatever the rank; {whole}"),
    ]


def rate_line(given: Given, whole: float, source: str, key: str = "learning_rate") -> Line:
    """A learning rate: that of training all weights, or ten times as much for an adapter."""
    if given.adapted:
        return Line(
            f"train.{key}",
            _number(ADAPTER_RATE * whole),
            f"ten times {whole:g}, as LoRA Without Regret found; {source}",
        )
    return Line(f"train.{key}", _number(whole), source)


def batch_lines(sources: Sequence[FoundData], length: int, given: Given, most: int, source: str) -> list[Line]:
    """Batches, passes over the data and activations of a training on rows."""
    rows = None if any(one.rows is None for one in sources) else sum(one.rows or 0 for one in sources)
    size = most
    while rows is not None and size > 8 and rows // size < 20:
        size //= 2
    few = f"fewer than {most}, for at least 20 steps a pass over {rows} rows" if size < most else source
    lines = [
        Line("train.global_batch_size", size, few),
        Line("train.num_train_epochs", 2, "Tülu 3 and OLMo 2; watch eval_loss for over-fitting"),
        Line("train.warmup_steps", 0.03, "a share of all steps: Tülu 3, SmolLM3"),
        Line("train.per_device_train_batch_size", max(1, min(8, _MICRO_TOKENS // length)), "a limit; see `plan --fit`"),
    ]
    return [*lines, *checkpointing(given)]


def checkpointing(given: Given) -> list[Line]:
    """`gradient_checkpointing`, where the network is deep."""
    if given.parameters < _DEEP:
        return []
    return [Line("train.gradient_checkpointing", "true", "activations of a model of this size would fill a GPU")]


def _number(value: float) -> str:
    digits, _, power = f"{value:.1e}".partition("e")
    return f"{digits}e{int(power)}"


def written(name: str, stage: str, lines: Sequence[Line]) -> list[str]:
    """A section as YAML, every value with its reason behind it."""
    out = [f"  {name}:", *([f"    stage: {stage}"] if name != stage else [])]
    group = ""
    for line in lines:
        head, _, key = line.key.rpartition(".")
        begins = head != group
        if head and begins:
            out.append(f"    {head.removesuffix('[]')}:")
        group = head
        margin = " " * (6 if head else 4)
        mark = "" if not head.endswith("[]") else "- " if begins else "  "
        if isinstance(line.value, str | int | float):
            out.append(f"{margin + mark + key + ': ' + str(line.value):<46}  # {line.reason}")
        else:
            out.append(f"{margin}{mark}{key}:  # {line.reason}")
            out += [f"{margin}{' ' * len(mark)}  - {entry}" for entry in line.value]
    return out
