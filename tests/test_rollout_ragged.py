"""Rows without padding give the same results as padded rows, with gradients; unsupported models keep padding."""

import copy

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from rollout import attention, ragged
from rollout.batch import pad_batch
from rollout.engine import generate
from rollout.logprobs import completion_logprobs
from rollout.sampling import SamplingSpec
from stages.ppo.actor_critic import Critic

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, **HEADS),
    "mistral": MistralConfig(**SIZES, **HEADS, sliding_window=5),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "gemma2": Gemma2Config(**SIZES, **HEADS, sliding_window=5, query_pre_attn_scalar=8),
    "gpt2": GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
}
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14, 15], [3], [20, 21]]
COMPLETIONS = [[30, 31, 32, 33, 34, 35, 36], [40, 39], [41, 42, 43], [50, 51, 52, 53]]
BATCH = pad_batch(PROMPTS, COMPLETIONS, 0, torch.device("cpu"))
assert BATCH.unpadded.lengths == [10, 10, 4, 6]


@pytest.fixture(autouse=True, params=["rows one by one", "rows beside one another"])
def attended(request, monkeypatch):
    """How attention is computed, and the number of fused attention calls for BATCH in one layer."""
    monkeypatch.setattr(attention, "_RUN_TOKENS", 1 if request.param == "rows one by one" else 1000)
    return {"rows one by one": 3, "rows beside one another": 1}[request.param]


def test_rows_of_equal_length_share_an_attention_call(attended, monkeypatch):
    calls = []
    causal = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda *args: calls.append(args[0].shape) or causal(*args))
    q = torch.zeros(1, 4, 30, 8)
    this = attention.Ragged(BATCH.unpadded.lengths, BATCH.unpadded.place, [None])
    assert this.attend(0, q, q, q, 1.0, None).shape == (1, 30, 4, 8)
    assert len(calls) == attended
    assert calls[0] == ((2, 4, 10, 8) if attended == 3 else (4, 4, 10, 8))


def test_many_short_rows_are_batched(monkeypatch):
    monkeypatch.undo()
    calls = []
    causal = attention._causal
    monkeypatch.setattr(attention, "_causal", lambda *args: calls.append(1) or causal(*args))
    for lengths, expected in (([70, 20, 40], 3), ([9, 10, 11, 12], 1), ([9] * 40, 1)):
        place = torch.cat([torch.arange(n) + row * max(lengths) for row, n in enumerate(lengths)])
        q = torch.zeros(1, 4, sum(lengths), 8)
        attention.Ragged(lengths, place, [None]).attend(0, q, q, q, 1.0, None)
        assert len(calls) == expected
        calls.clear()


def model_of(config, kind=AutoModelForCausalLM, **more):
    torch.manual_seed(0)
    model = kind.from_config(copy.deepcopy(config), **more)  # enabling changes the model itself
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients(model, values):
    """Gradients of a sum that weights every token of a completion differently."""
    model.zero_grad()
    weights = torch.arange(1.0, 1 + values.numel()).view(values.shape)
    torch.where(BATCH.completion_mask, values * weights, 0.0).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def near(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, grad in theirs.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_and_gradients_equal_those_of_padded_rows(family, checkpointing):
    padded = model_of(FAMILIES[family])
    unpadded = copy.deepcopy(padded)
    ragged.enable(unpadded)
    assert ragged.enabled(unpadded) and not ragged.enabled(padded)
    if checkpointing:
        unpadded.gradient_checkpointing_enable()
        unpadded.train()
    (expected, entropy), (found, found_entropy) = (completion_logprobs(m, BATCH, 0.8) for m in (padded, unpadded))
    mask = BATCH.completion_mask
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_entropy[mask], entropy[mask], rtol=1e-5, atol=1e-5)
    assert not found[~mask].any()
    near(gradients(unpadded, found), gradients(padded, expected))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_critic_gives_the_same_values(family):
    config = FAMILIES[family]
    config.num_labels, config.pad_token_id = 1, 0
    padded = Critic(model_of(config, AutoModelForSequenceClassification), torch.float32)
    torch.nn.init.normal_(padded.head.weight)
    unpadded = copy.deepcopy(padded)
    ragged.enable(unpadded.body)
    assert ragged.enabled(unpadded.body)
    expected, found = padded(BATCH), unpadded(BATCH)
    mask = BATCH.completion_mask
    torch.testing.assert_close(found[mask], expected[mask], rtol=1e-5, atol=1e-5)
    near(gradients(unpadded, found), gradients(padded, expected))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_of_a_conversation_the_policys_tokens_alone_are_computed_and_all_are_read(family):
    actions = [torch.tensor([(i + t) % 3 != 1 for t in range(len(ids))]) for i, ids in enumerate(COMPLETIONS)]
    batch = pad_batch(PROMPTS, COMPLETIONS, 0, torch.device("cpu"), actions)
    mask = batch.completion_mask
    assert mask.sum() == sum(int(own.sum()) for own in actions) < BATCH.completion_mask.sum()
    policy, body = model_of(FAMILIES[family]), model_of(FAMILIES[family])
    critic = Critic(body, torch.float32)
    torch.nn.init.normal_(critic.head.weight)
    for _ in range(2):
        logp, part = (completion_logprobs(policy, b, 0.8)[0] for b in (BATCH, batch))
        torch.testing.assert_close(part[mask], logp[mask], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(critic(batch)[mask], critic(BATCH)[mask], rtol=1e-5, atol=1e-5)
        ragged.enable(policy)  # then once more, without padding
        ragged.enable(critic.body)
    assert not part[~mask].any() and len(batch.unpadded.before) == mask.sum()


def test_a_model_with_biases_in_its_mask_reads_padded_rows(caplog):
    model = model_of(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4))
    expected, _ = completion_logprobs(model, BATCH, 1.0)
    ragged.enable(model)
    assert not ragged.enabled(model)
    assert "rows are padded, because" in caplog.text
    found, _ = completion_logprobs(model, BATCH, 1.0)
    assert torch.equal(found, expected)


def test_an_enabled_model_still_generates():
    model = model_of(FAMILIES["qwen3"]).eval()
    spec = SamplingSpec(6, (2,), 0)
    keys = [(i,) for i in range(len(PROMPTS))]
    before = generate(model, PROMPTS, spec, keys, seed=0)
    ragged.enable(model)
    assert [c.ids for c in generate(model, PROMPTS, spec, keys, seed=0)] == [c.ids for c in before]


def test_under_autocast_attention_agrees_within_bfloat16():
    model = model_of(FAMILIES["llama"])
    ragged.enable(model)
    exact, _ = completion_logprobs(model, BATCH, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = completion_logprobs(model, BATCH, 1.0)
    assert not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.1)
    rounded.sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
