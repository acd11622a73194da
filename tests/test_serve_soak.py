"""The benchmarks of the server, for seconds: clients of every kind, and tokens that are counted."""

import pytest

from benchmarks import serve
from benchmarks.serving import served
from benchmarks.soak import soak

pytestmark = pytest.mark.slow


def test_no_answer_is_lost_and_none_is_wrong():
    found = soak(0.05, 4, None, questions=2)
    assert found["wrong"] == [] and found["exit_code"] == 0
    assert found["health"] == {"status": "ok", "running": 0, "waiting": 0}
    assert sum(found["requests"].values()) > 4 and found["memory_mib"][1] > 50


def test_clients_count_their_tokens(monkeypatch):
    monkeypatch.setattr(serve, "TOKENS", 5)
    with served(None, "5M", 0.0) as server:
        assert serve._ask(server, 0, stream=False) == serve._ask(server, 0, stream=True) == 15
