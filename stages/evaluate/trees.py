"""The likelihoods of several continuations of one text, which is computed once for all of them.

A row of the batch is the text and behind it all its continuations. An attention mask lets each continuation see the
text and itself, and positions go on behind the text. Legend: B rows, P longest text, R most tokens of a row's
continuations (each without its last token, which is only scored), L = P + R, V vocabulary.

Models whose attention does not take such a mask, or sees only a window, read every continuation behind a text of its
own (`likelihood.of_pairs`); so do continuations that change the text's own tokens.
"""

import weakref
from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from data.encode import Encoder
from rollout.attention import UnsupportedError
from rollout.forward import configs, windows
from rollout.logprobs import token_logprobs
from rollout.positions import check_positions
from stages.evaluate import likelihood
from stages.evaluate.likelihood import Pair

_CLOSE = 1e-3
"""Nats by which the two ways may differ in a model's trial, of a few tokens."""
_BEFORE, _AFTER = 16, 4
"""Tokens of the texts and of the continuations in that trial."""
_checked: "weakref.WeakKeyDictionary[PreTrainedModel, bool]" = weakref.WeakKeyDictionary()


@torch.no_grad()
def of_choices(
    model: PreTrainedModel,
    encoder: Encoder,
    rows: Sequence[Sequence[Pair]],
    batch_size: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[list[float]]:
    """log p of each continuation of each row, nats. `advance`: called with the number of continuations done."""
    found: dict[int, list[float]] = {}
    shared = [i for i, row in enumerate(rows) if len(row) > 1 and all(before == row[0][0] for before, _ in row)]
    if shared and _takes_trees(model, encoder, rows[shared[0]]):
        check_positions(model, max(likelihood.longest(rows[i]) for i in shared))
        shared.sort(key=lambda i: -len(rows[i][0][0]))
        together = max(1, batch_size // max(len(rows[i]) for i in shared))
        for start in range(0, len(shared), together):
            chosen = shared[start : start + together]
            found |= zip(chosen, _scored(model, encoder, [rows[i] for i in chosen]), strict=True)
            advance(sum(len(rows[i]) for i in chosen))
    rest = [i for i in range(len(rows)) if i not in found]
    flat = [pair for i in rest for pair in rows[i]]
    values = iter(likelihood.of_pairs(model, encoder, flat, batch_size, advance=advance))
    found |= {i: [next(values) for _ in rows[i]] for i in rest}
    return [found[i] for i in range(len(rows))]


def _takes_trees(model: PreTrainedModel, encoder: Encoder, row: Sequence[Pair]) -> bool:
    """Whether the model gives the same values in both ways, tried once with the ids of a row."""
    if model not in _checked:
        try:
            plain = all(window is None for window in windows(model)) and all(
                one._attn_implementation in ("sdpa", "eager") for one in configs(model.config)
            )
        except UnsupportedError:
            plain = False
        if plain:
            tried = _trial(row)
            flat = [pair for pairs in tried for pair in pairs]
            wanted = likelihood.of_pairs(model, encoder, flat, len(flat))
            got = [value for values in _scored(model, encoder, tried) for value in values]
            plain = max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < _CLOSE
        _checked[model] = plain
    return _checked[model]


def _trial(row: Sequence[Pair]) -> list[list[Pair]]:
    """Two rows that show whether continuations see one another, and whether a shorter row's padding is seen.

    Continuations of one token do not: their only token is scored and never read. So they are repeated.
    """
    before = row[0][0][-_BEFORE:]
    scored = [(after * _AFTER)[:_AFTER] for _, after in row]
    return [[(text, one) for one in scored] for text in (before, before[len(before) // 2 :])]


def _scored(model: PreTrainedModel, encoder: Encoder, rows: Sequence[Sequence[Pair]]) -> list[list[float]]:
    """One forward pass."""
    left = max(len(row[0][0]) for row in rows)
    width = left + max(sum(len(scored) - 1 for _, scored in row) for row in rows)
    ids = torch.full((len(rows), width), encoder.pad_id, dtype=torch.long)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # (B, L, L); padding sees itself alone
    at: list[int] = []  # of each scored token: row * (R + 1) + the place, counted from the text's last token
    tokens: list[int] = []
    for b, row in enumerate(rows):
        before = row[0][0]
        first = left - len(before)
        ids[b, first:left] = torch.tensor(before)
        positions[b, first:left] = torch.arange(len(before))
        seen[b, first:left, first:left] = torch.ones(len(before), len(before)).tril().bool()
        start = left
        for _, scored in row:
            end = start + len(scored) - 1
            ids[b, start:end] = torch.tensor(scored[:-1], dtype=torch.long)
            positions[b, start:end] = torch.arange(len(before), len(before) + end - start)
            seen[b, start:end, first:left] = True
            seen[b, start:end, start:end] = torch.ones(end - start, end - start).tril().bool()
            places = [left - 1, *range(start, end)]
            at += [b * (width - left + 1) + place - left + 1 for place in places]
            tokens += scored
            start = end
    dtype = model.dtype
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]  # (B, 1, L, L)
    logits = model(
        input_ids=ids.to(model.device),
        position_ids=positions.to(model.device),
        attention_mask=mask.to(model.device),
        use_cache=False,
        logits_to_keep=width - left + 1,
    ).logits  # (B, R + 1, V)
    wanted = logits.flatten(0, 1)[torch.tensor(at, device=model.device)]  # (scored tokens, V)
    logp, _ = token_logprobs(wanted, torch.tensor(tokens, device=model.device), 1.0)
    values = iter(logp.double().tolist())
    return [[sum(next(values) for _ in scored) for _, scored in row] for row in rows]
