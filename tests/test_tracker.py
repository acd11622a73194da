"""The mirror to Weights & Biases: it gets every line under one run id, and its troubles are its own."""

import logging
import sys
import threading
import time
import types

import pytest

from stages.tracker import WandbMirror


class Recorder:
    """Stands in for the wandb package."""

    def __init__(self) -> None:
        self.settings: dict = {}
        self.lines: list[dict] = []
        self.finished = False

    def module(self) -> types.ModuleType:
        module = types.ModuleType("wandb")
        module.init = self.init
        return module

    def init(self, **settings):
        self.settings = settings
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, line: dict) -> None:
        self.lines.append(line)

    def finish(self) -> None:
        self.finished = True


def mirror(tmp_path) -> WandbMirror:
    return WandbMirror("baton", "tiny/sft", "abc123", {"learning_rate": 1.0}, str(tmp_path))


def test_every_line_arrives_in_order_under_the_id_it_was_given(tmp_path, monkeypatch):
    recorder = Recorder()
    monkeypatch.setitem(sys.modules, "wandb", recorder.module())
    opened = mirror(tmp_path)
    for step in range(1, 6):
        opened.log({"step": step, "loss": 1 / step})
    opened.close()
    assert recorder.lines == [{"step": step, "loss": 1 / step} for step in range(1, 6)]
    assert recorder.settings["id"] == "abc123" and recorder.settings["resume"] == "allow"
    assert recorder.finished


def test_an_error_costs_a_warning(tmp_path, monkeypatch, caplog):
    module = types.ModuleType("wandb")

    def init(**settings):
        raise RuntimeError("no route to host")

    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)
    with caplog.at_level(logging.WARNING):
        opened = mirror(tmp_path)
        opened.log({"step": 1})
        opened.close()
    assert "wandb stopped (RuntimeError: no route to host); metrics.jsonl has everything" in caplog.text


def test_a_package_that_is_absent_costs_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        mirror(tmp_path).close()
    assert "wandb stopped (ModuleNotFoundError" in caplog.text


def test_a_connection_that_hangs_is_left_behind(tmp_path, monkeypatch, caplog):
    released = threading.Event()
    module = types.ModuleType("wandb")
    module.init = lambda **settings: released.wait(60)
    monkeypatch.setitem(sys.modules, "wandb", module)
    with caplog.at_level(logging.WARNING):
        opened = mirror(tmp_path)
        for step in range(1000):
            opened.log({"step": step})
        begun = time.monotonic()
        opened.close()
        waited = time.monotonic() - begun
    released.set()
    assert "was left behind" in caplog.text
    assert waited < 30, "it waited for the hanging connection"


@pytest.mark.slow
def test_the_real_package_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    opened = mirror(tmp_path)
    opened.log({"step": 1, "loss": 2.0})
    opened.close()
    assert list(tmp_path.glob("wandb/offline-run-*-abc123/*.wandb"))
