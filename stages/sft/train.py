"""Instruction tuning with TRL's SFTTrainer, on rows that our own encoder has masked.

    python -m stages.sft recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.sft recipes/tiny.yaml

Legend: B rows, T tokens.

The loss of a step is the sum over all its supervised tokens, on all processes and in all micro-batches, divided by
their number: how the step is cut changes nothing.
"""

from collections.abc import Sequence

import torch
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from data.encode import encode_chats
from data.errors import RowRefused
from data.packing import pack_rows
from data.records import Chat
from stages.sft.config import Config
from training.measure import greedy_answers, measure_rows, token_losses
from training.model import Model, load_encoder, trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit


class Trainer(StageTrainer, SFTTrainer):
    """TRL's trainer in our frame."""


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)

    # Data: conversations as ids and labels, packed or not.
    loaded = run.load(config.data, Chat)
    rows = encode_chats(loaded.records, encoder, config.max_length, config.truncation, loaded.accounting)
    run.account(loaded, max_drop_fraction=config.max_drop_fraction)
    heldout, prompts = [], []
    if config.eval_data:
        held = run.load(config.eval_data, Chat)
        heldout = encode_chats(held.records, encoder, config.max_length, config.truncation, held.accounting)
        asked = [chat.messages[:-1] for chat in held.records[: config.eval_answers]]
        prompts = [
            (ids, messages[-1].content)
            for messages, ids in zip(asked, encoder.prompts(asked), strict=True)
            if not isinstance(ids, RowRefused)
        ]
        run.account(held, "held-out data", config.max_drop_fraction)
    if config.packing:
        rows = pack_rows(rows, config.max_length)

    # Model and trainer.
    args = arguments(SFTConfig, run, len(rows), max_length=None, dataset_kwargs={"skip_prepare_dataset": True})
    dtype = trained_dtype(run.engine, config.model_args)
    model = Model.load(run.engine, parent, "policy", encoder, config.model_args, dtype=dtype, bf16=args.bf16)
    collate = Collator(encoder.pad_id)
    trainer = Trainer(
        model=model.module,
        args=args,
        train_dataset=Dataset.from_list(rows),
        data_collator=collate,
        processing_class=encoder.tokenizer,
    )
    lengths = [len(row["input_ids"]) for row in rows] if config.group_by_length and not config.packing else None
    order = StepOrder(len(rows), config.train.global_batch_size, run.seed, lengths)

    def hold_out() -> dict[str, float]:
        if not heldout:
            return {}
        found = measure_rows(trainer, heldout, [len(r["input_ids"]) for r in heldout], collate, token_losses)
        tokens = found["tokens"].sum()
        metrics = {"loss": found["nats"].sum() / tokens, "mean_token_accuracy": found["correct"].sum() / tokens}
        return metrics | greedy_answers(run, trainer, encoder, prompts, config.max_new_tokens)

    fit(run, trainer, order, hold_out)

    metrics = trainer.evaluate()
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish("causal_lm", write, metrics, step=trainer.state.global_step)


class Collator:
    """Rows padded on the right. Packed rows bring `position_ids`, which alone say where a conversation begins."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        """-> input_ids, labels and attention_mask or position_ids, each (B, T) long."""
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], self._pad_id),
            "labels": _padded([row["labels"] for row in rows], -100),
        }
        if "position_ids" in rows[0]:
            # With an attention mask beside them, transformers would no longer look at the positions. Each padded
            # position is a conversation of its own.
            batch["position_ids"] = _padded([row["position_ids"] for row in rows], 0)
        else:
            batch["attention_mask"] = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
        return batch


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    out = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.long)
    for i, row in enumerate(rows):
        out[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
    return out
