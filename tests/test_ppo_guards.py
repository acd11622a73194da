"""The guards of a policy-gradient run on made-up answers: probe, named stops, over-optimisation, what is kept."""

import json
import math

import pytest
import torch

from handoff.errors import GateError
from rollout.trajectory import Trajectory, TrajectoryBatch, Turn
from stages.ppo.config import GuardConfig, PPOTrainConfig
from stages.ppo.guards import Watch, probe, probe_size
from stages.ppo.metrics import repetition
from stages.ppo.sampler import rewards_of

CPU = torch.device("cpu")
FINE = {
    "objective/kl": 1.0,
    "val/first_ratio_deviation": 0.0,
    "val/num_eos_tokens": 3,
    "val/explained_variance": 0.5,
    "policy/entropy_avg": 1.0,
}


def answer(score=0.0, length=4, stopped=True, kl=0.0) -> Trajectory:
    logp = torch.zeros(length)
    ref = logp.clone()
    ref[-1] = -kl
    return Trajectory(
        row=0,
        prompt_ids=torch.tensor([1, 2], dtype=torch.int32),
        ids=torch.full((length,), 5, dtype=torch.int32),
        turns=(Turn("policy", 0, length),),
        end="stop" if stopped else "length",
        engine_logp=logp,
        old_logp=logp,
        ref_logp=ref,
        score=score,
    )


def answers(scores, **more) -> TrajectoryBatch:
    return TrajectoryBatch.pack([answer(score, **more) for score in scores])


def test_rewards_lose_what_the_recipe_takes_from_endless_and_overlong_answers():
    t = PPOTrainConfig(max_completion_length=8, overlong_buffer=4, overlong_penalty=2.0, missing_eos_penalty=0.5)
    ends = [(4, True), (6, True), (8, False)]
    batch = TrajectoryBatch.pack([answer(1.0, length, stopped) for length, stopped in ends])
    assert rewards_of(batch, t, CPU).tolist() == [1.0, 0.0, -1.5]


def test_probe_lets_a_varied_reward_pass():
    t, guards = PPOTrainConfig(), GuardConfig()
    found = probe(answers([0, 1, 0, 1, 1, 1, 1, 1]), t, guards)
    assert found == {"probe/truncated": 0.0, "probe/frac_reward_zero_std": 0.5, "probe/reward": 0.75}
    assert probe_size(t) == 4
    assert probe_size(PPOTrainConfig(num_generations=16)) == 16


def test_probe_refuses_a_constant_reward_with_the_remedy():
    with pytest.raises(GateError, match=r"no learning signal: .* 100% of 2 prompts all have the same reward .* easier"):
        probe(answers([1.0] * 8), PPOTrainConfig(), GuardConfig())
    with pytest.raises(GateError, match="100% of 2 prompts have equal rewards"):
        probe(answers([1.0] * 4 + [0.0] * 4), PPOTrainConfig(), GuardConfig())


def test_probe_refuses_a_constant_reward_though_penalties_for_cut_off_and_long_answers_differ():
    t = PPOTrainConfig(max_completion_length=8, overlong_buffer=4)
    ends = [(8, False), (3, True), (6, True), (4, True)] * 2
    batch = TrajectoryBatch.pack([answer(0.25, length, stopped) for length, stopped in ends])
    assert len(set(rewards_of(batch, t, CPU).tolist())) == 3
    with pytest.raises(GateError, match=r"no learning signal: .* 100% of 2 prompts all have the same reward"):
        probe(batch, t, GuardConfig())


def test_probe_refuses_answers_that_are_cut_off_with_the_remedy():
    batch = answers([0, 1, 0, 1], stopped=False)
    with pytest.raises(GateError, match=r"truncation: .* 100% of 4 answers .* Raise train.max_completion_length"):
        probe(batch, PPOTrainConfig(max_completion_length=4), GuardConfig())
    probe(batch, PPOTrainConfig(max_completion_length=4), GuardConfig(max_truncated=1.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objective/kl": 60.0}, r"60\.0 nats from the reference, above guards\.kl_limit 50\.0"),
        ({"val/first_ratio_deviation": 0.02}, "before any step the policy differs"),
    ],
)
def test_stops_at_once(change, said):
    with pytest.raises(GateError, match=said):
        Watch().after_iteration({**FINE, **change}, torch.tensor([0.0, 1.0]), 7, GuardConfig())


@pytest.mark.parametrize(
    ("change", "rewards", "said"),
    [
        ({}, [0.5, 0.5], "one and the same reward, 0.5"),
        ({"val/num_eos_tokens": 0}, [0.0, 1.0], "no answer of 3 iterations in a row ended"),
        ({"val/explained_variance": -0.1}, [0.0, 1.0], "for 3 iterations the critic has predicted worse"),
    ],
)
def test_stops_after_patience_and_a_good_iteration_starts_the_count_again(change, rewards, said):
    guards, watch = GuardConfig(patience=3), Watch()
    bad = ({**FINE, **change}, torch.tensor(rewards))
    good = (FINE, torch.tensor([0.0, 1.0]))
    for metrics, reward in (bad, bad, good, bad, bad):
        watch.after_iteration(metrics, reward, 0, guards)
    with pytest.raises(GateError, match=said):
        watch.after_iteration(*bad, 5, guards)


def test_stops_when_entropy_collapses():
    watch = Watch()
    watch.after_iteration(FINE, torch.tensor([0.0, 1.0]), 0, GuardConfig())
    watch.after_iteration({**FINE, "policy/entropy_avg": 0.06}, torch.tensor([0.0, 1.0]), 1, GuardConfig())
    with pytest.raises(GateError, match=r"entropy is 0\.0400 nats a token, below 5% of the first iteration's 1\.0000"):
        watch.after_iteration({**FINE, "policy/entropy_avg": 0.04}, torch.tensor([0.0, 1.0]), 2, GuardConfig())


def course(watch: Watch, points, learned=True) -> None:
    """Looks at policies with given (score, monitor) over 64 answers with a little spread."""
    for step, (score, monitor) in enumerate(points):
        noise = [0.1 * math.sin(i) for i in range(64)]
        batch = answers([score + n for n in noise], kl=float(step))
        batch = batch.with_columns(monitor=monitor + torch.tensor(noise, dtype=torch.float64))
        watch.look(step, batch, learned)


def test_over_optimisation_is_the_score_up_and_the_monitor_down():
    guards, watch = GuardConfig(), Watch()
    course(watch, [(0, 0), (1, 0.5), (2, 0.2)])
    assert watch.over_optimized(guards) is None  # once may be chance
    course(watch, [(3, 0.1)])
    said = watch.over_optimized(guards)
    assert said is not None
    assert "rose from 1.0" in said and "the monitor fell from 0.5" in said


@pytest.mark.parametrize(
    "points",
    [
        [(0, 0), (1, 0.5), (2, 0.6), (3, 0.7)],  # both rise
        [(0, 0), (1, 0.5), (0.9, 0.2), (0.8, 0.1)],  # both fall: training fails, the reward does not lie
        [(0, 0), (1, 0.5), (2, 0.49), (3, 0.48)],  # within the noise
    ],
)
def test_other_courses_are_not_over_optimisation(points):
    watch = Watch()
    course(watch, points)
    assert watch.over_optimized(GuardConfig()) is None


def test_without_a_monitor_a_learned_score_is_watched_at_constant_length():
    """The score follows length alone; at equal length it has fallen."""
    watch = Watch()
    for step, grown in enumerate((0, 8, 16, 24)):
        lengths = [10 + i % 5 + grown for i in range(60)]
        batch = [answer(0.1 * n - 0.2 * step + 0.001 * (i % 3), n) for i, n in enumerate(lengths)]
        watch.look(step, TrajectoryBatch.pack(batch), learned=True)
    assert [look.score for look in watch.looks] == sorted(look.score for look in watch.looks)
    assert "over-optimisation" in (watch.over_optimized(GuardConfig()) or "")
    same = Watch()
    for step, grown in enumerate((0, 8, 16)):  # a written length bonus may be followed: nothing learned is fooled
        lengths = [10 + i % 5 + grown for i in range(60)]
        same.look(step, TrajectoryBatch.pack([answer(0.1 * n, n) for n in lengths]), False)
    assert same.over_optimized(GuardConfig()) is None


def test_the_best_policy_lies_on_the_frontier():
    watch = Watch()
    course(watch, [(9, 9), (1, 0.5), (2, 0.2), (2.5, 0.1)])
    assert watch.best(0.0, monitored=True) == 1  # the untrained one is not a result
    assert watch.best(0.0, monitored=False) == 3
    assert watch.best(0.7, monitored=False) == 2  # 2.5 − 0.7·3 < 2 − 0.7·2
    assert Watch().best(0.0, monitored=True) is None


def test_a_watch_survives_being_saved():
    watch = Watch()
    course(watch, [(0, 0), (1, 0.5)])
    watch.after_iteration(FINE, torch.tensor([1.0, 1.0]), 1, GuardConfig())
    again = Watch.from_state(json.loads(json.dumps(watch.state())))
    assert again == watch


def test_repetition_is_the_share_of_repeated_grams():
    assert repetition([1, 2, 3]) == 0.0
    assert repetition(list(range(20))) == 0.0
    assert repetition([7] * 13) == pytest.approx(0.9)
