"""`baton top`: a running training in the terminal, from the files of its run alone. No torch here.

So it works for a run on another machine, too, whose folder is shared. Whether a process is still there can only be said
of one on this machine; of others it says how long ago they wrote. What the files hold is not trusted: what cannot be
read is left out, and control characters are shown.
"""

import json
import math
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from baton.report.text import NOTHING, duration, short
from handoff.errors import HandoffError, UserError
from handoff.files import human_bytes, read_json
from handoff.lock import LOCK_NAME
from handoff.stage import StageDir
from training.progress import progress_path
from training.recipe import load_recipe
from training.terminal import Screen

VALUES = {
    "loss": ("loss", "loss/policy_avg", "eval_loss"),
    "reward": ("objective/scores", "rewards/margins", "margin"),
    "KL": ("objective/kl",),
}
"""{column: the metrics that it shows; the first that was logged}."""
_STYLES = {
    "running": "green",
    "silent": "yellow",
    "done": "default",
    "killed": "red",
    "stopped": "yellow",
    "waiting": "dim",
}
_TAIL = 1 << 18  # bytes at the end of metrics.jsonl that are read
_SILENT = 600.0  # seconds without a sign of a process on another machine
_SLACK = 5.0  # seconds by which the clocks of a process's start and of a file may differ


@dataclass(frozen=True)
class Seen:
    """One section of a run, as its files show it."""

    name: str
    state: str = "waiting"
    """running, silent (on another machine, and not heard of for long), done, killed, stopped (it can go on) or
    waiting."""
    step: int | None = None
    total: int | None = None
    rate: float | None = None
    """Steps in a second."""
    values: dict[str, float] = field(default_factory=dict)
    """Of the columns in VALUES."""
    memory: str = ""
    notes: tuple[str, ...] = ()
    """About its process and its last line."""
    begun: str = ""

    @property
    def left(self) -> float | None:
        """Seconds to go."""
        if self.state != "running" or not self.rate or self.step is None or self.total is None:
            return None
        return max(self.total - self.step, 0) / self.rate


def look(run_dir: Path, names: Sequence[str] | None, now: float) -> list[Seen]:
    """Every section of a run: those of the recipe in its order, or those that have begun in the order of time.

    Args:
        now: the time, as time.time gives it.
    """
    begun = [path.parent.name for path in run_dir.glob("*/started.json") if not path.parent.name.startswith(".")]
    if names is None:
        return sorted((_section(run_dir, name, now) for name in begun), key=lambda seen: (seen.begun, seen.name))
    return [_section(run_dir, name, now) for name in names]


def _section(run_dir: Path, name: str, now: float) -> Seen:
    stage = StageDir(run_dir / name)
    if not stage.started_path.is_file():
        return Seen(name)
    lines, written = _last_lines(stage.metrics_path)
    owner, pulse = _read(stage.path / LOCK_NAME), _read(progress_path(run_dir, name))
    begun = str(_read(stage.started_path).get("begun", ""))
    values = {column: value for column, keys in VALUES.items() if (value := _newest(lines, keys)) is not None}
    notes = [] if written is None else [f"last line {duration(max(now - written, 0))} ago"]
    step = next((line["step"] for line in reversed(lines)), None)
    if not owner:
        done = stage.manifest_path.is_file()
        state = "done" if done else "stopped"
        return Seen(name, state, step, None, None, values, "", () if done else tuple(notes), begun)
    if pulse.get("pid") != owner.get("pid") or pulse.get("host") != owner.get("host"):
        pulse = {}  # of an earlier start
    state, where = _process(owner, max(_number(pulse.get("at")) or 0, written or 0, _since(owner)), now)
    total, rate = _number(pulse.get("total")), _number(pulse.get("rate"))
    counted = [at for at in (step, _number(pulse.get("done"))) if at is not None]
    return Seen(
        name,
        state,
        int(max(counted)) if counted else None,
        None if total is None else int(total),
        rate,
        values,
        _memory(pulse) if state == "running" else "",
        (*notes, where),
        begun,
    )


def _process(owner: dict[str, Any], heard: float, now: float) -> tuple[str, str]:
    """(the state of a section, words about its process). `heard`: when it last gave a sign."""
    pid, host = owner.get("pid"), str(owner.get("host", ""))
    if host != socket.gethostname():
        ago = max(now - heard, 0)
        words = f"process {pid} on {host}, heard of {duration(ago)} ago; whether it is there is seen on {host} alone"
        return "silent" if ago > _SILENT else "running", words
    with suppress(psutil.Error, ValueError, TypeError, OverflowError):
        process = psutil.Process(int(str(pid)))
        # Another process may have got the number since.
        if process.create_time() <= _since(owner) + _SLACK and process.status() != psutil.STATUS_ZOMBIE:
            return "running", f"process {pid} on this machine is there"
    return "killed", f"process {pid} on this machine is gone; `baton run` goes on from the last saved state"


def _since(owner: dict[str, Any]) -> float:
    """When the owner took the section's lock; 0 if it is not said."""
    with suppress(ValueError, KeyError):
        return datetime.fromisoformat(str(owner["since"])).timestamp()
    return 0.0


def _memory(pulse: dict[str, Any]) -> str:
    memory, peak = _number(pulse.get("memory")), _number(pulse.get("peak"))
    if memory is None:
        return ""
    return human_bytes(int(memory)) + ("" if peak is None else f", at most {human_bytes(int(peak))}")


def _last_lines(path: Path) -> tuple[list[dict[str, Any]], float | None]:
    """(the last whole lines of metrics.jsonl, when it was written)."""
    try:
        if not path.is_file():
            return [], None
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(size - _TAIL, 0))
            raw = file.read().splitlines(keepends=True)
            written = path.stat().st_mtime
    except OSError:
        return [], None
    lines = []
    for one in raw[1:] if size > _TAIL else raw:
        with suppress(ValueError, RecursionError):
            line = json.loads(one) if one.endswith(b"\n") else None
            if isinstance(line, dict) and type(line.get("step")) is int:
                lines.append(line)
    return lines, written if lines else None


def _newest(lines: Sequence[dict[str, Any]], keys: Sequence[str]) -> float | None:
    """The last value of the first of these metrics that was logged."""
    for key in keys:
        for line in reversed(lines):
            value = line.get(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return float(value)
    return None


def _read(path: Path) -> dict[str, Any]:
    """An object of a file that another process writes; empty if there is none, or if it cannot be read now."""
    with suppress(OSError, ValueError, RecursionError, HandoffError):
        if path.is_file() and isinstance(found := read_json(path), dict):
            return found
    return {}


def _number(value: Any) -> float | None:
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if good else None


def drawn(run_dir: Path, sections: Sequence[Seen]) -> Group:
    """The table, with a line below it for each section that runs or was stopped."""
    table = Table("stage", "state", "step", "rate", "left", *VALUES, "memory", box=None)
    notes = []
    for seen in sections:
        step = NOTHING if seen.step is None else f"{seen.step:,}"
        if seen.total is not None:
            step += f" of {seen.total:,}"
        numbers = [short(seen.values.get(column)) for column in VALUES]
        state = Text(seen.state, _STYLES[seen.state])
        table.add_row(seen.name, state, step, _rate(seen), duration(seen.left), *numbers, seen.memory or NOTHING)
        if seen.notes and seen.state != "done":
            notes.append(Text(f"{seen.name}: {'; '.join(seen.notes)}"))
    return Group(Text(str(run_dir)), table, *notes)


def _rate(seen: Seen) -> str:
    if not seen.rate or seen.state != "running":
        return NOTHING
    return f"{short(seen.rate)}/s" if seen.rate >= 1 else f"{short(1 / seen.rate)} s each"


def top(target: Path, interval: float) -> None:
    """The command. In a terminal it is drawn again every `interval` seconds until Ctrl-C; otherwise once.

    Raises:
        UserError: there is no such run, or nothing of it has begun.
    """
    names: list[str] | None = None
    run_dir = target
    if not target.is_dir():
        recipe = load_recipe(target)
        run_dir, names = recipe.run_dir, recipe.order()
    sections = look(run_dir, names, time.time())
    if not sections:
        raise UserError(f"{run_dir}: no stage has been started here; `baton run <recipe>` starts one")
    screen = Screen()
    if not screen.is_terminal:
        screen.print(drawn(run_dir, sections))
        return
    with suppress(KeyboardInterrupt), Live(drawn(run_dir, sections), console=screen, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            live.update(drawn(run_dir, look(run_dir, names, time.time())), refresh=True)
