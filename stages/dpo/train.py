"""Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023), on pairs that our encoder has tokenized.

    python -m stages.dpo recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.dpo recipes/tiny.yaml

Legend: B pairs, T tokens.

The reference's log-probabilities are computed once, before training, and kept beside the pairs in `state/pairs` under a
hash of the pairs and of the reference's weights, so no second model stays in memory. A resumed run reads them from
there if the files are unchanged, and computes them again otherwise.
"""

from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from data.records import Preference
from data.rows import Pairs, Row, Rows
from handoff.files import changed_files, hash_tree, read_json, remove_tree, write_json
from stages.dpo.config import Config
from stages.dpo.loss import alarms, pair_metrics
from training.engines.protocol import Engine
from training.limits import within_window
from training.measure import greedy_answers, measure_rows, questions
from training.model import Model, load_encoder, trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit

_HASHES = "hashes.json"


class Trainer(StageTrainer, DPOTrainer):
    """TRL's trainer with the behaviour that all stages share. The pairs are tokenized already, so it skips that."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)

    # Data: pairs as ids.
    pairs = Pairs(within_window(run, [parent], "max_length", config.max_length), config.truncation)
    rows = run.rows(config.data, pairs, encoder, max_drop_fraction=config.max_drop_fraction)
    heldout: Rows[Row] | None = None
    prompts: list[tuple[list[int], str]] = []
    if config.eval_data:
        heldout = run.rows(config.eval_data, pairs, encoder, "held-out data", config.max_drop_fraction, apart_from=rows)
        prompts = questions(
            run, config.eval_data, Preference, encoder, config.eval_answers, parent, config.max_new_tokens
        )

    # Model and trainer.
    smoothed = config.label_smoothing > 0
    args = arguments(
        DPOConfig,
        run,
        len(rows),
        max_length=None,
        beta=config.beta,
        loss_type=["robust" if smoothed else config.loss_type] + ["sft"] * (config.sft_weight > 0),
        loss_weights=[1.0] + [config.sft_weight] * (config.sft_weight > 0),
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=config.train.per_device_eval_batch_size,
    )
    dtype = trained_dtype(run.engine, config.model_args)
    model = Model.load(
        run.engine, parent, "policy", encoder, config.model_args, dtype=dtype, dropout=False, bf16=bool(args.bf16)
    )
    run.rehearse("causal_lm", model)
    model.read()  # TRL computes the reference's log-probabilities while it sets up
    run.console.print(f"  the reference reads {len(rows) + len(heldout or ())} pairs")
    kept = run.dir.state_dir / "pairs"
    drop_altered(run.engine, kept)
    trainer = Trainer(
        model=model.module,
        args=args,
        train_dataset=on_disk(run.engine, rows, kept / "train"),
        eval_dataset=on_disk(run.engine, heldout, kept / "eval") if heldout is not None else None,
        processing_class=encoder.tokenizer,
    )
    list_hashes(run.engine, kept)
    lengths = rows.lengths[longest_first(rows)] if config.group_by_length else None
    order = StepOrder(len(rows), config.train.global_batch_size, run.seed, lengths)

    measured: list[dict[str, float]] = []

    def hold_out() -> dict[str, float]:
        if heldout is None:
            return {}
        lengths = heldout.lengths[longest_first(heldout)]
        kept_pairs: Any = trainer.eval_dataset  # TRL has added the reference's log-probabilities
        found = measure_rows(trainer, kept_pairs, lengths, trainer.data_collator, pair_logps)
        metrics = pair_metrics(found, config.beta, config.loss_type, config.label_smoothing, config.sft_weight)
        metrics |= greedy_answers(run, trainer, encoder, prompts, config.max_new_tokens)
        measured.append(metrics)
        return metrics

    fit(run, trainer, model, order, hold_out)

    metrics = trainer.evaluate()
    for warning in alarms(measured[0], measured[-1]) if len(measured) > 1 else []:
        run.console.print(f"  warning: {warning}", style="yellow")
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish("causal_lm", write, metrics, step=trainer.state.global_step)


def longest_first(rows: Rows[Row]) -> np.ndarray:
    """Indices of the pairs by falling length, (N,). Pairs of equal length keep their order."""
    return np.argsort(-rows.lengths.astype(np.int64), kind="stable")


def on_disk(engine: Engine, rows: Rows[Row], folder: Path) -> Dataset:
    """The pairs, longest first, as a data set in `folder`. TRL keeps the reference's log-probabilities there too."""
    if engine.is_main and not folder.exists():
        written = folder.with_name(f".tmp-{folder.name}")
        rows.stored(longest_first(rows)).save_to_disk(written)
        written.rename(folder)
    engine.barrier()
    return datasets.load_from_disk(str(folder))


def drop_altered(engine: Engine, pairs: Path) -> None:
    """Removes the folder if it is incomplete (the process was killed) or differs from what was written."""
    if engine.is_main and pairs.exists():
        with suppress(OSError, ValueError):
            if not changed_files(pairs, read_json(pairs / _HASHES)):
                return
        remove_tree(pairs)
    # No barrier is needed: no process opens the folder before the one in `on_disk`.


def list_hashes(engine: Engine, pairs: Path) -> None:
    """Writes the hashes of the folder's files, which `drop_altered` compares."""
    if engine.is_main:
        hashes = hash_tree(pairs)
        hashes.pop(_HASHES, None)
        write_json(pairs / _HASHES, hashes)


def pair_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probabilities (B,) of both answers under the model and the reference, and their lengths."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)  # (2B, T)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
        use_cache=False,
    )
    chosen, rejected = out.log_probs.sum(-1).chunk(2)
    chosen_tokens, rejected_tokens = batch["completion_mask"].sum(-1).chunk(2)
    return {
        "chosen": chosen,
        "rejected": rejected,
        "ref_chosen": batch["ref_chosen_logps"],
        "ref_rejected": batch["ref_rejected_logps"],
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }
