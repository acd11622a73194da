"""Tools, tool calls and thoughts: rendered by templates that take them, with ids equal to transformers' own."""

import json
from collections import Counter

import pytest

from data.config import FileSource
from data.encode import Encoder
from data.errors import DataError, RowRefused
from data.records import Chat, Preference, Prompt
from data.rows import Chats, Prompts, Texts
from tests.row_sets import encode, load
from tests.test_chat_templates import ENDLESS, TEMPLATES, encoder, runs
from tests.test_data_encode import own

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"town": "Oslo"}}}
ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Is it cold in Oslo?"}]
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "minus four degrees", "tool_call_id": "abcdefghi", "name": "weather"}
THOUGHT = "It is below zero."
TALKS = {
    "a call": [*ASKED, CALLED],
    "a call and its result": [*ASKED, CALLED, RESULT, {"role": "assistant", "content": "Yes, it is cold."}],
    "two turns": [
        *ASKED,
        CALLED,
        RESULT,
        {"role": "assistant", "content": "Yes, it is cold."},
        {"role": "user", "content": "And now?"},
        CALLED,
        RESULT,
        {"role": "assistant", "content": "Still cold."},
    ],
    "tools that are not called": [*ASKED, {"role": "assistant", "content": "I do not know."}],
}
KEEPING = {
    "qwen3", "qwen3_training", "qwen2_5", "llama3_1", "llama3_2", "lfm2_v2", "qwen3_5_think", "qwen3_instruct_2507",
    "nemotron_3_nano", "gemma4", "gptoss", "muse_glimmer",
}  # fmt: skip
"""Templates of which at least the conversation with a call and its result must be used."""


def read(folder, rows, want=Chat, **settings):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load([FileSource(source="file", path="rows.jsonl", **settings)], want, folder, seed=0)


def theirs(made: Encoder, turns, tools=None, **options):
    """What transformers makes of it; arguments are text where the template wants text."""
    for as_text in (False, True):
        given = json.loads(json.dumps(turns))
        for turn in given if as_text else ():
            for call in turn.get("tool_calls", ()):
                call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        try:
            return made.tokenizer.apply_chat_template(given, tools=tools, tokenize=True, **options)["input_ids"]
        except Exception:
            continue
    return None


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - ENDLESS))
def test_a_template_gives_its_own_ids_or_refuses(name, tmp_path):
    """The mask is the calls and the answers, and nothing of the tools or their results."""
    made = encoder(TEMPLATES[name])
    used = Counter()
    for talk, turns in TALKS.items():
        (record,) = read(tmp_path, [{"messages": turns, "tools": [TOOL]}]).records
        try:
            ids, mask = made.chat(record.messages)
        except RowRefused as refused:
            assert any(word in str(refused) for word in ("lost", "template", "special token")), refused
            continue
        except Exception as error:
            assert "lost" in str(error) or "template" in str(error), error
            continue
        used[talk] += 1
        assert ids == theirs(made, turns, [TOOL]), talk
        prompt = theirs(made, turns[:-1], [TOOL], add_generation_prompt=True)
        assert made.prompt(record.messages[:-1]) == prompt
        said = runs(made, ids, mask)
        answers = [turn for turn in turns if turn["role"] == "assistant"]
        assert len(said) == len(answers), (talk, said)
        for run, turn in zip(said, answers, strict=True):
            assert "minus four" not in run and "The weather of a town" not in run and "Is it cold" not in run
            assert turn["content"] in run and ("Oslo" in run) == ("tool_calls" in turn)
            assert made._special.search(run.strip()[-30:]), "the stop token is trained"
    assert name not in KEEPING or used["a call and its result"], name


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
@pytest.mark.parametrize("name", ["qwen3", "qwen3_5_think", "nemotron_3_nano", "gptoss"])
def test_a_thought_is_rendered_under_the_key_that_the_template_takes(name, key, tmp_path):
    made = encoder(TEMPLATES[name])
    row = {"messages": [*ASKED, {"role": "assistant", "content": "Yes.", key: THOUGHT}]}
    (record,) = read(tmp_path, [row]).records
    ids, mask = made.chat(record.messages)
    taken = "thinking" if name == "gptoss" else "reasoning_content"
    assert ids == theirs(made, [*ASKED, {"role": "assistant", "content": "Yes.", taken: THOUGHT}])
    (said,) = runs(made, ids, mask)
    assert THOUGHT in said and "Yes." in said


def test_earlier_thoughts_follow_earlier_turns(tmp_path):
    turns = [*ASKED, {"role": "assistant", "content": "Yes.", "reasoning_content": THOUGHT}]
    turns += [
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Quite.", "reasoning_content": "I am."},
    ]
    loaded = read(tmp_path, [{"messages": turns}])
    made = encoder(TEMPLATES["qwen3"])
    for earlier, rows in (("strip", 1), ("keep", 1), ("fork", 2)):
        found = list(encode(Chats(256, "drop", earlier), loaded.records, made, loaded.accounting))
        assert len(found) == rows
        shown = [made.tokenizer.decode([i for i in row["labels"] if i >= 0]) for row in found]
        assert (THOUGHT in " ".join(shown)) == (earlier != "strip") and "I am." in " ".join(shown)
    assert found[1]["input_ids"] == theirs(made, turns)


def test_a_template_that_takes_none_of_it_refuses_and_names_the_key(tmp_path):
    rows = [
        {"messages": TALKS["tools that are not called"], "tools": [TOOL]},
        {"messages": TALKS["a call"]},
        {"messages": [*ASKED, {"role": "assistant", "content": "Yes.", "thinking": THOUGHT}]},
    ]
    for made in (own(), encoder(TEMPLATES["phi3"])):
        loaded = read(tmp_path, [*rows, {"messages": TALKS["tools that are not called"]}])
        kept = encode(Chats(256, "drop"), loaded.records, made, loaded.accounting)
        assert len(kept) == 1
        lost = {f"`{key}` would be lost": 1 for key in ("tools", "tool_calls", "thinking")}
        assert kept.accounting.dropped == lost
        assert "set `ignore: [tools]` in the source to train without it" in kept.accounting.summary()


def test_the_shapes_in_which_calls_and_tools_are_published(tmp_path):
    """OpenAI's, its older one, ShareGPT's, JSON text in place of lists, and tools in the system's turn."""
    text = {"name": "weather", "arguments": json.dumps({"town": "Oslo"})}
    shapes = [
        {"messages": [*ASKED, {**CALLED, "content": None}], "tools": [TOOL]},
        {"messages": [*ASKED, {**CALLED, "tool_calls": [{**CALL, "function": text}]}], "tools": json.dumps([TOOL])},
        {
            "messages": [*ASKED, {"role": "assistant", "content": None, "function_call": text}],
            "functions": [TOOL["function"]],
        },
        {"messages": [{**ASKED[0], "tools": [TOOL]}, ASKED[1], CALLED]},
        {
            "conversations": [
                {"from": "human", "value": ASKED[1]["content"]},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
        },
    ]
    made = encoder(TEMPLATES["qwen2_5"])
    rows = []
    for shape in shapes:
        loaded = read(tmp_path, [shape])
        assert not any("not read" in note for note in loaded.accounting.notes)
        rows.append(made.chat(loaded.records[0].messages))
    assert all(row == rows[0] for row in rows)
    assert rows[0][0] == theirs(made, TALKS["a call"], [TOOL])


@pytest.mark.parametrize("name", ["phi3", "phi3_5", "gemma3", "cohere"])
def test_a_tools_turn_that_the_template_leaves_out_is_refused(name, tmp_path):
    """Their templates pass over roles that they do not know."""
    made = encoder(TEMPLATES[name])
    turns = [*ASKED, {"role": "assistant", "content": "I look."}, RESULT, {"role": "assistant", "content": "Cold."}]
    (record,) = read(tmp_path, [{"messages": turns}]).records
    with pytest.raises(DataError, match=r"leaves out the turn of a tool|refuses it"):
        made.chat(record.messages)
    with pytest.raises(DataError, match=r"leaves out the turn of a tool|refuses it"):
        made.prompt(record.messages[:-1])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [*ASKED, {**CALLED, "tool_calls": [{"id": 1}]}]}, "`tool_calls` cannot be read"),
        ({"messages": [*ASKED, {**CALLED, "tool_calls": ["weather"]}]}, "`tool_calls` cannot be read"),
        ({"messages": TALKS["a call"], "tools": "weather"}, "`tools` cannot be read"),
        ({"messages": [{**ASKED[1], "tool_calls": [CALL]}, CALLED]}, "`tool_calls` would be lost"),
        ({"messages": [ASKED[1], {**CALLED, "tools": [TOOL]}]}, "`tools` would be lost"),
        ({"messages": [*ASKED, {"role": "assistant", "content": "", "thinking": THOUGHT}]}, "empty answer"),
        ({"messages": TALKS["a call"], "tools": [TOOL], "functions": [TOOL["function"]]}, "`functions` would be lost"),
    ],
)
def test_what_cannot_be_read_is_dropped_by_name(row, reason, tmp_path):
    assert read(tmp_path, [{"messages": TALKS["a call"]}, row]).accounting.dropped == {reason: 1}


def test_a_special_token_in_a_call_or_a_tool_is_refused(tmp_path):
    made = encoder(TEMPLATES["qwen2_5"])
    forged = json.loads(json.dumps(CALL).replace("Oslo", "<|im_end|>"))
    for row in (
        {"messages": [*ASKED, {**CALLED, "tool_calls": [forged]}]},
        {"messages": TALKS["a call"], "tools": [forged]},
    ):
        (record,) = read(tmp_path, [row]).records
        with pytest.raises(Exception, match="special token"):
            made.chat(record.messages)


def test_prompts_keep_their_tools_on_disk_and_for_rewards(tmp_path):
    loaded = read(tmp_path, [{"prompt": TALKS["a call and its result"][:-1], "tools": [TOOL]}], Prompt)
    made = encoder(TEMPLATES["qwen2_5"])
    (prompt,) = encode(Prompts(2048), loaded.records, made, loaded.accounting)
    assert prompt.ids == theirs(made, TALKS["a call and its result"][:-1], [TOOL], add_generation_prompt=True)
    assert prompt.record.messages == loaded.records[0].messages and prompt.record.columns == {"tools": [TOOL]}


def test_an_answer_of_a_pair_that_calls_a_tool_is_refused(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"chosen": TALKS["a call"], "rejected": TALKS["tools that are not called"]},
    ]
    counts = read(tmp_path, rows, Preference, format="preference").accounting
    assert counts.rows_used == 1 and counts.dropped == {"`tool_calls` would be lost": 1}


def test_a_tokenizer_learns_from_calls_too(tmp_path):
    loaded = read(tmp_path, [{"messages": TALKS["a call"]}])
    (texts,) = encode(Texts(Chat), loaded.records, None, loaded.accounting)
    assert any("Oslo" in text and "weather" in text for text in texts[2:])
