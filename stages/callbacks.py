"""What every Trainer-based stage reports while it trains: metrics.jsonl, progress, and a stop when it has diverged."""

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from handoff.errors import GateError
from stages import runtime

if TYPE_CHECKING:
    from stages.run import Run
    from stages.trainer import StageTrainer

# Totals that the Trainer logs once at the end; the manifest has them in other form.
_AT_THE_END = "train_runtime"


class FlowCallback(TrainerCallback):
    """When to evaluate, to save and to log, beyond what the Trainer decides itself."""

    def __init__(self, trainer: "StageTrainer", eval_steps: int) -> None:
        self._trainer = trainer
        self._eval_steps = eval_steps

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The model is wrapped by now, so this is the earliest moment at which the engine can be seen.
        runtime.check_trainer(self._trainer)
        if state.global_step == 0:
            self._trainer.evaluate()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        last = state.global_step >= state.max_steps
        if last:
            control.should_save = False  # what follows is the publishing, which keeps the same weights
        elif self._eval_steps and state.global_step % self._eval_steps == 0:
            control.should_evaluate = True
        # A line at each save, so that averages since the last line do not straddle a resume.
        control.should_log = control.should_log or control.should_save or last


class MetricsCallback(TrainerCallback):
    """Lines of metrics.jsonl.

    Raises:
        GateError: loss or gradient norm is not finite; with the step and the usual causes.
    """

    def __init__(self, run: "Run") -> None:
        self._run = run
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
        logs: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        if _AT_THE_END in logs or "loss" not in logs:
            return
        for name in ("loss", "grad_norm"):
            if not math.isfinite(logs.get(name, 0.0)):
                raise GateError(diverged(self._run.section.name, name, logs[name], state.global_step))
        assert self._last is not None
        step, then = self._last
        now = time.perf_counter()
        self._last = (state.global_step, now)
        seconds = (now - then) / max(state.global_step - step, 1)
        self._run.log(state.global_step, {**logs, "time/step": round(seconds, 4)})


def diverged(section: str, name: str, value: float, step: int) -> str:
    """What to say when `name` is not finite."""
    return (
        f"{section}: {name} is {value} at step {step}, training was stopped and nothing was published. Usual causes: "
        "learning_rate too high or no warmup_steps; max_grad_norm 0; a row without a supervised token; "
        "broken weights in the parent (its own loss on the first line of metrics.jsonl tells)"
    )


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
