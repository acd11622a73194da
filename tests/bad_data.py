"""Data that cannot be used for training, with the expected messages, for test_bad_input.py."""

import gzip
import json
from hashlib import sha256

CHAT = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
PAIR = {"prompt": "hi", "chosen": "hello", "rejected": "go away"}


def jsonl(*rows: object) -> bytes:
    return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


def turns(*roles: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


EMPTY = {"prompt": "hi", "completion": " "}
SAME = {"prompt": "hi", "chosen": "hello", "rejected": " hello\n"}
LONG = {"prompt": "hi " * 100, "completion": "hello"}
DROPPED = "DataError: 2 of 3 rows were dropped, more than max_drop_fraction = 0.5 allows:\n  dropped, "
PLACES = "(first at x.jsonl:2, x.jsonl:3)\nCorrect the data, or raise max_drop_fraction to accept this."
DATA = {
    "empty": ("sft", "x.jsonl", b"", "DataError: x.jsonl: is empty; remove it, exclude it, or put its rows back"),
    "not UTF-8": (
        "sft",
        "x.jsonl",
        jsonl(CHAT) + b'{"prompt": "caf\xe9", "completion": "a"}\n',
        "DataError: x.jsonl:2: not UTF-8 (byte 0xe9); convert it",
    ),
    "truncated gzip": (
        "sft",
        "x.jsonl.gz",
        gzip.compress(
            b"".join(jsonl({"prompt": str(n), "completion": sha256(bytes(n)).hexdigest()}) for n in range(99))
        )[:-400],
        "DataError: x.jsonl.gz: the gzip file ends in the middle (half a download?); fetch it again",
    ),
    "broken JSON": (
        "sft",
        "x.jsonl",
        jsonl(CHAT, CHAT) + b'{"messages": [\n',
        "DataError: x.jsonl:3: broken JSON at column ",
    ),
    "missing column": (
        "sft",
        "x.jsonl",
        jsonl({"prompt": "hi", "completion": "a"}, {"prompt": "hi", "answer": "a"}),
        "DataError: x.jsonl:2: no column `completion` or `response`; the row has prompt, answer.",
    ),
    "unknown columns": (
        "sft",
        "x.jsonl",
        jsonl({"query": "hi", "gold": 1}),
        "DataError: x.jsonl:1: columns query, gold are of no known format. Rename them to fit one of:",
    ),
    "None": (
        "sft",
        "x.jsonl",
        jsonl({"prompt": "hi", "completion": "a"}, {"prompt": "hi", "completion": None}),
        "DataError: x.jsonl:2: `completion` is null; give it a value, or remove the row",
    ),
    "None in a pair": (
        "reward_model",
        "x.jsonl",
        jsonl(PAIR, {**PAIR, "rejected": None}),
        "DataError: x.jsonl:2: `rejected` is null; give it a value, or remove the row",
    ),
    "conversations for pairs": (
        "reward_model",
        "x.jsonl",
        jsonl(CHAT),
        "DataError: x.jsonl:1: holds conversations with one answer; a preference needs `chosen` and `rejected`",
    ),
    "empty answer": (
        "sft",
        "x.jsonl",
        jsonl({**EMPTY, "completion": "a"}, EMPTY, EMPTY),
        f"{DROPPED}empty answer: 2 {PLACES}",
    ),
    "chosen == rejected": (
        "reward_model",
        "x.jsonl",
        jsonl(PAIR, SAME, SAME),
        f"{DROPPED}chosen and rejected are the same: 2 {PLACES}",
    ),
    "only chosen == rejected": (
        "reward_model",
        "x.jsonl",
        jsonl(SAME),
        "DataError: file:x.jsonl: no row can be used (split all, holdout 0):\n1 rows in, 0 used, 1 dropped",
    ),
    "roles out of order": (
        "sft",
        "x.jsonl",
        jsonl(CHAT, turns("user", "user", "assistant"), turns("assistant", "user", "assistant")),
        f"{DROPPED}roles out of order: 2 {PLACES}",
    ),
    "half a character": (
        "sft",
        "x.jsonl",
        jsonl(CHAT, {"prompt": "Hi \ud83d there", "completion": "a"}),
        "DataError: x.jsonl:2: `prompt` holds half a character",
    ),
    "a role that is a list": (
        "sft",
        "x.jsonl",
        jsonl({"messages": [{"role": ["user"], "content": "hi"}]}),
        "DataError: x.jsonl:1: `messages[0].role` is ['user']; known roles are system, developer",
    ),
    "a number of 5,000 digits": (
        "sft",
        "x.jsonl",
        jsonl(CHAT) + b'{"prompt": "hi", "completion": "a", "n": ' + b"7" * 5000 + b"}\n",
        "DataError: x.jsonl:2: a number has more than 4300 digits; write it as text",
    ),
    "no turn of the user": (
        "ppo",
        "x.jsonl",
        jsonl(turns("system")),
        "DataError: file:x.jsonl: no row can be used (split all, holdout 0):\n1 rows in, 0 used, 1 dropped",
    ),
    "tool calls": (
        "sft",
        "x.jsonl",
        jsonl(CHAT, *[{"messages": [*CHAT["messages"][:1], {**CHAT["messages"][1], "tool_calls": [{"id": 1}]}]}] * 2),
        f"{DROPPED}`tool_calls` cannot be read: 2 (first at x.jsonl:2, x.jsonl:3); each is {{type: "
        "function, function: {name, arguments}}, with an object of arguments\nCorrect the data",
    ),
    "every row too long": ("sft", "x.jsonl", jsonl(LONG, LONG), "DataError: no row is left of 2"),
    "every pair too long": (
        "reward_model",
        "x.jsonl",
        jsonl({**PAIR, "prompt": "hi " * 100}),
        "DataError: no row is left of 1",
    ),
    "every prompt too long": ("ppo", "x.jsonl", jsonl({"prompt": "hi " * 900}), "DataError: no row is left of 1"),
}
