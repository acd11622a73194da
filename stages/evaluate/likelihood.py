"""How likely given text is under a model: choices, the rows' own answers, and documents."""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from data.encode import EncodedPrompt, Encoder
from data.errors import RowRefused
from rollout.batch import pad_batch
from rollout.logprobs import completion_logprobs
from rollout.positions import check_positions
from training.measure import TextWindows

Pair: TypeAlias = tuple[list[int], list[int]]
"""Ids of what is read first, and of the text that is scored after it."""
BITS = 1 / math.log(2)
"""Bits a nat."""


def longest(pairs: Sequence[Pair]) -> int:
    """The most tokens that the model reads of these: all but the last one, which is only scored."""
    return max((len(before) + len(scored) - 1 for before, scored in pairs), default=1)


@torch.no_grad()
def of_pairs(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Pair],
    batch_size: int,
    *,
    temperature: float = 1.0,
    whole: bool = True,
    advance: Callable[[int], None] = lambda _: None,
) -> list[float]:
    """log p(scored text | what is read first) of each row, nats. Rows of similar lengths share a batch.

    Args:
        whole: over all of the model's logits; False: over those that the tokenizer has a token for, as in sampling.
        advance: called with the number of rows done.
    """
    check_positions(model, longest(rows))
    sums = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_batch([rows[i][0] for i in chosen], [rows[i][1] for i in chosen], encoder.pad_id, model.device)
        logp, _ = completion_logprobs(model, batch, temperature, vocab_size=None if whole else encoder.vocab_size)
        for i, value in zip(chosen, torch.where(batch.completion_mask, logp, 0.0).sum(-1).tolist(), strict=True):
            sums[i] = value
        advance(len(chosen))
    return sums


def references(encoder: Encoder, prompts: Sequence[EncodedPrompt], ids: Sequence[list[int]]) -> dict[int, Pair]:
    """{prompt: its ids and those of the answer in its row, the column `reference`}.

    Left out are prompts without one, and answers that the model's template cannot express.
    """
    texts = {i: p.record.columns.get("reference") for i, p in enumerate(prompts)}
    told = {i: text for i, text in texts.items() if isinstance(text, str) and text.strip()}
    answers = zip(told, encoder.answers(list(told.values())), strict=True)
    return {i: (ids[i], answer) for i, answer in answers if not isinstance(answer, RowRefused)}


@torch.no_grad()
def of_documents(
    model: PreTrainedModel, encoder: Encoder, texts: Sequence[str], context: int, batch_size: int
) -> list[float]:
    """log p(document) of each, nats, over the windows of `TextWindows`, each of `context` tokens."""
    sums = np.zeros(len(texts))
    windows = TextWindows(encoder.documents(texts), encoder, context)
    check_positions(model, int(windows.lengths.max(initial=1)))
    for start in range(0, len(windows), batch_size):
        batch = windows.collate(windows[start : start + batch_size])
        labels = batch["shift_labels"].to(model.device)
        logits = model(input_ids=batch["input_ids"].to(model.device), use_cache=False).logits
        logp = torch.log_softmax(logits.float(), -1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
        nats = torch.where(labels >= 0, logp, 0.0).sum(-1)  # (B,)
        np.add.at(sums, windows.texts[start : start + batch_size], nats.double().cpu().numpy())
    found: list[float] = sums.tolist()
    return found
