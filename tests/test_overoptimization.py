"""The fit of reward against distance: it recovers known coefficients, and reads a run's evaluations."""

import json
import math

import pytest

from benchmarks.overoptimization import course, fit


def test_the_fit_recovers_alpha_and_beta():
    kl = [0.0, 0.5, 1.0, 2.0, 5.0, 12.0, 30.0]
    gain = [0.0, *(math.sqrt(k) * (0.7 - 0.25 * math.log(math.sqrt(k))) for k in kl[1:])]
    alpha, beta, r2 = fit(kl, gain)
    assert (alpha, beta, r2) == pytest.approx((0.7, 0.25, 1.0))
    noisy = [g + (0.2 if i % 2 else -0.2) for i, g in enumerate(gain)]
    assert 0.5 < fit(kl, noisy)[2] < 0.99


def test_a_course_has_gains_over_the_first_evaluation(tmp_path):
    lines = [
        {"step": 0, "probe/reward": 1.0},
        {"step": 0, "eval/kl": 0.0, "eval/monitor": 0.25, "eval/scores": 1.0},
        {"step": 1, "objective/kl": 0.5},
        {"step": 1, "eval/kl": 2.0, "eval/monitor": 0.75, "eval/scores": 3.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert course(tmp_path) == {"kl": [0.0, 2.0], "gold": [0.0, 0.5], "proxy": [0.0, 2.0]}
