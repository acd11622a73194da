"""`baton chat`: talk to a model in the terminal, or to two of them side by side.

Conversations are encoded as in training (`data.encode`). An answer is decoded one token at a time, shown immediately,
and ends at the model's stop tokens. Every model has its own conversation. Lines are read from standard input; if that
is not a terminal, standard output gets only the answers, so that scripts can use it. Errors go to standard error.
Ctrl-C ends an answer, of which the conversation keeps what was said, or drops the line that is being typed.
"""

import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from baton.targets import open_models
from data.errors import DataError
from handoff.errors import UserError
from training.importing import quick_imports
from training.terminal import Screen, shown

if TYPE_CHECKING:
    from baton.speaker import Speaker

COMMANDS = "/reset begins anew, /system TEXT sets the system message, /quit ends"


@dataclass
class Terminal:
    """The input of lines and the output of answers."""

    console: Screen = field(default_factory=Screen)
    errors: Screen = field(default_factory=lambda: Screen(stderr=True))
    asks: bool = field(default_factory=lambda: sys.stdin.isatty() and sys.stdout.isatty())

    def read(self) -> str | None:
        """The next line, None at the end of input. In a terminal, Ctrl-C drops the line; a second one in a row ends."""
        for last in (not self.asks, True):
            try:
                return (self.console.input("[bold cyan]you[/] > ") if self.asks else input()).strip()
            except EOFError:
                return None
            except KeyboardInterrupt:
                if last:
                    raise
                self.say(f"\n{COMMANDS}, as does Ctrl-C once more")
        raise AssertionError

    def say(self, text: str) -> None:
        """Prints a line that is not from a model."""
        self.console.print(text, style="dim")

    def complain(self, text: str) -> None:
        """Prints to standard error why a line gets no answer."""
        self.errors.print(text, style="red")

    def one(self, speaker: "Speaker", text: str) -> None:
        """Prints one model's answer while it is generated."""
        if self.asks:
            self.console.print(Text.assemble((shown(speaker.name), "bold green"), " > "), end="")
        for piece in speaker.answer(text):
            self.console.print(piece, end="")
        self.console.print()

    def several(self, speakers: "Sequence[Speaker]", text: str) -> None:
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

        from baton.speaker import ChatSampling, Speaker

    disable_progress_bar()
    terminal = Terminal()
    sampling = ChatSampling(temperature, max_new_tokens, seed)
    speakers = [Speaker(parent, sampling) for parent in parents]
    for speaker in speakers:
        speaker.reset(system)
        if speaker.as_text:
            terminal.complain(f"{speaker.name}: the conversation is put to it as text, because {speaker.as_text}")
    if terminal.asks:
        terminal.say(f"{' and '.join(str(parent.path) for parent in parents)}; {COMMANDS}")
    converse(terminal, speakers)


def _is_text(line: str) -> bool:
    """Whether it holds no half characters. Python makes these of bytes that are not in the terminal's encoding."""
    return not re.search("[\ud800-\udfff]", line)


def converse(terminal: Terminal, speakers: "Sequence[Speaker]") -> None:
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
