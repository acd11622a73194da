"""Clients that people have, against the server: chat, streams, tools, structured answers, embeddings, evaluation."""

import enum

import pydantic
import pytest
import torch

from data.records import Message
from tests.serving import ASKED, serving, write_model
from tests.test_serve import first

openai = pytest.importorskip("openai")


class Town(enum.Enum):
    OSLO = "Oslo"
    ROME = "Rome"


class Trip(pydantic.BaseModel):
    """A trip to a town."""

    model_config = pydantic.ConfigDict(extra="forbid")
    town: Town
    days: int = pydantic.Field(ge=1, le=9)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving([write_model(tmp_path_factory.mktemp("models") / "tiny", window=4096)], key="the-key") as running:
        yield running


@pytest.fixture
def want(server):
    return server.chat(temperature=0, max_tokens=20)["choices"][0]["message"]["content"]


def test_openai(server, want):
    client = openai.OpenAI(base_url=server.base, api_key="the-key")
    assert [one.id for one in client.models.list()] == ["tiny"]
    asked = {"model": "tiny", "messages": ASKED, "max_tokens": 20}
    assert client.chat.completions.create(**asked, temperature=0).choices[0].message.content == want
    parts = list(client.chat.completions.create(**asked, temperature=0, stream=True))
    assert "".join(part.choices[0].delta.content or "" for part in parts) == want
    several = client.chat.completions.create(**asked, n=2, seed=1, logprobs=True, top_logprobs=2)
    assert len(several.choices) == 2 and len(several.choices[1].logprobs.content[0].top_logprobs) == 2
    parsed = client.chat.completions.parse(model="tiny", messages=ASKED, response_format=Trip, seed=2)
    assert isinstance(parsed.choices[0].message.parsed, Trip)
    tools = [openai.pydantic_function_tool(Trip)]
    called = client.chat.completions.parse(model="tiny", messages=ASKED, tools=tools, tool_choice="required", seed=1)
    assert isinstance(called.choices[0].message.tool_calls[0].function.parsed_arguments, Trip)
    text = client.completions.create(model="tiny", prompt="Sort", max_tokens=5, temperature=0, echo=True, logprobs=1)
    assert text.choices[0].text.startswith("Sort") and text.choices[0].logprobs.token_logprobs[0] is None
    vectors = client.embeddings.create(model="tiny", input=["a", "b"]).data
    assert len(vectors) == 2 and sum(x * x for x in vectors[0].embedding) == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**asked, temperature=9)
    assert refused.value.param == "temperature"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server.base, api_key="other").models.list()
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**{**asked, "model": "gpt-9"})


def test_langchain(server, want):
    langchain = pytest.importorskip("langchain_openai")
    keys = {"base_url": server.base, "api_key": "the-key", "model": "tiny"}
    chat = langchain.ChatOpenAI(**keys, temperature=0, max_tokens=20)
    assert chat.invoke("What is 2 + 3?").content == want
    assert "".join(part.content for part in chat.stream("What is 2 + 3?")) == want
    longer = langchain.ChatOpenAI(**keys, seed=3, max_tokens=100)
    for method in ("json_schema", "function_calling"):
        assert isinstance(longer.with_structured_output(Trip, method=method).invoke("A trip?"), Trip)
    (call,) = longer.bind_tools([Trip], tool_choice="required").invoke("A trip?").tool_calls
    assert call["name"] == "Trip" and Trip.model_validate_json(pydantic.TypeAdapter(dict).dump_json(call["args"]))
    embeddings = langchain.OpenAIEmbeddings(**keys, check_embedding_ctx_length=False)
    assert len(embeddings.embed_query("a")) == len(embeddings.embed_documents(["a", "b"])[1]) == 48


def test_llama_index(server, want):
    llms = pytest.importorskip("llama_index.llms.openai_like")
    from llama_index.core.base.llms.types import ChatMessage
    from llama_index.core.prompts import PromptTemplate
    from llama_index.core.tools import FunctionTool
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    keys = {"api_base": server.base, "api_key": "the-key"}
    kind = {"is_chat_model": True, "is_function_calling_model": True, "context_window": 4096}
    chat = llms.OpenAILike(model="tiny", **keys, **kind, temperature=0.0, max_tokens=20)
    asked = [ChatMessage(role="user", content="What is 2 + 3?")]
    assert chat.chat(asked).message.content == want
    assert "".join(part.delta or "" for part in chat.stream_chat(asked)) == want
    longer = llms.OpenAILike(model="tiny", **keys, **kind, max_tokens=200, additional_kwargs={"seed": 3})

    def plan(town: Town, days: int) -> str:
        """Plans a trip."""
        return f"{days} days in {town}"

    tool = FunctionTool.from_defaults(plan)
    reply = longer.chat_with_tools([tool], user_msg="A trip?", tool_required=True)
    (call,) = longer.get_tool_calls_from_response(reply)
    assert call.tool_name == "plan" and call.tool_kwargs["town"] in ("Oslo", "Rome")
    assert isinstance(longer.structured_predict(Trip, PromptTemplate("A trip?")), Trip)
    vectors = OpenAILikeEmbedding(model_name="tiny", **keys)
    assert len(vectors.get_text_embedding("a")) == 48


def test_lm_evaluation_harness_scores_over_http(server, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    encoder, model = first(server)
    api = lm_eval.LocalCompletionsAPI(
        base_url=f"{server.base}/completions",
        model="tiny",
        tokenizer=str(server.served[0].parent.model_dir),
        tokenizer_backend="huggingface",
        batch_size=2,
    )
    pairs = [("Sort the words", " pear"), ("apple, pear", " fig"), ("Be", " brief.")]
    found = api.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    for (context, continuation), (logprob, _) in zip(pairs, found, strict=True):
        whole, begun = (api.tok_encode(text) for text in (context + continuation, context))
        with torch.no_grad():
            logp = torch.log_softmax(model(torch.tensor([whole])).logits[0, :, : encoder.vocab_size], -1)
        want = sum(logp[i - 1, whole[i]].item() for i in range(len(begun), len(whole)))
        assert logprob == pytest.approx(want, abs=1e-3)


def test_a_recipes_judge_asks_a_served_model(server, monkeypatch):
    """A schema in `request` makes any model a judge whose replies can be read."""
    from reward.judge import judge

    monkeypatch.setenv("OPENAI_API_KEY", "the-key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    schema = {
        "type": "object",
        "properties": {"score": {"type": "integer", "minimum": 1, "maximum": 10}},
        "required": ["score"],
        "additionalProperties": False,
    }
    request = {"max_tokens": 60, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}}
    prompts, answers = [(Message("user", "2 + 3?"),)] * 2, ["5", "five"]
    found = judge(prompts, answers, base_url=server.base, model="tiny", request=request)
    assert all(score is not None and 0 <= score <= 1 for score in found)
    assert found == judge(prompts, answers, base_url=server.base, model="tiny", request=request)
