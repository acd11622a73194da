"""Runs rows of different lengths through a model without padding, for training and scoring.

Legend: B rows, R longest completion, T tokens of all rows, A actions of all rows (`rollout.batch`), H hidden size, V
vocabulary.

Prompts and answers differ in length; padded to the longest of each, a third of a batch may be padding. Without padding,
everything but attention is computed for the T real tokens only, and the vocabulary projection for the A actions only.
`enable` first compares the results with and without padding. If they agree, it gives the model the attention for this
(`rollout.attention.Ragged`); otherwise, or with FlashAttention, the model keeps its own attention and padded rows.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout.attention import NAME, Ragged, UnsupportedError
from rollout.batch import PaddedBatch, pad_batch
from rollout.forward import attached, configs, deviation, reason_against, windows

_log = logging.getLogger(__name__)
_PROBE = ((3, 4), (2, 9))  # lengths of prompt and completion


def enable(model: PreTrainedModel) -> None:
    """Makes `model` (whole, not wrapped) read rows without padding, or logs a warning that says why it cannot.

    This replaces the model's own attention: from then on, every caller must give it a pass of `rollout.attention`.
    """
    found = [c._attn_implementation for c in configs(model.config)]
    if any(name not in ("sdpa", "eager") for name in found):
        return
    reason = _reason_against(model)
    if reason is not None:
        _log.warning("%s: rows are padded, because %s", type(model).__name__, reason)
        return
    for config in configs(model.config):
        config._attn_implementation = NAME


def enabled(model: PreTrainedModel) -> bool:
    """Whether `enable` has succeeded."""
    return bool(model.config._attn_implementation == NAME)


def inputs(model: PreTrainedModel, batch: PaddedBatch) -> dict[str, Any]:
    """Keyword arguments with which an enabled model reads `batch`; its outputs are (1, T, ...)."""
    rows = batch.unpadded
    return {
        "input_ids": rows.ids,
        "position_ids": rows.positions,
        "use_cache": False,
        "ragged": Ragged(rows.lengths, rows.place, windows(model)),
    }


def spread(values: Tensor, batch: PaddedBatch) -> Tensor:
    """Spreads the actions' values (A,) to (B, R), with 0 everywhere else."""
    shape = batch.completion_mask.shape
    return values.new_zeros(shape.numel()).index_copy(0, batch.unpadded.where, values).view(shape)


@torch.no_grad()
def _reason_against(model: PreTrainedModel) -> str | None:
    body = model.base_model
    assert isinstance(body, PreTrainedModel)
    size = body.config.get_text_config(decoder=True).vocab_size
    rows = [[[i * 5 % size for i in range(n)] for n in lengths] for lengths in _PROBE]
    if body is not model:
        # Generation compares with the model's own attention, which is replaced below, so it must compare first.
        reason = reason_against(model, rows[1][1])
        if reason is not None:
            return reason
    batch = pad_batch([row[0] for row in rows], [row[1] for row in rows], 0, body.device)
    was_training = body.training
    body.eval()
    try:
        with torch.autocast(body.device.type, enabled=False):
            padded = body(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                position_ids=batch.position_ids,
                use_cache=False,
            ).last_hidden_state  # (B, P + R, H)
            with attached(body):
                got = body(**inputs(body, batch)).last_hidden_state[0]  # (T, H)
    except UnsupportedError as error:
        return str(error)
    except Exception as error:  # a foreign model's code may raise anything for unknown arguments
        return f"a trial of its forward pass failed: {type(error).__name__}: {error}"
    finally:
        body.train(was_training)
    return deviation(got, padded[batch.attention_mask.bool()], "its hidden states come")
