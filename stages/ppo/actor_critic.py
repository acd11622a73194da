"""Policy and critic as one module, so that every engine wraps, shards and clips them together.

Legend: B rows, R longest completion, A actions of all rows (`rollout.batch`), H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from reward.learned import backbone
from rollout.batch import PaddedBatch
from rollout.logprobs import completion_logprobs
from rollout.ragged import enabled, inputs, spread


class Critic(nn.Module):
    """A transformer body with a linear head that computes a value at every position."""

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        """`model`: its body becomes the critic's; the head starts at zero. `dtype`: precision of the head, which is
        trained, while the body may be frozen in bfloat16."""
        super().__init__()
        self.body = backbone(model)
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def start_from_reward_head(self, score: nn.Linear, mean: float, std: float, weight: float) -> None:
        """Initial values are the reward model's scores of the prefix, in units of the weighted, normalised reward."""
        with torch.no_grad():
            self.head.weight.copy_(score.weight * (weight / std))
            self.head.bias.fill_(-mean * weight / std)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Values (B, R), fp32: at an action, the value of the tokens before it; at other positions, arbitrary."""
        if enabled(self.body):
            hidden = self.body(**inputs(self.body, batch)).last_hidden_state[0, batch.unpadded.before]  # (A, H)
            return spread(self._values(hidden), batch)
        width = batch.completion_ids.shape[1]
        hidden = self.body(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state[:, -width - 1 : -1]  # (B, R, H)
        return self._values(hidden)

    def _values(self, hidden: Tensor) -> Tensor:
        """(..., H) -> (...,) fp32."""
        values: Tensor = self.head(hidden.to(self.head.weight.dtype))
        return values.squeeze(-1).float()


class ActorCritic(nn.Module):
    """`forward` computes the losses' inputs at the completion tokens of a padded batch."""

    def __init__(self, policy: PreTrainedModel, critic: Critic | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self,
        batch: PaddedBatch,
        temperature: float,
        entropy_gradient: bool = False,
        vocab_size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> log-probabilities and entropies of the actions, values of the states before them: (B, R).

        Values are None without a critic. Entropies have a gradient only if `entropy_gradient` is set. `vocab_size`: as
        in `rollout.sampling`.
        """
        logp, entropy = completion_logprobs(self.policy, batch, temperature, entropy_gradient, vocab_size)
        # Return copies: FSDP registers hooks on a module's outputs, which fails on views.
        values = self.critic(batch).clone() if self.critic is not None else None
        return logp.clone(), entropy, values


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], size: int, processes: int, *, padded: bool
) -> list[list[list[int]]]:
    """Splits `rows` into micro-batches of at most `size` rows, the same number for each process.

    padded: rows of similar length share a micro-batch, so that there is little padding. Otherwise all micro-batches on
    all processes get about the same number of tokens, so that none takes much more memory or time. The number of rows
    must be a multiple of `processes`.
    """
    assert len(rows) % processes == 0
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    if padded:
        at_once = size * processes
        chunks = [ordered[start : start + at_once] for start in range(0, len(ordered), at_once)]
        return [[chunk[process::processes] for chunk in chunks] for process in range(processes)]
    count = -(-len(rows) // (size * processes)) * processes
    batches: list[list[int]] = [[] for _ in range(count)]
    for i, row in enumerate(ordered):
        turn, place = divmod(i, count)
        # The order is reversed each turn, so a micro-batch with a short row in one turn gets a long one in the next.
        batches[count - 1 - place if turn % 2 == 0 else place].append(row)
    return [batches[process::processes] for process in range(processes)]
