"""Finds the saved states of a training run at its start and saves new ones; a disk that is full or cannot be written
costs a saved state and does not stop the training.

Trainer-based stages and the policy-gradient loop share this code. Every process calls each method.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from handoff.errors import HandoffError
from handoff.files import (
    cannot_write,
    check_free_space,
    disk_is_full,
    free_bytes,
    human_bytes,
    remove_tree,
    tree_bytes,
)
from handoff.manifest import EngineRecord
from handoff.previous import PREVIOUS
from handoff.state import BrokenStates, State, StateStore
from training.config import OptimizerConfig
from training.engines import files

if TYPE_CHECKING:
    from training.run import Run

logger = logging.getLogger(__name__)


class SavedStates:
    """The states of one run."""

    def __init__(
        self, run: "Run", config: OptimizerConfig, more: Collection[str] = (), needed: Collection[str] = ()
    ) -> None:
        """
        Args:
            run: the stage's run.
            config: the stage's `train:`.
            more: names of parts besides model and optimizer.
            needed: the parts among `more` that a start from the weights alone requires.
        """
        self._run, self._config = run, config
        weights = (files.MODEL, *needed)
        self._store = StateStore(run.dir.state_dir, (files.MODEL, files.OPTIMIZER, *more), weights)
        self._bytes = 0

    def newest(self) -> State | None:
        """The state to resume, None for a fresh start. Lines of metrics and samples after it are removed.

        With `resume: weights` in the recipe and no whole state, it is a damaged state, whose `lost` is not empty.

        Raises:
            HandoffError: there are states, but none is whole (or, with `resume: weights`, has usable weights).
        """
        run = self._run

        def found() -> State | None:
            state = self._found() if run.resumable else None
            self._store.clean(state if state is not None and not state.lost else None)
            return state

        state = run.engine.on_main(found)
        if state is None:
            run.rewind(None)
            return None
        run.rewind(state.step, state.extra["journals"])
        saved, now = EngineRecord(**state.extra["engine"]), run.engine.record()
        if saved.words != now.words:
            run.console.print(
                f"  saved by {saved.words}, goes on with {now.words}: the same rows and the same batch at every "
                "step; random numbers for dropout are drawn anew where the number of processes is another",
            )
        if now.device == "cpu" and saved.threads not in (None, now.threads):
            run.console.print(
                f"  saved with {saved.threads} threads, goes on with {now.threads}: numbers are added in another "
                "order, so the result differs in its last bits from that of an undisturbed run; with "
                f"OMP_NUM_THREADS={saved.threads} it does not"
            )
        if state.lost:
            run.log(state.step, {"resumed_without": sorted(state.lost)})
        return state

    def _found(self) -> State | None:
        try:
            return self._store.latest()
        except BrokenStates as error:
            if error.weights is None:
                raise
            step = error.weights.step
            if self._config.resume == "exact":
                raise BrokenStates(
                    f"{error}; or set train.resume=weights to go on after step {step} with its weights and what else "
                    "is whole, a lost optimizer starting anew: that is not the same training any more",
                    error.weights,
                ) from error
            lost = "; ".join(error.weights.lost.values())
            logger.warning(
                "train.resume is weights, and no whole state is left: going on after step %d without what was lost "
                "(%s). The result is not that of an undisturbed run",
                step,
                lost,
            )
            return error.weights

    def at(self, step: int | None) -> State | None:
        """The state of that step, or None if it is missing or damaged."""
        return self._run.engine.on_main(lambda: None if step is None else self._store.at(step))

    def check_room(self, states: int, state_bytes: int, model_bytes: int) -> None:
        """Checks before training that the disk has room for `states` states of about `state_bytes` each and for the
        published model of `model_bytes`. The space of states that already exist is counted as available.

        Raises:
            HandoffError: there is too little room.
        """
        self._bytes = state_bytes
        self._run.engine.on_main(lambda: self._check_room(states, state_bytes, model_bytes))

    def _check_room(self, states: int, state_bytes: int, model_bytes: int) -> None:
        there = tree_bytes(self._store.directory)
        need = max(0, states * state_bytes - there) + model_bytes
        what = (
            f"{self._run.section.name}: {states} saved states of {human_bytes(state_bytes)} (train.save_total_limit "
            f"{self._config.save_total_limit}, and one being written) and a model of {human_bytes(model_bytes)}"
        )
        try:
            check_free_space(self._store.directory, need, what)
        except HandoffError as error:
            previous = self._run.dir.path.parent / PREVIOUS
            aside = tree_bytes(previous)
            if not aside:
                raise
            raise HandoffError(
                f"{error}; {previous} has {human_bytes(aside)} of what earlier recipes made, which may be removed"
            ) from error

    def save(
        self,
        step: int,
        model: Any,
        optimizer: Any,
        extra: Mapping[str, Any],
        more: Callable[[Path], None] | None = None,
        protect: int | None = None,
    ) -> bool:
        """Saves the state of `step`. Returns False if it cannot be written; the earlier states then stay.

        Args:
            step: the step after which the state is saved; it names the state.
            model, optimizer: as wrapped by the engine.
            extra: other values that the next step depends on, as JSON.
            more: writes the other parts into the folder. Every process calls it; errors are raised only on the main
                process, after every process has done its part.
            protect: an earlier step whose state is kept whatever its age.
        """
        engine = self._run.engine
        staged = engine.on_main(lambda: self._staged(step))
        if staged is None:
            return False
        failed: Exception | None = None
        # Both contain collectives, and only the main process writes. So it must call the second one even if the first
        # has failed; otherwise the other processes would wait for it forever.
        for write in (partial(files.save_state, engine, model, optimizer), more):
            try:
                if write is not None:
                    write(staged)
            except Exception as error:
                if not cannot_write(error):
                    raise
                failed = failed or error
        return engine.on_main(lambda: self._committed(step, staged, extra, protect, failed))

    def _committed(
        self, step: int, staged: Path, extra: Mapping[str, Any], protect: int | None, failed: Exception | None
    ) -> bool:
        """Makes the folder the state of `step`. False if it could not be written (`failed`), or cannot be now."""
        try:
            if failed is not None:
                raise failed
            self._run.sync()
            extra = {
                **extra,
                "engine": self._run.engine.record().model_dump(),
                "journals": self._run.seals(),
            }
            path = self._store.commit(step, staged, self._config.save_total_limit, extra, protect)
            self._bytes = tree_bytes(path)
        except Exception as error:
            if not cannot_write(error):
                raise
            with suppress(OSError):
                remove_tree(staged)
            self._say_failed(step, str(error), full=disk_is_full(error))
            return False
        return True

    def _staged(self, step: int) -> Path | None:
        """The folder to write the state into. None if it cannot be written, with a warning in the log."""
        try:
            free = free_bytes(self._store.directory)
            if free < self._bytes:
                needed = f"it takes {human_bytes(self._bytes)}, {human_bytes(free)} are free"
                self._say_failed(step, needed, full=True)
                return None
            return self._store.staging(step)
        except OSError as error:
            self._say_failed(step, str(error), full=disk_is_full(error))
            return None

    def _say_failed(self, step: int, why: str, *, full: bool) -> None:
        logger.warning(
            "%s the state of step %d (%s): what was saved before stays, training goes on, the next save tries again. "
            "%s %s",
            "no room to save" if full else "cannot save",
            step,
            why,
            "Free some space on the disk of" if full else "Make it possible to write to",
            self._store.directory,
        )
