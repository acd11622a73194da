"""Scores of a reward model: one number for prompt and answer, read at the last real token.

Legend: B rows, T tokens, H hidden size.

The position comes from the attention mask, never from a search for the padding token, so a score does not depend on the
side of the padding, on the batch, or on which token pads (Transformers' own head looks for the last non-pad token).
"""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from data.encode import Encoder
from data.records import Message
from handoff.contract import check_same_encoding
from handoff.errors import HandoffError
from handoff.parent import Parent
from reward.functions import RewardError


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model below its head: hidden states, no projection."""
    return model.get_submodule(model.base_model_prefix)


def last_token_scores(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Scores (B,) fp32 of rows (B, T) padded on either side."""
    hidden = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state  # (B, T, H)
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = torch.where(attention_mask.bool(), columns, -1).amax(-1)  # (B,)
    at_last = hidden[torch.arange(len(last), device=last.device), last]  # (B, H)
    scores: torch.Tensor = model.get_submodule("score")(at_last).squeeze(-1).float()
    return scores


@torch.no_grad()
def score(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32) -> torch.Tensor:
    """Raw scores (N,) fp32 on the CPU of rows of prompt and answer tokens, in evaluation mode.

    Raises:
        RewardError: a score is not finite.
    """
    was_training = model.training
    model.train(False)
    scores = torch.empty(len(rows))
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of like length together
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = len(rows[chosen[0]])
            ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
            mask = torch.zeros((len(chosen), width), dtype=torch.long)
            for i, row in enumerate(chosen):
                ids[i, : len(rows[row])] = torch.as_tensor(rows[row], dtype=torch.long)
                mask[i, : len(rows[row])] = 1
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            device = model.device
            out = last_token_scores(model, ids.to(device), mask.to(device), positions.to(device))
            scores[torch.tensor(chosen)] = out.cpu()
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(scores).all()):
        worst = int((~torch.isfinite(scores)).nonzero()[0])
        raise RewardError(f"the reward model gave {scores[worst].item()} for row {worst}; its weights are broken")
    return scores


class LearnedReward:
    """A published reward model, with the mean and deviation that its stage measured on held-out answers."""

    def __init__(self, parent: Parent, model: PreTrainedModel, policy: Parent, *, reencode: bool) -> None:
        """Raises HandoffError when the encodings differ and `reencode` is off, or when the statistics are missing."""
        if not reencode:
            check_same_encoding(policy, parent, "the reward model reads the policy's tokens; set `reencode: true`")
        statistics = parent.manifest.extra if parent.manifest is not None else {}
        if not {"reward_mean", "reward_std"} <= statistics.keys():
            raise HandoffError(
                f"{parent.path}: no reward_mean and reward_std in stage.json; train the reward model with this pipeline"
            )
        self.mean: float = statistics["reward_mean"]
        self.std: float = statistics["reward_std"]
        self.model = model
        self._encoder = Encoder.from_pretrained(parent.model_dir)
        self._reencode = reencode

    def __call__(
        self,
        prompts: Sequence[tuple[Message, ...]],
        completions: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        stopped: Sequence[bool],
    ) -> list[float]:
        """Normalised scores: (raw − mean) / deviation."""
        if self._reencode:
            rows = []
            for prompt, text, ended in zip(prompts, completions, stopped, strict=True):
                answer = self._encoder.answer(text)
                # An answer that never ended must not look to the reward model as if it had.
                rows.append([*self._encoder.prompt(prompt), *(answer if ended else answer[:-1])])
        else:
            rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        raw = score(self.model, rows, self._encoder.pad_id)
        return [float(value) for value in (raw - self.mean) / self.std]
