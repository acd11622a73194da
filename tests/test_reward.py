"""Reward-model scores: independent of padding and batch, read at the last token or at every token."""

import doctest

import pytest
import torch
from transformers import AutoModelForSequenceClassification, LlamaConfig

import reward.functions
from reward.functions import RewardError, find
from reward.learned import last_token_scores, score, token_scores

ROWS = [[5, 9, 11, 2], [7] * 10 + [2], [3, 4, 2], [8, 9, 10, 11, 12, 13], [40, 2]]


def scorer() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        pad_token_id=0,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def padded_scores(model, rows, *, left: bool, extra: int):
    width = max(map(len, rows)) + extra
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    with torch.no_grad():
        return last_token_scores(model, ids, mask, (mask.cumsum(-1) - 1).clamp(min=0))


@pytest.mark.parametrize("extra", [0, 17])
@pytest.mark.parametrize("left", [False, True])
def test_scores_do_not_depend_on_padding(left, extra):
    model = scorer()
    alone = torch.cat([padded_scores(model, [row], left=False, extra=0) for row in ROWS])
    assert alone.std() > 1e-3
    assert torch.allclose(padded_scores(model, ROWS, left=left, extra=extra), alone, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_scores_do_not_depend_on_the_batch(batch_size):
    model = scorer()
    alone = torch.cat([padded_scores(model, [row], left=False, extra=0) for row in ROWS])
    assert torch.allclose(score(model, ROWS, pad_id=0, batch_size=batch_size), alone, atol=1e-5)


def test_scores_are_those_of_transformers_where_it_reads_the_same_token():
    model = scorer()
    ids = torch.tensor([ROWS[0]])
    with torch.no_grad():
        theirs = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.squeeze()
    assert torch.allclose(score(model, [ROWS[0]], pad_id=0)[0], theirs, atol=1e-6)


def test_scores_survive_saving(tmp_path):
    model = scorer()
    before = score(model, ROWS, pad_id=0)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1).eval()
    assert torch.equal(score(again, ROWS, pad_id=0), before)


def test_a_broken_reward_model_is_named():
    model = scorer()
    with torch.no_grad():
        model.score.weight.fill_(float("nan"))
    with pytest.raises(RewardError, match="its weights are broken"):
        score(model, ROWS, pad_id=0)


def test_the_examples_in_docstrings():
    assert doctest.testmod(reward.functions).failed == 0
    assert doctest.testmod(reward.functions).attempted >= 3


@pytest.mark.parametrize("name", ["lenght_penalty", "no.such.module:f", "reward.functions:nothing"])
def test_an_unknown_function_is_an_error(name):
    with pytest.raises(RewardError, match="reward function"):
        find("x", name, {})


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_scores_of_tokens_are_scores_of_the_row_cut_after_them(batch_size):
    model = scorer()
    counts = [2, 7, 0, 6, 1]
    found = token_scores(model, ROWS, counts, pad_id=0, batch_size=batch_size)
    assert [len(row) for row in found] == counts
    for row, count, values in zip(ROWS, counts, found, strict=True):
        cut = [row[: len(row) - count + 1 + i] for i in range(count)]
        if cut:
            assert torch.allclose(values, score(model, cut, pad_id=0), atol=1e-5)


def test_a_broken_reward_model_is_named_where_every_token_is_read():
    model = scorer()
    with torch.no_grad():
        model.get_input_embeddings().weight[9] = float("inf")
    with pytest.raises(RewardError, match="for row 1; its weights are broken"):
        token_scores(model, [[5, 6], [8, 9]], [1, 1], pad_id=0)
