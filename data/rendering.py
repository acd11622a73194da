"""Renders conversations with a checkpoint's chat template, under a limit of time and memory and with a frozen clock.

The templates run in a process of their own (data/template_worker.py), which is started when the first one is needed and
ends with this process. A template that breaks its limits ends that process, and the next conversation gets a new one.
"""

import atexit
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from data.errors import RowRefused, TemplateFailed
from data.template_worker import MEMORY

SECONDS = 10.0
"""Processor time for rendering one conversation."""

# A place where a template reads the time in a format that is written there, or asks whether it can.
_CLOCK_USE = re.compile(
    r"""strftime_now\s*(?:is\s+(?:not\s+)?defined|\(\s*(?P<quote>['"])(?P<format>[^'"\\]*)(?P=quote)\s*\))"""
)
_ALL_OF_IT = "%Y-%m-%d %H:%M:%S"

Turn = dict[str, Any]
"""A message as templates see it: `role`, `content`, and what it holds besides (data/calls.py) but the tools."""
Conversation = tuple[Sequence[Turn], bool, list[dict[str, Any]] | None]
"""Turns; whether the next answer's header ends them; the tools that answers may call."""


class Clock:
    """The time that templates see (`strftime_now`). A stage freezes it at the time when it was first started, so that
    a resume on another day gives the same ids; elsewhere, in chat for instance, it is the time of day."""

    def __init__(self) -> None:
        self._frozen: datetime | None = None

    def freeze(self, moment: datetime | None) -> None:
        """Stops the clock at `moment`; None lets it run again."""
        self._frozen = moment

    def now(self) -> datetime:
        """The time, without a time zone, to the second."""
        return (self._frozen or datetime.now()).replace(microsecond=0, tzinfo=None)


CLOCK = Clock()
"""The clock of this process, which runs one stage."""


class Renderer:
    """One chat template with the tokenizer's special tokens."""

    def __init__(self, template: str, special_tokens: Mapping[str, Any]) -> None:
        """
        Args:
            template: the source.
            special_tokens: names that the template may use, e.g. `bos_token`, and their texts or lists of texts.
        """
        self._template = template
        self._variables = {
            name: [str(token) for token in value] if isinstance(value, list) else str(value)
            for name, value in special_tokens.items()
        }
        uses = list(_CLOCK_USE.finditer(template))
        formats = {use["format"] for use in uses if use["format"] is not None}
        self._formats = formats if len(uses) == template.count("strftime_now") else {_ALL_OF_IT}

    def clock(self) -> list[str]:
        """What the template can read of the time now: the date alone, for most; nothing if it does not read it."""
        return sorted(CLOCK.now().strftime(text) for text in self._formats)

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """The text of each conversation.

        Raises:
            RowRefused: the template refuses a conversation.
            TemplateFailed: the template has a mistake, or needs too much time or memory.
        """
        request = {
            "template": self._template,
            "variables": self._variables,
            "seconds": SECONDS,
            "clock": CLOCK.now().isoformat(),
            "conversations": [[list(turns), generation, tools] for turns, generation, tools in conversations],
        }
        texts = []
        for answer in _WORKER.ask(request):
            if "refused" in answer:
                raise RowRefused(f"the chat template refuses it: {answer['refused']}")
            if "failed" in answer:
                raise TemplateFailed(answer["failed"])
            texts.append(answer["text"])
        return texts


class _Worker:
    """The process that renders. One for this process: a fork of it starts its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: dict[str, Any]) -> list[dict[str, str]]:
        """The process's answers. Raises TemplateFailed when the template made it end."""
        with self._lock:
            process = self._running()
            assert process.stdin is not None and process.stdout is not None
            line = ""
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                pass
            except BaseException:  # interrupted: the next request must not get this one's answer
                self._end()
                raise
            if line.endswith("\n"):
                answers: list[dict[str, str]] = json.loads(line)
                return answers
            ended = self._end()
        if ended == -signal.SIGPROF:
            raise TemplateFailed(f"it needs more than {SECONDS:g} seconds for one conversation")
        raise TemplateFailed(f"the process that renders it, with {MEMORY >> 20} MiB of memory, ended with code {ended}")

    def close(self) -> None:
        """Ends the process."""
        with self._lock:
            if self._owner == os.getpid():
                self._end()

    def _running(self) -> "subprocess.Popen[str]":
        if self._process is None or self._owner != os.getpid() or self._process.poll() is not None:
            program = Path(__file__).with_name("template_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-I", str(program)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="ascii",
                start_new_session=True,
            )
            self._owner = os.getpid()
        return self._process

    def _end(self) -> int | None:
        """Ends the process, unless it has ended. Returns its exit code."""
        if self._process is None:
            return None
        with self._process as process, suppress(BrokenPipeError):
            process.communicate()  # closes its standard input, at which it ends
        self._process = None
        return process.returncode


_WORKER = _Worker()
atexit.register(_WORKER.close)
