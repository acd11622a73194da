"""Rows on disk: encoded once, found again by what they depend on, made again when damaged, gone when refused."""

import copy
import json
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

import data.shards
from data.accounting import Accounting
from data.config import FileSource, WorldSource
from data.encode import Encoder
from data.errors import DataError
from data.fingerprint import fingerprints
from data.records import Chat, Message, Origin, Preference, Prompt, Text
from data.rows import Chats, Documents, Pairs, Prompts, Questions, Texts
from data.shards import INDEX, RowStore, StoredRows, row_key
from handoff.errors import HandoffError
from handoff.files import sha256_file
from tests.row_sets import encode, load
from tests.test_data_encode import own

CHATS = Chats(64, "drop")


def write(folder: Path, name: str, count: int, answer: str = "pear") -> FileSource:
    rows = [{"prompt": f"{name} {i}", "completion": answer} for i in range(count)]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return FileSource(source="file", path=f"{name}.jsonl")


def store(folder: Path) -> RowStore:
    return RowStore(folder / ".rows", sha256_file, lambda call: call())


def folders(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / ".rows").iterdir())


def test_a_second_start_reads_no_source_text(tmp_path, monkeypatch):
    sources = [write(tmp_path, "a", 30), write(tmp_path, "b", 20)]
    first = store(tmp_path).open(sources, CHATS, own(), tmp_path, 0)
    kept = list(first)
    monkeypatch.setattr("data.load.read_rows", lambda *args: pytest.fail("the source was read again"))
    again = store(tmp_path).open(sources, CHATS, own(), tmp_path, 0)
    assert list(again) == kept and len(kept) == 50
    assert again.accounting == first.accounting and again.fingerprints == first.fingerprints
    assert again.lengths.tolist() == [len(row["input_ids"]) for row in kept]
    assert list(again.dataset()) == kept and again[7] == kept[7] and again[3:5] == kept[3:5]


def test_several_sources_come_in_the_order_of_the_mixture(tmp_path):
    """Rows, stream and the first places of each reason are those of all records in their order of use."""
    sources = [write(tmp_path, "a", 60), write(tmp_path, "b", 40), write(tmp_path, "c", 9, "pear " * 80)]
    sources[1] = sources[1].model_copy(update={"weight": 0.5})
    records = load(sources, Chat, tmp_path, 5).records
    rows = store(tmp_path).open(sources, CHATS, own(), tmp_path, 5)
    short = [record for record in records if "c" not in record.origin.file]
    assert [row["input_ids"] for row in rows] == [own().chat(record.messages)[0] for record in short]
    dropped = [str(record.origin) for record in records if "c" in record.origin.file]
    assert rows.accounting.examples["longer than max_length"] == dropped[:3]
    assert rows.accounting.dropped == {"longer than max_length": 9}
    assert rows.accounting.set_aside == {"mixture weight": 20}
    with pytest.raises(DataError, match=r"longer than max_length: 9 .*; raise max_length, or set truncation: keep_end"):
        rows.accounting.check(0.05)

    texts = [
        source.model_copy(update={"format": "text", "path": f"{name}.txt"}) for source, name in zip(sources, "abc")
    ]
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i} " + "x" * 5000 for i in range(8)))
    stream = store(tmp_path).open(texts, Documents(), own(), tmp_path, 5)
    documents = load(texts, Text, tmp_path, 5).records
    assert stream.tokens.tolist() == [i for record in documents for i in own().document(record.text)]
    assert stream.lengths.tolist() == [len(own().document(record.text)) for record in documents]


def test_the_key_changes_with_what_rows_depend_on_and_with_nothing_else(tmp_path):
    sources = [write(tmp_path, "a", 3), write(tmp_path, "b", 3)]
    encoder = own()

    def key(sources=sources, kind=CHATS, encoder=encoder, seed=0):
        return row_key(fingerprints(sources, tmp_path), sources, kind, encoder, seed)

    def changed(**settings):
        return [sources[0].model_copy(update=settings), sources[1]]

    first = key()
    assert key(encoder=Encoder(copy.deepcopy(encoder.tokenizer))) == first
    assert key([s.model_copy(update={"weight": 3.0}) for s in sources]) == first  # the same mixture
    assert key(sources[:1], seed=1) == key(sources[:1])  # nothing is mixed

    template, tokenizer, pad = (copy.deepcopy(own().tokenizer) for _ in range(3))
    template.chat_template += "{# other #}"
    tokenizer.add_tokens(["pear"])
    pad.pad_token = "<|reserved_0|>"
    others = [
        key(seed=1),
        key(kind=Chats(65, "drop")),
        key(kind=Chats(64, "keep_end")),
        key(kind=Chats(64, "drop", "fork")),
        key(kind=Questions(Chat)),
        key(kind=Questions(Preference)),
        key(kind=Texts(Chat), encoder=None),
        key(encoder=Encoder(template)),
        key(encoder=Encoder(tokenizer)),
        key(encoder=Encoder(pad)),
        key(changed(weight=0.5)),
        key(changed(limit=2)),
        key(changed(format="prompt_completion")),
        key(changed(holdout=0.5, split="train")),
        key(sources[::-1]),
        key(sources[:1]),
    ]
    write(tmp_path, "a", 3, "apple")
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


@pytest.mark.parametrize("damage", ["cut", "altered", "missing", "counts", "unfinished"])
def test_a_damaged_folder_is_made_again(tmp_path, damage):
    sources = [write(tmp_path, "a", 20)]
    first = list(store(tmp_path).open(sources, CHATS, own(), tmp_path, 0))
    (folder,) = (tmp_path / ".rows").iterdir()
    rows, index = folder / "rows.arrow", folder / INDEX
    content = rows.read_bytes()
    if damage == "cut":
        rows.write_bytes(content[:-100])
    elif damage == "altered":
        rows.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    elif damage == "missing":
        rows.unlink()
    elif damage == "counts":
        index.write_text(index.read_text().replace('"rows_in": 20', '"rows_in": 21'))
    else:
        index.unlink()
    again = store(tmp_path).open(sources, CHATS, own(), tmp_path, 0)
    assert list(again) == first and again.accounting.rows_in == 20
    assert folders(tmp_path) == [folder.name] and rows.read_bytes() == content


def test_refused_data_leaves_nothing_and_is_refused_again(tmp_path):
    write(tmp_path, "a", 20)
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write('{"prompt": "q"}\n')
    long = write(tmp_path, "long", 3, "pear " * 80)
    for source, kind, message in (
        (FileSource(source="file", path="a.jsonl"), CHATS, "a.jsonl:21: no column `completion`"),
        (long, CHATS, "no row is left of 3: .* raise max_length, or set truncation: keep_end"),
        (long, Prompts(2), "no row is left of 3: .* max_prompt_length is 2; raise max_prompt_length$"),
        (long, Chats(64, "error"), "long.jsonl:1: .* tokens, and max_length is 64"),
    ):
        for _ in range(2):
            with pytest.raises(DataError, match=message):
                store(tmp_path).open([source], kind, own(), tmp_path, 0)
            assert not (tmp_path / ".rows").exists()


def test_a_start_that_is_refused_takes_its_rows_along_and_no_others(tmp_path):
    kept, refused = store(tmp_path), store(tmp_path)
    kept.open([write(tmp_path, "a", 5)], CHATS, own(), tmp_path, 0)
    before = folders(tmp_path)
    rows = refused.open([write(tmp_path, "b", 5)], CHATS, own(), tmp_path, 0)
    assert len(folders(tmp_path)) == 2
    refused.discard()
    assert folders(tmp_path) == before
    assert len(list(rows)) == 5  # mapped files outlive their names
    kept.discard()
    assert not (tmp_path / ".rows").exists()


def test_writers_at_the_same_time_do_not_disturb_each_other(tmp_path):
    sources = [write(tmp_path, "a", 300)]
    found: list[list] = []
    gate = threading.Barrier(4)

    def start():
        mine = store(tmp_path)
        gate.wait()
        found.append(list(mine.open(sources, CHATS, own(), tmp_path, 0)))

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(rows == found[0] and len(rows) == 300 for rows in found)
    assert len(folders(tmp_path)) == 1


def test_other_processes_open_what_the_main_one_has_made_and_hash_nothing(tmp_path, monkeypatch):
    """Also if their machine's file system shows it a little later."""
    told: list[StoredRows] = []
    sources = [write(tmp_path, "a", 5)]
    main = RowStore(tmp_path / ".rows", sha256_file, lambda call: told.append(call()) or told[0])
    rows = main.open(sources, CHATS, own(), tmp_path, 0)
    hidden = tmp_path / "hidden"
    told[0].folder.rename(hidden)
    other = RowStore(tmp_path / ".rows", lambda path: pytest.fail(f"{path} was hashed again"), lambda call: told[0])
    found: list[list] = []
    waiting = threading.Thread(target=lambda: found.append(list(other.open(sources, CHATS, own(), tmp_path, 0))))
    waiting.start()
    time.sleep(0.1)
    assert found == []
    hidden.rename(told[0].folder)
    waiting.join()
    assert found == [list(rows)]


def test_a_machine_that_sees_another_folder_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "_SEEN", 0.0)
    elsewhere = StoredRows(tmp_path / ".rows" / "elsewhere", {})
    other = RowStore(tmp_path / ".rows", sha256_file, lambda call: elsewhere)
    with pytest.raises(HandoffError, match="all machines have to see the same output_root"):
        other.open([write(tmp_path, "a", 5)], CHATS, own(), tmp_path, 0)


def test_what_a_writer_that_has_died_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(data.shards, "_PATIENCE", 0.0)
    left = tmp_path / ".rows" / ".writing-x"
    left.mkdir(parents=True)
    store(tmp_path).open([write(tmp_path, "a", 5)], CHATS, own(), tmp_path, 0)
    assert not left.exists()


def test_prompts_come_back_as_they_were_read(tmp_path):
    world = load([WorldSource(source="world", kind="prompts", size=40)], Prompt, None, 0).records
    columns = {"n": 3, "x": 0.1, "none": None, "list": [1, "a"], "deep": {"b": [True]}, "text": "é\ud800"}
    records = [*world, Prompt((Message("system", "s"), Message("user", "q")), Origin("x", 1), columns)]
    counts = Accounting()
    rows = encode(Prompts(200), records, own(), counts)
    assert [row.record for row in rows] == records
    assert rows.facts["n"] == 1 and rows.facts["family"] == 40
    odd = Prompt((Message("user", "q"),), Origin("x", 1), {"image": b"1", "answer": "4"})
    (row,) = encode(Prompts(200), [odd], own(), counts)
    assert row.record.columns == {"answer": "4"}
    assert counts.notes == {"column `image` left out: bytes is no JSON value": 1}


def test_questions_are_those_of_every_record_and_texts_are_as_they_are():
    chat = Chat(
        (Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")), None
    )
    forged = Chat((Message("user", "<|end|>"), Message("assistant", "b")), None)
    assert list(encode(Questions(Chat), [chat, forged], own(), Accounting())) == [
        (own().prompt(chat.messages[:-1]), "c"),
        ([], "<|end|>"),
    ]
    pair = Preference((Message("user", "a"),), "x", "y", None)
    assert encode(Questions(Preference), [pair], own(), Accounting())[0] == (own().prompt(pair.prompt), "a")
    assert list(encode(Texts(Chat), [chat, forged], None, Accounting())) == [["a", "b", "c", "d"], ["<|end|>", "b"]]


def test_no_rows_at_all_can_be_opened():
    for kind in (Documents(), Texts(Text), Pairs(9, "drop")):
        rows = encode(kind, [], own(), Accounting())
        assert len(rows) == 0 and rows.tokens.tolist() == []


@pytest.mark.slow
@pytest.mark.parametrize("kind", [CHATS, Documents()], ids=["chats", "documents"])
def test_memory_does_not_grow_with_the_data(tmp_path, kind):
    """Python's heap while rows are encoded and opened, of N rows and of 8 N; a batch is the same for both."""

    def peak(count: int) -> int:
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                row = {"prompt": f"{i}", "completion": "pear apple " * 5}
                file.write(json.dumps({"text": row["completion"]} if kind == Documents() else row) + "\n")
        encoder = own()
        tracemalloc.start()
        rows = store(tmp_path).open([FileSource(source="file", path=path.name)], kind, encoder, tmp_path, 0)
        assert len(rows) == count and np.isfinite(rows.lengths).all()
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(4096)  # what is imported and compiled once
    small, large = peak(2 * 4096), peak(9 * 4096)
    # Lengths and places: 12 bytes a row, doubled while an array grows. A row itself takes about 3,000.
    assert large - small < 7 * 4096 * 60


def test_facts_are_those_of_the_rows_that_are_left(tmp_path):
    rows = [
        {"prompt": "one", "a": 1},
        {"prompt": "two", "a": 2, "b": 3},
        {"prompt": "three", "b": 4},
        {"prompt": "four"},
    ]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = FileSource(source="file", path="p.jsonl")
    whole = store(tmp_path).open([source], Prompts(64), own(), tmp_path, 0)
    assert whole.facts == {"a": 2, "b": 2}
    left = whole.without({1: "why"}, lambda prompt: prompt.record.origin)
    assert left.facts == {"a": 1, "b": 1} and whole.facts == {"a": 2, "b": 2}
    last = left.without({1: "why"}, lambda prompt: prompt.record.origin)
    assert last.facts == {"a": 1}, "a column of no row is no column"
    assert [prompt.record.columns for prompt in last] == [{"a": 1}, {}]
