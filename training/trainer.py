"""What every Trainer-based stage adds to its upstream trainer (transformers' or TRL's), by inheritance.

- The rows of each optimizer step depend only on seed and epoch, not on the number of processes or on a resume.
- States are committed whole or not at all, and the newest whole one is resumed. If the disk is full, a state is not
  saved and training continues.
- Held-out metrics are the stage's own, measured at the start, every `eval_steps` and at the end.
- Upstream's model cards, telemetry, progress bars and prints are off.
"""

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import datasets
import numpy as np
import torch
import transformers
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Sampler
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.integrations import liger

from data.sampling import shuffled
from handoff.state import State
from training.callbacks import AverageCallback, Finished, FlowCallback, MetricsCallback, ProgressCallback
from training.config import MuonTrainConfig, TrainConfig
from training.engines import files, finite
from training.engines.upstream import score_labels_alone
from training.faults import Faults
from training.isolation import check_packing
from training.optimizer import adamw, decay_groups, in_bfloat16, muon_adamw
from training.saving import SavedStates

if TYPE_CHECKING:
    from training.model import Model
    from training.run import Run

# Rows are sorted by length within windows of this many optimizer steps.
_SORTED_STEPS = 8
# Rows of one length often belong to one kind of task. So that a step is not made of one kind only, it consists of this
# many random groups, each of rows of similar length; the first number that divides the step's size is used.
_GROUPS = (4, 3, 2)


A = TypeVar("A", bound=TrainingArguments)


class StepOrder(Sampler[int]):
    """The rows of each optimizer step, which depend only on (seed, epoch).

    An epoch is a whole number of steps; the last one is filled up with rows from the epoch's beginning. So every row is
    used, every process makes the same number of passes, and all steps have the same size.
    """

    def __init__(
        self, rows: int, step_size: int, seed: int, lengths: "Sequence[int] | np.ndarray | None" = None
    ) -> None:
        """`lengths`: one for each row; rows of similar length are then adjacent, so micro-batches have less padding.

        A step then consists of four such groups (three or two if its size is not a multiple of four), the longest rows
        first. Micro-batches no larger than a group have the least padding; their size does not affect the order.
        """
        assert rows > 0 and (lengths is None or len(lengths) == rows)
        self.steps = math.ceil(rows / step_size)
        self._rows, self._step_size, self._seed, self._epoch = rows, step_size, seed, 0
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._longest_first = False

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def longest_first(self) -> None:
        """From now on, the longest rows come first, where their lengths are known. They show what the steps take."""
        self._longest_first = True

    def __len__(self) -> int:
        return self.steps * self._step_size

    def rows_of(self, step: int) -> list[int]:
        """The rows of an optimizer step (counted from 0 over all epochs), sorted by their index in the data."""
        order = StepOrder(self._rows, self._step_size, self._seed, self._lengths)
        order.set_epoch(step // self.steps)
        first = step % self.steps * self._step_size
        return sorted(list(order)[first : first + self._step_size])

    def __iter__(self) -> Iterator[int]:
        order: np.ndarray = np.resize(shuffled(self._rows, self._seed, "order", self._epoch), len(self))
        if self._longest_first and self._lengths is not None:
            order = order[np.argsort(-self._lengths[order], kind="stable")]
        elif self._lengths is not None:
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
    """A mixin: `class SftTrainer(StageTrainer, trl.SFTTrainer)`. `fit` sets these attributes before training."""

    run: "Run"
    trained: "Model"
    order: StepOrder
    train_config: TrainConfig
    saves: SavedStates
    resumed: State | None
    hold_out: Callable[[], dict[str, float]]
    faults: Faults
    average: AverageCallback
    at_start: dict[str, float]
    """The finite metrics of the first evaluation, before the first step; a resumed run has them, too."""
    # TRL's trainers count training tokens here and lose the count on a resume, so our states include it.
    _total_train_tokens: int = 0
    # TRL's trainers collect values here, whose averages go into the next line of metrics.jsonl.
    _metrics: Any = {"train": {}}  # noqa: RUF012

    def _get_train_sampler(self, train_dataset: Any = None) -> StepOrder:
        return self.order

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The Trainer's AdamW; Muon with AdamW if `train.optim` is muon; stochastic rounding for bfloat16 weights."""
        config = self.train_config
        trained: Any = self.model
        decayed = set(self.get_decay_parameter_names(trained))
        if isinstance(config, MuonTrainConfig) and config.optim == "muon" and self.optimizer is None:
            self.optimizer = muon_adamw(trained, decayed, config)
        elif in_bfloat16(trained) and self.optimizer is None:
            groups = decay_groups(trained.named_parameters(), decayed, config.weight_decay)
            self.optimizer = adamw(groups, config, self.run.seed, half=True)
        return super().create_optimizer(model)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The stage's own held-out metrics, logged with the prefix `eval_`."""
        metrics = {f"eval_{key}": value for key, value in self.hold_out().items()}
        if metrics:
            self.run.log(self.state.global_step, metrics)
            self.at_start = self.at_start or {key: value for key, value in metrics.items() if math.isfinite(value)}
        return metrics

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Upstream's loss; if it is not finite, its gradient is not finite either."""
        loss: Any = super().compute_loss(*args, **kwargs)
        return finite.carry_nonfinite(loss)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Upstream's norm, checked here because the Trainer calls this right before the optimizer steps."""
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]  # upstream has no types
        self.average.check(float(norm))
        return norm

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Saves a state that any engine can load. Upstream's checkpoints depend on the engine and contain pickles."""
        extra = {
            "tokens": self._total_train_tokens,
            "faults": asdict(self.faults),
            "sums": self.average.sums(),
            "at_start": self.at_start,
        }
        states = files.rng_states(self.run.engine)
        self.saves.save(
            self.state.global_step,
            self.model_wrapped,
            self.optimizer,
            extra,
            lambda path: files.write_rng(self.run.engine, path, states),
        )

    def start_from_parent(self) -> None:
        """Called when the prepared model has its parent's weights, before a saved state is loaded."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Does nothing: `_prepare_for_training` loads the state, once model and optimizer are wrapped."""

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        """Upstream's preparation; then the saved state is loaded into the prepared model, optimizer and schedule."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)  # type: ignore[no-untyped-call]  # as above
        self.trained.fill(self.model_wrapped)
        self.run.engine.adopt(self)
        self.start_from_parent()
        state = self.resumed
        if state is not None:
            moments = files.OPTIMIZER not in state.lost
            files.load_state(self.run.engine, self.model_wrapped, self.optimizer, state.path, moments)
            assert self.lr_scheduler is not None
            move_schedule(self.lr_scheduler, state.step)
        return prepared

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restores the saved random generators right before the first batch, or seeds them anew if they are lost."""
        state = self.resumed
        if state is None:
            return
        if files.RNG in state.lost:
            files.seed_rng(self.run.engine, self.args.seed, state.step)
        else:
            files.load_rng(self.run.engine, state.path, self.args.seed, state.step)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the manifest describes the model."""

    def _send_telemetry(self) -> None:
        """Does nothing: upstream must not use the network."""


def move_schedule(scheduler: LambdaLR, step: int) -> None:
    """Sets the learning rates to those after `step` steps. They depend only on the step, so a state has no schedule."""
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
    """A number of steps; a value below 1 is a share of `total`."""
    return math.ceil(value * total) if value < 1 else int(value)


def arguments(kind: type[A], run: "Run", rows: int, **own: Any) -> A:
    """TrainingArguments, or a TRL config, from the recipe's `train:` and the engine.

    Args:
        kind: the class to make.
        run: the stage's run, whose config has `train`.
        rows: number of rows of the training data.
        own: fields of `kind` that the stage sets.

    Raises:
        LaunchError: the processes cannot share the global batch evenly, Muon is set under an engine that shards, or the
            engine refuses another value.
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
        # Inside the folder of states, under a name that `StateStore.clean` removes.
        "output_dir": str(run.dir.state_dir / ".tmp-trainer"),
        "max_steps": total,
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
    }
    run.engine.group()
    return kind(**fields, **run.engine.training_arguments(config), **own)  # what two of them set is an error


def quiet() -> None:
    """Hides the libraries' notes and warnings, which do not help the user of a recipe; errors are still shown."""
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"(transformers|trl|accelerate|torch\.distributed)\."
    )
    datasets.disable_progress_bars()
    os.environ.setdefault("TQDM_DISABLE", "1")  # TRL checks it before it draws its own bars
    for name in ("trl", "accelerate", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)


def fit(
    run: "Run",
    trainer: StageTrainer,
    model: "Model",
    order: StepOrder,
    hold_out: Callable[[], dict[str, float]],
    packed: str | None = None,
) -> None:
    """Trains, starting from the newest whole state if there is one.

    Args:
        run: the stage's run.
        trainer: made with `arguments`, for the model's module.
        model: the model that is trained.
        order: the rows of each step.
        hold_out: measures the current model on held-out data; called before the first step and every `eval_steps`.
        packed: the recipe's key that packs rows which must not see each other.

    Raises:
        RecipeError: the network does not keep packed rows apart.
        HandoffError: there are saved states but none is whole, or the disk has too little room for new ones.
        GateError: loss or gradient was not finite in too many steps in a row.
        Stopped: a signal asked the stage to end, and it tried to save its state.
    """
    config: TrainConfig = run.config.train
    score_labels_alone()
    use_kernels(run, trainer)
    if run.tries_longest:
        order.longest_first()
    trainer.run, trainer.trained, trainer.order = run, model, order
    trainer.train_config, trainer.hold_out = config, hold_out
    trainer.saves = SavedStates(run, config, more=[files.RNG])
    state = trainer.resumed = trainer.saves.newest()
    bytes_ = files.state_bytes(run.engine, trainer.model)
    trainer.saves.check_room(config.save_total_limit + 1, bytes_, model.published_bytes())
    run.mirror(config.report_to)
    trainer.faults = Faults(**state.extra["faults"]) if state is not None else Faults()
    trainer.average = AverageCallback(trainer, state.extra["sums"] if state is not None else None)
    trainer.at_start = state.extra["at_start"] if state is not None else {}
    if state is not None:
        trainer._total_train_tokens = state.extra["tokens"]
        run.console.print(f"  resuming after step {state.step}")
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(
        FlowCallback(trainer, lambda: check_packing(run, trainer.model_wrapped, trainer.args.bf16, packed))
    )
    trainer.add_callback(MetricsCallback(trainer))
    trainer.add_callback(trainer.average)
    # A first start may have used random numbers where a later one reads what it left on the disk. Seeding here gives
    # both the same random numbers from now on.
    transformers.set_seed(run.seed)
    with run.progress(trainer.args.max_steps, run.section.name) as advance:
        trainer.add_callback(ProgressCallback(advance))
        run.engine.barrier()  # each process may have loaded its model for another length of time
        with suppress(Finished):
            trainer.train(resume_from_checkpoint=None if state is None else _place(trainer, state.step))


def use_kernels(run: "Run", trainer: StageTrainer) -> None:
    """Gives the trainer's model Liger's kernels, if they are chosen. The loss stays the stage's own.

    Raises:
        LaunchError: the recipe asks for them, and they cannot run here.
    """
    config: TrainConfig = run.config.train
    installed, compiled = find_spec("liger_kernel") is not None, bool(trainer.args.torch_compile)
    if run.engine.choose_liger(config.use_liger_kernel, installed=installed, compiled=compiled):
        # Not by TrainingArguments: with its own switch, TRL would take another loss as well.
        liger.apply_liger_kernel(trainer.model, {"cross_entropy": False, "fused_linear_cross_entropy": False})


def _place(trainer: StageTrainer, step: int) -> str:
    """A folder from which upstream reads that `step` steps are done. Upstream then skips batches of this run's size, so
    the rows of each step are the same for any number of processes."""
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
