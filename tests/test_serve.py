"""The server's answers: the engine's own tokens, whatever else is asked at the same time."""

import base64
import math
import struct
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from data.records import Message
from rollout.engine import generate
from rollout.sampling import SamplingSpec
from tests.serving import ASKED, serving, write_model

ASK = "/v1/chat/completions"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    with serving([write_model(folder / "tiny"), write_model(folder / "other", "llama3_1")]) as running:
        yield running


@pytest.fixture
def ask(server):
    def ask(**body):
        reply = server.post(ASK, {"model": "tiny", "messages": ASKED, **body})
        assert reply.status_code == 200, reply.text
        return reply.json()

    return ask


def texts(reply):
    return [choice["message"]["content"] for choice in reply["choices"]]


def first(server):
    """The encoder and a copy of the weights, which the server's own thread does not use."""
    from transformers import AutoModelForCausalLM

    served = server.served[0]
    return served.encoder, AutoModelForCausalLM.from_pretrained(served.parent.model_dir).eval()


def test_a_greedy_answer_is_that_of_rollouts(server, ask):
    encoder, model = first(server)
    ids = encoder.prompt([Message("user", ASKED[0]["content"])])
    spec = SamplingSpec.of(encoder, 40, temperature=0.0)
    (want,) = generate(model, [ids], spec, [()], 0)
    reply = ask(temperature=0, max_tokens=40)
    assert texts(reply) == [encoder.decode(want.ids)] and len(want.ids) > 5
    assert reply["choices"][0]["finish_reason"] == want.end
    assert reply["usage"] == {
        "prompt_tokens": len(ids),
        "completion_tokens": len(want.ids),
        "total_tokens": len(ids) + len(want.ids),
    }
    assert reply["object"] == "chat.completion" and reply["model"] == "tiny"


def test_a_seed_gives_the_same_answer_whatever_runs_beside_it(ask):
    alone = [ask(seed=seed, max_tokens=30, top_p=0.9) for seed in range(4)]
    with ThreadPoolExecutor(12) as pool:
        others = [pool.submit(ask, max_tokens=30 + n, temperature=0.3 * n, n=1 + n % 3) for n in range(6)]
        beside = list(pool.map(lambda seed: ask(seed=seed, max_tokens=30, top_p=0.9), range(4)))
    assert [texts(one) for one in beside] == [texts(one) for one in alone]
    assert len({texts(one)[0] for one in alone}) == 4
    assert all(other.result()["usage"]["completion_tokens"] for other in others)
    assert texts(ask(max_tokens=30)) != texts(ask(max_tokens=30))


def test_several_answers_are_keyed_one_by_one(ask):
    several = texts(ask(seed=5, n=3, max_tokens=20))
    assert len(set(several)) == 3 and several[0] == texts(ask(seed=5, max_tokens=20))[0]
    assert several[:2] == texts(ask(seed=5, n=2, max_tokens=20))
    assert len(set(texts(ask(temperature=0, n=2, max_tokens=20)))) == 1


def test_more_tokens_extend_an_answer(ask):
    short, long = ask(seed=2, max_tokens=7), ask(seed=2, max_completion_tokens=25)
    assert texts(long)[0].startswith(texts(short)[0].rstrip("�")) and short["choices"][0]["finish_reason"] == "length"
    assert short["usage"]["completion_tokens"] == 7


def test_an_answer_ends_before_a_stop_text(ask):
    whole = texts(ask(seed=7, max_tokens=60))[0]
    place = next(i for i in range(len(whole) // 2, len(whole)) if whole.find(whole[i : i + 3]) == i)
    stop = whole[place : place + 3]
    for stops in (stop, ["never there", stop]):
        cut = ask(seed=7, max_tokens=60, stop=stops)
        assert texts(cut) == [whole[:place]] and cut["choices"][0]["finish_reason"] == "stop"
        assert cut["usage"]["completion_tokens"] < 60


@pytest.mark.parametrize("more", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["a", "e"]}])
def test_a_stream_has_what_the_whole_answer_has(server, ask, more):
    body = {"seed": 11, "max_tokens": 30, "temperature": 1.2, **more}
    whole = ask(**body)
    events = server.stream(ASK, {"model": "tiny", "messages": ASKED, "stream_options": {"include_usage": True}, **body})
    assert events[-1]["usage"] == whole["usage"] and events[-1]["choices"] == []
    assert all(event["usage"] is None and event["object"] == "chat.completion.chunk" for event in events[:-1])
    for i, choice in enumerate(whole["choices"]):
        own = [event["choices"][0] for event in events[:-1] if event["choices"][0]["index"] == i]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(part["delta"].get("content") or "" for part in own) == choice["message"]["content"]
        assert [p["finish_reason"] for p in own if p["finish_reason"]] == [choice["finish_reason"]] and len(own) > 2
        told = [entry for part in own if part["logprobs"] for entry in part["logprobs"]["content"]]
        assert told == (choice["logprobs"] or {"content": []})["content"]


def test_log_probabilities_are_the_models(server, ask):
    encoder, model = first(server)
    reply = ask(seed=3, temperature=0.5, top_k=4, max_tokens=9, logprobs=True, top_logprobs=3)
    content = reply["choices"][0]["logprobs"]["content"]
    ids = encoder.prompt([Message("user", ASKED[0]["content"])])
    assert len(content) == 9
    for entry in content:
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([ids])).logits[0, -1, : encoder.vocab_size], -1)
        names = {encoder.text([i], special=True): i for i in reversed(logp.topk(4).indices.tolist())}
        assert entry["logprob"] == pytest.approx(logp[names[entry["token"]]].item(), abs=1e-4)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(
            logp.topk(3).values.tolist(), abs=1e-4
        )
        ids.append(names[entry["token"]])
    assert b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace") == encoder.text(
        ids[-9:], special=True
    )
    assert all(
        entry["top_logprobs"] == [] for entry in ask(max_tokens=2, logprobs=True)["choices"][0]["logprobs"]["content"]
    )


def test_a_prompt_is_echoed_with_its_log_probabilities(server):
    encoder, model = first(server)
    rows = [[5, 40, 77, 300, 12], [99, 98]]
    body = {"model": "tiny", "prompt": rows, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    choices = server.post("/v1/completions", body).json()["choices"]
    for row, choice in zip(rows, choices, strict=True):
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([row])).logits[0, :, : encoder.vocab_size], -1)
        told = choice["logprobs"]
        want = [logp[i, token].item() for i, token in enumerate(row[1:])]
        assert told["token_logprobs"][0] is None and len(told["tokens"]) == len(row) + 1
        assert told["token_logprobs"][1:-1] == pytest.approx(want, abs=1e-4)
        assert told["token_logprobs"][-1] == pytest.approx(logp[-1].max().item(), abs=1e-4)
        for i, top in enumerate(told["top_logprobs"][1:-1]):
            assert max(top.values()) == pytest.approx(logp[i].max().item(), abs=1e-4)
        assert choice["text"] == "".join(told["tokens"])
        assert told["text_offset"][:2] == [0, len(told["tokens"][0])]
    none = server.post("/v1/completions", {**body, "max_tokens": 0}).json()
    assert none["usage"]["completion_tokens"] == 0
    assert [len(choice["logprobs"]["tokens"]) for choice in none["choices"]] == [5, 2]


def test_completions_continue_texts(server):
    encoder, model = first(server)
    texts = ["Sort the words", "a <|im_end|> b"]
    body = {"model": "tiny", "prompt": texts, "max_tokens": 12, "temperature": 0}
    reply = server.post("/v1/completions", body).json()
    for text, choice in zip(texts, reply["choices"], strict=True):
        ids = encoder.document(text)[:-1]
        (want,) = generate(model, [ids], SamplingSpec.of(encoder, 12, temperature=0.0), [()], 0)
        assert choice["text"] == encoder.text(want.ids)
    assert "<|im_end|>" not in encoder.tokenizer.convert_ids_to_tokens(encoder.document(texts[1]))
    events = server.stream("/v1/completions", {**body, "prompt": texts[0]})
    assert "".join(event["choices"][0]["text"] for event in events) == reply["choices"][0]["text"]
    assert server.post("/v1/completions", {"model": "tiny", "prompt": "a"}).json()["usage"]["completion_tokens"] <= 16


def test_models_health_and_metrics(server, ask):
    listed = {one["id"]: one for one in server.get("/v1/models").json()["data"]}
    assert set(listed) == {"tiny", "other"} and listed["tiny"]["max_model_len"] == 1024
    assert listed["tiny"]["conversations"] == "chat template"
    assert server.get("/v1/models/other").json() == listed["other"]
    assert server.get("/v1/models/none").status_code == 404
    ask(max_tokens=3)
    assert server.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
    lines = server.get("/metrics").text.splitlines()
    numbers = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert float(numbers["baton_completion_tokens_total"]) >= 3
    assert float(numbers['baton_requests_total{route="/v1/chat/completions",status="200"}']) >= 1
    assert numbers["baton_request_seconds_count"] == numbers['baton_request_seconds_bucket{le="+Inf"}']
    assert all(math.isfinite(float(value)) for value in numbers.values())


def test_each_model_answers_under_its_name(server):
    replies = [server.chat("x", model=name, temperature=0, max_tokens=8) for name in ("tiny", "other")]
    assert [reply["model"] for reply in replies] == ["tiny", "other"]
    missing = server.post(ASK, {"messages": ASKED})
    assert missing.status_code == 400 and missing.json()["error"]["param"] == "model"
    absent = server.post(ASK, {"messages": ASKED, "model": "/etc/passwd"})
    assert absent.status_code == 404 and absent.json()["error"]["code"] == "model_not_found"


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_an_embedding_is_the_hidden_state_that_the_server_says(tmp_path, pooling):
    with serving([write_model(tmp_path / "tiny")], pooling=pooling) as server:
        encoder, model = first(server)
        reply = server.post("/v1/embeddings", {"input": ["pear apple", "fig"], "encoding_format": "float"}).json()
        again = server.post(
            "/v1/embeddings", {"input": encoder.document("fig")[:-1], "encoding_format": "base64"}
        ).json()
        assert pooling in server.get("/v1/models").json()["data"][0]["embeddings"] and reply["pooling"] == pooling
    with torch.no_grad():
        ids = encoder.document("pear apple")[:-1]
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0]
    want = torch.nn.functional.normalize(hidden.mean(0) if pooling == "mean" else hidden[-1], dim=0)
    assert torch.allclose(torch.tensor(reply["data"][0]["embedding"]), want, atol=1e-5)
    assert reply["usage"]["prompt_tokens"] == len(ids) + len(encoder.document("fig")) - 1
    raw = base64.b64decode(again["data"][0]["embedding"])
    assert struct.unpack(f"<{len(raw) // 4}f", raw) == pytest.approx(reply["data"][1]["embedding"], abs=1e-6)


def test_a_model_without_a_template_gets_the_conversation_as_text(tmp_path):
    with serving([write_model(tmp_path / "base", None)]) as server:
        (listed,) = server.get("/v1/models").json()["data"]
        assert listed["conversations"] == "as text, because the tokenizer has no chat template"
        encoder, model = first(server)
        text = (
            "A conversation between a user and an assistant. The assistant's answers are short and true.\n\n"
            "User: What is the capital of France?\nAssistant: The capital of France is Paris.\n\n"
            "User: How many days are in a week?\nAssistant: A week has seven days.\n\nUser: Why?\nAssistant:"
        )
        ids = encoder.document(text)[:-1]
        (want,) = generate(model, [ids], SamplingSpec.of(encoder, 10, temperature=0.0), [()], 0)
        reply = server.chat("Why?", temperature=0, max_tokens=10)
        assert texts(reply) == [encoder.text(want.ids).lstrip()] and reply["usage"]["prompt_tokens"] == len(ids)
        refused = server.post(ASK, {"messages": [*ASKED, {"role": "tool", "content": "5", "tool_call_id": "1"}]})
        assert refused.status_code == 400 and "need a chat template" in refused.json()["error"]["message"]
