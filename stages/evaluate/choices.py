"""Multiple choice: the model's answer is the choice whose text is likeliest after the question.

The numbers are those of lm-evaluation-harness (Gao et al.): accuracy by the sum of the choice's log-probabilities, and
`_norm` by that sum divided by the choice's characters. Question and choice are plain text, without the chat template.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from data.encode import Encoder
from data.records import Question
from rollout.batch import pad_batch
from rollout.logprobs import completion_logprobs
from stages.evaluate.statistics import Estimate, proportion

Pair: TypeAlias = tuple[list[int], list[int]]
"""Ids of what is read first, and of a choice."""


def encode(encoder: Encoder, prompt: str, question: Question) -> list[Pair]:
    """What is read first, and the choice, for each choice.

    The choice's tokens are those by which the whole text is longer than the prompt's own tokens: so does
    lm-evaluation-harness cut, and a tokenizer that joins characters across the border gives the same numbers.
    """
    before = prompt.replace("{question}", question.text)
    # Spaces at the end of the prompt belong to the choice's first token.
    whole = encoder.documents([before.rstrip(), *(f"{before} {choice}" for choice in question.choices)])
    context, *texts = [ids[:-1] for ids in whole]  # without the end token
    return [(text[: len(context)], text[len(context) :]) for text in texts]


def longest(pairs: Sequence[Pair]) -> int:
    """The most tokens that the model reads of these: all but the last one, which is only scored."""
    return max(len(before) + len(choice) - 1 for before, choice in pairs)


@torch.no_grad()
def likelihoods(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Pair],
    batch_size: int,
    advance: Callable[[int], None],
) -> list[float]:
    """log p(choice | what is read first) of each row, nats. Rows of similar lengths share a batch."""
    sums = [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_batch([rows[i][0] for i in chosen], [rows[i][1] for i in chosen], encoder.pad_id, model.device)
        logp, _ = completion_logprobs(model, batch, temperature=1.0)
        for i, value in zip(chosen, torch.where(batch.completion_mask, logp, 0.0).sum(-1).tolist(), strict=True):
            sums[i] = value
        advance(len(chosen))
    return sums


def accuracies(name: str, questions: Sequence[Question], sums: Sequence[Sequence[float]]) -> dict[str, Estimate]:
    """Both accuracies with their intervals. `sums`: for each question the log-likelihoods of its choices."""
    plain, normed = [], []
    for question, values in zip(questions, sums, strict=True):
        assert all(map(math.isfinite, values))
        lengths = [len(choice) for choice in question.choices]
        plain.append(int(np.argmax(values)) == question.right)
        normed.append(int(np.argmax(np.asarray(values) / lengths)) == question.right)
    return {name: proportion(plain), f"{name}_norm": proportion(normed)}
