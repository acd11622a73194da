"""Direct preference optimisation with TRL's DPOTrainer (Rafailov et al. 2023), on pairs that our encoder has tokenized.

    python -m stages.dpo recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.dpo recipes/tiny.yaml

Legend: B pairs, T tokens.

The reference is the policy before its first step: every engine computes its log-probabilities with the model that it
will train, so no second model is in memory. They are kept in `state/pairs`, under a hash of the pairs and of the
parent's files. A resumed run reads them from there if the file is unchanged. Otherwise it computes them again, before
it loads its saved state.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from trl import DPOConfig, DPOTrainer

from data.records import Preference
from data.rows import Pairs, Row, Rows
from handoff.files import canonical_hash, read_json, sha256_file, write_json
from rollout.positions import check_positions
from stages.dpo.config import Config
from stages.dpo.loss import alarms, pair_metrics
from training.engines.upstream import without_reference
from training.limits import within_window
from training.measure import greedy_answers, measure_rows, questions
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit

_VALUES, _RECORD = "reference.safetensors", "reference.json"


class PairRows(Sequence[Row]):
    """Pairs, longest first; pairs of equal length keep their order."""

    def __init__(self, rows: Rows[Row]) -> None:
        self._rows = rows
        self._order = np.argsort(-rows.lengths.astype(np.int64), kind="stable")
        self.lengths = rows.lengths[self._order]
        """Tokens of each pair's prompt and longer answer, (N,)."""
        self.fingerprints = rows.fingerprints
        self.reference: dict[str, np.ndarray] = {}
        """`chosen` and `rejected`: the reference's log-probabilities, (N,) each, once they are known; then each pair
        has them in TRL's columns."""

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        pair = self._rows[int(self._order[index])]
        return pair | {f"ref_{answer}_logps": float(values[index]) for answer, values in self.reference.items()}


class Trainer(StageTrainer, DPOTrainer):
    """TRL's trainer with the behaviour that all stages share. The pairs are tokenized already, so it skips that."""

    parts: dict[str, PairRows]
    """{name: pairs} of the training and the held-out data."""

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset

    def start_from_parent(self) -> None:
        """Adds the reference's log-probabilities to the pairs. The model is the reference now."""
        run, folder = self.run, self.run.dir.state_dir / "pairs"
        of = canonical_hash({"parent": run.parent().fingerprint, **{n: p.fingerprints for n, p in self.parts.items()}})
        found = run.engine.on_main(lambda: read_reference(folder, of))
        if found is None:
            run.console.print(f"  the reference reads {sum(map(len, self.parts.values()))} pairs")
            found = {}
            for name, pairs in self.parts.items():
                logps = measure_rows(self, pairs, pairs.lengths, self.data_collator, answer_logps)
                found |= {f"{name}/{answer}": logps[answer] for answer in ("chosen", "rejected")}
            if run.engine.is_main:
                keep_reference(folder, of, found)
        for name, pairs in self.parts.items():
            pairs.reference = {answer: found[f"{name}/{answer}"] for answer in ("chosen", "rejected")}


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)
    if parent.base is not None:
        run.engine.check_pairs_on_adapter()

    # Data: pairs as ids.
    kind = Pairs(within_window(run, [parent], "max_length", config.max_length), config.truncation)
    rows = run.rows(config.data, kind, encoder, max_drop_fraction=config.max_drop_fraction)
    heldout: Rows[Row] | None = None
    prompts: list[tuple[list[int], str]] = []
    if config.eval_data:
        heldout = run.rows(config.eval_data, kind, encoder, "held-out data", config.max_drop_fraction, apart_from=rows)
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
    )
    dtype = trained_dtype(run.engine, config.model_args, config.adapter)
    model = Model.load(
        run.engine,
        parent,
        "policy",
        encoder,
        config.model_args,
        dtype=dtype,
        dropout=False,
        bf16=bool(args.bf16),
        seed=run.seed,
        adapter=config.adapter,
        quantization=config.frozen_weights(),
        publish=config.publish_dtype,
    )
    check_positions(model.module, max(int(part.lengths.max()) for part in (rows, heldout) if part is not None))
    run.rehearse("causal_lm", model)
    pairs = PairRows(rows)
    with without_reference():
        trainer = Trainer(
            model=model.module,
            args=args,
            train_dataset=rows.stored(np.arange(1)),  # TRL asks for a Dataset
            processing_class=encoder.tokenizer,
        )
    trainer.train_dataset = pairs
    trainer.precompute_ref_logps = True  # TRL's loss reads them from the pairs
    trainer.parts = {"train": pairs}
    if heldout is not None:
        trainer.parts["eval"] = PairRows(heldout)
    lengths = pairs.lengths if config.group_by_length else None
    order = StepOrder(len(pairs), config.train.global_batch_size, run.seed, lengths)

    def hold_out() -> dict[str, float]:
        if heldout is None:
            return {}
        kept = trainer.parts["eval"]
        found = measure_rows(trainer, kept, kept.lengths, trainer.data_collator, pair_logps)
        metrics = pair_metrics(found, config.beta, config.loss_type, config.label_smoothing, config.sft_weight)
        return metrics | greedy_answers(run, trainer, encoder, prompts, config.max_new_tokens)

    fit(run, trainer, model, order, hold_out)

    metrics = trainer.evaluate()
    for warning in alarms(trainer.at_start, metrics) if trainer.at_start else []:
        run.console.print(f"  warning: {warning}", style="yellow")
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish(
        "causal_lm", write, metrics, step=trainer.state.global_step, adapter=model.adapter_record(run.section.name)
    )


def read_reference(folder: Path, of: str) -> dict[str, np.ndarray] | None:
    """The kept log-probabilities; None if there are none, they belong to something else, or the file is damaged.

    `of`: hash of the pairs and of the reference.
    """
    with suppress(OSError, ValueError, SafetensorError):
        if read_json(folder / _RECORD) == {"of": of, "sha256": sha256_file(folder / _VALUES)}:
            return dict(load_file(folder / _VALUES))
    return None


def keep_reference(folder: Path, of: str, values: dict[str, np.ndarray]) -> None:
    """Writes what `read_reference` reads, the record last."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(values, folder / _VALUES)
    write_json(folder / _RECORD, {"of": of, "sha256": sha256_file(folder / _VALUES)})


def answer_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probabilities (B,) of both answers under the model: `chosen`, `rejected`."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)  # (2B, T)
    out = model(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        labels=labels,
        fused_lm_head=True,
        use_cache=False,
    )
    chosen, rejected = out.log_probs.sum(-1).chunk(2)
    return {"chosen": chosen, "rejected": rejected}


def pair_logps(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Log-probabilities (B,) of both answers under the model and the reference, and their lengths."""
    chosen_tokens, rejected_tokens = batch["completion_mask"].sum(-1).chunk(2)
    return {
        **answer_logps(model, batch),
        "ref_chosen": batch["ref_chosen_logps"],
        "ref_rejected": batch["ref_rejected_logps"],
        "chosen_tokens": chosen_tokens,
        "rejected_tokens": rejected_tokens,
    }
