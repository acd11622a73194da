"""JSON schemas and tools: answers that always fit, and calls in the form of the model's own template."""

import json
import threading

import jsonschema
import pytest

from baton.answering import Answering
from baton.serve.tools import CallReader, read_form
from data.calls import holding, with_tools
from data.errors import DataError
from data.records import Message
from tests.serving import ASKED, serving, write_model
from tests.test_chat_templates import TEMPLATES, encoder

ASK = "/v1/chat/completions"


def tool(name, properties, **more):
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    return {"type": "function", "function": {"name": name, "description": f"The {name}.", "parameters": schema, **more}}


WEATHER = tool("weather", {"town": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}})
CLOCK = tool("clock", {"zone": {"$ref": "#/$defs/zone"}})
CLOCK["function"]["parameters"]["$defs"] = {"zone": {"enum": ["UTC", "CET"]}}
TOOLS = [WEATHER, CLOCK]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    parents = [write_model(folder / "qwen", window=4096), write_model(folder / "llama", "llama3_1", window=4096)]
    parents.append(write_model(folder / "tagged", "qwen3_6", window=4096))
    with serving([*parents, write_model(folder / "phi", "phi3")]) as running:
        yield running


def ask(server, **body):
    reply = server.post(ASK, {"model": "qwen", "messages": ASKED, "max_tokens": 400, **body})
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"]


def check_call(call):
    schema = next(t["function"]["parameters"] for t in TOOLS if t["function"]["name"] == call["function"]["name"])
    jsonschema.validate(json.loads(call["function"]["arguments"]), schema)
    assert call["type"] == "function" and len(call["id"]) == 9


LEAVES = [
    {"type": "integer", "minimum": -5, "maximum": 50},
    {"type": "boolean"},
    {"type": "null"},
    {"enum": ["red", "green", 3]},
    {"const": "fixed"},
    {"type": "string", "maxLength": 8},
    {"type": "string", "pattern": "^[A-C]{2}-[0-9]{3}$"},
    {"type": "string", "format": "date"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"anyOf": [{"type": "boolean"}, {"enum": ["é", "日本"]}]},
]
SCHEMAS = [
    *LEAVES,
    *({"type": "array", "items": leaf, "minItems": 1, "maxItems": 3} for leaf in LEAVES),
    *(
        {"type": "object", "properties": {"a": leaf, "b c": {"type": "boolean"}}, "required": ["a", "b c"],
         "additionalProperties": False}
        for leaf in LEAVES
    ),
    *(
        {"type": "object", "properties": {"list": {"$ref": "#/$defs/row"}}, "required": ["list"],
         "additionalProperties": False,
         "$defs": {"row": {"type": "array", "maxItems": 2, "items": leaf}}}
        for leaf in LEAVES
    ),
    *(
        {"type": "object", "properties": {"kind": {"const": i}, "more": {"type": "object", "properties": {"x": leaf},
         "required": ["x"], "additionalProperties": False}}, "required": ["kind"], "additionalProperties": False}
        for i, leaf in enumerate(LEAVES)
    ),
]  # fmt: skip


def test_fifty_schemas_give_fifty_valid_answers(server):
    assert len(SCHEMAS) == 50
    for seed, schema in enumerate(SCHEMAS):
        wanted = {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}
        (choice,) = ask(server, response_format=wanted, seed=seed)
        assert choice["finish_reason"] == "stop", (schema, choice)
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_a_json_object_is_one_and_streams_are_restricted_too(server):
    body = {"response_format": {"type": "json_object"}, "seed": 4, "temperature": 0.7}
    found = []
    for seed in range(3):
        (choice,) = ask(server, **{**body, "seed": seed}, max_tokens=60)
        if choice["finish_reason"] == "stop":
            assert isinstance(json.loads(choice["message"]["content"]), dict)
            found.append(seed)
    assert found
    wanted = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMAS[20]}}, "seed": 1}
    events = server.stream(ASK, {"model": "qwen", "messages": ASKED, **wanted})
    said = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
    jsonschema.validate(json.loads(said), SCHEMAS[20])


@pytest.mark.parametrize(
    "schema", [{"type": "foo"}, {"not": {}}, {"$ref": "#/nowhere"}, {"type": "string", "pattern": "("}]
)
def test_a_schema_that_cannot_be_followed_is_refused_by_name(server, schema):
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    reply = server.post(ASK, {"model": "qwen", "messages": ASKED, "response_format": wanted})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "response_format.json_schema.schema"


@pytest.mark.parametrize("model", ["qwen", "llama", "tagged"])
def test_a_required_call_is_made_and_read(server, model):
    names = set()
    for seed in range(6):
        (choice,) = ask(server, model=model, tools=TOOLS, tool_choice="required", seed=seed)
        assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
        (call,) = choice["message"]["tool_calls"]
        check_call(call)
        names.add(call["function"]["name"])
    assert names == {"weather", "clock"}
    named = {"type": "function", "function": {"name": "clock"}}
    for seed in range(3):
        (choice,) = ask(server, model=model, tools=TOOLS, tool_choice=named, seed=seed)
        assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["clock"]


def test_a_call_streams_and_its_result_is_taken_back(server):
    body = {"model": "qwen", "messages": ASKED, "tools": TOOLS, "tool_choice": "required", "seed": 0}
    (choice,) = ask(server, **body)
    events = server.stream(ASK, body)
    parts = [event["choices"][0] for event in events]
    (call,) = [part["delta"]["tool_calls"][0] for part in parts if "tool_calls" in part["delta"]]
    assert call["index"] == 0 and call["function"] == choice["message"]["tool_calls"][0]["function"]
    assert parts[-1]["finish_reason"] == "tool_calls" and not any(part["delta"].get("content") for part in parts)
    result = {"role": "tool", "tool_call_id": call["id"], "content": "rain"}
    (answer,) = ask(server, messages=[*ASKED, choice["message"], result], tools=TOOLS, tool_choice="none", max_tokens=5)
    assert "tool_calls" not in answer["message"]


def test_without_a_call_the_text_is_the_answer(server):
    free, bound = (ask(server, seed=2, max_tokens=30, **more) for more in ({}, {"tools": TOOLS, "tool_choice": "none"}))
    assert free == bound
    strict = [tool("weather", WEATHER["function"]["parameters"]["properties"], strict=True)]
    for seed in range(2):
        (choice,) = ask(server, tools=strict, seed=seed, max_tokens=30)
        assert choice["message"]["content"] and "tool_calls" not in choice["message"]


def test_a_schema_and_tools_together_give_one_of_both(server):
    schema = {"enum": ["yes", "no"]}
    kinds = set()
    for seed in range(8):
        (choice,) = ask(
            server, tools=TOOLS, seed=seed, response_format={"type": "json_schema", "json_schema": {"schema": schema}}
        )
        if choice["finish_reason"] == "tool_calls":
            check_call(choice["message"]["tool_calls"][0])
        else:
            assert json.loads(choice["message"]["content"]) in ("yes", "no")
        kinds.add(choice["finish_reason"])
    assert kinds <= {"tool_calls", "stop"}


def test_a_template_without_calls_refuses_tools(server):
    reply = server.post(ASK, {"model": "phi", "messages": ASKED, "tools": TOOLS})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "tools"


# ---- reading what models write


class Known(Answering):
    """A model of which only the encoder is there."""

    def __init__(self, template):
        self.encoder = encoder(TEMPLATES[template])
        self._encoding = threading.Lock()


def read(template, *pieces, many=True):
    model = Known(template)
    form = read_form(model)
    assert form is not None
    reader = CallReader(form, model, [WEATHER, CLOCK], many=many)
    text = "".join(map(reader.add, pieces)) + reader.finish()
    return text, [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in reader.calls]


ONE = '{"name": "weather", "arguments": {"town": "Oslo", "note": "</tool_call> {"}}'
TWO = '{"name": "clock", "arguments": {}}'
TAGGED = """<tool_call>
<function=weather>
<parameter=town>
Oslo
</parameter>
<parameter=days>
3
</parameter>
<parameter=note>
two
lines <b>
</parameter>
</function>
</tool_call>"""


@pytest.mark.parametrize("cut", [1, 3, 1000])
def test_calls_are_separated_from_text_wherever_pieces_are_cut(cut):
    def pieces(text):
        return [text[i : i + cut] for i in range(0, len(text), cut)]

    calls = [("weather", {"town": "Oslo", "note": "</tool_call> {"}), ("clock", {})]
    for text, want in (
        (f"<tool_call>\n{ONE}\n</tool_call>", ("", calls[:1])),
        (f"I look.\n<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{TWO}\n</tool_call>", ("I look.\n", calls)),
        (f"<tool_call>{ONE}</tool_call><tool_call>{TWO}</tool_call> and more", ("", calls)),
        ("a < b, <tool_ and {x}", ("a < b, <tool_ and {x}", [])),
        ("<tool_call>\n{broken", ("<tool_call>\n{broken", [])),
        ('<tool_call>\n{"name": 3}\n</tool_call>', ('<tool_call>\n{"name": 3}\n</tool_call>', [])),
    ):
        assert read("qwen3", *pieces(text)) == want
    text = '{"name": "weather", "parameters": {"town": "Oslo"}}'
    assert read("llama3_1", *pieces(text)) == ("", [("weather", {"town": "Oslo"})])
    assert read("llama3_1", *pieces("It is " + text)) == (f"It is {text}", [])
    assert read("llama3_1", '{"a": 1}') == ('{"a": 1}', [])
    tagged = ("weather", {"town": "Oslo", "days": 3, "note": "two\nlines <b>"})
    assert read("qwen3_6", *pieces(f"I look.\n\n{TAGGED}")) == ("I look.\n\n", [tagged])
    bare = "<tool_call>\n<function=clock>\n</function>\n</tool_call>"
    assert read("qwen3_6", *pieces(f"{TAGGED}\n{bare}")) == ("", [tagged, ("clock", {})])
    assert read("qwen3_6", TAGGED[:-20]) == (TAGGED[:-20], [])


def test_one_call_alone_is_taken_where_more_are_not_wanted():
    text = f"<tool_call>\n{TWO}\n</tool_call>\n<tool_call>\n{ONE}\n</tool_call>"
    assert read("qwen2_5", text, many=False) == ("", [("clock", {})])


READ = {
    "json": {"qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl", "llama3_1", "llama3_2"},
    "tagged": {"qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8", "nemotron_3_nano", "nemotron_3_super"},
}


@pytest.mark.parametrize("kind", READ)
def test_the_calls_that_a_template_writes_are_read_back(kind):
    """Two calls, a text, a number, a list and none, in every template whose form is known."""
    made = {"town": "Oslo", "days": 3, "list": ["a", 1], "quote": 'say "x"'}
    properties = {"town": {"type": "string"}, "quote": {"type": "string"}, "days": {}, "list": {}}
    tools = [tool("weather", properties), tool("clock", {})]
    for name in READ[kind]:
        model = Known(name)
        form = read_form(model)
        assert form is not None, name
        for wanted in ([("weather", made)], [("clock", {}), ("weather", made)]):
            calls = [{"type": "function", "function": {"name": n, "arguments": a}} for n, a in wanted]
            turn = holding(Message("assistant", ""), {"tool_calls": calls})
            try:
                ids, mask = model.chat([*with_tools((Message("user", "?"),), tools), turn])
            except DataError:
                assert len(calls) == 2 and name.startswith("llama")  # it takes one call alone
                continue
            said = [token for token, own in zip(ids, mask, strict=True) if own][:-1]
            reader = CallReader(form, model, tools, many=True)
            reader.add(model.encoder.text(said, special=True))
            reader.finish()
            found = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in reader.calls]
            assert found == wanted, name
