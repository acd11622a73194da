"""Rewards: the scorer does not care how rows are padded or batched; functions and models are summed by weight."""

import doctest

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForSequenceClassification, LlamaConfig

import reward.functions
from data.records import Message
from reward.compose import Answers, Composition
from reward.config import RewardConfig
from reward.functions import RewardError, find
from reward.learned import last_token_scores, score

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


def answers() -> Answers:
    texts = ["Of course! 42", "41", "no idea at all no idea at all"]
    ids = [[1] * 40, [1] * 3, [1] * 8]
    return Answers(
        prompts=[(Message("user", "6 * 7?"),)] * 3,
        prompt_ids=[[5]] * 3,
        texts=texts,
        ids=ids,
        stopped=[True, True, False],
        columns=[{"answer": "Of course! 42"}, {"answer": "42"}, {}],
    )


def test_composition_weighs_and_keeps_parts():
    entries = [
        RewardConfig(function="exact_match", weight=2.0),
        RewardConfig(function="length_penalty", weight=0.5, args={"free": 20}),
    ]
    scores = Composition(entries, {})(answers())
    assert scores.parts == {"exact_match": [1.0, 0.0, None], "length_penalty": [-1.0, 0.0, 0.0]}
    assert scores.total == [1.5, 0.0, 0.0]


def test_a_function_of_the_user_by_its_path(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shout(prompts, completions, **columns):\n    return [float(c.isupper()) for c in completions]\n"
        "def broken(prompts, completions, **columns):\n    return [float('nan')] * len(completions)\n"
        "def short(prompts, completions, **columns):\n    return [1.0]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert Composition([RewardConfig(function="my_rewards:shout")], {})(answers()).total == [0.0, 0.0, 0.0]
    with pytest.raises(RewardError, match=r"`broken` gave nan for the answer 'Of course! 42'"):
        Composition([RewardConfig(function="my_rewards:broken")], {})(answers())
    with pytest.raises(RewardError, match=r"`short` gave 1 values for 3 answers"):
        Composition([RewardConfig(function="my_rewards:short")], {})(answers())


@pytest.mark.parametrize("name", ["lenght_penalty", "no.such.module:f", "reward.functions:nothing"])
def test_an_unknown_function_is_an_error(name):
    with pytest.raises(RewardError, match="reward function"):
        find(name)


@pytest.mark.parametrize(
    "keys", [{}, {"model": "a", "function": "b"}, {"model": "a", "args": {"n": 1}}, {"function": "f", "reencode": True}]
)
def test_an_entry_is_a_model_or_a_function(keys):
    with pytest.raises(ValidationError):
        RewardConfig(**keys)
