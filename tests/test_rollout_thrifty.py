"""Norms and gated layers that keep less give what the models' own give, gradients included."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from rollout import thrifty

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
KNOWN = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
IDS = torch.arange(24).view(2, 12)


def model_of(config, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(**SIZES, **HEADS))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def outcome(model):
    """Logits, and the gradients of a sum that weighs them differently."""
    logits = model(input_ids=IDS).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum().backward()
    return {"logits": logits.detach()} | {name: p.grad for name, p in model.named_parameters()}


def kept(model):
    """Bytes that are kept for the backward pass."""
    sizes = {}

    def pack(x):
        sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logits = model(input_ids=IDS).logits
    del logits
    return sum(sizes.values())


@pytest.mark.parametrize("dtype, allowed", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("family", KNOWN)
def test_logits_and_gradients_are_the_models_own_and_less_is_kept(family, dtype, allowed):
    own = model_of(KNOWN[family], dtype)
    ours = copy.deepcopy(own)
    thrifty.enable(ours)
    assert {type(m).__name__.removeprefix(family.capitalize()) for m in ours.modules() if thrifty.enabled(m)} == {
        "RMSNorm",
        "MLP",
    }
    assert kept(ours) < kept(own)
    expected, found = outcome(own), outcome(ours)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert (found[name] - value).float().norm() <= allowed * value.float().norm() + 1e-6, name


def test_under_autocast_too():
    own = model_of(LlamaConfig)
    ours = copy.deepcopy(own)
    thrifty.enable(ours)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = own(input_ids=IDS).logits, ours(input_ids=IDS).logits
    assert found.dtype == expected.dtype == torch.bfloat16
    assert (found - expected).float().norm() <= 2e-2 * expected.float().norm()


def test_it_is_undone_and_what_is_not_known_is_left_alone():
    model, other = model_of(LlamaConfig), model_of(Gemma2Config)
    thrifty.enable(model)
    thrifty.enable(other)
    assert any(thrifty.enabled(m) for m in model.modules()) and not any(thrifty.enabled(m) for m in other.modules())
    thrifty.disable(model)
    assert all("forward" not in vars(m) for m in model.modules())


def test_a_copy_computes_with_its_own_weights():
    model = model_of(LlamaConfig)
    thrifty.enable(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert twin(input_ids=IDS).logits.abs().sum() > 0
