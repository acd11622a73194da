"""Batches of trajectories: packing, views, selections, and what follows from turns; the exchange between processes."""

from dataclasses import fields

import pytest
import torch
from torch import Tensor

from rollout.trajectory import Trajectory, TrajectoryBatch, Turn
from tests.conversations import Conversations
from tests.launching import grouped


@pytest.fixture
def conversations() -> Conversations:
    return Conversations(3, 2, seed=1)


def same(one: Trajectory, other: Trajectory) -> None:
    for name in (column.name for column in fields(Trajectory)):
        a, b = getattr(one, name), getattr(other, name)
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b, name


def test_a_batch_gives_back_what_was_packed(conversations):
    batch = TrajectoryBatch.pack(conversations.trajectories)
    assert len(batch) == 6
    for i, trajectory in enumerate(conversations.trajectories):
        same(batch[i], trajectory)


def test_a_selection_and_a_join_are_those_of_the_trajectories(conversations):
    batch, trajectories = TrajectoryBatch.pack(conversations.trajectories), conversations.trajectories
    for rows in ([4, 0, 4, 2], [3], []):
        chosen = batch.select(torch.tensor(rows, dtype=torch.int64))
        assert len(chosen) == len(rows)
        for i, row in enumerate(rows):
            same(chosen[i], trajectories[row])
    both = TrajectoryBatch.join([batch.select(torch.tensor([5, 1])), batch.select(torch.tensor([0]))])
    for i, row in enumerate((5, 1, 0)):
        same(both[i], trajectories[row])


def test_nothing_packed_has_the_types_of_something():
    nothing, something = TrajectoryBatch.pack([]), TrajectoryBatch.pack(Conversations(1, 2, 0).trajectories)
    for name, column in nothing.columns().items():
        assert len(column) == 0
        if column.dtype != torch.float32:  # the random conversations have double precision
            assert column.dtype == something.columns()[name].dtype, name


def test_actions_are_the_tokens_of_the_policys_turns(conversations):
    batch = conversations.batch
    for i, trajectory in enumerate(conversations.trajectories):
        mask = [t.actor == "policy" for t in trajectory.turns for _ in range(t.start, t.end)]
        assert (
            batch.pad(batch.actions)[i, : len(mask)].tolist() == mask
            and not batch.pad(batch.actions)[i, len(mask) :].any()
        )
        assert batch.action_count[i] == sum(mask)
        assert batch.stopped[i] == (trajectory.end == "stop")
        numbers = [x for x, own in zip(trajectory.old_logp.tolist(), mask, strict=True) if own]
        assert batch.total(batch.old_logp)[i].item() == sum(numbers)  # in this order
        refs = [x for x, own in zip(trajectory.ref_logp.tolist(), mask, strict=True) if own]
        assert batch.kl[i].item() == sum(numbers) - sum(refs)
        assert batch.reward[i].item() == pytest.approx(trajectory.score + sum(t.reward for t in trajectory.turns))


def test_a_turns_reward_lies_at_its_last_token(conversations):
    batch = conversations.batch
    for i, trajectory in enumerate(conversations.trajectories):
        expected = conversations.batch[i].dense.clone()
        for turn in trajectory.turns:
            if turn.actor == "policy":
                expected[turn.end - 1] += turn.reward
        torch.testing.assert_close(batch.pad(batch.token_reward)[i, : len(expected)], expected, rtol=1e-6, atol=1e-6)
    unpaid = batch.with_columns(turn_reward=torch.zeros_like(batch.turn_reward))
    assert unpaid.token_reward is unpaid.dense
    assert unpaid.with_columns(dense=None).token_reward is None


def test_the_last_answer_and_what_is_before_it(conversations):
    batch = conversations.batch
    contexts, answers = batch.last_answers()
    numbers = [[float(token) for token in answer] for answer in answers]
    column = batch.pad(batch.at_last_answers(numbers))
    for i, trajectory in enumerate(conversations.trajectories):
        cut = trajectory.turns[-1].start
        assert contexts[i] == [*trajectory.prompt_ids.tolist(), *trajectory.ids[:cut].tolist()]
        assert answers[i] == trajectory.ids[cut:].tolist()
        assert column[i, cut : len(trajectory.ids)].tolist() == numbers[i] and not column[i, :cut].any()


def test_a_model_reads_all_and_is_asked_about_actions(conversations):
    rows = [3, 0, 5]
    padded = conversations.batch.padded(rows, 99, torch.device("cpu"))
    for i, row in enumerate(rows):
        trajectory = conversations.trajectories[row]
        real = padded.attention_mask[i].bool()
        assert padded.input_ids[i, real].tolist() == [*trajectory.prompt_ids.tolist(), *trajectory.ids.tolist()]
        assert (padded.input_ids[i, ~real] == 99).all()
        length = len(trajectory.ids)
        mask = [t.actor == "policy" for t in trajectory.turns for _ in range(t.start, t.end)]
        assert padded.completion_mask[i, :length].tolist() == mask
        assert not padded.completion_mask[i, length:].any()


def test_turns_have_to_cover_the_tokens():
    with pytest.raises(AssertionError):
        TrajectoryBatch.pack(
            [
                Trajectory(
                    row=0,
                    prompt_ids=torch.tensor([1], dtype=torch.int32),
                    ids=torch.tensor([2, 3], dtype=torch.int32),
                    turns=(Turn("policy", 0, 1),),
                    end="stop",
                    engine_logp=torch.zeros(2),
                )
            ]
        )


@pytest.mark.slow
def test_processes_gather_columns_of_different_lengths(root):
    done = grouped(root, "cpu2", "tests.exchanging")
    assert done.returncode == 0, done.stderr[-3000:]
