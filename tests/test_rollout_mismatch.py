"""The mismatch monitor: its metrics, tolerated differences, and each mistake that it should detect."""

import math

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from handoff.errors import GateError
from rollout.batch import pad_batch
from rollout.engine import generate
from rollout.logprobs import completion_logprobs
from rollout.mismatch import check_mismatch, mismatch_metrics, truncated_importance_weights, usual_limit
from rollout.sampling import Completion, SamplingSpec
from tests.fake_vllm import tiny_llama

LIMIT, BF16_LIMIT = usual_limit(bf16=False), usual_limit(bf16=True)
PROMPTS = [[5, 9, 11], [7] * 6, [3, 4], [8, 9, 10, 11]] * 8
CPU = torch.device("cpu")


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (6,), generator=generator)
    mask = torch.arange(8) < lengths[:, None]
    engine = -3 * torch.rand(6, 8, generator=generator)
    trainer = engine + 0.3 * torch.randn(6, 8, generator=generator)
    # Values after an answer's end must not matter.
    return engine.masked_fill(~mask, torch.nan), trainer.masked_fill(~mask, -torch.inf), mask


@pytest.mark.parametrize("seed", range(4))
def test_metrics_are_those_of_a_loop_over_tokens(seed):
    engine, trainer, mask = ragged(seed)
    difference = [t - e for e, t in zip(engine[mask].tolist(), trainer[mask].tolist(), strict=True)]
    ratio = [math.exp(d) for d in difference]
    expected = {
        "sampling/sampling_logp_difference/mean": np.mean(np.abs(difference)),
        "sampling/sampling_logp_difference/max": np.max(np.abs(difference)),
        "sampling/importance_sampling_ratio/min": min(ratio),
        "sampling/importance_sampling_ratio/mean": np.mean(ratio),
        "sampling/importance_sampling_ratio/max": max(ratio),
        "sampling/kl": np.mean([r - 1 - d for r, d in zip(ratio, difference, strict=True)]),
    }
    assert mismatch_metrics(engine, trainer, mask) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("seed", range(4))
def test_weights_are_those_of_a_loop_over_tokens(seed, level):
    engine, trainer, mask = ragged(seed)
    cap = 1.2
    weights = truncated_importance_weights(engine, trainer, mask, cap, level)
    capped = 0
    for row in range(len(mask)):
        difference = [float(trainer[row, i] - engine[row, i]) for i in range(mask.shape[1]) if mask[row, i]]
        for i in range(mask.shape[1]):
            expected = 1.0
            if mask[row, i]:
                expected = min(math.exp(difference[i] if level == "token" else sum(difference)), cap)
                capped += expected == cap
            assert weights[row, i].item() == pytest.approx(expected, rel=1e-5)
    assert capped > 0 and not weights.requires_grad


def test_importance_weights_correct_samples_to_the_trainers_policy():
    """On one token of a small vocabulary, the weighted mean over all engine outcomes equals the trainer's mean."""
    generator = torch.Generator().manual_seed(0)
    engine, trainer = torch.log_softmax(torch.randn(2, 12, generator=generator), -1)
    value = torch.randn(12, generator=generator)
    weights = truncated_importance_weights(engine[:, None], trainer[:, None], torch.ones(12, 1, dtype=torch.bool), 1e9)
    estimate = (engine.exp() * weights[:, 0] * value).sum()
    assert estimate.item() == pytest.approx((trainer.exp() * value).sum().item(), abs=1e-6)


@torch.no_grad()
def sample(model, temperature: float = 1.0, top_p: float = 1.0, reports_raw: bool = False) -> list[Completion]:
    """An engine that samples with `top_p` and reports the log-probabilities of the truncated distribution, or with
    `reports_raw` those of the model at temperature 1."""
    out = []
    generator = torch.Generator().manual_seed(1)
    for prompt in PROMPTS:
        completion = Completion()
        for _ in range(8):
            logits = model(torch.tensor([[*prompt, *completion.ids]])).logits[0, -1] / temperature
            p, order = torch.softmax(logits, -1).sort(descending=True)
            p = torch.where(p.cumsum(-1) - p < top_p, p, 0.0)
            logp = torch.log(p / p.sum())
            rank = int(torch.multinomial(p, 1, generator=generator))
            completion.ids.append(int(order[rank]))
            reported = torch.log_softmax(logits * temperature, -1)[order] if reports_raw else logp
            completion.logprobs.append(float(reported[rank]))
        out.append(completion)
    return out


@torch.no_grad()
def measured(trainer, completions: list[Completion], temperature: float) -> dict[str, float]:
    batch = pad_batch(PROMPTS, [c.ids for c in completions], 0, CPU)
    logp, _ = completion_logprobs(trainer, batch, temperature)
    engine = pad_sequence([torch.tensor(c.logprobs) for c in completions], batch_first=True)
    return mismatch_metrics(engine, logp, batch.completion_mask)


@pytest.mark.parametrize("temperature", [0.6, 1.0])
def test_the_engine_of_this_process_agrees_with_its_own_model(temperature):
    model = tiny_llama(hidden_size=32)
    spec = SamplingSpec(8, (2,), 0, temperature)
    completions = generate(model, PROMPTS, spec, [(i,) for i in range(len(PROMPTS))], seed=1)
    metrics = measured(model, completions, temperature)
    assert metrics["sampling/sampling_logp_difference/mean"] < 1e-5
    assert metrics["sampling/importance_sampling_ratio/mean"] == pytest.approx(1, abs=1e-5)
    check_mismatch(metrics, LIMIT)


def test_an_engine_that_renormalises_after_top_p_is_found_out():
    model = tiny_llama(hidden_size=32)
    metrics = measured(model, sample(model, top_p=0.8), 1.0)
    assert metrics["sampling/importance_sampling_ratio/max"] <= 1 + 1e-5
    with pytest.raises(GateError, match="truncates the distribution: top-p"):
        check_mismatch(metrics, BF16_LIMIT)
    check_mismatch(measured(model, sample(model), 1.0), LIMIT)


def test_the_rounding_of_bfloat16_is_no_mistake():
    """Logits up to 24, rounded to bfloat16 once before and once after a small shift, as two implementations would."""
    exact = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 6
    chosen = torch.multinomial(torch.softmax(exact, -1), 1, generator=torch.Generator().manual_seed(1))
    mine, theirs = (
        torch.log_softmax((exact + shift).bfloat16().float(), -1).gather(-1, chosen) for shift in (0.0, 0.06)
    )
    metrics = mismatch_metrics(mine, theirs, torch.ones_like(chosen, dtype=torch.bool))
    assert metrics["sampling/sampling_logp_difference/mean"] > 0.02
    check_mismatch(metrics, BF16_LIMIT)


def test_another_temperature_is_found_out():
    model = tiny_llama(hidden_size=32)
    with pytest.raises(GateError, match="another temperature"):
        check_mismatch(measured(model, sample(model), 0.6), BF16_LIMIT)


def test_log_probabilities_without_the_temperature_are_found_out():
    model = tiny_llama(hidden_size=32)
    with pytest.raises(GateError, match="without the temperature"):
        check_mismatch(measured(model, sample(model, 0.6, reports_raw=True), 0.6), BF16_LIMIT)


def test_stale_weights_are_found_out():
    model = tiny_llama(hidden_size=32)
    completions = sample(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    with pytest.raises(GateError, match="stale weights"):
        check_mismatch(measured(model, completions, 1.0), LIMIT)


def test_ratios_around_one_point_to_another_policy():
    engine = torch.full((2, 2), -1.0)
    trainer = torch.log(torch.tensor([[1.3, 0.7], [1.3, 0.7]])) + engine
    with pytest.raises(GateError, match="average to 1, so the engine reports what it samples from"):
        check_mismatch(mismatch_metrics(engine, trainer, torch.ones(2, 2, dtype=torch.bool)), LIMIT)


def test_a_difference_that_is_not_a_number_never_passes():
    engine = torch.tensor([[-1.0, torch.nan]])
    with pytest.raises(GateError, match="nan nats"):
        check_mismatch(mismatch_metrics(engine, engine - 0.01, torch.ones(1, 2, dtype=torch.bool)), LIMIT)
