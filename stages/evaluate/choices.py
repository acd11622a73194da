"""Multiple choice: the model's answer is the choice whose text is likeliest after the question.

The numbers are those of lm-evaluation-harness (Gao et al.): accuracy by the sum of the choice's log-probabilities, and
`_norm` by that sum divided by the choice's characters. Question and choice are plain text, without the chat template.
"""

import math
from collections.abc import Sequence

import numpy as np

from data.encode import Encoder
from data.records import Question
from stages.evaluate.likelihood import Pair
from stages.evaluate.statistics import Items


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


def right(name: str, questions: Sequence[Question], sums: Sequence[Sequence[float]]) -> dict[str, Items]:
    """1 or 0 for each question, by both ways to choose. `sums`: the log-likelihoods of each question's choices."""
    plain, normed = [], []
    for question, values in zip(questions, sums, strict=True):
        assert all(map(math.isfinite, values))
        lengths = [len(choice) for choice in question.choices]
        plain.append(float(int(np.argmax(values)) == question.right))
        normed.append(float(int(np.argmax(np.asarray(values) / lengths)) == question.right))
    return {name: Items(plain), f"{name}_norm": Items(normed)}
