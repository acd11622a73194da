"""Pretraining with transformers' Trainer on packed blocks of documents.

    python -m stages.pretrain recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.pretrain recipes/tiny.yaml

Legend: N rows, B rows of a batch, T tokens of a row (`block_size`).
"""

import math
from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments
from trl.trainer.utils import add_fused_lm_head

from data.rows import Documents
from handoff.window import model_window
from rollout.positions import check_positions
from stages.pretrain.config import Config
from training.architecture import model_config
from training.measure import TextWindows, measure_rows, token_losses, window_nats
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.recipe import RecipeError
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    if (parent.kind == "tokenizer") != (config.model is not None):
        raise RecipeError(
            f"{run.recipe.path}: {run.section.name}.model: "
            + (
                "says what to build from a tokenizer"
                if config.model is None
                else "the parent is a model already; drop it"
            )
        )
    encoder = load_encoder(parent)
    shape = None
    if config.model is not None:
        try:
            shape = model_config(config.model, encoder, config.block_size)
        except RecipeError as error:
            raise RecipeError(f"{run.recipe.path}: {run.section.name}.{error}") from error

    elif (found := model_window(parent.weights_dir)) is not None and found.tokens < config.block_size:
        raise RecipeError(
            f"{run.recipe.path}: {run.section.name}.block_size is {config.block_size}, more than the window of "
            f"{parent.name}, {found.tokens} tokens ({found.key} in its config.json); take block_size={found.tokens}"
        )

    # Data: blocks of tokens; held-out documents as windows that score every token once.
    rows = run.rows(config.data, Documents(), encoder, max_drop_fraction=config.max_drop_fraction)
    blocks = rows.blocks(config.block_size)  # (N, T)
    windows, texts, heldout_bytes = None, None, 0
    if config.eval_data:
        held = run.rows(
            config.eval_data, Documents(), encoder, "held-out data", config.max_drop_fraction, apart_from=rows
        )
        windows, heldout_bytes = Windows(held.tokens, encoder.eos_id, config.block_size), held.facts["bytes"]
        texts = TextWindows(np.split(held.tokens, np.cumsum(held.lengths)[:-1]), encoder, config.block_size)

    # Model and trainer.
    args = arguments(TrainingArguments, run, len(blocks))
    dtype = trained_dtype(run.engine, config.model_args, config.adapter)
    if shape is not None:
        torch.manual_seed(run.seed)
        keys: dict[str, Any] = {"bf16": args.bf16, "dtype": dtype, "publish": config.publish_dtype}
        model = Model.build(run.engine, shape, encoder, config.model_args, **keys)
        if config.embedding_std is not None:
            torch.nn.init.normal_(model.module.get_input_embeddings().get_parameter("weight"), std=config.embedding_std)
    else:
        model = Model.load(
            run.engine,
            parent,
            "policy",
            encoder,
            config.model_args,
            dtype=dtype,
            bf16=args.bf16,
            seed=run.seed,
            adapter=config.adapter,
            quantization=config.frozen_weights(),
            publish=config.publish_dtype,
        )
    if config.isolate_documents:  # without that, all rows are of one length
        check_positions(model.module, min(config.block_size, int(rows.lengths.max())))
    run.rehearse("causal_lm", model)
    parameters = model.parameters()
    run.console.print(f"  {parameters / 1e6:.2f} M parameters, {blocks.size:,} tokens in rows of {config.block_size}")
    collate = Collator(encoder.eos_id if config.isolate_documents else None)
    trainer = StageTrainer(model=model.module, args=args, train_dataset=Blocks(blocks), data_collator=collate)
    add_fused_lm_head(model.module, outputs=("log_probs", "is_top1"))
    order = StepOrder(len(blocks), config.train.global_batch_size, run.seed)

    def hold_out() -> dict[str, float]:
        if windows is None or texts is None:
            return {}
        lengths = np.full(len(windows), windows.width)
        found = measure_rows(trainer, windows, lengths, collate.labelled, token_losses)
        nats, tokens = found["nats"].sum(), found["tokens"].sum()
        of_texts = measure_rows(trainer, texts, texts.lengths, texts.collate, window_nats)["nats"].sum()
        return {
            "loss": nats / tokens,
            "perplexity": math.exp(min(nats / tokens, 700.0)),
            "bits_per_byte": of_texts / math.log(2) / heldout_bytes,
            "mean_token_accuracy": found["correct"].sum() / tokens,
        }

    fit(run, trainer, model, order, hold_out, packed="isolate_documents" if config.isolate_documents else None)

    metrics = trainer.evaluate() | {
        "parameters": parameters,
        "train_tokens": trainer.state.global_step * config.train.global_batch_size * config.block_size,
    }
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    run.publish(
        "causal_lm", write, metrics, step=trainer.state.global_step, adapter=model.adapter_record(run.section.name)
    )


class Blocks(Dataset[np.ndarray]):
    """Rows of token ids, (N, T) int32."""

    def __init__(self, blocks: np.ndarray) -> None:
        self._blocks = blocks

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, index: int) -> np.ndarray:
        row: np.ndarray = self._blocks[index]
        return row


class Collator:
    """Rows of equal length, without padding."""

    def __init__(self, boundary: int | None) -> None:
        """`boundary`: the end token, after which a new document begins; None: documents attend to each other."""
        self._boundary = boundary

    def __call__(self, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """Blocks (T,) -> input_ids, labels and, for isolated documents, position_ids, each (B, T) long. Every token is
        a label, except an isolated document's first one."""
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        return self._batch(ids, ids.clone())

    def labelled(self, rows: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
        """The same batch, made from windows (2, T) of ids and labels."""
        ids, labels = torch.from_numpy(np.stack(rows)).unbind(1)
        return self._batch(ids, labels.clone())

    def _batch(self, ids: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        if self._boundary is None:
            return {"input_ids": ids, "labels": labels}
        first = torch.zeros_like(ids, dtype=torch.bool)  # the first token of each document
        first[:, 1:] = ids[:, :-1] == self._boundary
        columns = torch.arange(ids.shape[1]).expand_as(ids)
        begins = torch.where(first, columns, 0).cummax(dim=1).values
        # An isolated document's first token has no context, so it is not predicted.
        return {"input_ids": ids, "labels": labels.masked_fill(first, -100), "position_ids": columns - begins}


class Windows(Sequence[np.ndarray]):
    """Overlapping windows over a stream of documents. Each token is scored once, with at least half a window of
    context where the stream has that much.

    A window is (2, T) long: ids, and labels that are -100 for context. T is `width`, or the length of the stream if
    that is shorter. A window is built when it is read.
    """

    def __init__(self, tokens: np.ndarray, end: int, width: int) -> None:
        """
        Args:
            tokens: token ids of the concatenated documents, (N,).
            end: the end token. It precedes the first token as its context and is not scored in that place.
        """
        self._tokens, self._end = tokens, end
        size = len(tokens) + 1
        self.width = min(width, size)
        self._starts = [*range(0, size - self.width, max(1, self.width // 2)), size - self.width]

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = self._starts[index]
        scored = self._starts[index - 1] + self.width if index else 1
        window = np.full((2, self.width), -100, dtype=np.int64)
        window[0, start == 0 :] = self._tokens[max(start - 1, 0) : start + self.width - 1]
        if start == 0:
            window[0, 0] = self._end
        window[1, scored - start :] = window[0, scored - start :]
        return window
