"""Readers on arbitrary files and rows: an error that names the file, or rows that add up, and never another exception.

tests/fuzzing.py says how to run it for an hour.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import strategies as st

from data.accounting import Accounting
from data.columns import ROLES
from data.config import FileSource
from data.errors import DataError
from data.files import SUFFIXES
from data.load import read
from data.records import Chat, Preference, Prompt, Text
from data.rows import Chats, Documents, Pairs, Prompts
from data.shards import write_rows
from tests.fuzzing import fuzz
from tests.test_data_encode import own
from tests.test_data_known_keys import BASES, OF_ROWS, OF_TURNS

HUGE = "a number of 5000 digits"
KINDS = {Text: Documents(), Chat: Chats(64, "drop"), Preference: Pairs(64, "keep_end"), Prompt: Prompts(64)}
PACK = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def encode(name: str, content: bytes, want, **config) -> None:
    """Reads and encodes a file. Any exception but a DataError fails the test."""
    with tempfile.TemporaryDirectory() as folder, suppress(DataError):
        (Path(folder) / name).write_bytes(content)
        (Path(folder) / "rows").mkdir()
        accounting = Accounting()
        try:
            records = read([FileSource(source="file", path=name, **config)], want, Path(folder), 0, accounting)
            write_rows(Path(folder) / "rows", KINDS[want], records, own(), accounting, lambda count: None)
            accounting.check(1.0)
        except DataError as error:
            assert str(error).encode() and (name in str(error) or "no row is left" in str(error))
            raise
        assert accounting.rows_in == accounting.rows_used + sum(accounting.dropped.values())
        assert json.dumps(accounting.to_json()).encode() and accounting.summary().encode()


wants = st.sampled_from(list(KINDS))
texts = st.text(alphabet=st.characters(exclude_categories=()), max_size=12) | st.sampled_from(
    [
        HUGE,
        "hi",
        "<|end|>",
        "#### 4",
        "\n\nHuman: q\n\nAssistant: a",
        "Human: x",
        "[]",
        "NaN",
        "true",
        "0",
        " ",
        "\ud83d",
    ]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
keys = st.sampled_from([*OF_ROWS, *OF_TURNS, "role", "content", "from", "value", "type", "chosen", "rejected"]) | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3), max_leaves=6
)
turns = st.builds(
    lambda who, role, text, more: {
        **more,
        **({"role": role, "content": text} if who else {"from": role, "value": text}),
    },
    st.booleans(),
    st.sampled_from(["user", "assistant", *ROLES]) | st.sampled_from([["user"], {"name": "user"}, None, 3]),
    texts | st.lists(st.builds(lambda text: {"type": "text", "text": text}, texts), max_size=2) | values,
    st.dictionaries(keys, values, max_size=2),
)
columns = scalars | st.lists(turns, max_size=4) | values
talks = st.lists(turns, min_size=1, max_size=4)
rows = st.one_of(
    st.sampled_from([base for base, _ in BASES.values()]).flatmap(
        lambda base: st.dictionaries(keys, columns, max_size=3).map(lambda more: more | base)
    ),
    st.sampled_from([base for base, _ in BASES.values()]).flatmap(
        lambda base: st.dictionaries(st.sampled_from(list(base)), columns, max_size=2).map(lambda more: base | more)
    ),
    st.builds(lambda name, talk, more: {**more, name: talk}, st.sampled_from(["messages", "conversations", "prompt"]),
              talks, st.dictionaries(keys, columns, max_size=2)),
    st.builds(lambda good, bad: {"chosen": good, "rejected": bad}, talks | columns, talks | columns),
    st.dictionaries(keys, columns, max_size=4),
    values,
)  # fmt: skip


def as_json(value) -> str:
    """JSON, also of a number that Python does not write."""
    return json.dumps(value).replace(json.dumps(HUGE), "7" * 5000)


def test_rows_of_any_values():
    def rows_of_any_values(want, made, suffix, ignore):
        content = "\n".join(map(as_json, made)) if suffix == "jsonl" else as_json(made)
        encode(f"x.{suffix}", content.encode(), want, ignore=ignore)

    some = st.lists(rows, min_size=1, max_size=4)
    fuzz(250, rows_of_any_values, wants, some, st.sampled_from(["jsonl", "json"]), st.lists(keys, max_size=2))


def test_files_of_any_bytes():
    def files_of_any_bytes(content, packed, suffix, packing, want):
        encode(f"x{suffix}{packing}", PACK[packing](content) if packed else content, want)

    content = st.binary(max_size=60) | texts.map(lambda text: text.encode(errors="surrogatepass"))
    fuzz(150, files_of_any_bytes, content, st.booleans(), st.sampled_from(SUFFIXES), st.sampled_from(list(PACK)), wants)


def test_files_that_were_damaged():
    """A whole file of some kind, of which a part is cut out or written over."""

    def files_that_were_damaged(data, made, suffix, packing, want):
        content = PACK[packing](whole_file(suffix, made))
        start = data.draw(st.integers(0, len(content)))
        end = data.draw(st.integers(start, min(len(content), start + 40)))
        name = f"x{data.draw(st.sampled_from([suffix, *SUFFIXES]))}{packing}"
        encode(name, content[:start] + data.draw(st.binary(max_size=8)) + content[end:], want)

    some = st.lists(rows, min_size=1, max_size=3)
    kinds = st.sampled_from(SUFFIXES), st.sampled_from(list(PACK))
    fuzz(150, files_that_were_damaged, st.data(), some, *kinds, wants)


def test_tables_of_any_fields():
    def tables_of_any_fields(made, delimiter, want):
        out = io.StringIO()
        writer = csv.writer(out, delimiter=delimiter)
        for row in made:
            with suppress(csv.Error):
                writer.writerow(row)
        for name in ("x.csv", "x.tsv"):
            encode(name, out.getvalue().encode(errors="surrogatepass"), want)

    some = st.lists(st.lists(texts, max_size=4), max_size=4)
    fuzz(100, tables_of_any_fields, some, st.sampled_from([",", "\t", ";"]), wants)


@pytest.mark.parametrize("depth", [50, 99, 100, 101, 500, 5_000, 100_000])
@pytest.mark.parametrize("want", KINDS)
def test_rows_of_any_depth(depth, want):
    row = json.dumps(BASES["prompt_completion"][0])[:-1]
    for opened, closed in (("[", "]"), ('{"a": ', "}")):
        deep = f'{row}, "deep": {opened * depth}1{closed * depth}}}'
        for name, content in (
            ("x.jsonl", deep),
            ("x.json", deep),
            ("x.json", f"[{deep}]"),
            ("x.json", f'{{"d": [{deep}]}}'),
        ):
            encode(name, content.encode(), want)


def whole_file(suffix: str, made: list) -> bytes:
    if suffix in (".parquet", ".arrow"):
        import pyarrow
        import pyarrow.parquet

        table = pyarrow.table({"prompt": ["q", "r"], "completion": ["a", "b"], "n": [[1], [2]]})
        sink = pyarrow.BufferOutputStream()
        if suffix == ".parquet":
            pyarrow.parquet.write_table(table, sink)
        else:
            with pyarrow.ipc.new_stream(sink, table.schema) as stream:
                stream.write_table(table)
        return sink.getvalue().to_pybytes()
    if suffix in (".csv", ".tsv"):
        return b"prompt,completion\nq,a\nr,b\n".replace(b",", b"\t" if suffix == ".tsv" else b",")
    if suffix == ".json":
        return json.dumps(made).encode()
    return "\n".join(json.dumps(row) for row in made).encode()
