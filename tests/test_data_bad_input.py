"""Mistakes in data give an error at once, with file, line, field and the fix; nothing broken is read silently."""

import gzip
import json
import os

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from pydantic import ValidationError

from data.config import FileSource, HubSource
from data.errors import DataError
from data.records import Chat, Preference, Text
from handoff.errors import UserError
from tests.row_sets import load

GOOD = json.dumps({"prompt": "q", "completion": "a"}) + "\n"


def read(folder, path="x.jsonl", want=Chat, **settings):
    return load([FileSource(source="file", path=path, **settings)], want, folder, seed=0)


def complaint(folder, name, content, want=Chat, **settings) -> str:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read(folder, name, want, **settings)
    return str(error.value)


def row(**columns) -> str:
    return GOOD + json.dumps(columns) + "\n"


def test_missing_file_folder_and_match(tmp_path):
    for path in ("none.jsonl", "none/*.jsonl", "none"):
        with pytest.raises(DataError) as error:
            read(tmp_path, path)
        text = str(error.value)
        assert f"`path: {path}` under data_root {tmp_path}: no such file" in text
        assert text.endswith("Correct the path or data_root")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"`path: folder` .*no file that can be read"):
        read(tmp_path, "folder")


def test_empty_files(tmp_path):
    for name, content in (
        ("x.jsonl", ""),
        ("x.json", "[]"),
        ("x.json", ""),
        ("x.txt", " \n\n "),
        ("x.csv", "prompt,completion\n"),
        ("x.csv", ""),
        ("x.jsonl.gz", gzip.compress(b"")),
    ):
        assert complaint(tmp_path, name, content) == f"{name}: is empty; remove it, exclude it, or put its rows back"


def test_not_utf8(tmp_path):
    latin = json.dumps({"prompt": "café", "completion": "a"}, ensure_ascii=False).encode("latin-1")
    assert complaint(tmp_path, "x.jsonl", GOOD.encode() + latin).startswith(
        "x.jsonl:2: not UTF-8 (byte 0xe9); convert it, e.g. `iconv -f latin1 -t utf-8 FILE`"
    )
    assert complaint(tmp_path, "x.txt", b"one\ntwo\ncaf\xe9\n", Text).startswith("x.txt:3: not UTF-8 (byte 0xe9)")
    assert complaint(tmp_path, "x.json", b'["one",\n"caf\xe9"]', Text).startswith("x.json:2: not UTF-8")


def test_damaged_gzip(tmp_path):
    whole = gzip.compress(GOOD.encode() * 5000)
    for name in ("x.jsonl.gz", "x.json.gz", "x.txt.gz", "x.csv.gz"):
        text = complaint(tmp_path, name, whole[: len(whole) // 2])
        assert text == f"{name}: the gzip file ends in the middle (half a download?); fetch it again"
    assert complaint(tmp_path, "y.jsonl.gz", GOOD).startswith("y.jsonl.gz: not a gzip file, or damaged")
    flipped = whole[:-8] + bytes(8)
    assert complaint(tmp_path, "y.jsonl.gz", flipped).startswith("y.jsonl.gz: not a gzip file, or damaged (CRC check")


def test_broken_json(tmp_path):
    text = complaint(tmp_path, "x.jsonl", GOOD + "\n" + GOOD[:-4] + "\n" + GOOD)
    assert text.startswith("x.jsonl:3: broken JSON at column ") and "each line is one whole object" in text
    assert complaint(tmp_path, "x.json", '[{"a": 1},\n{"a": 2},\n{"a": }]').startswith(
        "x.json:3: broken JSON at column 7"
    )
    assert complaint(tmp_path, "x.json", '{\n"prompt": "q"\n').startswith("x.json:2: broken JSON at column")
    assert complaint(tmp_path, "x.jsonl", "7\n") == (
        "x.jsonl:1: a row is int; expected an object of columns, or a string (a document)"
    )


def test_broken_csv_and_parquet(tmp_path):
    head = "prompt,completion\nq,a\n"
    text = complaint(tmp_path, "x.csv", head + "q\n")
    assert text.startswith("x.csv:2: the row that ends at line 3 has fewer fields than the header (prompt, completion)")
    assert "has more fields than the header" in complaint(tmp_path, "x.csv", head + "q,a,b\n")
    assert complaint(tmp_path, "x.csv", head + '"q,a\n').startswith("x.csv: broken CSV near line 3")
    assert complaint(tmp_path, "x.parquet", b"PAR1 nothing").startswith("x.parquet: not a whole parquet file")


def test_a_missing_column_names_present_and_expected_columns(tmp_path):
    text = complaint(tmp_path, "x.jsonl", row(prompt="q", answer="a"))
    assert text.startswith("x.jsonl:2: no column `completion` or `response`; the row has prompt, answer.")
    assert "Format prompt_completion expects `prompt` and `completion` (or `response`)" in text
    text = complaint(tmp_path, "x.jsonl", row(), format="alpaca")
    assert text.startswith("x.jsonl:1: no column `instruction`; the row has prompt, completion. Format alpaca expects")
    text = complaint(tmp_path, "x.jsonl", '{"chosen": "a", "rejected": "b"}', Preference)
    assert text.startswith("x.jsonl:1: `chosen` does not begin with `Human:`")
    assert "bare answers need a `prompt` column" in text
    text = complaint(tmp_path, "x.jsonl", '{"messages": [{"role": "user", "text": "q"}]}')
    assert text.startswith("x.jsonl:1: `messages[0].content` is missing; the turn has role, text")


def test_unknown_format_lists_the_known_ones(tmp_path):
    text = complaint(tmp_path, "x.jsonl", '{"query": "q", "gold": 0}')
    assert text.startswith("x.jsonl:1: columns query, gold are of no known format. Rename them to fit one of:")
    for name in ("prompt_completion", "alpaca", "messages", "sharegpt", "preference", "hh_rlhf", "gsm8k", "text"):
        assert f"\n  {name}: `" in text
    (tmp_path / "x.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"x.xlsx: not one of .txt, .jsonl, .ndjson, .json, .csv,"):
        read(tmp_path, "x.xlsx")


def test_null_in_a_row(tmp_path):
    text = complaint(tmp_path, "x.jsonl", row(prompt="q", completion=None))
    assert text == "x.jsonl:2: `completion` is null; give it a value, or remove the row"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None}]
    text = complaint(tmp_path, "x.jsonl", json.dumps({"messages": messages}))
    assert text.startswith("x.jsonl:1: `messages[1].content` is null")
    text = complaint(tmp_path, "x.jsonl", '{"conversations": [{"from": null, "value": "x"}]}')
    assert text.startswith("x.jsonl:1: `conversations[0].from` is null")
    assert complaint(tmp_path, "x.jsonl", "null\n").startswith("x.jsonl:1: a row is NoneType")


def test_wrong_types_and_roles(tmp_path):
    assert complaint(tmp_path, "x.jsonl", row(prompt=3, completion="a")) == (
        "x.jsonl:2: `prompt` is int; expected a list of turns"
    )
    assert complaint(tmp_path, "x.jsonl", '{"instruction": ["q"], "output": "a"}') == (
        "x.jsonl:1: `instruction` is list; expected text"
    )
    text = complaint(tmp_path, "x.jsonl", '{"messages": "hi"}')
    assert text.startswith("x.jsonl:1: `messages` is str; expected a list of turns; in a table")
    assert "`messages[0]` is str; expected {role, content} or" in complaint(tmp_path, "x.jsonl", '{"messages": ["hi"]}')
    text = complaint(tmp_path, "x.jsonl", '{"messages": [{"role": "User:", "content": "q"}]}')
    assert text.startswith("x.jsonl:1: `messages[0].role` is 'User:'; known roles are system, developer, user, human")
    image = '{"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]}'
    assert complaint(tmp_path, "x.jsonl", image).startswith("x.jsonl:1: `messages[0].content[0]` is not a text part")
    assert complaint(tmp_path, "x.jsonl", '"a string"\n', format="alpaca").startswith(
        "x.jsonl:1: a string; format alpaca"
    )


def test_a_role_of_another_type_is_an_unknown_role(tmp_path):
    for role in (["user"], {"name": "user"}, 3, True):
        text = complaint(tmp_path, "x.jsonl", json.dumps({"messages": [{"role": role, "content": "q"}]}))
        assert text.startswith(f"x.jsonl:1: `messages[0].role` is {role!r}; known roles are system, developer")


def test_half_a_character_is_named_with_its_place(tmp_path):
    line = json.dumps({"messages": [{"role": "user", "content": "ok"}, {"role": "assistant", "content": "é \udc00"}]})
    text = complaint(tmp_path, "x.jsonl", GOOD + line)
    assert text.startswith("x.jsonl:2: `messages[1].content` holds half a character (\\udc00 at position 2)")
    assert complaint(tmp_path, "x.json", f"[{GOOD}, {line}]").startswith("x.json:2: `messages[1].content` holds half")
    text = complaint(tmp_path, "x.jsonl", json.dumps({"prompt": "q", "completion": "a", "\ud83d": 1}))
    assert text.startswith("x.jsonl:1: `\\ud83d (the key)` holds half a character")
    (tmp_path / "x.jsonl").write_text(json.dumps({"prompt": "\U0001f600", "completion": "a"}))
    assert read(tmp_path).records[0].messages[0].content == "\U0001f600"


def test_numbers_nesting_and_keys_that_json_allows_and_readers_do_not(tmp_path):
    more = GOOD.strip()[:-1]
    huge = more + ', "n": ' + "9" * 5000 + "}"
    assert complaint(tmp_path, "x.jsonl", GOOD + huge) == (
        "x.jsonl:2: a number has more than 4300 digits; write it as text"
    )
    for depth in (150, 100_000):
        deep = more + ', "n": ' + "[" * depth + "]" * depth + "}"
        text = complaint(tmp_path, "x.jsonl", GOOD + deep)
        assert text == "x.jsonl:2: lists or objects are nested more than 100 deep; flatten the row"
    twice = '{"prompt": "q", "completion": "a", "completion": "b"}'
    assert complaint(tmp_path, "x.jsonl", GOOD + twice) == (
        "x.jsonl:2: the key `completion` comes twice in one object; rename or remove one"
    )
    inner = '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'
    assert "x.json:1: the key `content` comes twice" in complaint(tmp_path, "x.json", f"[{inner}]")


def test_files_that_are_something_else_are_named_as_that(tmp_path):
    good = GOOD.encode()
    for name, content, words in (
        (
            "x.jsonl",
            GOOD.encode("utf-16"),
            "x.jsonl: is UTF-16, not UTF-8; convert it: `iconv -f utf-16 -t utf-8 FILE`",
        ),
        ("x.txt", GOOD.encode("utf-16"), "x.txt: is UTF-16, not UTF-8"),
        ("x.csv", GOOD.encode("utf-16-le"), "x.csv: has zero bytes at its start; it is damaged, or it is UTF-16"),
        ("x.jsonl", gzip.compress(good), "x.jsonl: holds gzip data; add `.gz` to its name"),
        (
            "x.json.gz",
            gzip.compress(gzip.compress(good)),
            "x.json.gz: holds gzip data, compressed twice; unpack it once",
        ),
        ("x.jsonl", b"PAR1....", "x.jsonl: is no text; give it the name of what it is, `.parquet`"),
        ("x.jsonl.bz2", b"BZh9", "x.jsonl.bz2: the bzip2 file ends in the middle"),
        ("x.jsonl.zst", b"\x28\xb5\x2f\xfd\x00", "x.jsonl.zst: the zstd file ends in the middle"),
        ("x.jsonl.xz", good, "x.jsonl.xz: not a xz file, or damaged"),
        ("x.arrow", b"ARROW1", "x.arrow: not a whole Arrow file, or not readable"),
    ):
        assert complaint(tmp_path, name, content).startswith(words)


def test_columns_of_one_name_and_other_separators(tmp_path):
    text = complaint(tmp_path, "x.csv", "prompt,completion,completion\nq,a,b\n")
    assert text == "x.csv: columns 2 and 3 are both called `completion`; rename or remove one"
    table = pyarrow.Table.from_arrays([pyarrow.array(["q"]), pyarrow.array(["a"])], ["prompt", "prompt"])
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x.parquet: columns 1 and 2 are both called `prompt`"):
        read(tmp_path, "x.parquet")
    assert complaint(tmp_path, "x.csv", "prompt\tcompletion\nq\ta\n") == (
        "x.csv: its columns are separated by tabs; call it .tsv"
    )
    assert "separated by semicolons; write it with commas" in complaint(tmp_path, "x.csv", "prompt;completion\nq;a\n")
    assert "separated by commas" in complaint(tmp_path, "x.tsv", "prompt,completion\nq,a\n")


def test_a_json_object_without_one_list_of_rows(tmp_path):
    text = complaint(tmp_path, "x.json", '{\n"train": [1],\n"test": []}')
    assert text.startswith("x.json: is one object with the keys train, test; expected a list of rows, or an object")
    assert "(2 of its values are lists)" in text
    assert "expected an object of columns" in complaint(tmp_path, "x.json", '{"data": [1]}')


def test_paths_that_cannot_be_looked_up(tmp_path):
    for path in ("x\0y", "**.jsonl", "x" * 300):
        with pytest.raises(DataError, match="`path: "):
            read(tmp_path, path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / os.fsdecode(b"caf\xe9.jsonl")).write_text(GOOD)
    with pytest.raises(DataError, match=r"caf.udce9.jsonl': the file's name is not UTF-8; rename it"):
        read(tmp_path, "folder")


def test_history_has_pairs_of_texts(tmp_path):
    for history in ("before", [["a"]], [["a", None]], [3]):
        text = complaint(tmp_path, "x.jsonl", json.dumps({"instruction": "q", "output": "a", "history": history}))
        assert text.startswith("x.jsonl:1: `history[0]` is not [question, answer]; `history` is a list of such pairs")


def test_an_exclude_that_matches_nothing_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with pytest.raises(DataError, match=r"`exclude: moby\*` matches none of its 1 files; correct the name"):
        read(tmp_path, ".", Text, exclude=["moby*"])
    with pytest.raises(DataError, match="`exclude` leaves none of its 1 files"):
        read(tmp_path, ".", Text, exclude=["*.txt"])


def test_holdout_and_split_need_each_other():
    with pytest.raises(ValidationError, match="split: test needs `holdout`"):
        FileSource(source="file", path="x", split="test")
    with pytest.raises(ValidationError, match="`holdout` needs `split: train`"):
        HubSource(source="hub", name="x/y", holdout=0.1)


def test_a_data_set_missing_from_the_hub_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path))
    with pytest.raises(DataError, match=r"hub:.*/none\[train\]: cannot be loaded: .* Check name, subset, hub_split"):
        load([HubSource(source="hub", name=str(tmp_path / "none"))], Chat, None, 0)


def test_a_row_of_the_hub_that_cannot_be_decoded_is_named(monkeypatch):
    def rows(*args, **settings):
        yield json.loads(GOOD)
        raise ImportError("to decode images, install Pillow")

    monkeypatch.setattr(datasets, "load_dataset", rows)
    with pytest.raises(DataError, match=r"hub:x/y\[train\]: the row after 1 cannot be decoded: to decode images"):
        load([HubSource(source="hub", name="x/y")], Chat, None, 0)
