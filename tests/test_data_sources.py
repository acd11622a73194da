"""Every kind of file gives the same rows; folders, globs and the hub; text files become documents; fingerprints."""

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data.config import FileSource, HubSource, StageSource, WorldSource
from data.documents import TARGET, split_documents
from data.errors import DataError
from data.fingerprint import fingerprint, fingerprints
from data.records import Chat, Origin, Prompt, Text
from data.sources import read_rows
from handoff.files import HashCache
from tests.row_sets import load

ROWS = [{"prompt": 'a "b", c\nd', "completion": "é"}, {"prompt": "q", "completion": "x" * 200_000}]


def contents(suffix: str) -> bytes:
    if suffix == ".jsonl":
        return "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    if suffix == ".json":
        return json.dumps(ROWS, indent=1).encode()
    if suffix == ".csv":
        out = io.StringIO()
        writer = csv.DictWriter(out, ["prompt", "completion"])
        writer.writeheader()
        writer.writerows(ROWS)
        return out.getvalue().encode()
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), buffer)
    return buffer.getvalue()


BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("suffix", "bom"),
    [(".jsonl", b""), (".jsonl", BOM), (".json", b""), (".json", BOM), (".csv", b""), (".csv", BOM), (".parquet", b"")],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, suffix, bom):
    plain, packed = tmp_path / f"rows{suffix}", tmp_path / f"rows{suffix}.gz"
    plain.write_bytes(bom + contents(suffix))
    packed.write_bytes(gzip.compress(bom + contents(suffix)))
    for path in (plain, packed):
        rows = list(read_rows(FileSource(source="file", path=path.name), tmp_path, Counter()))
        assert [row for row, _ in rows] == ROWS
        assert [origin for _, origin in rows] == [Origin(path.name, 1), Origin(path.name, 2)]


def test_json_with_one_row_a_line_and_lines_counted_with_the_blank_ones(tmp_path):
    (tmp_path / "x.json").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    rows = list(read_rows(FileSource(source="file", path="x.json"), tmp_path, Counter()))
    assert rows == [({"text": "one"}, Origin("x.json", 1)), ({"text": "two"}, Origin("x.json", 3))]


def test_folders_globs_and_exclude(tmp_path, monkeypatch):
    (tmp_path / "books" / "old").mkdir(parents=True)
    for name in ("books/b.txt", "books/a.txt", "books/old/c.txt.gz", "books/.hidden.txt", "books/notes.md"):
        content = name.encode()
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)

    def texts(path, root=tmp_path, **settings):
        return [r.text for r in load([FileSource(source="file", path=path, **settings)], Text, root, 0).records]

    assert texts("books") == ["books/a.txt", "books/b.txt", "books/old/c.txt.gz"]
    assert texts("books/*.txt", exclude=["b.*"]) == ["books/.hidden.txt", "books/a.txt"]
    assert texts("books/**/*.gz") == texts(str(tmp_path / "books" / "*" / "*.gz")) == ["books/old/c.txt.gz"]
    assert texts("books", exclude=["a.txt", "c*"]) == ["books/b.txt"]
    monkeypatch.chdir(tmp_path)
    assert texts("books/a.txt", root=None) == ["books/a.txt"]


def test_files_of_a_folder_are_read_or_named(tmp_path):
    table = pyarrow.Table.from_pylist([{"text": "arrow"}])
    packers = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd}
    names = {f"{kind}.jsonl.{kind}": pack(json.dumps({"text": kind}).encode()) for kind, pack in packers.items()}
    names |= {"tab.tsv": b"text\tn\ntab\t1\n", "new.ndjson": b'{"text": "new"}', "UP.JSONL": b'{"text": "up"}'}
    names |= {"README.md": b"about", "rows.bin": b"\0", ".hidden.jsonl": b"{}", ".cache/rows.jsonl": b"{}"}
    (tmp_path / "set" / ".cache").mkdir(parents=True)
    for name, content in names.items():
        (tmp_path / "set" / name).write_bytes(content)
    with pyarrow.ipc.new_file(tmp_path / "set" / "arrow.arrow", table.schema) as file:
        file.write_table(table)
    loaded = load([FileSource(source="file", path="set")], Text, tmp_path, 0)
    assert {record.text for record in loaded.records} == {"arrow", "gz", "bz2", "xz", "zst", "tab", "new", "up"}
    left_out = "files left out, of another kind or hidden: .cache/rows.jsonl, .hidden.jsonl, README.md, rows.bin"
    assert loaded.accounting.notes[left_out] == 4
    quiet = load([FileSource(source="file", path="set", exclude=["README.md", "rows.*", ".*"])], Text, tmp_path, 0)
    assert not any("left out" in note for note in quiet.accounting.notes)


def zstd(content: bytes) -> bytes:
    """Two frames one after the other, as some writers make them."""
    half = len(content) // 2
    return b"".join(pyarrow.compress(part, "zstd", asbytes=True) for part in (content[:half], content[half:]))


def test_files_whose_names_say_that_they_are_held_out_are_named(tmp_path):
    for name in ("train.jsonl", "test-00000.jsonl", "latest.jsonl", "contest.jsonl", "my_eval.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    notes = load([FileSource(source="file", path=".")], Text, tmp_path, 0).accounting.notes
    assert "files read whose names say that they are held out (see `exclude`): my_eval.jsonl, test-00000.jsonl" in notes
    for path in ("test-00000.jsonl", "t*.jsonl"):
        said = any(
            "held out" in n for n in load([FileSource(source="file", path=path)], Text, tmp_path, 0).accounting.notes
        )
        assert said == (path == "t*.jsonl")


def test_folders_that_datasets_saved(tmp_path):
    made = datasets.Dataset.from_list(ROWS)
    made.save_to_disk(tmp_path / "one", num_shards=2)
    loaded = load([FileSource(source="file", path="one")], Chat, tmp_path, 0)
    assert [r.messages[0].content for r in loaded.records] == [row["prompt"] for row in ROWS]
    assert loaded.accounting.notes == {"files read as prompt_completion": 2}
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "two")
    with pytest.raises(
        DataError, match=r"`path: two` .*holds the splits test, train of a saved data set; add one of them"
    ):
        load([FileSource(source="file", path="two")], Chat, tmp_path, 0)
    assert len(load([FileSource(source="file", path="two/train")], Chat, tmp_path, 0).records) == 2


def test_json_under_a_key_and_one_row_alone(tmp_path):
    content = json.dumps({"version": "1.1", "data": ROWS}, indent=1)
    for text in (content, json.dumps({"version": "1.1", "data": ROWS})):
        (tmp_path / "x.json").write_text(text)
        loaded = load([FileSource(source="file", path="x.json")], Chat, tmp_path, 0)
        assert len(loaded.records) == 2
        assert loaded.accounting.notes["x.json: rows read under the key `data`; left out beside it: `version`"] == 1
    (tmp_path / "x.json").write_text(json.dumps(ROWS[0], indent=1))
    assert len(load([FileSource(source="file", path="x.json")], Chat, tmp_path, 0).records) == 1


def test_columns_of_a_table_without_a_name_are_left_out_and_named(tmp_path):
    (tmp_path / "x.csv").write_text(",prompt,completion\n0,q,a\n\n1,r,b\n")
    loaded = load([FileSource(source="file", path="x.csv")], Prompt, tmp_path, 0)
    assert [record.columns for record in loaded.records] == [{"reference": "a"}, {"reference": "b"}]
    assert loaded.accounting.notes["x.csv: column 1 left out: it has no name (an index?)"] == 1


def test_a_data_set_is_read_by_name(tmp_path, monkeypatch):
    """`datasets` accepts a folder in place of a name, which needs no network."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS * 3))
    name = str(tmp_path / "set")
    loaded = load([HubSource(source="hub", name=name, hub_split="train[:5]")], Chat, None, 0)
    assert [r.messages[0].content for r in loaded.records] == [row["prompt"] for row in (ROWS * 3)[:5]]
    assert loaded.records[4].origin == Origin(f"hub:{name}[train[:5]]", 5)


@pytest.mark.parametrize("streams", [True, False], ids=["it can be streamed", "only the cache has it"])
def test_a_limit_streams_a_data_set_of_the_hub_where_that_is_possible(monkeypatch, streams):
    asked = []

    def load_dataset(path, *, streaming=False, **keys):
        asked.append(streaming)
        if streaming and not streams:
            raise ConnectionError("no network")
        return ({"prompt": f"q{n}", "completion": "a"} for n in range(10**9 if streaming else 20))

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = load([HubSource(source="hub", name="o/n", limit=3)], Chat, None, 0).records
    assert [record.messages[0].content for record in found] == ["q0", "q1", "q2"]
    assert asked == ([True] if streams else [True, False])


BOOK = (
    "\ufeffThe Project Gutenberg EBook\r\n\r\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\r\n\r\n"
    + "\r\n\r\n".join(f"Paragraph {i}\r\nof two lines. " + "word " * 100 for i in range(60))
    + "\r\n\r\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\r\n*** START: FULL LICENSE ***\r\nlicence"
)


def test_rows_of_a_stage_are_read_from_the_folder_that_the_run_names(tmp_path):
    rows = [{"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}], "score": n}
            for n in range(40)]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:20]))
    (tmp_path / "more.jsonl.gz").write_bytes(
        gzip.compress("".join(json.dumps(row) + "\n" for row in rows[20:]).encode())
    )
    source = StageSource(source="stage", name="generate").at(tmp_path)
    read = list(read_rows(source, tmp_path / "elsewhere", Counter()))
    assert [row for row, _ in read] == rows[20:] + rows[:20]
    assert read[0][1] == Origin("stage:generate/more.jsonl.gz", 1)
    label, digest = fingerprint(source, None)
    assert label == "stage:generate" and digest == fingerprint(source.at(tmp_path), tmp_path)[1]
    prompts = load([source], Prompt, None, 0).records
    assert prompts[0].columns == {"score": 20, "reference": "a"}
    parts = [
        {r.messages[0].content for r in load([StageSource(source="stage", name="g", holdout=0.5, split=s).at(tmp_path)],
                                             Chat, None, 0).records}
        for s in ("train", "validation", "test")
    ]  # fmt: skip
    assert sum(map(len, parts)) == 40 == len(set.union(*parts))


def test_books_lose_their_wrapping_and_are_cut_between_paragraphs():
    documents = list(split_documents(BOOK))
    assert len(documents) > 3 and all(TARGET / 2 < len(d) <= TARGET for d in documents[:-1])
    assert all(d.startswith("Paragraph") for d in documents)
    text = "\n\n".join(documents)
    assert text.startswith("Paragraph 0\nof two lines.") and "licence" not in text and "\r" not in text
    assert text.split() == BOOK.split("X ***")[1].split("***")[0].split()


def test_one_article_per_line_is_told_from_running_text():
    articles = ["word " * 300, "other " * 500]
    assert list(split_documents("\n".join(articles) + "\n")) == articles
    lines = [f"line {i} of a poem" for i in range(100)]
    assert list(split_documents("\n".join(lines))) == ["\n".join(lines)]
    mixed = articles[0] + "\n\n" + "short\n\n" * 9
    assert list(split_documents(mixed)) == [mixed.strip("\n")]
    assert list(split_documents(" \n\n\t\n")) == []


def test_a_very_long_paragraph_is_split():
    documents = list(split_documents("no end " * 10_000 + "\n\nshort"))
    assert max(map(len, documents)) <= TARGET + len("short") + 2
    assert "".join(documents).replace("\n", "") == "no end " * 10_000 + "short"


def test_fingerprints_follow_the_bytes_and_the_names(tmp_path):
    source = FileSource(source="file", path="*.txt")
    (tmp_path / "a.txt").write_text("one")
    label, first = fingerprint(source, tmp_path)
    assert label == "file:*.txt" and fingerprint(source, tmp_path) == (label, first)
    (tmp_path / "a.txt").write_text("two!")
    assert fingerprint(source, tmp_path)[1] != first
    (tmp_path / "a.txt").write_text("one")
    assert fingerprint(source, tmp_path)[1] == first
    (tmp_path / "b.txt").write_text("one")
    assert fingerprint(source, tmp_path)[1] != first


def test_fingerprints_of_one_list_have_distinct_names():
    def world(**settings):
        return WorldSource(source="world", kind="chats", **settings)

    hashes = fingerprints([world(), world(split="test"), world(seed=1)], None)
    assert (
        list(hashes) == ["world:chats[train]", "world:chats[test]", "world:chats[train]#2"]
        and len(set(hashes.values())) == 3
    )
    hub = [HubSource(source="hub", name="o/n", subset="s", revision=r) for r in (None, "v1")]
    assert fingerprint(hub[0], None)[0] == "hub:o/n/s[train]"
    assert fingerprint(hub[0], None)[1] != fingerprint(hub[1], None)[1]


def test_a_file_that_has_not_changed_is_hashed_once(tmp_path, monkeypatch):
    monkeypatch.setattr("handoff.files._SETTLED", -1.0)
    (tmp_path / "a.txt").write_text("one")
    source, cache = FileSource(source="file", path="a.txt"), HashCache(tmp_path / "hashes.json")
    first = fingerprint(source, tmp_path, cache.sha256)
    assert first == fingerprint(source, tmp_path)
    cache.save()
    monkeypatch.setattr("handoff.files.sha256_file", lambda path: pytest.fail("hashed again"))
    assert fingerprint(source, tmp_path, HashCache(tmp_path / "hashes.json").sha256) == first
