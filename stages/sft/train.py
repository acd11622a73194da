"""Instruction tuning with TRL's SFTTrainer, on rows that this project's encoder has tokenized and masked.

    python -m stages.sft recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.sft recipes/tiny.yaml

Legend: B rows, T tokens.

The loss of a step is the sum over all its supervised tokens, on all processes and in all micro-batches, divided by
their number. So it does not depend on the number of processes or micro-batches.
"""

from collections.abc import Sequence

import torch
from trl import SFTConfig, SFTTrainer

from data.packing import PackedRows
from data.records import Chat
from data.rows import Chats, Row, Rows
from rollout.positions import check_positions
from stages.sft.config import Config
from training.limits import within_window
from training.measure import greedy_answers, measure_rows, questions, token_losses
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit


class Trainer(StageTrainer, SFTTrainer):
    """TRL's trainer with the behaviour that all stages share."""


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)

    # Data: conversations as ids and labels, packed or not.
    longest = within_window(run, [parent], "max_length", config.max_length)
    chats = Chats(longest, config.truncation, config.earlier_turns)
    rows = run.rows(config.data, chats, encoder, max_drop_fraction=config.max_drop_fraction)
    heldout: Rows[Row] | None = None
    prompts: list[tuple[list[int], str]] = []
    if config.eval_data:
        heldout = run.rows(config.eval_data, chats, encoder, "held-out data", config.max_drop_fraction, apart_from=rows)
        prompts = questions(run, config.eval_data, Chat, encoder, config.eval_answers, parent, config.max_new_tokens)
    data = PackedRows(rows, rows.lengths, longest) if config.packing else rows

    # Model and trainer.
    args = arguments(SFTConfig, run, len(data), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    dtype = trained_dtype(run.engine, config.model_args, config.adapter)
    model = Model.load(
        run.engine,
        parent,
        "policy",
        encoder,
        config.model_args,
        dtype=dtype,
        bf16=bool(args.bf16),
        seed=run.seed,
        adapter=config.adapter,
        quantization=config.frozen_weights(),
        publish=config.publish_dtype,
    )
    check_positions(model.module, max(int(part.lengths.max()) for part in (rows, heldout) if part is not None))
    run.rehearse("causal_lm", model)
    collate = Collator(encoder.pad_id)
    trainer = Trainer(
        model=model.module,
        args=args,
        train_dataset=data.dataset(),
        data_collator=collate,
        processing_class=encoder.tokenizer,
    )
    lengths = rows.lengths if config.group_by_length and not config.packing else None
    order = StepOrder(len(data), config.train.global_batch_size, run.seed, lengths)

    def hold_out() -> dict[str, float]:
        if heldout is None:
            return {}
        found = measure_rows(trainer, heldout, heldout.lengths, collate, token_losses)
        tokens = found["tokens"].sum()
        metrics = {"loss": found["nats"].sum() / tokens, "mean_token_accuracy": found["correct"].sum() / tokens}
        return metrics | greedy_answers(run, trainer, encoder, prompts, config.max_new_tokens)

    fit(run, trainer, model, order, hold_out, packed="packing" if config.packing else None)

    metrics = trainer.evaluate()
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish(
        "causal_lm", write, metrics, step=trainer.state.global_step, adapter=model.adapter_record(run.section.name)
    )


class Collator:
    """Pads rows on the right. Packed rows have `position_ids`, which restart at 0 where a conversation begins."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """-> input_ids, labels and attention_mask or position_ids, each (B, T) long."""
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self._pad_id),
            "labels": _padded([row["labels"] for row in rows], -100),
        }
        if "position_ids" in rows[0]:
            # With an attention mask, transformers would not use the positions to separate conversations. Each padding
            # token has position 0, so it counts as a conversation of its own.
            batch["position_ids"] = _padded([row["position_ids"] for row in rows], 0)
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out
