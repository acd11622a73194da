"""Durable writes, hashes and disk space (handoff/files.py), and the tokenizer's ids as transformers sees them."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from handoff.encoding import read_tokenizer
from handoff.errors import HandoffError
from handoff.files import (
    canonical_hash,
    check_free_space,
    disk_is_full,
    fsync_tree,
    hash_tree,
    human_bytes,
    read_json,
    sha256_file,
    write_json,
)


def test_json_round_trips_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": [1, None], "ä": "→"})
    assert read_json(path) == {"b": [1, None], "ä": "→"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("bad", [float("nan"), object()])
def test_a_failed_write_keeps_the_old_content(tmp_path: Path, bad: Any) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises((ValueError, TypeError)):
        write_json(path, {"filler": "x" * 100_000, "bad": bad})
    assert read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(("content", "message"), [(b'{\n"a": }', "line 2: not JSON"), (b'{"a": "\xff"}', "not UTF-8")])
def test_damaged_json_names_file_and_position(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(HandoffError, match=message) as raised:
        read_json(path)
    assert str(path) in str(raised.value)


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"abc")
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-4's example
    assert sha256_file(tmp_path / "sub" / "b") == abc
    assert hash_tree(tmp_path) == {"sub/b": abc}
    assert (
        canonical_hash({"b": 1, "a": [2]}) == canonical_hash({"a": [2], "b": 1}) != canonical_hash({"a": [2], "b": 2})
    )


def test_every_file_and_directory_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "d" / "e").mkdir(parents=True)
    (tmp_path / "d" / "e" / "f").write_text("x")
    flushed = []

    def flush(descriptor: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{descriptor}").readlink())

    monkeypatch.setattr(os, "fsync", flush)
    fsync_tree(tmp_path)
    assert flushed == [tmp_path / "d" / "e" / "f", tmp_path / "d" / "e", tmp_path / "d", tmp_path]


def test_free_space_names_what_it_is_for(tmp_path: Path) -> None:
    check_free_space(tmp_path / "not" / "yet" / "there", 1, "two saved states")
    with pytest.raises(HandoffError, match=r"two saved states needs 1024\.0 TiB, but .* free; free some space"):
        check_free_space(tmp_path, 1 << 50, "two saved states")
    assert [human_bytes(n) for n in (12, 1536, 3 << 30)] == ["12 bytes", "1.5 KiB", "3.0 GiB"]


@pytest.mark.slow
def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    special = ["<|bos|>", "<|eos|>", "<|pad|>", "<|end|>"]
    raw = Tokenizer(models.BPE(vocab={"a": 0, "b": 1, "ab": 2}, merges=[("a", "b")]))
    raw.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|bos|>", eos_token="<|eos|>", pad_token="<|pad|>"
    )
    tokenizer.chat_template = "{{ messages[0].content }}<|end|>"
    tokenizer.save_pretrained(tmp_path)
    record = read_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (record.bos_id, record.eos_id, record.pad_id) == (
        loaded.bos_token_id,
        loaded.eos_token_id,
        loaded.pad_token_id,
    )
    assert record.vocab_size == len(loaded) == 7
    assert record.stop_ids == sorted([loaded.eos_token_id, loaded.convert_tokens_to_ids("<|end|>")])
    # A second save, after using padding and truncation, gives the same fingerprint.
    loaded(["ab", "a"], padding=True, truncation=True, max_length=2)
    loaded.save_pretrained(tmp_path / "again")
    assert read_tokenizer(tmp_path / "again") == record


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_what_counts_as_a_full_disk(error, full):
    assert disk_is_full(error) is full
