"""The in-process engine: the same tokens as `generate`, the right log-probabilities, and no dependence on the batch."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rollout.batch import pad_batch
from rollout.engine import generate
from rollout.errors import RolloutError
from rollout.logprobs import completion_logprobs
from rollout.positions import check_positions, longest_alike
from rollout.sampling import SamplingSpec

PROMPTS = [[5, 9, 11], [7] * 10, [3, 4], [8, 9, 10, 11, 12, 13], [40, 41], [6]]
ARCHITECTURES = {
    "llama": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "mistral": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
}


def tiny(architecture: str, seed: int = 0):
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        architecture, vocab_size=64, bos_token_id=1, eos_token_id=2, pad_token_id=0, **ARCHITECTURES[architecture]
    )
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # random weights predict nearly uniformly; a sharper model shows errors
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model.eval()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_those_of_generate(architecture):
    model = tiny(architecture)
    spec = SamplingSpec(12, (2, 17), 0, temperature=0.0)
    ours = generate(model, PROMPTS, spec, [(i,) for i in range(len(PROMPTS))], seed=1, batch_size=4)
    for prompt, completion in zip(PROMPTS, ours, strict=True):
        out = model.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=[2, 17], pad_token_id=0
        )
        assert completion.ids == out[0, len(prompt) :].tolist()
        assert (completion.end == "stop") == (completion.ids[-1] in (2, 17))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_logprobs_equal_those_of_a_full_forward_pass(temperature):
    model = tiny("llama")
    spec = SamplingSpec(16, (2,), 0, temperature)
    rows = generate(model, PROMPTS, spec, [(i,) for i in range(len(PROMPTS))], seed=3)
    batch = pad_batch(PROMPTS, [r.ids for r in rows], 0, torch.device("cpu"))
    with torch.no_grad():
        logits = model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=batch.position_ids
        ).logits
    width = batch.completion_ids.shape[1]
    logp = torch.log_softmax(logits[:, -width - 1 : -1] / temperature, -1)
    logp = logp.gather(-1, batch.completion_ids[..., None]).squeeze(-1)
    for i, row in enumerate(rows):
        assert torch.allclose(logp[i, : len(row.ids)], torch.tensor(row.logprobs), atol=1e-5)


def test_tokens_do_not_depend_on_batch_or_order():
    model = tiny("llama")
    spec = SamplingSpec(16, (2,), 0)
    keys = [("row", i) for i in range(len(PROMPTS))]
    together = generate(model, PROMPTS, spec, keys, seed=5)
    order = [4, 0, 5, 2, 1, 3]
    for size in (1, 3):
        apart = generate(model, [PROMPTS[i] for i in order], spec, [keys[i] for i in order], seed=5, batch_size=size)
        assert [apart[order.index(i)].ids for i in range(len(PROMPTS))] == [c.ids for c in together]
    assert [c.ids for c in generate(model, PROMPTS, spec, keys, seed=6)] != [c.ids for c in together]


def test_samples_follow_the_distribution():
    """10,000 first tokens against the model's own probabilities: a chi-square statistic within six deviations."""
    model = tiny("llama", seed=1)
    spec = SamplingSpec(1, (2,), 0, temperature=1.5)
    count = 10_000
    rows = generate(model, [[5, 6]] * count, spec, [(i,) for i in range(count)], seed=0, batch_size=2500)
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / 1.5, -1)
    seen = torch.bincount(torch.tensor([r.ids[0] for r in rows]), minlength=len(p))
    enough = p * count >= 5
    chi2 = (((seen - p * count) ** 2) / (p * count))[enough].sum().item()
    degrees = int(enough.sum()) - 1
    assert chi2 < degrees + 6 * (2 * degrees) ** 0.5


def test_a_stop_token_ends_the_row_and_nothing_follows():
    model = tiny("llama")
    spec = SamplingSpec(40, tuple(range(2, 20)), 0, temperature=1.0)
    for completion in generate(model, PROMPTS, spec, [(i,) for i in range(len(PROMPTS))], seed=2):
        assert completion.end == "stop"
        assert all(not 2 <= t < 20 for t in completion.ids[:-1])
        assert len(completion.ids) == len(completion.logprobs)


def test_an_invalid_spec_is_refused():
    with pytest.raises(ValueError, match="max_new_tokens"):
        SamplingSpec(0, (2,), 0)
    with pytest.raises(ValueError, match="temperature"):
        SamplingSpec(4, (2,), 0, temperature=-1.0)


@pytest.mark.parametrize("temperature", [0.0, 1.7])
@pytest.mark.parametrize("plain", [False, True])
def test_ids_without_a_token_are_never_sampled_and_have_no_probability(plain, temperature, monkeypatch):
    """The tokenizer has 40 ids, the model 64 rows of embeddings, as where rows are padded for speed."""
    if plain:
        monkeypatch.setattr("rollout.engine.reason_against", lambda *_: "so that the model's own cache is used")
    model, prompts = tiny("llama"), PROMPTS[:4] * 4
    keys = [(i,) for i in range(len(prompts))]
    every = SamplingSpec(16, (2,), 0, temperature)
    assert any(token >= 40 for c in generate(model, prompts, every, keys, seed=3) for token in c.ids)
    spec = SamplingSpec(16, (2,), 0, temperature, vocab_size=40)
    completions = generate(model, prompts, spec, keys, seed=3)
    assert all(token < 40 for c in completions for token in c.ids)
    batch = pad_batch(prompts, [c.ids for c in completions], 0, torch.device("cpu"))
    with torch.no_grad():
        logp, entropy = completion_logprobs(model, batch, temperature or 1.0, vocab_size=40)
        logits = model(torch.tensor([prompts[0]])).logits[0, -1, :40] / (temperature or 1.0)
    for i, completion in enumerate(completions):
        assert torch.allclose(torch.tensor(completion.logprobs), logp[i, : len(completion.ids)], atol=1e-5)
    p = torch.softmax(logits, -1)
    assert logp[0, 0].item() == pytest.approx(p[completions[0].ids[0]].log().item(), abs=1e-5)
    assert entropy[0, 0].item() == pytest.approx(-(p * p.log()).sum().item(), abs=1e-5)


ROTATIONS = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [4.0] * 8,
        "original_max_position_embeddings": 16,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rows_whose_positions_would_depend_on_the_rows_beside_them_are_refused(kind):
    """Beyond 16 tokens all rows of a batch are rotated in another way."""
    window = {"longrope": 64, "dynamic": 16}[kind]
    config = AutoConfig.for_model(
        "llama",
        vocab_size=64,
        **ARCHITECTURES["llama"],
        max_position_embeddings=window,
        rope_parameters={"rope_theta": 1e4, **ROTATIONS[kind]},
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert longest_alike(config) == 16
    assert longest_alike(tiny("llama").config) is longest_alike(tiny("gpt2").config) is None
    prompts = [[5, 9, 11], [7] * 10]
    spec = SamplingSpec(6, (), 0, 1.0)
    together = generate(model, prompts, spec, [(0,), (1,)], seed=1)
    alone = generate(model, prompts[:1], spec, [(0,)], seed=1)[0]
    assert together[0].ids == alone.ids and together[0].logprobs == pytest.approx(alone.logprobs, abs=1e-5)
    check_positions(model, 16)
    with pytest.raises(RolloutError, match=r"one of them passes 16 tokens.* there are rows of up to 17 tokens"):
        check_positions(model, 17)
    if kind == "longrope":
        with pytest.raises(RolloutError, match="probabilities would depend on the batch"):
            generate(model, prompts, SamplingSpec(7, (), 0, 1.0), [(0,), (1,)], seed=1)
