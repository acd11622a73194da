"""Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023), on pairs that our own encoder has cut.

    python -m stages.dpo recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.dpo recipes/tiny.yaml

Legend: B pairs, T tokens.

The reference's log-probabilities are computed once, before training, and kept beside the pairs in `state/pairs` under a
hash of the pairs and of the reference's weights; no second model stays in memory. A resumed training reads them again,
once their bytes are found to be those that were written; else they are computed again.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from data.encode import encode_preferences
from data.errors import RowRefused
from data.records import Preference
from handoff.files import changed_files, hash_tree, read_json, remove_tree, write_json
from stages.dpo.config import Config
from stages.dpo.loss import alarms, pair_metrics
from training.engines.protocol import Engine
from training.measure import greedy_answers, measure_rows
from training.model import Model, load_encoder, trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit

Row = dict[str, Any]
_HASHES = "hashes.json"


class Trainer(StageTrainer, DPOTrainer):
    """TRL's trainer in our frame. The pairs come as ids, so there is nothing left to prepare."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)

    # Data: pairs as ids.
    loaded = run.load(config.data, Preference)
    rows = encode_preferences(loaded.records, encoder, config.max_length, config.truncation, loaded.accounting)
    run.account(loaded, max_drop_fraction=config.max_drop_fraction)
    heldout: list[Row] = []
    prompts: list[tuple[list[int], str]] = []
    if config.eval_data:
        held = run.load(config.eval_data, Preference)
        heldout = encode_preferences(held.records, encoder, config.max_length, config.truncation, held.accounting)
        run.account(held, "held-out data", config.max_drop_fraction)
        asked = [pair.prompt for pair in held.records[: config.eval_answers]]
        prompts = [
            (ids, messages[-1].content)
            for messages, ids in zip(asked, encoder.prompts(asked), strict=True)
            if not isinstance(ids, RowRefused)
        ]

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
        run.engine, parent, "policy", encoder, config.model_args, dtype=dtype, dropout=False, bf16=args.bf16
    )
    drop_altered(run.engine, run.dir.state_dir / "pairs")
    run.console.print(f"  the reference reads {len(rows) + len(heldout)} pairs")
    trainer = Trainer(
        model=model.module,
        args=args,
        train_dataset=on_disk(run.engine, rows, run.dir.state_dir / "pairs" / "train"),
        eval_dataset=on_disk(run.engine, heldout, run.dir.state_dir / "pairs" / "eval") if heldout else None,
        processing_class=encoder.tokenizer,
    )
    list_hashes(run.engine, run.dir.state_dir / "pairs")
    lengths = [pair_length(row) for row in trainer.train_dataset] if config.group_by_length else None
    order = StepOrder(len(rows), config.train.global_batch_size, run.seed, lengths)

    measured: list[dict[str, float]] = []

    def hold_out() -> dict[str, float]:
        if not heldout:
            return {}
        pairs = list(trainer.eval_dataset)
        found = measure_rows(trainer, pairs, [pair_length(row) for row in pairs], trainer.data_collator, pair_logps)
        metrics = pair_metrics(found, config.beta)
        metrics |= greedy_answers(run, trainer, encoder, prompts, config.max_new_tokens)
        measured.append(metrics)
        return metrics

    fit(run, trainer, order, hold_out)

    metrics = trainer.evaluate()
    for warning in alarms(measured[0], measured[-1]) if len(measured) > 1 else []:
        run.console.print(f"  warning: {warning}", style="yellow")
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish("causal_lm", write, metrics, step=trainer.state.global_step)


def pair_length(row: Row) -> int:
    """Tokens of the prompt and the longer answer."""
    return len(row["prompt_ids"]) + max(len(row["chosen_ids"]), len(row["rejected_ids"]))


def on_disk(engine: Engine, rows: Sequence[Row], folder: Path) -> Dataset:
    """The pairs, longest first, as a data set in `folder`, where TRL keeps the reference's log-probabilities too."""
    if engine.is_main and not folder.exists():
        written = folder.with_name(f".tmp-{folder.name}")
        Dataset.from_list(sorted(rows, key=pair_length, reverse=True)).save_to_disk(written)
        written.rename(folder)
    engine.barrier()
    return datasets.load_from_disk(str(folder))


def drop_altered(engine: Engine, pairs: Path) -> None:
    """Removes the folder when a kill left it unfinished, or a byte of it is not as it was written."""
    if engine.is_main and pairs.exists():
        with suppress(OSError, ValueError):
            if not changed_files(pairs, read_json(pairs / _HASHES)):
                return
        remove_tree(pairs)
    # Nobody opens it before: `on_disk` waits for the main process.


def list_hashes(engine: Engine, pairs: Path) -> None:
    """Notes the bytes of the folder, for `drop_altered`."""
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
