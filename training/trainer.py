"""What every Trainer-based stage gets around its upstream trainer (transformers' or TRL's), by inheritance, no fork.

- The rows of each optimizer step depend on seed and epoch alone: not on the number of processes or where a resume was.
- States are committed whole or not at all, the newest valid one is resumed, a full disk costs one state, no training.
- Held-out metrics are the stage's own, at the start, every `eval_steps` and at the end.
- Upstream's model cards, telemetry, progress bars and prints are off.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
import numpy as np
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments

from data.sampling import shuffled
from handoff.state import State
from training.callbacks import AverageCallback, FlowCallback, MetricsCallback, ProgressCallback
from training.config import MuonTrainConfig, TrainConfig
from training.engines import files, finite
from training.faults import Faults
from training.optimizer import muon_adamw
from training.saving import SavedStates

if TYPE_CHECKING:
    from training.run import Run

# Rows are sorted by length within so many optimizer steps at a time.
_SORTED_STEPS = 8
# A step of rows that are all of one length would be a step of one kind of task: steps are put together from so many
# groups of like length, drawn at random.
_GROUPS = (4, 3, 2)


A = TypeVar("A", bound=TrainingArguments)


class StepOrder(Sampler[int]):
    """Which rows make up each optimizer step: a function of (seed, epoch) alone.

    An epoch is a whole number of steps; the last one is filled up with rows from the epoch's beginning, so that every
    row is seen, every process has the same number of passes, and no step is smaller than the others.
    """

    def __init__(
        self, rows: int, step_size: int, seed: int, lengths: "Sequence[int] | np.ndarray | None" = None
    ) -> None:
        """`lengths` (one a row) puts rows of like length beside one another: little of a micro-batch is padding.

        A step then consists of four such groups (three or two where its size does not divide by four), the longest rows
        first; micro-batches no larger than a group pad least. The size of a micro-batch decides nothing here.
        """
        assert rows > 0 and (lengths is None or len(lengths) == rows)
        self.steps = math.ceil(rows / step_size)
        self._rows, self._step_size, self._seed, self._epoch = rows, step_size, seed, 0
        self._lengths = None if lengths is None else np.asarray(lengths)

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self.steps * self._step_size

    def rows_of(self, step: int) -> list[int]:
        """The rows of an optimizer step, counted from 0 over all epochs; in the order of the training data."""
        order = StepOrder(self._rows, self._step_size, self._seed, self._lengths)
        order.set_epoch(step // self.steps)
        first = step % self.steps * self._step_size
        return sorted(list(order)[first : first + self._step_size])

    def __iter__(self) -> Iterator[int]:
        order: np.ndarray = np.resize(shuffled(self._rows, self._seed, "order", self._epoch), len(self))
        if self._lengths is not None:
            window = _SORTED_STEPS * self._step_size
            parts = [order[start : start + window] for start in range(0, len(order), window)]
            order = np.concatenate([part[np.argsort(-self._lengths[part], kind="stable")] for part in parts])
            groups = next((n for n in _GROUPS if self._step_size % n == 0), 1)
            order = order.reshape(self.steps * groups, -1)
            order = order[shuffled(len(order), self._seed, "groups", self._epoch)].reshape(self.steps, groups, -1)
            longest = self._lengths[order].max(axis=-1)  # (steps, groups)
            order = np.take_along_axis(order, np.argsort(-longest, axis=1, kind="stable")[:, :, None], axis=1).ravel()
        return map(int, order)


class StageTrainer(Trainer):
    """A mixin: `class SftTrainer(StageTrainer, trl.SFTTrainer)`. `fit` sets what it needs before it trains."""

    run: "Run"
    order: StepOrder
    train_config: TrainConfig
    saves: SavedStates
    resumed: State | None
    hold_out: Callable[[], dict[str, float]]
    faults: Faults
    average: AverageCallback
    # TRL's trainers count the tokens seen here, and forget them when they resume.
    _total_train_tokens: int = 0
    # TRL's trainers collect here what the next line of metrics.jsonl averages.
    _metrics: Any = {"train": {}}  # noqa: RUF012

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW as the Trainer makes it, or Muon and AdamW."""
        config = self.train_config
        if isinstance(config, MuonTrainConfig) and config.optim == "muon" and self.optimizer is None:
            trained: Any = self.model
            self.optimizer = muon_adamw(trained, set(self.get_decay_parameter_names(trained)), config)
        return super().create_optimizer(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stage's own held-out metrics, logged with the prefix `eval_`."""
        metrics = {f"eval_{key}": value for key, value in self.hold_out().items()}
        if metrics:
            self.run.log(self.state.global_step, metrics)
        return metrics

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's, with a gradient that tells when it is not finite."""
        loss: Any = super().compute_loss(*args, **kwargs)
        return finite.carry_nonfinite(loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Upstream's, which is asked for right before the optimizer steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]  # upstream has no types
        self.average.check(float(norm))
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """A state of ours, which any engine can load. Upstream's parts depend on the engine, and are pickles."""
        extra = {
            "tokens": self._total_train_tokens,
            "faults": asdict(self.faults),
            "sums": self.average.sums(),
        }
        states = files.rng_states(self.run.engine)
        self.saves.save(
            self.state.global_step,
            self.model_wrapped,
            self.optimizer,
            extra,
            lambda path: files.write_rng(self.run.engine, path, states),
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: `_prepare_for_training` does it, when model and optimizer are wrapped."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Upstream's, and then the state is put into what it has prepared."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]  # as above
        state = self.resumed
        if state is not None:
            moments = files.OPTIMIZER not in state.lost
            files.load_state(self.run.engine, self.model_wrapped, self.optimizer, state.path, moments)
            assert self.lr_scheduler is not None
            move_schedule(self.lr_scheduler, state.step)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """As the state has them, right before the first batch."""
        state = self.resumed
        if state is None:
            return
        if files.RNG in state.lost:
            files.seed_rng(self.run.engine, self.args.seed, state.step)
        else:
            files.load_rng(self.run.engine, state.path, self.args.seed, state.step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the manifest says what this is."""

    def _send_telemetry(self) -> None:
        """None: no network after the start."""


def move_schedule(scheduler: LambdaLR, step: int) -> None:
    """Puts learning rates where they are after `step` steps: they follow from that alone, so nothing of it is saved."""
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    state = scheduler.state_dict()
    assert {"last_epoch", "_step_count", "_last_lr"} <= state.keys()
    scheduler.load_state_dict(state | {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps of the whole training."""
    per_epoch = math.ceil(rows / config.global_batch_size)
    return config.max_steps if config.max_steps > 0 else max(1, math.ceil(config.num_train_epochs * per_epoch))


def _whole(value: float, total: int) -> int:
    """Steps from a number of steps, or from a share of all."""
    return math.ceil(value * total) if value < 1 else int(value)


def arguments(kind: type[A], run: "Run", rows: int, **own: Any) -> A:
    """TrainingArguments, or a TRL config, from the recipe's `train:` and the engine.

    Args:
        kind: the class to make.
        run: of the stage, whose config has `train`.
        rows: of the training data.
        own: fields of `kind` that the stage decides.

    Raises:
        LaunchError: the global batch does not divide by the processes, Muon under an engine that shards, and what else
            the engine refuses.
    """
    config: TrainConfig = run.config.train
    if isinstance(config, MuonTrainConfig):
        run.engine.check_optimizer(f"{run.section.name}.train.optim", config.optim)
    total = total_steps(config, rows)
    schedule = {}
    if config.lr_scheduler_type == "warmup_stable_decay":
        schedule = {"num_decay_steps": _whole(config.decay_steps, total)}
    quiet()
    fields: dict[str, Any] = {
        # Inside the state's folder, under a name that `StateStore.clean` removes.
        "output_dir": str(run.dir.state_dir / ".tmp-trainer"),
        "max_steps": total,
        "per_device_eval_batch_size": config.per_device_eval_batch_size,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": schedule,
        "warmup_steps": _whole(config.warmup_steps, total),
        "weight_decay": config.weight_decay,
        "adam_beta1": config.adam_beta1,
        "adam_beta2": config.adam_beta2,
        "adam_epsilon": config.adam_epsilon,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": config.save_steps or math.ceil(total / 10),
        "eval_strategy": "no",
        "seed": run.seed,
        "data_seed": run.seed,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return kind(**{**fields, **run.engine.training_arguments(config), **own})


def quiet() -> None:
    """Upstream's notes are not for the user of a recipe; its errors are."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|torch\.distributed)\."
    )
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL asks it before it draws its own bars
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(run: "Run", trainer: StageTrainer, order: StepOrder, hold_out: Callable[[], dict[str, float]]) -> None:
    """Trains, from the newest valid state where there is one.

    Args:
        run: of the stage.
        trainer: made with `arguments`.
        order: the rows of each step.
        hold_out: held-out metrics of the model as it stands; called before the first step and every `eval_steps`.

    Raises:
        HandoffError: there are saved states and none is whole, or there is no room for those to come.
        GateError: loss or gradient was not finite in too many steps in a row.
        Stopped: a signal asked for it, and the state is saved.
    """
    config: TrainConfig = run.config.train
    trainer.run, trainer.order, trainer.train_config, trainer.hold_out = run, order, config, hold_out
    trainer.saves = SavedStates(run, config, more=[files.RNG])
    state = trainer.resumed = trainer.saves.newest()
    weights = files.weight_bytes(run.engine, trainer.model)
    trainer.saves.check_room(config.save_total_limit + 1, files.state_bytes(run.engine, trainer.model), weights)
    if config.report_to == "wandb":
        run.mirror()
    trainer.faults = Faults(**state.extra["faults"]) if state is not None else Faults()
    trainer.average = AverageCallback(trainer, state.extra["sums"] if state is not None else None)
    if state is not None:
        trainer._total_train_tokens = state.extra["tokens"]
        run.console.print(f"  resuming after step {state.step}")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(FlowCallback(trainer))
    trainer.add_callback(MetricsCallback(trainer))
    trainer.add_callback(trainer.average)
    # A second start may find on the disk what the first one computed with random numbers before this (DPO's reference).
    transformers.set_seed(run.seed)
    with run.progress(trainer.args.max_steps, run.section.name) as advance:
        trainer.add_callback(ProgressCallback(advance))
        trainer.train(resume_from_checkpoint=None if state is None else _place(trainer, state.step))


def _place(trainer: StageTrainer, step: int) -> str:
    """A folder that tells upstream that `step` steps are done. From there it counts batches as this run cuts them, so
    that the rows of each step are the same for any number of processes."""
    assert trainer.args.output_dir is not None
    folder = Path(trainer.args.output_dir)
    engine = trainer.run.engine
    if engine.is_main:
        place = TrainerState(global_step=step, train_batch_size=trainer.args.per_device_train_batch_size)
        place.compute_steps(trainer.args, trainer.args.max_steps)
        folder.mkdir(parents=True, exist_ok=True)
        place.save_to_json(str(folder / "trainer_state.json"))
    engine.barrier()
    return str(folder)
