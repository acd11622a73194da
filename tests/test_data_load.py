"""Rows of every published shape become records; splits, limits and mixtures choose among them; every row is counted."""

import json
import random

import pytest

from data.accounting import Accounting
from data.config import FileSource, WorldSource
from data.errors import DataError
from data.records import Chat, Message, Origin, Preference, Prompt, Text
from tests.row_sets import load

U, A, S, T = "user", "assistant", "system", "tool"


def source(path, **settings) -> FileSource:
    return FileSource(source="file", path=path, **settings)


def load_rows(folder, rows, want, name="rows.jsonl", **settings):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(text, encoding="utf-8")
    return load([source(name, **settings)], want, folder, seed=0)


def turns(messages) -> list[tuple[str, str]]:
    return [(m.role, m.content) for m in messages]


CHATS = {
    "completion": ({"prompt": "q", "completion": "a"}, [(U, "q"), (A, "a")]),
    "response": ({"prompt": "q", "response": "a"}, [(U, "q"), (A, "a")]),
    "turns": (
        {"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    "alpaca": ({"instruction": "q", "input": "", "output": "a"}, [(U, "q"), (A, "a")]),
    "alpaca_input": ({"instruction": "q", "input": "i", "response": "a"}, [(U, "q\n\ni"), (A, "a")]),
    "alpaca_null": ({"system": "s", "instruction": "q", "input": None, "output": "a"}, [(S, "s"), (U, "q"), (A, "a")]),
    "messages": (
        {"messages": [{"role": r, "content": c} for r, c in [(S, "s"), (U, "q"), (A, "c"), (T, "t"), (A, "a")]]},
        [(S, "s"), (U, "q"), (A, "c"), (T, "t"), (A, "a")],
    ),
    "parts": (
        {"messages": [{"role": U, "content": [{"type": "text", "text": "q"}]}, {"role": A, "content": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    "part_values": (
        {"messages": [{"role": U, "content": [{"type": "text", "value": "q"}]}, {"role": A, "content": "a"}]},
        [(U, "q"), (A, "a")],
    ),
    "sharegpt": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [(S, "s"), (U, "q"), (A, "a")],
    ),
    "sharegpt_tools": (
        {
            "conversations": [
                {"from": f, "value": v}
                for f, v in [("human", "q"), ("function_call", "c"), ("observation", "o"), ("gpt", "a")]
            ]
        },
        [(U, "q"), (A, "c"), (T, "o"), (A, "a")],
    ),
    "last_question_cut": (
        {"conversations": [{"from": f, "value": f} for f in ("human", "gpt", "human")]},
        [(U, "human"), (A, "gpt")],
    ),
    "empty_system": (
        {"messages": [{"role": r, "content": c} for r, c in [(S, " "), (U, "q"), (A, "a")]]},
        [(U, "q"), (A, "a")],
    ),
    "gsm8k": ({"question": "q", "answer": "2 and 2\n#### 1,004"}, [(U, "q"), (A, "2 and 2\n#### 1,004")]),
    "pair": ({"prompt": "q", "chosen": "a", "rejected": "b"}, [(U, "q"), (A, "a")]),
    "header": (
        {
            "prompt": "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\nq\nr\n\n"
            "### Input:\ni\n\n### Response:\n",
            "response": "a",
        },
        [(U, "q\nr\n\ni"), (A, "a")],
    ),
}


@pytest.mark.parametrize("shape", CHATS)
def test_every_shape_becomes_a_chat(tmp_path, shape):
    row, expected = CHATS[shape]
    loaded = load_rows(tmp_path, [row], Chat)
    assert turns(loaded.records[0].messages) == expected
    assert loaded.records[0].origin == Origin("rows.jsonl", 1)
    assert loaded.accounting.rows_in == loaded.accounting.rows_used == 1


PAIRS = {
    "strings": {"prompt": "q", "chosen": "a", "rejected": "b"},
    "question": {"question": "q", "chosen": "a", "rejected": "b"},
    "alpaca": {"instruction": "q", "input": "", "output": "a", "chosen": "a", "rejected": "b"},
    "prompt_turns": {"prompt": [{"role": U, "content": "q"}], "chosen": "a", "rejected": "b"},
    "answer_turns": {
        "prompt": "q",
        "chosen": [{"role": A, "content": "a"}],
        "rejected": [{"role": A, "content": "b"}],
    },
    "whole": {
        "prompt": "q",
        "chosen": [{"role": U, "content": "q"}, {"role": A, "content": "a"}],
        "rejected": [{"role": U, "content": "q"}, {"role": A, "content": "b"}],
    },
    "sharegpt": {
        "conversations": [{"from": "human", "value": "q"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "transcript": {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
}


@pytest.mark.parametrize("shape", PAIRS)
def test_every_shape_becomes_a_preference(tmp_path, shape):
    (record,) = load_rows(tmp_path, [PAIRS[shape]], Preference).records
    assert (turns(record.prompt), record.chosen, record.rejected) == ([(U, "q")], "a", "b")


def test_transcripts_keep_all_turns_and_line_breaks(tmp_path):
    start = "\n\nHuman: one\n\ntwo\n\nAssistant: yes\n\nHuman: three\n\nAssistant:"
    (record,) = load_rows(tmp_path, [{"chosen": start + " good", "rejected": start + " bad"}], Preference).records
    assert turns(record.prompt) == [(U, "one\n\ntwo"), (A, "yes"), (U, "three")]
    assert (record.chosen, record.rejected) == ("good", "bad")


def test_prompts_keep_the_reference_and_the_other_columns(tmp_path):
    def prompt(row):
        (record,) = load_rows(tmp_path, [row], Prompt).records
        return turns(record.messages), record.columns

    assert prompt({"prompt": "q", "test": [1], "n": None}) == ([(U, "q")], {"test": [1], "n": None})
    assert prompt({"prompt": "q", "completion": "a", "id": 7}) == ([(U, "q")], {"id": 7, "reference": "a"})
    assert prompt({"messages": [{"role": U, "content": "q"}], "ground_truth": "4"}) == (
        [(U, "q")],
        {"ground_truth": "4"},
    )
    assert prompt(PAIRS["transcript"]) == ([(U, "q")], {"reference": "a"})
    # Only the commas between a number's thousands are left out.
    finals = {"-1,004": "-1004", "$12,345.50": "$12345.50", "1,004 km": "1004 km", "(5, 12)": "(5, 12)", "7,8": "7,8"}
    finals |= {"1,000, 2,000": "1,000, 2,000", "(100,200)": "(100,200)", "12,3456": "12,3456", "x = 1,2": "x = 1,2"}
    for final, read in finals.items():
        answer = f"so\n#### {final}"
        assert prompt({"question": "q", "answer": answer}) == ([(U, "q")], {"answer": read, "reference": answer})


def test_text_comes_as_a_column_or_as_strings(tmp_path):
    for rows in ([{"text": "one", "id": 1}, {"text": "two", "id": 2}], ["one", "two"]):
        loaded = load_rows(tmp_path, rows, Text)
        assert loaded.records == [Text("one", Origin("rows.jsonl", 1)), Text("two", Origin("rows.jsonl", 2))]
    # Alpaca data often has a `text` column of the whole; it is instruction data all the same.
    (record,) = load_rows(tmp_path, [{"instruction": "q", "output": "a", "text": "all"}], Chat).records
    assert turns(record.messages) == [(U, "q"), (A, "a")]


def test_kinds_that_cannot_be_made_of_the_data(tmp_path):
    for row, want, words in (
        ("text", Chat, "holds documents; wanted are records of kind Chat"),
        ({"prompt": "q", "completion": "a"}, Text, "holds conversations; wanted are records of kind Text"),
        (PAIRS["strings"], Text, "holds pairs of answers; wanted are records of kind Text"),
        ({"prompt": "q", "completion": "a"}, Preference, "a preference needs `chosen` and `rejected`"),
    ):
        with pytest.raises(DataError, match=f"^rows.jsonl:1: .*{words}"):
            load_rows(tmp_path, [row], want)


def test_unfit_rows_are_dropped_and_counted(tmp_path):
    def talk(*roles):
        return {"messages": [{"role": role, "content": "x"} for role in roles]}

    rows = [
        ({"messages": [{"role": U, "content": "q"}, {"role": A, "content": " \n"}]}, "empty answer"),
        ({"messages": [{"role": U, "content": ""}, {"role": A, "content": "a"}]}, "empty prompt"),
        (talk(U, U, A), "roles out of order"),
        (talk(A), "roles out of order"),
        (talk(U, S, A), "roles out of order"),
        (talk(U, T, A), "roles out of order"),
        (talk(U, A, A), "roles out of order"),
        (talk(U), "no answer"),
        (talk(), "no answer"),
        (talk(U, A) | {"label": False}, "labelled as a bad answer (label: false)"),
    ]
    good = talk(U, A)
    loaded = load_rows(tmp_path, [good, *(row for row, _ in rows)], Chat)
    counts = loaded.accounting
    assert len(loaded.records) == counts.rows_used == 1 and counts.rows_in == 11
    for _, reason in rows:
        assert counts.dropped[reason] == sum(r == reason for _, r in rows)
    assert counts.examples["empty answer"] == ["rows.jsonl:2"]
    assert "dropped, empty answer: 1 (first at rows.jsonl:2)" in counts.summary()
    assert counts.metrics()["data/dropped/roles_out_of_order"] == 5
    assert counts.metrics()["data/dropped/labelled_as_a_bad_answer_label_false"] == 1

    pairs = [
        (PAIRS["strings"], None),
        ({"prompt": "q", "chosen": "a", "rejected": " a "}, "chosen and rejected are the same"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty answer"),
        ({"prompt": "q", "chosen": "", "rejected": "b"}, "empty answer"),
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
    ]
    counts = load_rows(tmp_path, [row for row, _ in pairs], Preference).accounting
    assert counts.rows_used == 1
    assert counts.dropped == {"chosen and rejected are the same": 1, "empty answer": 2, "empty prompt": 1}

    other = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: r\n\nAssistant: b"}
    counts = load_rows(tmp_path, [PAIRS["transcript"], other], Preference).accounting
    assert counts.dropped == {"chosen and rejected do not answer the same prompt": 1}

    counts = load_rows(tmp_path, [CHATS["gsm8k"][0], {"question": "q", "answer": "four"}], Prompt).accounting
    assert counts.dropped == {"no final answer after ####": 1}


def test_what_was_done_to_rows_is_noted(tmp_path):
    rows = [CHATS["last_question_cut"][0] | {"id": 1, "lang": "en"}] * 2
    notes = load_rows(tmp_path, rows, Chat).accounting.notes
    assert notes == {
        "files read as sharegpt": 1,
        "conversations whose turns after the last answer were cut": 2,
        "file:rows.jsonl: column `id` not read": 2,
        "file:rows.jsonl: column `lang` not read": 2,
    }
    assert load_rows(tmp_path, [CHATS["header"][0]], Chat).accounting.notes[
        "prompts whose instruction header was taken off"
    ]


def test_too_many_dropped_rows_are_refused(tmp_path):
    rows = [{"prompt": "q", "completion": text} for text in ("a", "b", "", "")]
    counts = load_rows(tmp_path, rows, Chat).accounting
    counts.check(0.5)
    with pytest.raises(
        DataError, match=r"2 of 4 rows were dropped[^$]*empty answer: 2 .first at rows.jsonl:3, rows.jsonl:4"
    ):
        counts.check(0.49)
    with pytest.raises(DataError, match=r"no row can be used[\s\S]*empty answer: 2"):
        load_rows(tmp_path, rows[2:], Chat)
    with pytest.raises(DataError, match="no row is left of 0"):
        Accounting().check(1.0)


def test_the_account_adds_up_whatever_comes(tmp_path):
    """A fuzz set: rows of random quality, in random splits, mixtures and limits."""
    rng = random.Random(0)
    pool = [
        {"prompt": "q{}", "completion": "a"},
        {"prompt": "", "completion": "a"},
        {"prompt": "q{}", "completion": " "},
    ]
    for trial in range(40):
        sources, written = [], 0
        for name in ("a.jsonl", "b.jsonl"):
            rows = [{k: v.format(i) for k, v in rng.choice(pool).items()} for i in range(rng.randint(30, 60))]
            rows.append({"prompt": "sure", "completion": "a"})
            written += len(rows)
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
            held = {"holdout": 0.5, "split": rng.choice(["train", "validation", "test"])} if rng.random() < 0.5 else {}
            sources.append(source(name, weight=rng.choice([0.3, 1.0]), **held))
        loaded = load(sources, Chat, tmp_path, seed=trial)
        counts = loaded.accounting
        assert counts.rows_in == counts.rows_used + sum(counts.dropped.values())
        assert counts.rows_used == len(loaded.records)
        assert counts.rows_in + sum(counts.set_aside.values()) == written


def test_splits_are_disjoint_complete_and_the_same_in_every_file(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": "a"} for i in range(400)]
    parts = {}
    for split in ("train", "validation", "test"):
        loaded = load_rows(tmp_path, rows, Chat, holdout=0.2, split=split)
        parts[split] = {r.messages[0].content for r in loaded.records}
        assert loaded.accounting.set_aside == {"other split": 400 - len(parts[split])}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 400
    assert 20 < len(parts["validation"]) < 60 and 20 < len(parts["test"]) < 60
    # The same questions in another file and shape, written a little differently, with later turns: the same sides.
    pairs = [{"prompt": f" Question  {i}", "chosen": "a", "rejected": "b"} for i in range(400)]
    test = load_rows(tmp_path, pairs, Preference, name="pairs.jsonl", holdout=0.2, split="test").records
    assert {" ".join(r.prompt[0].content.split()).lower() for r in test} == parts["test"]
    longer = [
        {"messages": [{"role": r, "content": c} for r, c in [(U, f"question {i}"), (A, "x"), (U, "y"), (A, "z")]]}
        for i in range(400)
    ]
    test = load_rows(tmp_path, longer, Chat, name="long.jsonl", holdout=0.2, split="test").records
    assert {r.messages[0].content for r in test} == parts["test"]


def test_a_test_part_is_not_trained_on_under_half_its_share(tmp_path):
    rows = [{"prompt": f"question {i}", "completion": "a"} for i in range(400)]
    test = {r.messages[0] for r in load_rows(tmp_path, rows, Chat, holdout=0.2, split="test").records}
    train = {r.messages[0] for r in load_rows(tmp_path, rows, Chat, holdout=0.1, split="train").records}
    assert test and train and not test & train


def test_an_empty_split_says_so(tmp_path):
    with pytest.raises(DataError, match=r"file:rows.jsonl: no row can be used .split test, holdout 0.01"):
        load_rows(tmp_path, [{"text": "one"}], Text, holdout=0.01, split="test")


def test_limit_takes_the_first_usable_rows(tmp_path):
    rows = [{"prompt": f"q{i}", "completion": "" if i == 1 else "a"} for i in range(10)]
    loaded = load_rows(tmp_path, rows, Chat, limit=3)
    assert [r.messages[0].content for r in loaded.records] == ["q0", "q2", "q3"]
    assert loaded.accounting.rows_in == 4


def test_weights_thin_out_the_lighter_sources(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {i}"}) + "\n" for i in range(100)))

    def texts(seed, *weights):
        sources = [source(f"{name}.jsonl", weight=weight) for name, weight in zip("ab", weights)]
        loaded = load(sources, Text, tmp_path, seed)
        assert loaded.accounting.rows_in == loaded.accounting.rows_used == len(loaded.records)
        return [r.text for r in loaded.records]

    both, light = texts(0, 1.0, 1.0), texts(0, 2.0, 0.5)
    assert len(both) == 200 and len(set(both)) == 200
    assert sum(t[0] == "a" for t in light) == 100 and sum(t[0] == "b" for t in light) == 25
    assert light == texts(0, 4.0, 1.0) and light != texts(1, 2.0, 0.5)
    # Mixed, so that the first rows are a sample of all.
    assert {t[0] for t in both[:20]} == {"a", "b"}


def test_the_world_goes_the_same_way(tmp_path):
    def world(kind, **settings):
        return WorldSource(source="world", kind=kind, size=30, **settings)

    chats = load([world("chats")], Chat, None, 0)
    prompts = load([world("chats")], Prompt, None, 0)
    assert len(chats.records) == len(prompts.records) == 30
    for chat, prompt in zip(chats.records, prompts.records, strict=True):
        assert prompt.messages == chat.messages[:-1]
        assert prompt.columns == {"reference": chat.messages[-1].content}
    assert "family" in load([world("prompts")], Prompt, None, 0).records[0].columns
    assert load([world("preferences")], Preference, None, 0).records[0].chosen
    assert load([world("documents")], Text, None, 0).records[0].text
    assert len(load([world("chats", limit=7)], Chat, None, 0).records) == 7
    with pytest.raises(DataError, match="world:documents:1: holds documents; wanted are records of kind Chat"):
        load([world("documents")], Chat, None, 0)


def test_messages_are_plain_records(tmp_path):
    (record,) = load_rows(tmp_path, [CHATS["completion"][0]], Chat).records
    assert record == Chat((Message(U, "q"), Message(A, "a")), Origin("rows.jsonl", 1))
