"""What every Trainer-based stage does around its steps: evaluate, log, save, end when asked to, skip what is broken."""

import math
import time
from collections.abc import Callable
from typing import Any, Protocol

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training.config import TrainConfig
from training.faults import Faults
from training.run import Run

# Totals that the Trainer logs once at the end; the manifest has them in other form.
_AT_THE_END = "train_runtime"


class Order(Protocol):
    """Which rows make up each optimizer step."""

    steps: int
    """Optimizer steps of an epoch."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch whose rows come next, from 0 on."""

    def rows_of(self, step: int) -> list[int]:
        """The rows of an optimizer step, counted from 0 over all epochs."""


class CalledBack(Protocol):
    """What the callbacks need of a trainer; `training.trainer.StageTrainer` is one. Upstream's attributes are Any."""

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
        """Measures and logs the held-out metrics."""


class FlowCallback(TrainerCallback):
    """When to evaluate, to save, to log and to end, beyond what the Trainer decides itself.

    Raises:
        Stopped: a signal asked for it; after the step, with the state saved.
    """

    def __init__(self, trainer: CalledBack) -> None:
        self._trainer = trainer
        self._stop = 0
        self._postponed = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The model is wrapped by now, so this is the earliest moment at which the engine can be seen.
        self._trainer.run.engine.adopt(self._trainer)
        if state.global_step == 0:
            self._trainer.evaluate()
        self._trainer.run.signals.finish_steps(self._trainer.train_config.grace_seconds)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # accelerate does not find the sampler behind the loader that skips the steps of a resumed epoch, on several
        # processes: the rest of the epoch would have the rows of the first one.
        order = self._trainer.order
        order.set_epoch(state.global_step // order.steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._trainer.run.engine.held_rate_back(self._trainer):
            self._trainer.lr_scheduler.step()
        last = state.global_step >= state.max_steps
        eval_steps = self._trainer.train_config.eval_steps
        if not last and eval_steps and state.global_step % eval_steps == 0:
            control.should_evaluate = True
        # While steps are skipped, the weights are suspect: states of them would push out the good ones before.
        due = control.should_save or self._postponed
        self._postponed = due and self._trainer.faults.in_a_row > 0
        self._stop, save = self._trainer.run.signals.asked(self._trainer.run.engine.largest)
        # What follows the last step is the publishing, which keeps the same weights.
        control.should_save = not last and ((due and not self._postponed) or bool(self._stop) or save)
        control.should_log = control.should_log or last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._stop:
            run = self._trainer.run
            saved = (run.dir.state_dir / f"step-{state.global_step}").is_dir()
            raise run.signals.stopped(self._stop, f"step {state.global_step}", saved)


class MetricsCallback(TrainerCallback):
    """Lines of metrics.jsonl."""

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
            del logs["grad_norm"]  # of a step that was skipped, which has a line of its own
        assert self._last is not None
        step, then = self._last
        now = time.perf_counter()
        self._last = (state.global_step, now)
        seconds = (now - then) / max(state.global_step - step, 1)
        skipped = self._trainer.faults.metrics()
        self._trainer.run.log(state.global_step, {**logs, **skipped, "time/step": round(seconds, 4)})


class AverageCallback(TrainerCallback):
    """The sums behind the averages of the next line: without the steps that are skipped, and across a resume.

    A state may be saved between two lines. What is summed up by then is saved with it, so that the next line of the
    resumed run is that of a run which was never stopped.
    """

    def __init__(self, trainer: CalledBack, saved: dict[str, Any] | None) -> None:
        """`saved`: what `sums` gave when the state was saved; None for a fresh start."""
        self._trainer = trainer
        self._saved = saved

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._saved is None:
            return
        trainer, losses = self._trainer, self._saved["losses"]
        # Another number of processes than then: each gets the same share of the sum.
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
        """With the norm of all gradients, right before the optimizer steps: leaves it nothing to do where they are not
        finite. The same on every process.

        Raises:
            GateError: that was one too many in a row.
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
        trainer.model.zero_grad()  # an optimizer leaves alone what has no gradient
        step = trainer.state.global_step
        trainer.faults.skip(
            trainer.run,
            step + 1,
            trainer.train_config.max_skipped_steps,
            {"loss": sum(shares) / len(shares), "grad_norm": norm},
            {"rows": trainer.order.rows_of(step)},
        )

    def sums(self) -> dict[str, Any]:
        """What goes into a saved state. Every process calls it."""
        trainer = self._trainer
        return {
            "losses": trainer.run.engine.of_all(float(trainer._tr_loss)),
            "steps": trainer.state.global_step - trainer._globalstep_last_logged,
            "metrics": trainer._metrics["train"],  # the same on every process
        }


class ProgressCallback(TrainerCallback):
    """One tick of the run's progress bar for each optimizer step."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._advance(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._advance(1)
