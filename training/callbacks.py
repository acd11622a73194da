"""Callbacks of every Trainer-based stage: when to evaluate, log, save and end, and how to skip a step."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.config import TrainConfig
from training.faults import Faults
from training.run import Run

# A key of the totals that the Trainer logs once at the end. They are not logged; the manifest has its own totals.
_AT_THE_END = "train_runtime"


class Order(Protocol):
    """The rows of each optimizer step."""

    steps: int
    """Optimizer steps in an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch (counted from 0) whose rows come next."""

    def rows_of(self, step: int) -> list[int]:
        """The rows of an optimizer step, counted from 0 over all epochs."""


class Finished(Exception):
    """Raised in place of a step where a resumed training has no step left."""


class CalledBack(Protocol):
    """What the callbacks need from a trainer; `training.trainer.StageTrainer` has it. Upstream's attributes are Any."""

    run: Run
    train_config: TrainConfig
    faults: Faults
    lr_scheduler: Any
    model: Any
    state: TrainerState
    _tr_loss: Any
    _globalstep_last_logged: int
    _metrics: dict[str, dict[str, list[float]]]

    @property
    def order(self) -> Order:
        """The rows of each step."""

    def evaluate(self) -> dict[str, float]:
        """Measures, logs and returns the held-out metrics."""


class FlowCallback(TrainerCallback):
    """Decides when to evaluate, save, log and end, beyond what the Trainer itself decides.

    Raises:
        Stopped: a signal asked the stage to end; raised after the step, when a state was saved or could not be saved.
        Finished: the resumed state is that of the last step.
    """

    def __init__(self, trainer: CalledBack, check: Callable[[], None]) -> None:
        """`check`: called once the model is wrapped and filled, before anything is measured."""
        self._trainer, self._check = trainer, check
        self._stop = 0
        self._postponed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step >= state.max_steps:
            raise Finished
        self._check()
        if state.global_step == 0:
            self._trainer.evaluate()
        self._trainer.run.signals.finish_steps(self._trainer.train_config.grace_seconds)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # On several processes, accelerate does not set the epoch of the sampler inside the loader that skips the steps
        # of a resumed epoch. Without this, the rest of that epoch would use the rows of the first epoch.
        order = self._trainer.order
        order.set_epoch(state.global_step // order.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.run.engine.held_rate_back(self._trainer):
            self._trainer.lr_scheduler.step()
        last = state.global_step >= state.max_steps
        eval_steps = self._trainer.train_config.eval_steps
        if not last and eval_steps and state.global_step % eval_steps == 0:
            control.should_evaluate = True
        # While steps are being skipped, the weights may be broken. Saving them would delete older, good states.
        # The last state keeps what was trained if the evaluation or the publication that follows fails.
        due = control.should_save or self._postponed or last
        self._postponed = due and self._trainer.faults.in_a_row > 0
        self._stop, save = self._trainer.run.signals.asked(self._trainer.run.engine.largest)
        control.should_save = (due and not self._postponed) or bool(self._stop) or save
        control.should_log = control.should_log or last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop and state.global_step < state.max_steps:
            run = self._trainer.run
            saved = (run.dir.state_dir / f"step-{state.global_step}").is_dir()
            raise run.signals.stopped(self._stop, f"step {state.global_step}", saved)


class MetricsCallback(TrainerCallback):
    """Writes the Trainer's logs to metrics.jsonl."""

    def __init__(self, trainer: CalledBack) -> None:
        self._trainer = trainer
        self._last: tuple[int, float] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last = (state.global_step, time.perf_counter())

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        logs = kwargs["logs"]
        if _AT_THE_END in logs or "loss" not in logs:
            return
        if not math.isfinite(logs["grad_norm"]):
            del logs["grad_norm"]  # belongs to a skipped step, which has its own line
        assert self._last is not None
        step, then = self._last
        now = time.perf_counter()
        self._last = (state.global_step, now)
        seconds = (now - then) / max(state.global_step - step, 1)
        skipped = self._trainer.faults.metrics()
        self._trainer.run.log(state.global_step, {**logs, **skipped, "time/step": round(seconds, 4)})


class AverageCallback(TrainerCallback):
    """Keeps the sums for the averages of the next line correct when steps are skipped and when a run resumes.

    A state may be saved between two lines. It then includes the sums so far, so that the next line of a resumed run is
    the same as without the interruption.
    """

    def __init__(self, trainer: CalledBack, saved: dict[str, Any] | None) -> None:
        """`saved`: the result of `sums` when the state was saved; None for a fresh start."""
        self._trainer = trainer
        self._saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._saved is None:
            return
        trainer, losses = self._trainer, self._saved["losses"]
        # If the number of processes has changed, each one gets an equal share of the sum.
        engine = trainer.run.engine
        mine = losses[engine.data_rank] if len(losses) == engine.data_world else sum(losses) / len(losses)
        trainer._tr_loss += mine
        trainer._globalstep_last_logged -= self._saved["steps"]
        trainer._metrics["train"].update({key: list(values) for key, values in self._saved["metrics"].items()})

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._loss = self._trainer._tr_loss.clone()
        self._counts = {key: len(values) for key, values in self._trainer._metrics["train"].items()}

    def check(self, norm: float) -> None:
        """Called with the norm of all gradients right before the optimizer steps. If it is not finite, removes the
        gradients, so that the step changes nothing. The norm is the same on every process.

        Raises:
            GateError: more than `train.max_skipped_steps` steps in a row were skipped.
        """
        trainer = self._trainer
        if math.isfinite(norm):
            trainer.faults.in_a_row = 0
            return
        shares = trainer.run.engine.of_all(float(trainer._tr_loss - self._loss))
        trainer._tr_loss.copy_(self._loss)
        trainer._globalstep_last_logged += 1
        sums = trainer._metrics["train"]
        for key in list(sums):
            del sums[key][self._counts.get(key, 0) :]
            if not sums[key]:
                del sums[key]
        trainer.model.zero_grad()  # an optimizer does not change parameters that have no gradient
        step = trainer.state.global_step
        trainer.faults.skip(
            trainer.run,
            step + 1,
            trainer.train_config.max_skipped_steps,
            {"loss": sum(shares) / len(shares), "grad_norm": norm},
            {"rows": trainer.order.rows_of(step)},
        )

    def sums(self) -> dict[str, Any]:
        """The sums to include in a saved state. Every process calls it."""
        trainer = self._trainer
        return {
            "losses": trainer.run.engine.of_all(float(trainer._tr_loss)),
            "steps": trainer.state.global_step - trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],  # the same on every process
        }


class ProgressCallback(TrainerCallback):
    """Advances the run's progress bar by one for each optimizer step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(1)
