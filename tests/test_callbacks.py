"""The Trainer-based stages' shared parts: the order of rows, the number of steps, divergence, Muon."""

import numpy as np
import pytest
import torch
from transformers.pytorch_utils import Conv1D

from training.config import MuonTrainConfig, TrainConfig
from training.faults import diverged
from training.measure import wilson
from training.optimizer import MuonAdamW, muon_adamw
from training.trainer import StepOrder, total_steps


def order(*args, epoch=0, **kwargs):
    made = StepOrder(*args, **kwargs)
    made.set_epoch(epoch)
    return list(made)


@pytest.mark.parametrize("lengths", [None, [7, 1, 5, 5, 2, 9, 4, 4, 8, 3, 6]])
@pytest.mark.parametrize(("rows", "step_size"), [(11, 4), (11, 11), (11, 16), (11, 3), (11, 1)])
def test_an_epoch_has_every_row_and_whole_steps(rows, step_size, lengths):
    got = order(rows, step_size, 1, lengths)
    assert len(got) == len(StepOrder(rows, step_size, 1, lengths)) == -(-rows // step_size) * step_size
    assert set(got) == set(range(rows))
    assert max(got.count(row) for row in range(rows)) <= -(-step_size // rows) + 1


def test_the_order_depends_only_on_seed_and_epoch():
    torch.manual_seed(0)
    first = order(50, 8, 1)
    torch.manual_seed(1)
    np.random.seed(1)
    assert order(50, 8, 1) == first
    assert order(50, 8, 1, epoch=1) != first
    assert order(50, 8, 2) != first


def test_rows_of_similar_length_share_a_batch_and_steps_are_mixed():
    lengths = np.random.default_rng(0).integers(5, 100, 640)
    grouped = lengths[order(640, 32, 1, lengths.tolist())].reshape(-1, 4, 8)  # step, group, row
    plain = lengths[order(640, 32, 1)].reshape(-1, 4, 8)
    assert np.ptp(grouped, axis=2).mean() < 0.15 * np.ptp(plain, axis=2).mean()
    # A whole step has short and long rows, the longest group first.
    assert np.ptp(grouped.reshape(-1, 32), axis=1).mean() > 0.5 * np.ptp(plain.reshape(-1, 32), axis=1).mean()
    assert (np.diff(grouped.max(axis=2), axis=1) <= 0).all()


@pytest.mark.parametrize(
    ("fields", "rows", "steps"),
    [({}, 64, 2), ({}, 65, 3), ({"num_train_epochs": 0.5}, 64, 1), ({"max_steps": 7}, 64, 7), ({}, 1, 1)],
)
def test_the_number_of_steps(fields, rows, steps):
    assert total_steps(TrainConfig(learning_rate=0.01, **fields), rows) == steps


def test_a_divergence_is_named_with_its_usual_causes():
    text = diverged("sft", "loss", float("nan"), 12, 4)
    assert text.startswith("sft: loss is nan at step 12") and "learning_rate too high" in text


def test_wilsons_interval():
    """Against the solutions of (p - share)^2 = z^2 p (1 - p) / n, which define it."""
    for successes, n in ((0, 10), (7, 10), (10, 10), (41.5, 50)):
        for bound in wilson(successes, n):
            assert (bound - successes / n) ** 2 == pytest.approx(1.96**2 * bound * (1 - bound) / n, abs=1e-9)
    low, high = wilson(7, 10)
    assert low < 0.7 < high


def test_muon_and_adamw_step_as_each_alone():
    """It saves, restores and schedules as one optimizer; each part's parameters change as with that part alone."""
    torch.manual_seed(0)
    config = MuonTrainConfig(optim="muon", muon_learning_rate=0.05, learning_rate=0.01, weight_decay=0.1)
    start, target = (torch.randn(6, 4), torch.randn(4)), torch.randn(6)

    def parameters():
        return [torch.nn.Parameter(value.clone()) for value in start]

    def backward(matrix, vector):
        (((matrix @ vector) - target) ** 2).sum().backward()

    matrix, vector = parameters()
    muon = torch.optim.Muon([matrix], lr=0.05, momentum=0.95, weight_decay=0.1)
    adamw = torch.optim.AdamW([vector], lr=0.01, weight_decay=0.0)
    both = parameters()
    one = MuonAdamW([both[0]], [{"params": [both[1]], "weight_decay": 0.0}], config)
    schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0 if step < 4 else 0.5)
    for step in range(8):
        if step == 3:  # a new optimizer continues from the saved state
            saved = one.state_dict()
            one = MuonAdamW([both[0]], [{"params": [both[1]], "weight_decay": 0.0}], config)
            one.load_state_dict(saved)
            schedule = torch.optim.lr_scheduler.LambdaLR(one, lambda step: 1.0 if step < 1 else 0.5)
        for optimizer in (muon, adamw):
            optimizer.param_groups[0]["lr"] = (0.05 if optimizer is muon else 0.01) * (1.0 if step < 4 else 0.5)
            optimizer.zero_grad()
        backward(matrix, vector)
        muon.step()
        adamw.step()
        one.zero_grad()
        backward(*both)
        one.step()
        schedule.step()
    assert torch.equal(matrix, both[0]) and torch.equal(vector, both[1])
    assert not torch.equal(matrix, start[0])


@pytest.mark.parametrize(("inputs", "outputs"), [(6, 4), (4, 12), (5, 5)])
def test_muon_steps_a_transposed_matrix_as_the_same_linear_layer(inputs, outputs):
    """GPT-2's Conv1D holds (in, out), Linear (out, in)."""
    torch.manual_seed(0)
    config = MuonTrainConfig(optim="muon", muon_learning_rate=0.05, learning_rate=0.01, weight_decay=0.1)

    class Network(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.embed, self.layer = torch.nn.Embedding(3, inputs), layer

        def get_input_embeddings(self):
            return self.embed

        def get_output_embeddings(self):
            return None

    linear, conv = torch.nn.Linear(inputs, outputs, bias=False), Conv1D(outputs, inputs)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
    x, target = torch.randn(8, inputs), torch.randn(8, outputs)
    for layer in (linear, conv):
        optimizer = muon_adamw(Network(layer), set(), config)
        for _ in range(4):
            optimizer.zero_grad()
            (layer(x) - target).square().sum().backward()
            optimizer.step()
    assert torch.allclose(conv.weight, linear.weight.T, rtol=0, atol=5e-3)  # Muon orthogonalises in bfloat16
    assert not torch.allclose(conv.weight, torch.zeros(()), atol=0.05)


def test_muon_keys_without_muon_are_refused():
    with pytest.raises(ValueError, match="muon_learning_rate is not read unless optim is muon"):
        MuonTrainConfig(learning_rate=0.01, muon_learning_rate=0.1)
