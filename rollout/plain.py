"""Generation with the model's own cache and attention, for models that do not support rollout attention.

Legend: B rows, P prompt length, V vocabulary.

A batch holds prompts of equal length, so there is no padding, and a model whose state is not keys and values (linear
attention, Mamba) needs no mask. Finished rows leave the batch.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from rollout.errors import RolloutError
from rollout.sampling import Completion, SamplingSpec, draw


def generate_plainly(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    spec: SamplingSpec,
    noise: Callable[[int], np.ndarray] | None,
    batch_size: int,
    advance: Callable[[int], None],
) -> list[Completion]:
    """As `rollout.engine.generate`. noise: gives a prompt's (max_new_tokens,) uniform numbers; None for greedy.

    Raises:
        RolloutError: the model does not use a `Cache` of transformers.
    """
    completions = [Completion() for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    start = 0
    while start < len(order):
        length = len(prompts[order[start]])
        rows = [i for i in order[start : start + batch_size] if len(prompts[i]) == length]
        start += len(rows)
        uniforms = None
        if noise is not None:
            uniforms = torch.from_numpy(np.stack([noise(i) for i in rows])).to(model.device)  # (B, max_new_tokens)
        ids = torch.tensor([list(prompts[i]) for i in rows], device=model.device)  # (B, P)
        _decode(model, ids, spec, uniforms, [completions[i] for i in rows])
        advance(len(rows))
    return completions


def _decode(
    model: PreTrainedModel,
    ids: torch.Tensor,
    spec: SamplingSpec,
    uniforms: torch.Tensor | None,
    completions: list[Completion],
) -> None:
    """Generates the completions of one batch into `completions`."""
    cache = DynamicCache(config=model.config)
    state = {state_name(model): cache}
    for step in range(spec.max_new_tokens):
        logits = model(input_ids=ids, use_cache=True, **state).logits[:, -1]  # (B, V)
        tokens, logprobs = draw(logits, spec, None if uniforms is None else uniforms[:, step])
        alive = []
        for row, (token, logprob) in enumerate(zip(tokens.tolist(), logprobs.tolist(), strict=True)):
            completions[row].ids.append(token)
            completions[row].logprobs.append(logprob)
            if token in spec.stop_ids:
                completions[row].end = "stop"
            else:
                alive.append(row)
        if not alive:
            return
        if len(alive) < len(completions):
            index = torch.tensor(alive, device=ids.device)
            cache.reorder_cache(
                cast(torch.LongTensor, index)
            )  # the one selection of rows that every kind of cache knows
            completions = [completions[row] for row in alive]
            tokens, uniforms = tokens[index], None if uniforms is None else uniforms[index]
        ids = tokens[:, None]


def state_name(model: PreTrainedModel) -> str:
    """The name of the cache argument of the model's forward pass."""
    parameters = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "cache_params"):
        if name in parameters:
            return name
    raise RolloutError(
        f"{type(model).__name__} does not keep its state in a cache of transformers (its forward pass takes neither "
        "past_key_values nor cache_params), so it cannot generate here; use another architecture"
    )
