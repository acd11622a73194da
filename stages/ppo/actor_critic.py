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
    """A transformer body with a linear head that reads a value at every position."""

    def __init__(self, model: PreTrainedModel) -> None:
        """`model`: whose body is taken over; the head starts at zero."""
        super().__init__()
        self.body = backbone(model)
        self.head = nn.Linear(model.config.get_text_config().hidden_size, 1, dtype=model.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def start_from_reward_head(self, score: nn.Linear, mean: float, std: float, weight: float) -> None:
        """Values begin as the reward model's opinion of the prefix, in the units of the weighted, normalised reward."""
        with torch.no_grad():
            self.head.weight.copy_(score.weight * (weight / std))
            self.head.bias.fill_(-mean * weight / std)

    def forward(self, batch: PaddedBatch) -> Tensor:
        """Values (B, R), fp32: at an action, the value of everything before it; elsewhere they mean nothing."""
        if enabled(self.body):
            hidden = self.body(**inputs(self.body, batch)).last_hidden_state[0, batch.unpadded.before]  # (A, H)
            return spread(self.head(hidden).squeeze(-1).float(), batch)
        width = batch.completion_ids.shape[1]
        hidden = self.body(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state[:, -width - 1 : -1]  # (B, R, H)
        return self.head(hidden).squeeze(-1).float()


class ActorCritic(nn.Module):
    """`forward` gives what the losses need, for the actions of a padded batch only."""

    def __init__(self, policy: PreTrainedModel, critic: Critic | None) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic

    def forward(
        self, batch: PaddedBatch, temperature: float, entropy_gradient: bool = False
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """-> log-probabilities and entropies of the actions, values of the states before them: (B, R).

        There are no values without a critic. Entropies carry a gradient only where it is asked for.
        """
        logp, entropy = completion_logprobs(self.policy, batch, temperature, entropy_gradient)
        # Copies, since FSDP hooks what a module returns and cannot do so on a view.
        values = self.critic(batch).clone() if self.critic is not None else None
        return logp.clone(), entropy, values


def micro_batches(
    lengths: Sequence[int], rows: Sequence[int], size: int, rank: int, world: int, *, padded: bool
) -> list[list[int]]:
    """Splits `rows` into micro-batches of at most `size` rows; those of one rank, equally many on every rank.

    padded: rows of like length come together, so that little is padding. Otherwise each micro-batch, of whichever rank,
    gets about as many tokens as any other, so that none takes much more memory or time. The number of rows has to be a
    multiple of `world`.
    """
    assert len(rows) % world == 0
    ordered = sorted(rows, key=lambda row: (lengths[row], row))
    if padded:
        chunks = [ordered[start : start + size * world] for start in range(0, len(ordered), size * world)]
        return [chunk[rank::world] for chunk in chunks]
    hands = -(-len(rows) // (size * world)) * world
    # In snake order: the micro-batch that gets the shortest row of one round gets the longest of the next.
    return [
        [row for i, row in enumerate(ordered) if (i % hands if i // hands % 2 else hands - 1 - i % hands) == hand]
        for hand in range(rank, hands, world)
    ]
