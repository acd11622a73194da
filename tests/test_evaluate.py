"""Evaluation: intervals against known values, bits per byte against a plain loop, and the whole stage."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from data.encode import Encoder
from data.sampling import uniform
from stages.evaluate.config import Config
from stages.evaluate.statistics import mean, proportion
from stages.evaluate.train import _bits_per_byte
from training.recipe import load_recipe
from training.run import run_section


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals_of_newcombe_1998(hits, n, low, high):
    """The last row is the worked example of Newcombe 1998, table I."""
    estimate = proportion([True] * hits + [False] * (n - hits))
    assert estimate["value"] == pytest.approx(hits / n)
    assert (estimate["low"], estimate["high"]) == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))


def test_bootstrap_interval_covers_as_often_as_it_says():
    """95 % of the intervals of 300 samples of 60 hold the true mean, give or take three deviations."""
    covered = 0
    for trial in range(300):
        sample = uniform(60, 0, "coverage", trial) ** 2  # mean 1/3, skewed
        estimate = mean(sample.tolist(), seed=trial)
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        covered += estimate["low"] <= 1 / 3 <= estimate["high"]
    assert abs(covered / 300 - 0.94) < 3 * math.sqrt(0.95 * 0.05 / 300)


def config(**keys) -> Config:
    data = [{"source": "world", "kind": "prompts", "size": 20, "split": "test"}]
    return Config.model_validate({"models": ["sft"], "data": data, **keys})


@pytest.mark.slow
def test_bits_per_byte_is_a_plain_sum(micro_recipe):
    """A text shorter than the context: −log2 of the product of its tokens' probabilities, over its bytes."""
    folder = load_recipe(micro_recipe).run_dir / "sft" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder.from_pretrained(folder)
    text = "Mira has a red cup. Où est-il?"
    ids = encoder.documents([text])[0]
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    bits = -sum(logp[i, token].item() for i, token in enumerate(ids[1:])) / math.log(2)
    found = _bits_per_byte(model, encoder, [text], config(context_length=512))
    assert found == pytest.approx(bits / len(text.encode()), rel=1e-5)


@pytest.mark.slow
def test_bits_per_byte_of_a_long_text_counts_every_token_once(micro_recipe):
    folder = load_recipe(micro_recipe).run_dir / "sft" / "model"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    encoder = Encoder.from_pretrained(folder)
    text = " ".join(f"Mira has {n} cups." for n in range(40))
    ids = encoder.documents([text])[0]
    context, stride = 32, 16
    nats = 0.0
    for place in range(1, len(ids)):
        # Windows end at the context's length and then every stride; the token belongs to the first that reaches it.
        end = context if place < context else context + math.ceil((place + 1 - context) / stride) * stride
        begin = max(0, min(end, len(ids)) - context)
        with torch.no_grad():
            logits = model(torch.tensor([ids[begin:place]])).logits[0, -1].double()
        nats -= torch.log_softmax(logits, -1)[ids[place]].item()
    found = _bits_per_byte(model, encoder, [text], config(context_length=context, batch_size=3))
    assert found == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.slow
def test_the_whole_stage(micro_recipe, tmp_path):
    text = micro_recipe.read_text() + (
        "  evaluate:\n"
        "    models: [pretrain, sft, dpo]\n"
        "    reward: reward\n"
        "    data: [{source: world, kind: prompts, size: 33, split: test}]\n"
        "    text: [{source: world, kind: documents, size: 5, split: test}]\n"
        "    max_new_tokens: 24\n"
        "    context_length: 64\n"
        "    samples: 4\n"
        "  dpo: {parent: sft, data: [{source: world, kind: preferences, size: 16}], train: {max_steps: 1}}\n"
    )
    path = tmp_path / "micro.yaml"
    path.write_text(text)
    recipe = load_recipe(path)
    run_section(recipe, "evaluate")
    results = json.loads((recipe.run_dir / "evaluate" / "results.json").read_text())
    assert results["models"] == ["pretrain", "sft"], "what has not been made is left out"
    for metric in ("accuracy", "gold", "stop_rate", "reward"):
        for estimate in (results["metrics"][name][metric] for name in results["models"]):
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] == 33
    assert results["metrics"]["sft"]["kl"]["value"] > 0
    assert set(results["win_rates"]) == {"sft"} and results["win_rates"]["sft"]["over"] == "pretrain"
    assert sum(family["sft"]["n"] for family in results["families"].values()) == 33
    assert all(math.isfinite(bits["value"]) for bits in results["bits_per_byte"].values())
    assert len(results["samples"]) == 4
    again = json.dumps(results, sort_keys=True)
    (recipe.run_dir / "evaluate" / "started.json").unlink()
    run_section(recipe, "evaluate")
    assert json.dumps(json.loads((recipe.run_dir / "evaluate" / "results.json").read_text()), sort_keys=True) == again


def test_intervals_do_not_depend_on_anything_but_the_seed():
    values = np.linspace(-1, 1, 50).tolist()
    assert mean(values, seed=3) == mean(values, seed=3)
    assert mean(values, seed=3) != mean(values, seed=4)
