"""Log-probabilities of actions under a model, from one forward pass over prompt and completion.

Legend: B rows, R longest completion, A actions of all rows (`rollout.batch`), V vocabulary.
"""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout.batch import PaddedBatch
from rollout.ragged import enabled, inputs, spread

_AT_ONCE = 2**22  # most logits to process at once when no gradient is needed


def token_logprobs(
    logits: Tensor, tokens: Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of `tokens` and entropies, under softmax(logits / temperature).

    logits (..., V), tokens (...) -> ((...), (...)), fp32, nats. The temperature is the one used for sampling,
    so that the scored distribution is the sampled one.
    """
    if not torch.is_grad_enabled() and logits.numel() > _AT_ONCE:
        # In pieces, because the temporary values would otherwise take several times the memory of the logits.
        rows = max(_AT_ONCE // logits.shape[-1], 1)
        pieces = zip(logits.flatten(0, -2).split(rows), tokens.flatten().split(rows), strict=True)
        found = [token_logprobs(piece, wanted, temperature) for piece, wanted in pieces]
        logp, entropy = (torch.cat(parts).view(tokens.shape) for parts in zip(*found, strict=True))
        return logp, entropy
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    chosen = logp.gather(-1, tokens[..., None]).squeeze(-1)
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):  # usually it is only reported
        entropy = -(logp.exp() * logp).sum(-1)
    return chosen, entropy


def completion_logprobs(
    policy: PreTrainedModel,
    batch: PaddedBatch,
    temperature: float,
    entropy_gradient: bool = False,
    vocab_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies (B, R), nats, of the actions under softmax(logits / temperature).

    The vocabulary projection is computed for the completions only. Ignore values outside `batch.completion_mask`.
    `vocab_size`: as in the spec that the actions were sampled under (`rollout.sampling`).
    """
    if enabled(policy):
        logits = policy(**inputs(policy, batch), logits_to_keep=batch.unpadded.before).logits[0]  # (A, V)
        tokens = batch.completion_ids.flatten()[batch.unpadded.where]
        chosen, entropy = token_logprobs(logits[:, :vocab_size], tokens, temperature, entropy_gradient)
        return spread(chosen, batch), spread(entropy, batch)
    width = batch.completion_ids.shape[1]
    logits = policy(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=width + 1,
    ).logits  # (B, R + 1, V)
    return token_logprobs(logits[:, :-1, :vocab_size], batch.completion_ids, temperature, entropy_gradient)
