"""Saves and restores the state of a policy-gradient run, and restores the best policy.

The best policy so far is always one of the saved states: when a look is better than all before it, the state is saved,
and it is not deleted as long as it is the best. So going back to it restores optimizer and critic too, and a resumed
run can also go back to it.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from handoff.state import State
from stages.ppo.config import Config
from stages.ppo.guards import Watch
from training.engines import files
from training.faults import Faults
from training.model import Model, WithoutAdapter
from training.run import Run
from training.saving import SavedStates

_REFERENCE = "reference.safetensors"


@dataclass
class Position:
    """Everything that the next iteration depends on besides model, optimizer and reference."""

    iteration: int
    """Number of finished iterations."""
    cursor: int
    """Number of prompts taken from the stream."""
    kl_coef: float
    lr_factor: float
    """Factor on the learning rates; every rollback halves it."""
    watch: Watch
    faults: Faults
    measured: dict[str, float] = field(default_factory=dict)
    """The last finished iteration's metrics that are published if its policy is kept."""


class Saves:
    """The saved states of one run."""

    def __init__(
        self,
        run: Run,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        reference: Model | WithoutAdapter,
    ) -> None:
        self._run, self._model, self._optimizer = run, model, optimizer
        config: Config = run.config
        self._t, self._guards, self._monitored = config.train, config.guards, bool(config.monitor)
        self._reference: Model | None = None  # saved only if it changes
        if config.train.sync_ref_model and isinstance(reference, Model):
            self._reference = reference
        self._every = self._t.save_iterations or max(1, self._t.iterations // 10)
        moving = [_REFERENCE] if self._reference is not None else []
        self._states = SavedStates(run, self._t, more=moving, needed=moving)

    def resume(self) -> Position:
        """Loads the newest valid state and cuts the metrics back to it; without a state, the start of the run.

        Raises:
            HandoffError: there are saved states but none is whole, or the disk has too little space for new ones.
        """
        state = self._states.newest()
        engine = self._run.engine
        policy = files.weight_bytes(engine, engine.unwrapped(self._model).policy)
        size = files.state_bytes(engine, self._model) + (policy if self._reference is not None else 0)
        # The kept states, the one being written, and the best one, which is never deleted.
        at_once = self._t.save_total_limit + 1 + (self._guards.keep == "best")
        self._states.check_room(at_once, size, policy)
        if state is None:
            return Position(0, 0, self._t.kl_coef, 1.0, Watch(), Faults())
        self._load(state)
        self._run.console.print(f"  resumes at iteration {state.step} of {self._t.iterations}")
        return _position(state)

    def judge(self, at: Position) -> Literal["go on", "back", "stop"]:
        """After a look: whether the run continues. `back`: it continues from its best policy, which is now loaded."""
        found = at.watch.over_optimized(self._guards)
        if found is None:
            return "go on"
        at.watch.alarms.append(f"iteration {at.iteration}: {found}")
        at.watch.divergent = 0
        self._run.console.print(f"  {found}")
        if self._guards.on_overoptimization == "warn":
            return "go on"
        best = self._best_state(at)
        if (
            self._guards.on_overoptimization == "stop"
            or best is None
            or at.watch.rollbacks == self._guards.max_rollbacks
        ):
            return "stop"
        self._load(best)
        at.watch.rollbacks += 1
        at.lr_factor /= 2
        at.kl_coef *= 2
        self._run.console.print(f"  goes on from the policy of iteration {best.step}")
        return "back"

    def after_iteration(self, at: Position, looked: bool) -> None:
        """Saves at regular intervals, when the latest look is the best so far, and when a signal requests it.

        Raises:
            Stopped: a signal requested a stop.
        """
        run = self._run
        last = at.iteration == self._t.iterations  # its state keeps what was trained if the publication fails
        improved = looked and self._guards.keep == "best" and self._best_step(at) == at.iteration
        # While steps are being skipped, the weights may be bad, and saving them would delete older, good states.
        due = (last or at.iteration % self._every == 0) and not at.faults.in_a_row
        stop, asked = run.signals.asked(run.engine.largest)
        saved = bool(improved or due or stop or asked) and self._save(at)
        if stop and not last:
            raise run.signals.stopped(stop, f"iteration {at.iteration}", saved)

    def restore_best(self, at: Position) -> tuple[int, dict[str, float]]:
        """Loads the policy to publish into the model. Returns its iteration, and the metrics of that iteration."""
        if self._guards.keep == "last" or self._best_step(at) in (None, at.iteration):
            return at.iteration, at.measured
        best = self._best_state(at)
        if best is None:
            return at.iteration, at.measured
        self._load(best)
        self._run.console.print(f"  keeps the policy of iteration {best.step} of {at.iteration}")
        return best.step, _position(best).measured

    def _best_step(self, at: Position) -> int | None:
        return at.watch.best(self._t.kl_coef, self._monitored)

    def _best_state(self, at: Position) -> State | None:
        return self._states.at(self._best_step(at))

    def _load(self, state: State) -> None:
        engine, moments = self._run.engine, files.OPTIMIZER not in state.lost
        files.load_state(engine, self._model, self._optimizer, state.path, moments)
        if self._reference is not None:
            files.load_frozen(engine, self._reference.module, state.path / _REFERENCE)

    def _save(self, at: Position) -> bool:
        """Every process calls it. False: the disk is full; the state is not saved and the run continues."""
        extra = {
            "cursor": at.cursor,
            "kl_coef": at.kl_coef,
            "lr_factor": at.lr_factor,
            "watch": at.watch.state(),
            "faults": asdict(at.faults),
            "measured": at.measured,
        }
        protect = self._best_step(at) if self._guards.keep == "best" else None
        return self._states.save(at.iteration, self._model, self._optimizer, extra, self._write_reference, protect)

    def _write_reference(self, path: Path) -> None:
        if self._reference is not None:
            engine = self._run.engine
            files.write_tensors(engine, path / _REFERENCE, engine.weights(self._reference.module))


def _position(state: State) -> Position:
    extra = state.extra
    watch, faults = Watch.from_state(extra["watch"]), Faults(**extra["faults"])
    numbers = extra["cursor"], extra["kl_coef"], extra["lr_factor"]
    return Position(state.step, *numbers, watch, faults, extra["measured"])
