"""Each key of published data is used, named as not read, or the reason why its row is dropped: none is lost unsaid."""

import json
import re

import pytest

from data.calls import held
from data.config import FileSource
from data.records import Chat, Preference, Prompt, Text
from tests.row_sets import load

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TALK = [{"role": "user", "content": "another question"}, {"role": "assistant", "content": "another answer"}]
SHARES = {"weight": 0, "loss_weight": 0.0, "train": False, "trainable": False}
MEDIA = {"images": ["a.png"], "image": "a.png", "audios": ["a"], "audio": {"id": "a"}, "videos": ["v"], "video": "v"}
THOUGHTS = {"reasoning_content": "so", "reasoning": "so", "thinking": "so"}
OF_ROWS = {
    **SHARES, **MEDIA, **THOUGHTS, "sample_weight": 0, "tools": [TOOL], "functions": [TOOL], "history": [["a", "b"]],
    "system": "Be brief.", "system_prompt": "Be brief.", "label": False, "kto_tag": "False", "score": 0.5,
    "scores": {"a": 1}, "score_chosen": 2, "score_rejected": 1, "margin": -1, "category": "x", "source": "x", "id": 7,
    "name": "x", "lang": "en", "metadata": {"a": 1}, "documents": ["d"], "chat_template_kwargs": {"thinking": True},
    "prompt": "another question", "completion": "another answer", "response": "another answer", "input": "more",
    "output": "another answer", "text": "another text", "messages": TALK, "conversations": TALK, "question": "why?",
    "instruction": "do it", "reference": "r", "ground_truth": "4", "solution": "4", "answer": "4", "__index__": 3,
    "chosen_score": 2, "rejected_score": 1, "turns": 2, "kto": True, "rating": 0, "is_safe": False, "labels": [0],
}  # fmt: skip
"""Keys of rows, each with a value that asks for something."""
OF_TURNS = {
    **SHARES, **MEDIA, **THOUGHTS, "loss": False, "tool_calls": [CALL], "function_call": {"name": "f"}, "tools": [TOOL],
    "functions": "f", "name": "ann", "tool_call_id": "c1", "train_detail": [{"begin": 0}], "prefix": True, "id": "m1",
    "refusal": "no", "annotations": [1], "cache_control": {"type": "x"}, "lang": "en", "recipient": "all",
}  # fmt: skip
"""Keys of turns, likewise."""


def talk(*texts, who="role", what="content", names=("user", "assistant")):
    return [{who: names[i % 2], what: text} for i, text in enumerate(texts)]


FOUR = talk("one", "two", "three", "four")
BASES = {
    "text": ({"text": "a text"}, (Text,)),
    "prompt_completion": ({"prompt": "q", "completion": "a"}, (Chat, Prompt)),
    "prompt turns": ({"prompt": FOUR[:3], "completion": FOUR[3:]}, (Chat, Prompt)),
    "prompt alone": ({"prompt": "q"}, (Prompt,)),
    "alpaca": ({"instruction": "q", "output": "a"}, (Chat, Prompt)),
    "messages": ({"messages": FOUR}, (Chat, Prompt)),
    "messages without an answer": ({"messages": FOUR[:3]}, (Prompt,)),
    "sharegpt": (
        {"conversations": talk("one", "two", "three", "four", who="from", what="value", names=("human", "gpt"))},
        (Chat, Prompt),
    ),
    "preference": ({"prompt": "q", "chosen": "a", "rejected": "b"}, (Chat, Preference, Prompt)),
    "preference turns": (
        {"chosen": FOUR, "rejected": [*FOUR[:3], {"role": "assistant", "content": "five"}]},
        (Chat, Preference, Prompt),
    ),
    "hh_rlhf": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        (Chat, Preference, Prompt),
    ),
    "gsm8k": ({"question": "q", "answer": "so\n#### 4"}, (Chat, Prompt)),
}
ANSWERS = (("prompt alone", "completion"), ("prompt alone", "response"))
"""Empty, they are errors: a column that is read has no empty cells."""
CASES = [(base, want) for base, (_, wants) in BASES.items() for want in wants]


def read(folder, rows, want, **settings):
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load([FileSource(source="file", path="rows.jsonl", **settings)], want, folder, seed=0)


def silent(folder, base, varied, want) -> list[str]:
    """The keys of `varied` ({key: row with it}) that are neither used nor named."""
    loaded = read(folder, [base, *varied.values()], want)
    counts = loaded.accounting
    assert counts.rows_in == counts.rows_used + sum(counts.dropped.values()) == len(varied) + 1
    made = {record.origin.row: what_is_used(record) for record in loaded.records}
    said = " ".join(
        [note for note in counts.notes if " not read" in note or "not answers" in note] + list(counts.dropped)
    )
    return [
        key
        for row, key in enumerate(varied, start=2)
        if made.get(row) == made[1] and not re.search(rf"`{key}`|\b{key}(:| is)", said)
    ]


def what_is_used(record):
    if isinstance(record, Text):
        return record.text
    if isinstance(record, Preference):
        return record.prompt, record.chosen, record.rejected
    trained = [(turn, turn.trained) for turn in record.messages]
    return trained, record.columns if isinstance(record, Prompt) else None


@pytest.mark.parametrize(("base", "want"), CASES)
def test_no_key_of_a_row_is_lost_silently(tmp_path, base, want):
    row = BASES[base][0]
    varied = {key: {**row, key: value} for key, value in OF_ROWS.items() if key not in row}
    assert silent(tmp_path, row, varied, want) == []


@pytest.mark.parametrize(("base", "want"), [case for case in CASES if "turns" in case[0] or "messages" in case[0]]
                         + [("sharegpt", Chat), ("sharegpt", Prompt)])  # fmt: skip
@pytest.mark.parametrize("place", [0, 1, -1])
def test_no_key_of_a_turn_is_lost_silently(tmp_path, base, want, place):
    row = BASES[base][0]
    varied = {}
    for key, value in OF_TURNS.items():
        # A user's turn is never trained on, so there a weight that asks for it is the one that could be lost.
        asked = 1 if key in (*SHARES, "loss") and place == 0 else value
        varied[key] = {
            name: [{**turn, key: asked} if i == place % len(turns) else turn for i, turn in enumerate(turns)]
            for name, turns in row.items()
        }
    if base == "prompt turns" and place == -1:  # the last turn of the prompt is the user's
        varied = {key: {**row, "completion": turned["completion"]} for key, turned in varied.items()}
    if base == "messages without an answer":
        varied = {key: turned for key, turned in varied.items() if key not in (*SHARES, "loss")}
    assert silent(tmp_path, row, varied, want) == []


@pytest.mark.parametrize(("base", "want"), CASES)
def test_a_key_that_says_nothing_changes_nothing(tmp_path, base, want):
    """Tables have every column in every row, so most are empty."""
    row = BASES[base][0]
    keys = [key for key in OF_ROWS if key not in row and (base, key) not in ANSWERS]
    for empty in (None, "", [], [None], {"a": None}, "[]"):
        rows = [row, *({**row, key: empty} for key in keys if empty is None or key in MEDIA)]
        rows += [{**row, "tools": empty}]
        loaded = read(tmp_path, rows, want)
        assert not loaded.accounting.dropped
        assert not any("not read" in note for note in loaded.accounting.notes)
        made = [what_is_used(record) for record in loaded.records]
        made = [used[0] if want is Prompt else used for used in made]
        assert made == [made[0]] * len(rows)


def test_a_key_in_ignore_is_left_out_and_its_row_is_used(tmp_path):
    turns = [FOUR[0], {**FOUR[1], "reasoning_content": "so", "weight": 0}]
    row = {"messages": turns, "tools": [TOOL], "images": ["a.png"], "label": False}
    names = ["reasoning_content", "weight", "tools", "images", "label"]
    for kept in names:
        others = [name for name in names if name != kept]
        loaded = read(tmp_path, [{"messages": FOUR}, row], Chat, ignore=others)
        if kept in ("reasoning_content", "tools"):
            assert not loaded.accounting.dropped
            assert [kept in held(turn) for turn in loaded.records[1].messages].count(True) == 1
            continue
        reason = next(iter(loaded.accounting.dropped))
        assert kept in reason or (kept == "weight" and reason == "no answer is to be trained on")
    loaded = read(tmp_path, [row], Chat, ignore=names)
    assert [turn.content for turn in loaded.records[0].messages] == ["one", "two"]
    assert loaded.records[0].messages[1].trained
    (question,) = read(tmp_path, [{"prompt": "q", "completion": "a"}], Prompt, ignore=["completion"]).records
    assert question.columns == {"completion": "a"}
    # Reward functions may read a column that the prompt does not show.
    (prompt,) = read(tmp_path, [row], Prompt, ignore=names).records
    assert prompt.columns == {"tools": [TOOL], "images": ["a.png"], "label": False, "reference": "two"}
