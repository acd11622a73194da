"""Scores answers with a reward model, at the last token of the answer or at every token of the answer.

Legend: B rows, T tokens, H hidden size.

Positions come from the attention mask, never from a search for the padding token, so a score does not depend on the
padding side, on the batch, or on the padding token (Transformers' own head looks for the last non-pad token).
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from data.encode import EncodedPrompt, Encoder
from data.errors import RowRefused
from data.records import Message
from handoff.contract import check_same_encoding
from handoff.errors import HandoffError
from handoff.parent import Parent
from handoff.window import model_window
from reward.functions import RewardError

_log = logging.getLogger(__name__)
_TOGETHER = 1000  # prompts that are checked in one call of the tokenizer


def backbone(model: PreTrainedModel) -> PreTrainedModel:
    """The model without its head: it returns hidden states."""
    body = model.get_submodule(model.base_model_prefix)
    assert isinstance(body, PreTrainedModel)
    return body


class _ReadByMask:
    """Mixed into a sequence classifier by `read_by_mask`."""

    def forward(
        self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **keys: Any
    ) -> SequenceClassifierOutput:
        """Scores (B, 1) as `logits`, for rows (B, T) padded on either side; without a mask, rows without padding."""
        hidden = backbone(self)(input_ids=input_ids, attention_mask=attention_mask, **keys).last_hidden_state
        scores = self.score(hidden)  # (B, T, 1)
        last = _last(torch.ones_like(input_ids) if attention_mask is None else attention_mask)
        return SequenceClassifierOutput(logits=scores[torch.arange(len(last), device=last.device), last])


def read_by_mask(model: PreTrainedModel) -> PreTrainedModel:
    """The sequence classifier, changed to read its score at the last token of the attention mask.

    transformers looks for the last token that is not the padding token. Where a model pads with its end token, that is
    the token before a row's end.
    """
    kind = type(model)
    model.__class__ = type(kind.__name__, (_ReadByMask, kind), {})
    return model


def last_token_scores(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Scores (B,) fp32 of rows (B, T) padded on either side."""
    hidden = _hidden(model, input_ids, attention_mask, position_ids)
    last = _last(attention_mask)
    return _head(model, hidden[torch.arange(len(last), device=last.device), last])


@torch.no_grad()
def score(model: PreTrainedModel, rows: Sequence[Sequence[int]], pad_id: int, batch_size: int = 32) -> torch.Tensor:
    """Raw scores (N,), fp32 on the CPU, of rows of prompt and answer tokens. The model runs in evaluation mode.

    Raises:
        RewardError: a score is not finite.
    """
    scores = torch.empty(len(rows))
    with _evaluation(model):
        for chosen, ids, mask, positions in _batches(rows, pad_id, batch_size, model.device):
            scores[torch.tensor(chosen)] = last_token_scores(model, ids, mask, positions).cpu()
    _check_finite(scores, range(len(rows)))
    return scores


@torch.no_grad()
def token_scores(
    model: PreTrainedModel,
    rows: Sequence[Sequence[int]],
    counts: Sequence[int],
    pad_id: int,
    batch_size: int = 32,
) -> list[torch.Tensor]:
    """Raw scores (counts[i],), fp32 on the CPU, at each of the last `counts[i]` tokens of row i, in evaluation mode.

    The last score of a row equals its `score`. Raises RewardError as `score` does.
    """
    scores = [torch.empty(0)] * len(rows)
    with _evaluation(model):
        for chosen, ids, mask, positions in _batches(rows, pad_id, batch_size, model.device):
            values = _head(model, _hidden(model, ids, mask, positions)).cpu()  # (B, T)
            for i, row in enumerate(chosen):
                scores[row] = values[i, len(rows[row]) - counts[row] : len(rows[row])]
                _check_finite(scores[row], [row] * counts[row])
    return scores


def statistics(parent: Parent) -> tuple[float, float] | None:
    """Mean and standard deviation of a reward model's scores on held-out answers, which its stage has measured; None
    for a model that was trained elsewhere."""
    found = parent.manifest.extra if parent.manifest is not None else {}
    if not {"reward_mean", "reward_std"} <= found.keys():
        return None
    return found["reward_mean"], found["reward_std"]


class LearnedReward:
    """A reward model, with the mean and standard deviation that its stage measured on held-out answers.

    The scores of a model that was trained elsewhere are taken as they are; the recipe's `weight` can scale them.
    """

    def __init__(
        self,
        parent: Parent,
        model: PreTrainedModel,
        encoder: Encoder,
        policy: Parent,
        *,
        reencode: bool,
        member: bool = False,
    ) -> None:
        """
        Args:
            parent: the reward model.
            model: its module.
            encoder: its encoder.
            policy: the model whose answers are scored.
            reencode: encode the answers' texts with the reward model's own tokenizer.
            member: whether it belongs to an ensemble, whose members must have statistics to be comparable.

        Raises:
            HandoffError: the encodings differ without `reencode`, or the statistics of a member are missing.
        """
        if not reencode:
            check_same_encoding(policy, parent, "the reward model reads the policy's tokens; set `reencode: true`")
        known = statistics(parent)
        if known is None:
            if member:
                raise HandoffError(
                    f"{parent.path}: no reward_mean and reward_std in stage.json, so its scores cannot be compared "
                    "with those of the other members of the ensemble; name it as a `model:` of its own with a `weight`"
                )
            _log.warning(
                "%s was trained elsewhere, so the mean and deviation of its scores are not known: they are taken as "
                "they are. The entry's `weight` scales them",
                parent.name,
            )
        self.mean, self.std = known or (0.0, 1.0)
        self.model = model
        self.name = parent.name
        self._window = model_window(parent.weights_dir)
        self._encoder = encoder
        self._reencode = reencode

    def check_prompts(self, prompts: Sequence[EncodedPrompt]) -> None:
        """Checks, before the first answer is sampled, that this model can read the prompts.

        Raises:
            RewardError: its chat template cannot express one of them, which is named.
            DataError: it has no chat template.
        """
        for start in range(0, len(prompts) if self._reencode else 0, _TOGETHER):
            records = [prompt.record for prompt in prompts[start : start + _TOGETHER]]
            for record, ids in zip(records, self._encoder.prompts([r.messages for r in records]), strict=True):
                if isinstance(ids, RowRefused):
                    raise RewardError(
                        f"{record.origin}: reward model {self.name} cannot read this prompt with `reencode: true`: "
                        f"{ids.reason}; take the row out of the data, or name another reward model"
                    )

    def __call__(
        self,
        prompts: Sequence[tuple[Message, ...]],
        completions: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        completion_ids: Sequence[Sequence[int]],
        stopped: Sequence[bool],
    ) -> list[float]:
        """Normalised scores (N,): (raw − mean) / standard deviation at the last token.

        Raises:
            RewardError: a score is not finite, or the model's chat template cannot express a prompt.
        """
        if self._reencode:
            rows = self._reencoded(prompts, completions, stopped)
        else:
            rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        raw = score(self.model, rows, self._encoder.pad_id)
        return [float(value) for value in (raw - self.mean) / self.std]

    def tokens(self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]) -> list[list[float]]:
        """Normalised scores at each token of each answer. Raises RewardError as `__call__` does."""
        assert not self._reencode, "the recipe refuses `read: every` with `reencode`"
        rows = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        raw = token_scores(self.model, rows, [len(ids) for ids in completion_ids], self._encoder.pad_id)
        return [[float(value) for value in (row - self.mean) / self.std] for row in raw]

    def _reencoded(
        self, prompts: Sequence[tuple[Message, ...]], completions: Sequence[str], stopped: Sequence[bool]
    ) -> list[list[int]]:
        """Rows of prompt and answer in the reward model's own tokens, encoded from the texts."""
        rows = []
        encoded = zip(self._encoder.prompts(prompts), self._encoder.answers(completions), strict=True)
        for i, (prompt, answer) in enumerate(encoded):
            if isinstance(prompt, RowRefused):
                raise RewardError(f"reward model {self.name}: prompt {prompts[i][-1].content!r}: {prompt.reason}")
            if isinstance(answer, RowRefused):
                raise RewardError(f"reward model {self.name}: answer {completions[i]!r}: {answer.reason}")
            # A truncated answer must not look complete to the reward model, so it gets no stop token.
            row = [*prompt, *(answer if stopped[i] else answer[:-1])]
            if self._window is not None and len(row) > self._window.tokens:
                # An answer's length in these tokens is known only now, so a run must not end here.
                _log.warning(
                    "reward model %s: a prompt and its answer are %d of its tokens; it reads the last %d (%s)",
                    self.name,
                    len(row),
                    self._window.tokens,
                    self._window.key,
                )
                row = row[-self._window.tokens :]
            rows.append(row)
        return rows


def _last(attention_mask: torch.Tensor) -> torch.Tensor:
    """The last attended column of each row, (B,)."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    return torch.where(attention_mask.bool(), columns, -1).amax(-1)


def _hidden(
    model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor
) -> torch.Tensor:
    """Last hidden states (B, T, H)."""
    hidden: torch.Tensor = backbone(model)(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False
    ).last_hidden_state
    return hidden


def _head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """(..., H) -> (...,) fp32. The head may be float32 on a frozen body in bfloat16."""
    head = model.get_submodule("score")
    scores: torch.Tensor = head(hidden.to(head.get_parameter("weight").dtype)).squeeze(-1).float()
    return scores


@contextmanager
def _evaluation(model: PreTrainedModel) -> Iterator[None]:
    was_training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(was_training)


def _batches(
    rows: Sequence[Sequence[int]], pad_id: int, batch_size: int, device: torch.device
) -> Iterator[tuple[list[int], torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yields (row indices, ids, mask, positions): (B, T) int64, padded right, rows of similar length together."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        width = len(rows[chosen[0]])
        ids = torch.full((len(chosen), width), pad_id, dtype=torch.long)
        mask = torch.zeros((len(chosen), width), dtype=torch.long)
        for i, row in enumerate(chosen):
            ids[i, : len(rows[row])] = torch.as_tensor(rows[row], dtype=torch.long)
            mask[i, : len(rows[row])] = 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        yield chosen, ids.to(device), mask.to(device), positions.to(device)


def _check_finite(scores: torch.Tensor, rows: Sequence[int]) -> None:
    finite = torch.isfinite(scores)
    if not bool(finite.all()):
        worst = int((~finite).nonzero()[0])
        raise RewardError(
            f"the reward model gave {scores[worst].item()} for row {rows[worst]}; its weights are broken. Train it "
            "again, or name another reward model under `reward`"
        )
