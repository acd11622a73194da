"""Published files, unchanged: how many records each gives, or the message that says why it gives none."""

import pytest

from data.calls import held
from data.config import FileSource
from data.errors import DataError
from data.records import Chat, Preference, Prompt, Text
from data.rows import Chats
from tests.row_sets import Loaded, encode, load
from tests.test_chat_templates import TEMPLATES, encoder
from tests.test_chat_tools import theirs
from tests.test_data_encode import own

TEXTS = {
    "pretrain/tinyshakespeare.txt.gz": 144,
    "pretrain/tinystories-1000.json.gz": 1000,
    "pretrain/wiki-demo.txt.gz": 30,
    "pretrain/wikitext-2.valid.txt.gz": 170,
}
CHATS = {
    "sft/instructions-1100.json.gz": 1100,
    "sft/alpaca-format-999.json.gz": 999,
    "sft/gpteacher-codegen.json.gz": 4535,
    "sft/sharegpt-format-500.json.gz": 500,
    "sft/messages-parts-format.jsonl.gz": 500,
    "sft/dolly-hhrlhf-1000.jsonl.gz": 1000,
    "preference/kto-300.json.gz": 150,
    "tools/toolrl-sft.json.gz": 400,
}
PREFERENCES = {
    "preference/hh-rlhf-harmless-1800.jsonl.gz": 1791,
    "preference/sharegpt-dpo-300.json.gz": 300,
    "preference/instructions-with-preference-1100.json.gz": 1094,
    "preference/messages-preference-sample.jsonl.gz": 100,
}
PROMPTS = {
    "verifiable/gsm8k-train.jsonl.gz": (7473, {"answer", "reference"}),
    "verifiable/humaneval.jsonl.gz": (164, {"task_id", "canonical_solution", "test", "entry_point"}),
    "verifiable/ifeval-prompts.jsonl.gz": (541, {"key", "instruction_id_list", "kwargs"}),
    "verifiable/rlvr-sample.jsonl.gz": (100, {"ground_truth", "dataset", "constraint", "constraint_type"}),
}
UNREADABLE = {
    "preference/pandalm-999.json.gz": "of no known format",
    "preference/llmbar-natural.json.gz": "of no known format",
    "verifiable/mbpp.jsonl.gz": "holds documents; wanted are records of kind Chat",
    "tools/bfcl-v4-multiple.jsonl.gz": "of no known format",
    "tools/bfcl-v4-simple_python.answers.jsonl.gz": "of no known format",
    "eval/arc-easy.jsonl.gz": "holds questions with answers to choose from; wanted are records of kind Chat",
    "eval/mmlu.tar.gz": "not one of .txt, .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow",
}


def read(folder, path, want, **settings) -> Loaded:
    loaded = load([FileSource(source="file", path=path, **settings)], want, folder, seed=0)
    counts = loaded.accounting
    assert counts.rows_used == len(loaded.records) == counts.rows_in - sum(counts.dropped.values())
    return loaded


@pytest.mark.parametrize("path", TEXTS)
def test_texts(shared_data, path):
    assert len(read(shared_data, path, Text).records) == TEXTS[path]


@pytest.mark.parametrize("path", CHATS)
def test_chats(shared_data, path):
    assert len(read(shared_data, path, Chat).records) == CHATS[path]


def test_conversations_with_tools_are_encoded_by_a_template_that_takes_them(shared_data):
    path = "tools/glaive-toolcall-300.json.gz"
    loaded = read(shared_data, path, Chat)
    chats = [record.messages for record in loaded.records]
    for name in ("qwen3", "llama3_1", "gptoss"):
        made = encoder(TEMPLATES[name])
        for messages, rows in zip(chats[:100], made.chats(chats[:100]), strict=True):
            assert isinstance(rows, list), (name, rows)
            turns = [{"role": m.role, "content": m.content, **held(m)} for m in messages]
            tools = turns[0].pop("tools", None)
            assert rows[0][0] == theirs(made, turns, tools)
    refused = encode(Chats(4096, "drop"), loaded.records, own(), loaded.accounting).accounting
    with pytest.raises(DataError, match=r"`tools` would be lost: 191 [\s\S]*set `ignore: .tools.` in the source"):
        refused.check(0.5)
    assert len(read(shared_data, path, Chat, ignore=["tools"]).records) == 300


@pytest.mark.parametrize("path", PREFERENCES)
def test_preferences(shared_data, path):
    assert len(read(shared_data, path, Preference).records) == PREFERENCES[path]


@pytest.mark.parametrize("path", PROMPTS)
def test_prompts(shared_data, path):
    count, columns = PROMPTS[path]
    records = read(shared_data, path, Prompt).records
    assert len(records) == count and all(set(record.columns) == columns for record in records)


@pytest.mark.parametrize("path", UNREADABLE)
def test_unreadable_files_say_why(shared_data, path):
    with pytest.raises(DataError, match=f"^{path}.*{UNREADABLE[path]}"):
        read(shared_data, path, Chat)


def test_books_lose_gutenbergs_text_and_one_can_be_held_out(shared_data):
    books = read(shared_data, "pretrain/gutenberg-*", Text, exclude=["*moby-dick*"])
    assert {record.origin.file.split("/")[1] for record in books.records} == {
        path.name for path in (shared_data / "pretrain").glob("gutenberg-*") if "moby" not in path.name
    }
    assert not any(mark in r.text for r in books.records for mark in ("PROJECT GUTENBERG", "\r", "\ufeff"))
    assert 4_000_000 < sum(len(record.text) for record in books.records) < 5_000_000


def test_dropped_pairs_and_headers_are_named(shared_data):
    harmless = read(shared_data, "preference/hh-rlhf-harmless-1800.jsonl.gz", Preference).accounting
    assert harmless.dropped.keys() <= {
        "empty answer",
        "roles out of order",
        "chosen and rejected do not answer the same prompt",
        "chosen and rejected are the same",
    }
    dolly = read(shared_data, "sft/dolly-hhrlhf-1000.jsonl.gz", Chat)
    assert dolly.accounting.notes["prompts whose instruction header was taken off"] == 1000
    assert dolly.records[0].messages[0].content == "what is kangen water?"


def test_equal_prompts_of_two_files_are_held_out_together(shared_data):
    held = {"holdout": 0.1}
    train = read(shared_data, "sft/instructions-1100.json.gz", Chat, split="train", **held).records
    test = read(shared_data, "preference/instructions-with-preference-1100.json.gz", Preference, split="test", **held)
    seen = {record.messages[0].content for record in train}
    assert len(test.records) > 30 and not any(record.prompt[0].content in seen for record in test.records)
