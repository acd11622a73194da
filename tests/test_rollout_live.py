"""Answers that join and leave a running batch: the tokens of `generate`, whatever runs beside them."""

import math

import pytest
import torch

from data.sampling import uniform
from handoff.errors import GateError
from rollout.engine import generate
from rollout.live import Answer, Live
from rollout.sampling import SamplingSpec
from tests.test_rollout_engine import ARCHITECTURES, PROMPTS, tiny


class Kept:
    """What an answer has received."""

    def __init__(self, most=10**9):
        self.tokens, self.error, self.most = [], None, most

    def receive(self, token):
        self.tokens.append(token)
        return len(self.tokens) < self.most

    def failed(self, error):
        self.error = error

    @property
    def ids(self):
        return [token.id for token in self.tokens]


def wanted(prompt, spec, key=0, **options):
    kept = options.pop("kept", None) or Kept()
    noise = uniform((spec.max_new_tokens,), 1, key) if spec.temperature > 0 else None
    return Answer(prompt, spec, noise, kept.receive, kept.failed, **options), kept


def run(live):
    while live.step():
        pass
    assert live.running == live.waiting == 0


def expected(model, prompt, spec, key=0):
    return generate(model, [prompt], spec, [(key,)], seed=1)[0]


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_answers_that_join_later_are_those_of_generate(architecture, plain, monkeypatch):
    """Six prompts, each with its own temperature and length, join two rows while these decode."""
    model = tiny(architecture)
    specs = [
        SamplingSpec(12, (2,), 0, temperature=0.0, vocab_size=40),
        SamplingSpec(9, (2, 17), 0, temperature=1.0, vocab_size=40),
        SamplingSpec(20, (2,), 0, temperature=0.7, top_p=0.8, vocab_size=40),
        SamplingSpec(1, (2,), 0, temperature=1.3, top_k=5, vocab_size=40),
        SamplingSpec(16, (2,), 0, temperature=1.0, vocab_size=40),
        SamplingSpec(300, (), 0, temperature=0.0, vocab_size=40),
    ]
    wants = [expected(model, prompt, spec, i) for i, (prompt, spec) in enumerate(zip(PROMPTS, specs, strict=True))]
    if plain:
        monkeypatch.setattr("rollout.live.reason_against", lambda *_: "so that the model's own cache is used")
    live = Live(model, 2, 40)
    every = []
    for i, (prompt, spec) in enumerate(zip(PROMPTS, specs, strict=True)):
        answer, kept = wanted(prompt, spec, i, top=1)
        every.append(kept)
        live.add([answer])
        live.step()
        assert live.running <= 2
    run(live)
    live.close()
    for i, (kept, want) in enumerate(zip(every, wants, strict=True)):
        assert kept.ids == want.ids and kept.tokens[-1].end == want.end, i
        assert [token.end for token in kept.tokens[:-1]] == [None] * (len(kept.tokens) - 1)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("plain", [False, True])
def test_log_probabilities_are_the_models_own(plain, monkeypatch):
    if plain:
        monkeypatch.setattr("rollout.live.reason_against", lambda *_: "so that the model's own cache is used")
    model = tiny("llama")
    live = Live(model, 4)
    answer, kept = wanted(PROMPTS[0], SamplingSpec(8, (), 0, temperature=2.0, top_k=9), top=3)
    silent, unasked = wanted(PROMPTS[0], answer.spec)
    silent.prompt = answer.prompt
    live.add([answer, silent])
    run(live)
    read = live.logprobs([*PROMPTS[0], *kept.ids], 2)
    hidden = live.hidden(PROMPTS[1])
    live.close()
    assert unasked.ids == kept.ids and all(t.logprob is None and not t.top for t in unasked.tokens)
    with torch.no_grad():
        row = torch.tensor([[*PROMPTS[0], *kept.ids]])
        logp = torch.log_softmax(model(row).logits[0], -1)
        want = model.model(torch.tensor([PROMPTS[1]])).last_hidden_state[0]
    assert torch.allclose(hidden, want, atol=1e-5)
    start = len(PROMPTS[0]) - 1
    for place, token in enumerate(kept.tokens):
        values, ids = logp[start + place].topk(3)
        assert token.logprob == pytest.approx(logp[start + place, token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == ids.tolist()
        assert [v for _, v in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert [token.id for token in read] == row[0, 1:].tolist()
    for place, token in enumerate(read):
        assert token.logprob == pytest.approx(logp[place, token.id].item(), abs=1e-4)
        assert [i for i, _ in token.top] == logp[place].topk(2).indices.tolist()


def test_a_cancelled_answer_frees_its_row_and_changes_no_other():
    model = tiny("llama")
    spec = SamplingSpec(40, (), 0, temperature=1.0)
    live = Live(model, 2)
    first, gone = wanted(PROMPTS[0], spec, 0)
    second, kept = wanted(PROMPTS[1], spec, 1)
    third, later = wanted(PROMPTS[2], spec, 2)
    fourth, never = wanted(PROMPTS[3], spec, 3)
    for answer in (first, second, third, fourth):
        live.add([answer])
    live.step()
    live.step()
    assert live.running == 2 and live.waiting == 2
    first.cancel()
    fourth.cancel()
    live.step()
    assert live.running == 2 and live.waiting == 0
    run(live)
    live.close()
    assert 0 < len(gone.ids) < 40 and never.ids == []
    assert kept.ids == expected(model, PROMPTS[1], spec, 1).ids
    assert later.ids == expected(model, PROMPTS[2], spec, 2).ids


def test_an_answer_ends_where_its_receiver_wants():
    model = tiny("llama")
    live = Live(model, 2)
    answer, kept = wanted(PROMPTS[0], SamplingSpec(40, (), 0, temperature=0.0), kept=Kept(most=5))
    live.add([answer])
    run(live)
    live.close()
    assert len(kept.ids) == 5 and kept.tokens[-1].end is None


class OnlyEven:
    """Allows even tokens, and no answer longer than four tokens."""

    def __init__(self):
        self.count = 0

    def allowed(self):
        return torch.arange(50) % 2 == 0

    def advance(self, token):
        self.count += 1
        return self.count == 4


def test_a_constraint_restricts_its_own_answer_alone():
    model = tiny("llama")
    spec = SamplingSpec(12, (), 0, temperature=1.5)
    live = Live(model, 4)
    bound, even = wanted(PROMPTS[0], spec, 0, constraint=OnlyEven(), top=64)
    free, other = wanted(PROMPTS[1], spec, 1)
    live.add([bound])
    live.add([free])
    run(live)
    live.close()
    for token in even.tokens:  # those of the model, before the constraint
        assert sum(math.exp(logprob) for _, logprob in token.top) == pytest.approx(1, abs=1e-4)
        assert all(math.isfinite(logprob) for _, logprob in token.top) and dict(token.top)[token.id] == token.logprob
    assert len(even.ids) == 4 and even.tokens[-1].end == "stop" and all(i % 2 == 0 and i < 50 for i in even.ids)
    assert other.ids == expected(model, PROMPTS[1], spec, 1).ids


@pytest.mark.parametrize("where", ["allowed", "advance", "nothing", "receive"])
def test_an_error_of_one_answer_ends_that_answer_alone(where, monkeypatch):
    model = tiny("llama")
    spec = SamplingSpec(12, (), 0, temperature=1.5)

    def broken(*_):
        raise ValueError("too complex")

    live = Live(model, 4)
    constraint = OnlyEven()
    bound, failing = wanted(PROMPTS[0], spec, 0, constraint=constraint)
    free, other = wanted(PROMPTS[1], spec, 1)
    live.add([bound])
    live.add([free])
    live.step()
    if where == "nothing":
        monkeypatch.setattr(constraint, "allowed", lambda: torch.zeros(50, dtype=torch.bool))
    elif where == "receive":
        bound.receive = broken
    else:
        monkeypatch.setattr(constraint, where, broken)
    run(live)
    live.close()
    assert isinstance(failing.error, GateError if where == "nothing" else ValueError)
    assert other.ids == expected(model, PROMPTS[1], spec, 1).ids and other.error is None


def test_broken_logits_fail_their_answers_and_the_next_ones_are_answered():
    model = tiny("llama")
    spec = SamplingSpec(6, (), 0, temperature=0.0)
    want = expected(model, PROMPTS[0], spec).ids
    weight = model.model.embed_tokens.weight
    before = weight[PROMPTS[1][0]].clone()
    with torch.no_grad():
        weight[PROMPTS[1][0]] = math.nan
    live = Live(model, 2)
    for prompt in PROMPTS[:2]:
        answer, kept = wanted(prompt, spec)
        live.add([answer])
        run(live)
        if prompt is PROMPTS[0]:
            assert kept.ids == want
        else:
            assert isinstance(kept.error, GateError) and kept.ids == []
    with torch.no_grad():
        weight[PROMPTS[1][0]] = before
    answer, kept = wanted(PROMPTS[0], spec)
    live.add([answer])
    run(live)
    live.close()
    assert kept.ids == want


@pytest.mark.parametrize("where", ["prefill", "decode", "exchange"])
def test_an_error_of_a_step_fails_the_answers_that_it_concerns(where, monkeypatch):
    model = tiny("llama")
    spec = SamplingSpec(6, (), 0, temperature=0.0)
    live = Live(model, 2)
    first, kept = wanted(PROMPTS[0], spec)
    live.add([first])
    with monkeypatch.context() as patched:

        def broken(*_):
            raise RuntimeError("DefaultCPUAllocator: not enough memory")

        patched.setattr(live._rows, where, broken)
        run(live)
    assert "not enough memory" in str(kept.error)
    answer, kept = wanted(PROMPTS[0], spec)
    live.add([answer])
    run(live)
    live.close()
    assert kept.ids == expected(model, PROMPTS[0], spec).ids and kept.error is None
