"""Preferences of the web chat: what is refused, and rows that stages read as they were meant. No browser here."""

import base64
import errno
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from baton.serve.preferences import Preferences, default_file
from baton.serve.run import serve
from baton.serve.settings import Limits
from data.accounting import Accounting
from data.config import FileSource
from data.load import read
from data.records import Message, Preference
from handoff.errors import UserError
from tests.serving import serving, write_model

KEEP = "/ui/preferences"
GOOD = {
    "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Human: hi"}],
    "chosen": "Human: hello\n\nAssistant: \x1b[31m hello ",
    "rejected": "Human: no",
    "chosen_model": "ppo",
    "rejected_model": "sft",
}


@pytest.fixture(scope="module")
def parents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / "sft"), write_model(folder / "ppo")]


@pytest.fixture(scope="module")
def server(parents, tmp_path_factory):
    file = tmp_path_factory.mktemp("run") / "preferences.jsonl"
    with serving(parents, key="open sesame", preferences=file, max_body=20_000) as running:
        yield running, file


def read_all(path: Path) -> tuple[list[Preference], Accounting]:
    accounting = Accounting()
    found = list(read([FileSource(source="file", path=path.name)], Preference, path.parent, 0, accounting))
    return found, accounting


def test_a_preference_becomes_a_row_that_stages_read_as_it_was_meant(server):
    running, file = server
    for _ in range(2):
        assert running.post(KEEP, GOOD).json() == {"kept": True}
    pairs, accounting = read_all(file)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == 2 * [
        ((Message("system", "Be brief."), Message("user", "Human: hi")), GOOD["chosen"], GOOD["rejected"])
    ]
    assert (accounting.rows_in, accounting.rows_used, sum(accounting.dropped.values())) == (2, 2, 0)
    row = json.loads(file.read_text(encoding="utf-8").splitlines()[-1])
    assert row.keys() == {"prompt", "chosen", "rejected", "chosen_model", "rejected_model", "time"}
    assert (row["chosen_model"], row["rejected_model"]) == ("ppo", "sft")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row["time"])


USER = {"role": "user", "content": "hi"}
WRONG = [
    ({"rejected": " " + GOOD["chosen"]}, 400, "messages"),
    ({"chosen": ""}, 400, "messages"),
    ({"rejected": " \n"}, 400, "messages"),
    ({"messages": []}, 400, "messages"),
    ({"messages": [USER, USER]}, 400, "messages"),
    ({"messages": [USER, {"role": "assistant", "content": "hi"}]}, 400, "messages"),
    ({"messages": [{"role": "system", "content": "x"}]}, 400, "messages"),
    ({"messages": [{"role": "user", "content": ""}]}, 400, "messages"),
    ({"messages": [{"role": "tool", "content": "x"}]}, 400, "messages.0.role"),
    ({"messages": [{**USER, "name": "x"}]}, 400, "messages.0.name"),
    ({"messages": [{"role": "user", "content": ["x"]}]}, 400, "messages.0.content"),
    ({"chosen": 3}, 400, "chosen"),
    ({"rejected": None}, 400, "rejected"),
    ({"chosen_model": "other"}, 400, "chosen_model"),
    ({"rejected_model": "../sft"}, 400, "rejected_model"),
    ({"model": "sft"}, 400, "model"),
    ({"path": "/tmp/x.jsonl"}, 400, "path"),
    ({"chosen": "x" * 20_000}, 413, None),
]


@pytest.mark.parametrize(("change", "status", "param"), WRONG)
def test_what_no_stage_could_use_is_refused_by_name_and_not_written(server, change, status, param):
    running, file = server
    before = file.read_bytes() if file.exists() else b""
    reply = running.post(KEEP, {**GOOD, **change})
    assert reply.status_code == status and reply.json()["error"]["param"] == param, reply.text
    assert (file.read_bytes() if file.exists() else b"") == before


def test_half_a_character_is_refused(server):
    running, _ = server
    body = json.dumps(GOOD).replace("Human: no", "\\ud83d").encode()
    assert running.post(KEEP, body).status_code == 400


def test_a_preference_needs_the_key_and_the_page_does_not(server):
    running, _ = server
    assert running.get("/", Authorization="").status_code == 200
    assert running.post(KEEP, GOOD, Authorization="Bearer other").status_code == 401
    assert running.get(KEEP).status_code == 405
    with serving([one.parent for one in running.served]) as without:
        assert without.get("/").status_code == without.post(KEEP, GOOD).status_code == 404


def test_the_page_is_one_document_under_a_strict_policy(server):
    running, _ = server
    page = running.get("/", Authorization="")
    policy = dict(part.split(" ", 1) for part in page.headers["content-security-policy"].split("; "))
    hashes = {}
    for tag in ("script", "style"):
        (source,) = re.findall(f"<{tag}>(.*?)</{tag}>", page.text, re.DOTALL)
        hashes[tag] = f"'sha256-{base64.b64encode(sha256(source.encode()).digest()).decode()}'"
        assert len(source) > 1000
    assert policy == {
        "default-src": "'none'",
        "script-src": hashes["script"],
        "style-src": hashes["style"],
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert page.headers["x-content-type-options"] == "nosniff" and page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r"""(?:src|href|action)\s*=\s*["']?([^"'\s>]+)|url\(|@import|https?://""", page.text)
    assert named == ["data:,"]


def test_rows_of_several_writers_stay_whole(tmp_path):
    file = tmp_path / "preferences.jsonl"
    writers = [Preferences(file) for _ in range(4)]
    assert not file.exists()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: writers[n % 4].add({"prompt": [], "number": n, "text": "é" * 3000}), range(40)))
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert sorted(row["number"] for row in rows) == list(range(40))


def test_a_row_that_cannot_be_written_whole_leaves_nothing(server, monkeypatch):
    running, file = server
    running.post(KEEP, GOOD)
    before = file.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        reply = running.post(KEEP, GOOD)
    assert reply.status_code == 500 and os.strerror(errno.ENOSPC) in reply.text and str(file) not in reply.text
    assert file.read_bytes() == before

    file.write_bytes(before[:-1])  # a row would be glued to the last one
    reply = running.post(KEEP, GOOD)
    assert reply.status_code == 500 and str(file) not in reply.text
    assert file.read_bytes() == before[:-1]
    file.write_bytes(before)
    assert running.post(KEEP, GOOD).status_code == 200


OTHERS = {
    "torn.jsonl": ('{"prompt": [', "last line has no end"),
    "broken.jsonl": ("{]\n", "broken JSON"),
    "chats.jsonl": ('{"messages": []}\n', "no preference"),
    "rows.json": ("[]", r"ends in \.jsonl"),
    "absent/rows.jsonl": (None, "there is no folder"),
    "folder.jsonl": ("folder", "not a regular file"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_file_that_rows_do_not_belong_into_is_refused_at_the_start(tmp_path, name):
    content, message = OTHERS[name]
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Preferences(tmp_path / name)
    assert content in (None, "folder") or (tmp_path / name).read_text() == content


def test_the_file_is_in_the_folder_of_the_run(parents, tmp_path, monkeypatch):
    assert default_file(parents[0]) == Path("preferences.jsonl"), "the model is of no run"

    class Published:
        path, manifest = tmp_path / "runs" / "tiny" / "sft", object()

    assert default_file(Published()) == tmp_path / "runs" / "tiny" / "preferences.jsonl"
    options = {"host": "127.0.0.1", "port": 0, "engine": "inprocess", "key_file": None, "pooling": "mean"}
    with pytest.raises(UserError, match="add --ui"):
        serve(["x"], **options, limits=Limits(), ui=False, preferences=tmp_path / "p.jsonl")
    with pytest.raises(UserError, match="no folder"):
        serve([str(parents[0].path)], **options, limits=Limits(), ui=True, preferences=tmp_path / "no" / "p.jsonl")
