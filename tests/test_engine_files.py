"""The files of a state: whole tensors under parameter names, written piece by piece (training/engines/files.py).

Engines are in test_engines.py, numbers of processes in test_world_size.py.
"""

import errno
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from training import engines
from training.config import MuonTrainConfig
from training.engines import files
from training.optimizer import MuonAdamW

ENGINE = engines.current()


class Odd(nn.Module):
    """Tied, frozen and 16-bit weights, a vector, a scalar, and buffers, one of which is not part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.head = nn.Linear(3, 7)
        self.head.weight = self.embed.weight
        self.middle = nn.Linear(3, 3)
        self.scale = nn.Parameter(torch.randn(()))
        self.short = nn.Parameter(torch.randn(5).to(torch.bfloat16))
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.register_buffer("seen", torch.tensor([True, False, True]))
        self.register_buffer("cache", torch.randn(3), persistent=False)

    def forward(self) -> torch.Tensor:
        hidden = self.middle(self.embed.weight)
        return self.head(hidden).square().sum() * self.scale + self.short.float().square().sum()


def train(model: Odd, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        model().backward()
        optimizer.step()
        optimizer.zero_grad()


def adamw(model: Odd) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def muon(model: Odd) -> torch.optim.Optimizer:
    config = MuonTrainConfig(optim="muon", learning_rate=0.01)
    rest = [p for p in model.parameters() if p is not model.middle.weight and p.requires_grad]
    return MuonAdamW([model.middle.weight], [{"params": rest, "weight_decay": 0.0}], config)


@pytest.mark.parametrize("make", [adamw, muon])
def test_a_loaded_state_continues_bit_for_bit(tmp_path: Path, make) -> None:
    torch.manual_seed(0)
    model = Odd()
    optimizer = make(model)
    train(model, optimizer, 3)
    files.save_state(ENGINE, model, optimizer, tmp_path)
    train(model, optimizer, 3)

    torch.manual_seed(1)
    other = Odd()
    frozen, cache = other.frozen.clone(), other.cache.clone()
    other.seen.fill_(False)
    again = make(other)
    files.load_state(ENGINE, other, again, tmp_path)
    train(other, again, 3)
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "frozen")
    assert torch.equal(other.frozen, frozen) and torch.equal(other.cache, cache)

    weights, moments = load_file(tmp_path / files.MODEL), load_file(tmp_path / files.OPTIMIZER)
    assert weights.keys() == {"embed.weight", "head.bias", "middle.weight", "middle.bias", "scale", "short", "unused",
                              "seen"}  # fmt: skip
    assert weights["short"].dtype == torch.bfloat16 and weights["scale"].shape == () and weights["seen"][0]
    assert "exp_avg/embed.weight" in moments and moments["step/scale"] == 3
    assert not any(key.endswith("/unused") for key in moments)
    assert ("momentum_buffer/middle.weight" in moments) is (make is muon)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < files.state_bytes(ENGINE, model) + 4000


def test_loading_weights_alone_keeps_the_optimizer(tmp_path: Path) -> None:
    model = Odd()
    optimizer = adamw(model)
    train(model, optimizer, 2)
    files.save_state(ENGINE, model, optimizer, tmp_path)
    (tmp_path / files.OPTIMIZER).unlink()
    other = Odd()
    fresh = adamw(other)
    files.load_state(ENGINE, other, fresh, tmp_path, moments=False)
    assert torch.equal(other.middle.weight, model.middle.weight)
    assert not fresh.state


def test_before_the_first_step_there_are_no_moments(tmp_path: Path) -> None:
    model = Odd()
    files.save_state(ENGINE, model, adamw(model), tmp_path)
    assert load_file(tmp_path / files.OPTIMIZER) == {}
    other = Odd()
    fresh = adamw(other)
    files.load_state(ENGINE, other, fresh, tmp_path)
    assert not fresh.state


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    model = Odd()
    files.save_state(ENGINE, model, adamw(model), tmp_path)
    other = nn.Linear(2, 2)
    with pytest.raises(AssertionError, match="is of another model"):
        files.load_state(ENGINE, other, torch.optim.AdamW(other.parameters()), tmp_path)


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    for part in (files.MODEL, files.OPTIMIZER):
        (tmp_path / part).symlink_to("/dev/full")
    model = Odd()
    with pytest.raises(OSError) as full:
        files.save_state(ENGINE, model, adamw(model), tmp_path)
    assert full.value.errno == errno.ENOSPC


def draws() -> list[float]:
    return [random.random(), np.random.rand(), np.random.randn(), torch.rand(()).item(), random.gauss(0, 1)]


def test_random_numbers_continue_after_a_resume(tmp_path: Path) -> None:
    draws()
    files.write_rng(ENGINE, tmp_path, files.rng_states(ENGINE))
    json.loads((tmp_path / files.RNG).read_text())
    expected = draws()
    draws()
    files.load_rng(ENGINE, tmp_path, seed=1, step=5)
    assert draws() == expected


def test_with_another_number_of_processes_they_depend_on_seed_step_and_rank(tmp_path: Path, monkeypatch) -> None:
    files.write_rng(ENGINE, tmp_path, files.rng_states(ENGINE) * 2)
    found = set()
    for rank, seed, step in ((0, 1, 5), (1, 1, 5), (0, 2, 5), (0, 1, 6)):
        monkeypatch.setattr(type(ENGINE), "data_rank", property(lambda engine, rank=rank: rank))
        files.load_rng(ENGINE, tmp_path, seed, step)
        once = draws()
        files.load_rng(ENGINE, tmp_path, seed, step)
        assert draws() == once
        found.add(once[3])
    assert len(found) == 4
