"""The benchmarks of the server, for seconds: clients of every kind, and tokens that are counted."""

import random

import pytest

from benchmarks import serve
from benchmarks.serving import Address
from benchmarks.soak import Soak, soak
from tests.serving import serving, write_model


@pytest.mark.slow
def test_no_answer_is_lost_and_none_is_wrong():
    found = soak(0.04, 4, None, questions=2)
    assert found["wrong"] == [] and found["exit_code"] == 0
    assert found["health"] == {"status": "ok", "running": 0, "waiting": 0}
    assert sum(found["requests"].values()) > 4 and found["memory_mib"][1] > 50


def test_what_is_counted_and_what_is_found_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr(serve, "TOKENS", 5)
    monkeypatch.setattr("benchmarks.soak.LENGTHS", (3, 8))
    with serving([write_model(tmp_path / "tiny")]) as server:
        address = Address(server.url, None, ["pear", "fig"])
        assert serve._ask(address, 0, stream=False) == serve._ask(address, 0, stream=True) == 15
        found = Soak(address, 1e6)
        found.learn(1)
        assert len(found.right) == 4 and len(set(found.right.values())) > 2
        found.right = dict.fromkeys(found.right, "another text")
        found.end = 0.0
        with address.client() as client:
            assert "instead of 'another text'" in found._whole(client, random.Random(0))
            assert "instead of 'another text'" in found._stream(client, random.Random(0))
            assert found._several(client, random.Random(0)) == "other answers"
            for seed in range(8):
                assert found._mistake(client, random.Random(seed)) == ""
