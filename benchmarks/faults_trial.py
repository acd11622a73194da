"""A trial of the fault campaign: one section with its published parents, and what a fault needs to disturb it."""

import json
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from benchmarks.faults_setup import NAME, Child, Scene, metrics_of
from handoff.errors import HandoffError
from handoff.files import list_files
from handoff.state import StateStore

_POLL = 0.0005  # seconds between two polls of a folder


class Broken(Exception):
    """A promise was broken; the text says which."""


def check(kept: bool, words: str) -> None:
    """Raises Broken."""
    if not kept:
        raise Broken(words)


class Trial:
    """One section with its parents in a separate folder, and its counts."""

    def __init__(self, scene: Scene, root: Path, rng: random.Random, section: str) -> None:
        self.scene, self.root, self.rng, self.section = scene, root, rng, section
        self.disk = root / "runs"
        self.sections = [section]
        """The sections whose results must equal the undisturbed ones."""
        self.same_states = True
        self.lost_steps = 0
        """Steps that had to be repeated."""
        self.damage = 0
        """Bytes that were altered or removed."""
        self.hit: bool | None = None
        """For a fault that aims at a moment: whether it hit that moment."""
        self._overrides: list[str] = []
        self._environment: dict[str, str] = {}

    @property
    def run(self) -> Path:
        return self.disk / NAME

    @property
    def stage(self) -> Path:
        return self.run / self.section

    @property
    def log(self) -> Path:
        return self.root / f"{self.section}.log"

    def prepare(self) -> None:
        """Copies the section's published ancestors into the folder."""
        self.scene.copy(self.disk, self.section)

    def options(self, *overrides: str, **environment: str) -> None:
        """Sets the overrides and environment variables of every later start."""
        self._overrides, self._environment = list(overrides), environment

    def start(self, log: Path | None = None) -> Child:
        return self.scene.child(self.disk, self.section, log or self.log, *self._overrides, **self._environment)

    def finish(self) -> None:
        """Starts the section again; now it must end."""
        child = self.start()
        code = child.wait()
        check(code == 0, f"started again, it ended with {code}")

    def refused(self, *words: str) -> None:
        """Starts the section, which must refuse with exit code 2 and these words, and must leave all files in place."""
        before = self._kept()
        already = len(self.said())
        code = self.start().wait()
        printed = self.said()[already:]
        check(code == 2, f"a start that has to be refused ended with {code}")
        missing = [word for word in words if word not in printed]
        check(not missing, f"the refusal does not name {missing}: {printed[-500:]}")
        missing = sorted(before - self._kept())
        check(not missing, f"the refused start removed {missing}")

    def _kept(self) -> set[str]:
        """The files in the stage's folder, without leftovers of an interrupted save or publishing."""
        return {name for name in list_files(self.stage) if not any(part[0] == "." for part in name.split("/"))}

    def said(self) -> str:
        """Everything that the section has printed in this trial."""
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def pause(self, most: float = 1.0) -> None:
        """Waits for a random part of the section's duration."""
        time.sleep(self.rng.uniform(0, most * self.scene.seconds[self.section]))

    def somewhere(self, child: Child) -> None:
        """Waits until a random moment of the section; in three of four cases during training."""
        if self.rng.random() < 0.75:
            steps = [line["step"] for line in metrics_of(self.scene.reference / self.section)]
            step = self.rng.choice(steps[:-1] or steps)
            self.until(child, lambda: self.last_step() >= step)
            time.sleep(self.rng.uniform(0, 0.05))
        else:
            self.pause()

    def kill(self, child: Child) -> None:
        """Sends SIGKILL, and counts the steps that are lost."""
        if child.running:
            child.kill()
            self.lost_steps += max(0, self.last_step() - self.newest_state())
        else:
            child.wait()

    def last_step(self) -> int:
        """The last step in the metrics; 0 before the first."""
        path = self.stage / "metrics.jsonl"
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def newest_state(self) -> int:
        """The step of the newest valid state; 0 if there is none."""
        with suppress(HandoffError):
            state = StateStore(self.stage / "state").latest()
            return state.step if state else 0
        return 0

    def states(self) -> list[Path]:
        """The saved states, newest first."""
        return sorted((self.stage / "state").glob("step-*"), key=lambda path: -int(path.name.removeprefix("step-")))

    def until(self, child: Child, happens: Callable[[], bool]) -> bool:
        """Waits until `happens` is true. Returns False if the process ended first."""
        look = time.monotonic() + 1
        while not happens():
            if not child.running:
                return False
            if time.monotonic() > look:
                look += 1
                if child.patience.hung():
                    child.kill()
                    raise Broken("it hung")
            time.sleep(_POLL)
        return True

    def flip_or_cut(self, path: Path) -> Callable[[], None]:
        """Flips a bit of a file, cuts off its end, or deletes it. Returns a function that restores the file."""
        content = path.read_bytes()
        how = self.rng.choice(("flip", "flip", "cut", "delete"))
        if how == "flip":
            at = self.rng.randrange(len(content))
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << self.rng.randrange(8)]) + content[at + 1 :])
            self.damage += 1
        elif how == "cut":
            kept = self.rng.randrange(len(content))
            path.write_bytes(content[:kept])
            self.damage += len(content) - kept
        else:
            path.unlink()
            self.damage += len(content)

        def put_back() -> None:
            path.write_bytes(content)

        return put_back
