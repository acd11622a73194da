"""`baton chat`: talk to a model in the terminal, or to two of them side by side.

Conversations are encoded as in training (`data.encode`). An answer is decoded one token at a time, shown immediately,
and ends at the model's stop tokens. Every model has its own conversation. Lines are read from standard input; if that
is not a terminal, standard output gets only the answers, so that scripts can use it. Errors go to standard error.
"""

import math
import re
import sys
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from baton.runs import run_dir_of
from data.errors import DataError
from data.records import Message
from handoff.errors import UserError
from handoff.gguf import is_gguf
from handoff.manifest import Manifest
from handoff.parent import Parent, open_parent
from handoff.stage import StageDir
from handoff.window import window
from training.importing import quick_imports
from training.recipe import load_recipe
from training.recipe_text import did_you_mean
from training.registry import Registry
from training.terminal import Screen, shown

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

    from data.encode import Encoder

COMMANDS = "/reset begins anew, /system TEXT sets the system message, /quit ends"
_HIDDEN = "�"  # bytes of a character whose rest has not been sampled yet


@dataclass(frozen=True)
class Sampling:
    """The sampling parameters. `temperature` 0: always the likeliest token."""

    temperature: float
    max_new_tokens: int
    seed: int


class Speaker:
    """A model with its encoder and its side of the conversation."""

    def __init__(self, parent: Parent, sampling: Sampling) -> None:
        with quick_imports():
            import torch

            from rollout.positions import longest_alike
            from training import engines
            from training.config import ModelArguments
            from training.model import Model, load_encoder

        self.name = parent.name
        self.encoder: Encoder = load_encoder(parent)
        if self.encoder.lacks:
            raise UserError(
                f"{parent.path}: {self.encoder.lacks}, so nobody can talk to this model; choose one that was taught to "
                "answer with --model, or put a chat_template.jinja beside its tokenizer.json"
            )
        engine = engines.current()
        self.device = engine.device
        model = Model.load(
            engine, parent, "policy", self.encoder, ModelArguments(), dropout=False, bf16=False, frozen=True
        )
        self.model: PreTrainedModel = model.freeze().module
        self.context = min(_context(self.model.config), longest_alike(self.model.config) or 1 << 30)
        self.sampling = sampling
        self.generator = torch.Generator(self.device).manual_seed(sampling.seed)
        self.system: str | None = None
        self.turns: list[Message] = []

    def reset(self, system: str | None) -> None:
        """Forgets the conversation."""
        self.system = system
        self.turns = []

    def answer(self, text: str) -> Generator[str, None, None]:
        """Yields pieces of the answer to the user's next message; after its end, both join the conversation.

        Raises DataError if the message cannot be expressed in the model's template, or fills the whole context.
        """
        asked = [*self.turns, Message("user", text)]
        ids = self._prompt(asked)
        said: list[int] = []
        shown = ""
        try:
            for token in self._tokens(ids):
                said.append(token)
                now = self.encoder.decode(said)
                if not now.endswith(_HIDDEN):
                    yield now[len(shown) :]
                    shown = now
            rest = self.encoder.decode(said)[len(shown) :]
            if rest:
                yield rest
        finally:
            self.turns = [*asked, Message("assistant", self.encoder.decode(said))]

    def _prompt(self, turns: Sequence[Message]) -> list[int]:
        """The conversation as ids, without its oldest exchanges if they leave no room for an answer."""
        before = [] if self.system is None else [Message("system", self.system)]
        room = self.context - min(self.sampling.max_new_tokens, self.context // 2)
        kept = list(turns)
        while True:
            ids = self.encoder.prompt([*before, *kept])
            if len(ids) <= room:
                return ids
            if len(kept) == 1:
                raise DataError(f"{len(ids)} tokens are too many for {self.name}: {room} fit beside an answer")
            kept = kept[2:]

    def _tokens(self, ids: Sequence[int]) -> Iterator[int]:
        import torch

        inputs = torch.tensor([ids], device=self.device)  # (1, T)
        cache = None
        for _ in range(min(self.sampling.max_new_tokens, self.context - len(ids))):
            with torch.inference_mode():
                output = self.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            token = self._choose(output.logits[0, -1, : self.encoder.vocab_size].float())
            if token in self.encoder.stop_ids:
                return
            yield token
            inputs = torch.tensor([[token]], device=self.device)

    def _choose(self, logits: "torch.Tensor") -> int:
        """The next token from logits of shape (V,), where V may be larger than the vocabulary."""
        logits = logits[: self.encoder.vocab_size]
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        chances = ((logits - logits.max()) / self.sampling.temperature).softmax(-1)
        return int(chances.multinomial(1, generator=self.generator))


def _context(config: "PretrainedConfig") -> int:
    """The model's window; some architectures have no limit."""
    found = window(config.to_dict())
    return 1 << 30 if found is None else found.tokens


def open_models(target: Path, names: Sequence[str]) -> list[Parent]:
    """The models to talk to. `target` is a recipe, the folder of a run, or the folder of one model.

    Without names: the newest aligned model of the run, or the newest instruction-tuned one.

    Raises:
        UserError: the target does not exist, or the run has no model to chat with or no section of that name.
        HandoffError: a model is missing, unfinished, altered, or not a language model.
    """
    if is_gguf(target) or (target.is_dir() and _is_model(target)):
        if names:
            raise UserError(f"{target} is one model; --model and --compare need a recipe or the folder of a run")
        return [open_parent(str(target.resolve()), Path("runs"), {"causal_lm"})]
    run_dir = run_dir_of(target)
    for name in names:
        _check_section(name, target, run_dir)
    return [open_parent(name, run_dir, {"causal_lm"}) for name in names or [default_model(run_dir)]]


def _check_section(name: str, target: Path, run_dir: Path) -> None:
    """Raises UserError, with the sections that there are, if `name` is none of them and neither a path nor a hub id."""
    if "/" in name or (run_dir / name).is_dir() or Path(name).exists():
        return
    if target.is_file():
        load_recipe(target).section(name)
        return
    known = sorted(folder.name for folder in run_dir.iterdir() if _is_model(folder))
    hint = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
    raise UserError(f"{run_dir}: no section {name}{hint}")


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").exists() or (folder / "stage.json").exists() or (folder / "started.json").exists()


def default_model(run_dir: Path) -> str:
    """The section whose model is the newest of the most aligned kind. Raises UserError when there is none."""
    registry = Registry()
    found: list[tuple[bool, str, str]] = []
    for folder in run_dir.iterdir():
        manifest: Manifest | None = StageDir(folder).manifest()
        if manifest is not None and manifest.kind == "causal_lm":
            answers = registry.declaration(manifest.stage).answers
            if answers != "no":
                found.append((answers == "aligned", manifest.created, manifest.name))
    if not found:
        tuning = " or ".join(stage for stage, known in registry.declarations().items() if known.answers == "tuned")
        raise UserError(
            f"{run_dir}: no model has been taught to answer yet; make one with `baton run <recipe> --to {tuning}`"
        )
    return max(found)[2]


@dataclass
class Terminal:
    """The input of lines and the output of answers."""

    console: Screen = field(default_factory=Screen)
    errors: Screen = field(default_factory=lambda: Screen(stderr=True))
    asks: bool = field(default_factory=lambda: sys.stdin.isatty() and sys.stdout.isatty())

    def read(self) -> str | None:
        """The next line, None at the end of input."""
        try:
            return (self.console.input("[bold cyan]you[/] > ") if self.asks else input()).strip()
        except EOFError:
            return None

    def say(self, text: str) -> None:
        """Prints a line that is not from a model."""
        self.console.print(text, style="dim")

    def complain(self, text: str) -> None:
        """Prints to standard error why a line gets no answer."""
        self.errors.print(text, style="red")

    def one(self, speaker: Speaker, text: str) -> None:
        """Prints one model's answer while it is generated."""
        if self.asks:
            self.console.print(Text.assemble((shown(speaker.name), "bold green"), " > "), end="")
        for piece in speaker.answer(text):
            self.console.print(piece, end="")
        self.console.print()

    def several(self, speakers: Sequence[Speaker], text: str) -> None:
        """Prints several answers: in growing columns in a terminal, else one after another."""
        names = [speaker.name for speaker in speakers]
        answers = [""] * len(speakers)
        pieces = [(place, speaker.answer(text)) for place, speaker in enumerate(speakers)]
        live = Live(console=self.console, refresh_per_second=12, auto_refresh=False) if self.asks else None
        if live is not None:
            live.start()
        try:
            while pieces:
                for place, stream in list(pieces):
                    piece = next(stream, None)
                    if piece is None:
                        pieces.remove((place, stream))
                    else:
                        answers[place] += piece
                if live is not None:
                    live.update(_columns(names, answers), refresh=True)
        finally:
            for _, stream in pieces:
                stream.close()
            if live is not None:
                live.stop()
        if live is None:
            for name, answer in zip(names, answers, strict=True):
                self.console.print(f"{name}: {answer}")


def _columns(names: Sequence[str], answers: Sequence[str]) -> Table:
    # Shown before it is measured: an escape is wider than the character that it stands for.
    table = Table(*(Column(Text(shown(name), style="bold green"), ratio=1) for name in names), expand=True)
    table.add_row(*(Text(shown(answer)) for answer in answers))
    return table


def talk(
    target: Path,
    model: str | None,
    compare: tuple[str, str] | None,
    system: str | None,
    *,
    temperature: float,
    max_new_tokens: int,
    seed: int,
) -> None:
    """`baton chat`: reads lines until the end of input or /quit. Raises what `open_models` raises."""
    if model is not None and compare is not None:
        raise UserError("--model names one section and --compare two; give one of them")
    if math.isnan(temperature):
        raise UserError("--temperature nan: give a number of 0 or more")
    if system is not None and not _is_text(system):
        raise UserError(f"--system {system!r} is not text in this terminal's encoding")
    parents = open_models(target, compare or ([model] if model else []))
    with quick_imports():
        from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    terminal = Terminal()
    sampling = Sampling(temperature, max_new_tokens, seed)
    speakers = [Speaker(parent, sampling) for parent in parents]
    for speaker in speakers:
        speaker.reset(system)
    if terminal.asks:
        terminal.say(f"{' and '.join(str(parent.path) for parent in parents)}; {COMMANDS}")
    converse(terminal, speakers)


def _is_text(line: str) -> bool:
    """Whether it holds no half characters. Python makes these of bytes that are not in the terminal's encoding."""
    return not re.search("[\ud800-\udfff]", line)


def converse(terminal: Terminal, speakers: Sequence[Speaker]) -> None:
    """The loop of questions and answers."""
    answer: Callable[[str], None]
    if len(speakers) == 1:
        answer = lambda line: terminal.one(speakers[0], line)  # noqa: E731
    else:
        answer = lambda line: terminal.several(speakers, line)  # noqa: E731
    while (line := terminal.read()) is not None:
        if not _is_text(line):
            terminal.complain(f"a line that is not text in the encoding of this terminal: {line!r}")
            continue
        word, _, rest = line.partition(" ")
        if word == "/quit":
            return
        if word in ("/reset", "/system"):
            for speaker in speakers:
                speaker.reset(rest.strip() or None if word == "/system" else speaker.system)
        elif word.startswith("/"):
            terminal.complain(f"no command {word}; {COMMANDS}")
        elif line:
            try:
                answer(line)
            except DataError as error:
                terminal.complain(str(error))
            except KeyboardInterrupt:
                terminal.say("")  # Ctrl-C ends the answer, not the conversation
