"""Packing: no row sees another, every row occurs once, and bins are full. Sampling: draws depend only on the key."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.packing import PackedRows, pack
from data.sampling import shuffled, uniform


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 90))
def test_every_row_is_packed_once_and_no_bin_overflows(lengths, capacity):
    bins = pack(lengths, capacity)
    assert sorted(i for one in bins for i in one) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in one) for one in bins]
    assert all(0 < load <= capacity for load in loads)
    # A bin is opened only for a row that fits in no other, so any two bins together overflow.
    assert sum(sorted(loads)[:2]) > capacity or len(loads) < 2


def test_best_fit_decreasing_by_hand_and_on_many_rows():
    assert pack([4, 8, 1, 4, 2, 1], 10) == [[1, 2, 5], [0, 3, 4]]
    rng = random.Random(0)
    lengths = [rng.randint(5, 200) for _ in range(5000)]
    assert len(pack(lengths, 512)) <= 1.01 * sum(lengths) / 512
    for bad in ([0], [11]):
        with pytest.raises(ValueError, match="row 0 has length"):
            pack(bad, 10)


def test_packed_rows_start_their_positions_again_and_lose_their_first_label():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    assert list(PackedRows(rows, [3, 2], 5)) == [
        {"input_ids": [1, 2, 3, 4, 5], "labels": [-100, 2, 3, -100, 5], "position_ids": [0, 1, 2, 0, 1]}
    ]
    assert len(PackedRows(rows, [3, 2], 4)) == 2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_loss_of_packed_rows_is_that_of_rows_alone(attention):
    """The summed loss over all rows is the same in batches of packed rows with padding: rows do not see each other."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).double().eval()
    rng = random.Random(1)
    rows = []
    for length in (9, 3, 7, 5, 4, 8, 2):
        ids = [rng.randrange(1, 50) for _ in range(length)]
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})

    def loss(logits, labels):
        return torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
        )

    def padded(rows, key, fill):
        width = max(len(row[key]) for row in rows)
        return torch.tensor([row[key] + [fill] * (width - len(row[key])) for row in rows])

    with torch.no_grad():
        alone = sum(loss(model(torch.tensor([r["input_ids"]])).logits, torch.tensor([r["labels"]])) for r in rows)
        for batch_size in (1, 2):
            packed = PackedRows(rows, [len(row["input_ids"]) for row in rows], 12)
            assert len(packed) < len(rows)
            total = torch.zeros((), dtype=torch.float64)
            for start in range(0, len(packed), batch_size):
                batch = packed[start : start + batch_size]
                positions = padded(batch, "position_ids", 0)
                logits = model(padded(batch, "input_ids", 0), position_ids=positions, use_cache=False).logits
                total += loss(logits, padded(batch, "labels", -100))
            assert torch.isfinite(total) and abs(total - alone) < 1e-9 * abs(alone)


def test_draws_depend_only_on_the_key():
    one = shuffled(1000, 7, "ppo", 3)
    np.random.seed(0)
    assert sorted(one) == list(range(1000)) and (one == shuffled(1000, 7, "ppo", 3)).all()
    assert one.dtype == np.int64 and shuffled(0, 7).shape == (0,)
    for other in ((8, "ppo", 3), (7, "ppo", 4), (7, "ppo3"), (7, "ppo", "3"), (7, 3, "ppo")):
        assert (one != shuffled(1000, *other)).mean() > 0.9

    draws = uniform((100, 50), 7, "sample")
    assert draws.shape == (100, 50) and draws.dtype == np.float64
    assert (draws >= 0).all() and (draws < 1).all()
    assert (uniform(5000, 7, "sample") == draws.reshape(-1)).all()
    # Uniform: mean 1/2, variance 1/12, each within 5 standard errors; and keys do not correlate.
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5
    assert abs(draws.var() - 1 / 12) < 5 * (1 / 180 / 5000) ** 0.5
    assert abs(np.corrcoef(draws.reshape(-1), uniform(5000, 7, "other"))[0, 1]) < 5 / 5000**0.5


def test_draws_are_pinned():
    """A change of these numbers changes every training run."""
    assert shuffled(8, 42, "order").tolist() == [6, 3, 5, 7, 0, 1, 2, 4]
    assert uniform(2, 42, "draw").tolist() == [0.5522333279264595, 0.8282799043794566]
