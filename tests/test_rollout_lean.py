"""The lean decode step equals the model's own forward pass, and is not used for other models."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rollout import forward
from rollout.bnb_layers import EightBitLinear, FourBitLinear
from rollout.engine import generate
from rollout.lean import _POSITIONS, Lean, fits
from rollout.sampling import SamplingSpec

SIZES = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 128,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, attention_bias=True, tie_word_embeddings=True),
    "llama-scaled-positions": LlamaConfig(
        **SIZES,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [5, 6, 7], [3]]
SPEC = SamplingSpec(20, (2,), 0, temperature=1.3)


def model_of(config):
    """A model whose norms and biases are not the initial ones and zeros."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.15)
    return model


def answers(model, prompts=PROMPTS):
    keys = [("lean", i) for i in range(len(prompts))]
    return generate(model, prompts, SPEC, keys, seed=1, batch_size=3)


@pytest.fixture
def calls(monkeypatch):
    """Counts the uses of the lean step."""
    found = []
    step = Lean.__call__
    monkeypatch.setattr(Lean, "__call__", lambda self, *args: found.append(1) or step(self, *args))
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lean_step_equals_the_models_own(name, calls, monkeypatch):
    compare(model_of(FAMILIES[name]), PROMPTS, calls, monkeypatch)


def test_the_updates_of_an_adapter_are_part_of_the_lean_step(calls, monkeypatch):
    plain = model_of(FAMILIES["qwen2"])
    config = LoraConfig(target_modules=["q_proj", "v_proj", "up_proj", "down_proj"], r=2, lora_dropout=0.5)
    model = get_peft_model(model_of(FAMILIES["qwen2"]), config).base_model.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    assert [c.ids for c in answers(model)] != [c.ids for c in answers(plain)]
    calls.clear()
    compare(model, PROMPTS, calls, monkeypatch)


def compare(model, prompts, calls, monkeypatch):
    found = answers(model, prompts)
    assert calls
    calls.clear()
    monkeypatch.setattr(forward, "fits", lambda model: False)
    expected = answers(model, prompts)
    assert not calls
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.ids == theirs.ids
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)


def test_positions_beyond_the_computed_rotations_work(calls, monkeypatch):
    model = model_of(LlamaConfig(**SIZES | {"max_position_embeddings": 512}))
    prompts = [[3 + i % 90 for i in range(length)] for length in (_POSITIONS - 10, 2 * _POSITIONS - 21, 5)]
    compare(model, prompts, calls, monkeypatch)


def test_under_autocast_it_agrees_within_bfloat16(calls):
    model = model_of(FAMILIES["llama"])
    exact = answers(model)
    calls.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = answers(model)
    assert calls
    same = [(a, b) for a, b in zip(exact, rounded, strict=True) if a.ids == b.ids]
    assert same
    for ours, theirs in same:
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=0.3)
        assert ours.logprobs != theirs.logprobs


def test_current_weights_are_used():
    model = model_of(FAMILIES["qwen3"])
    before = answers(model)
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert [c.ids for c in answers(model)] != [c.ids for c in before]


@pytest.mark.parametrize("what", ["dora", "hook", "another family", "a replaced forward pass", "positions by length"])
def test_other_models_use_their_own_forward_pass(what, calls):
    model = model_of(GemmaConfig(**SIZES) if what == "another family" else FAMILIES["llama"])
    if what == "positions by length":
        by_length = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
        model = model_of(LlamaConfig(**SIZES, rope_parameters=by_length))
    if what == "dora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, use_dora=True)).base_model.model
    if what == "hook":
        model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: output * 0)
    if what == "a replaced forward pass":
        model.model.layers[1].mlp.forward = lambda x: x * 0
    assert not fits(model)
    answers(model)
    assert not calls


@pytest.mark.parametrize("method", [FourBitLinear, EightBitLinear])
def test_quantised_layers_are_computed_with_the_weights_that_they_stand_for(method, calls):
    model = model_of(LlamaConfig(**SIZES))
    keys = {"double": True} if method is FourBitLinear else {}
    for name, layer in list(model.model.named_modules()):
        if isinstance(layer, torch.nn.Linear):
            quantised = method.of(layer.weight.detach(), layer.bias, torch.device("cpu"), **keys)
            model.model.set_submodule(name, quantised)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    for one in (model, adapted.base_model.model):
        assert fits(one)
        fast = answers(one)
        assert calls
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward, "fits", lambda model: False)
            slow = answers(one)
        assert [found.ids for found in fast] == [found.ids for found in slow]
