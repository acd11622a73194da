"""The mirror to Weights & Biases: it sends every line once under one run id, and its failures do not affect the stage.

The fake package imitates the real one's behaviour and failures, and records what it receives.
"""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import faults_wandb
from training import engines
from training.recipe import load_recipe
from training.run import Run, run_section
from training.signals import Signals
from training.trackers import mirror as mirrors
from training.trackers.destinations import DESTINATIONS
from training.trackers.mirror import Mirror, Mirrors
from training.trackers.sending import Lines


class Scene:
    """A stage's folder with a mirror, and the fake's server."""

    def __init__(self, tmp_path: Path) -> None:
        self.folder = tmp_path / "stage"
        self.folder.mkdir()
        self.server = tmp_path / "package" / "wandb"
        self.mirror = self.open()

    def open(self) -> Mirror:
        given = {"project": "baton", "name": "tiny/sft"}
        return Mirror("wandb", self.folder, given, "abc123", {"learning_rate": 1.0})

    def log(self, *steps: int, **more: float) -> None:
        """Writes a line for each step; its time differs each time it is written."""
        for step in steps:
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **more, "time/step": time.perf_counter()}) + "\n")
            self.mirror.wake()

    def cut(self, lines: int) -> None:
        path = self.folder / "metrics.jsonl"
        kept = path.read_text().splitlines(keepends=True)[:lines]
        os.truncate(path, len("".join(kept)))

    def arrived(self) -> list[int]:
        """The server's steps in the order of arrival."""
        path = self.server / "server-abc123.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        assert [line["_step"] for line in lines] == list(range(len(lines)))
        return [line["step"] for line in lines]

    def until(self, steps: list[int]) -> None:
        deadline = time.monotonic() + 30
        while self.arrived() != steps:
            assert time.monotonic() < deadline, self.arrived()
            time.sleep(0.02)

    def end(self) -> None:
        """Ends the mirror as a stage does, then waits for its background process."""
        process = self.mirror._process
        Mirrors([self.mirror]).close()
        if process is not None:
            process.wait(30)


@pytest.fixture
def scene(tmp_path, monkeypatch, root):
    package = tmp_path / "package" / "wandb"
    package.mkdir(parents=True)
    shutil.copy(faults_wandb.__file__, package / "__init__.py")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(package.parent), str(root)]))
    return Scene(tmp_path)


def test_every_line_arrives_in_order_under_the_id_it_was_given(scene):
    scene.log(1, 2, 3, 3)  # two lines of one step: training and held-out
    scene.until([1, 2, 3, 3])
    scene.log(4)
    scene.end()
    assert scene.arrived() == [1, 2, 3, 3, 4]
    assert (scene.server / "finished").exists()


def test_the_process_starts_with_the_first_line(scene):
    Mirrors([scene.mirror]).close()
    assert list(scene.folder.iterdir()) == []


@pytest.mark.parametrize("mode", ["", "offline"])
def test_after_a_kill_no_step_comes_twice_and_none_is_missing(scene, monkeypatch, mode):
    """The stage and its mirror are killed; the resumed stage cuts back to its state and writes the same lines again."""
    monkeypatch.setenv("FAKE_WANDB", mode)
    scene.log(1, 2, 3, 3)
    scene.until([1, 2, 3, 3])
    scene.mirror._process.send_signal(signal.SIGKILL)
    scene.mirror._process.wait()
    scene.log(4)  # this line is never sent
    scene.cut(2)
    scene.mirror = scene.open()
    scene.log(3, 3, 4, 5)
    scene.end()
    assert scene.arrived() == [1, 2, 3, 3, 4, 5]


def test_a_mirror_survives_truncated_and_rewritten_lines(scene):
    scene.log(1, 2, 3, 3)
    scene.until([1, 2, 3, 3])
    scene.cut(1)
    scene.log(2, 3, 3, 4)
    scene.until([1, 2, 3, 3, 4])
    scene.end()


def test_two_mirrors_of_one_stage_take_turns(scene):
    """The stage was killed, which closes the first mirror's pipe; the resumed stage starts a second mirror."""
    scene.log(1, 2)
    first = scene.mirror
    scene.mirror = scene.open()
    scene.log(3)
    Mirrors([first]).close()
    scene.end()
    assert scene.arrived() == [1, 2, 3]


def test_lines_lost_on_the_way_are_sent_again(scene):
    """The machine went down: lines were recorded as sent but did not arrive."""
    scene.log(1, 2, 3, 4)
    scene.until([1, 2, 3, 4])
    scene.end()
    server = scene.server / "server-abc123.jsonl"
    server.write_text("".join(server.read_text().splitlines(keepends=True)[:2]))
    scene.mirror = scene.open()
    scene.log(5)
    scene.end()
    assert scene.arrived() == [1, 2, 3, 4, 5]


def test_lines_sent_but_not_recorded_do_not_appear_twice(scene):
    scene.log(1, 2, 3)
    scene.until([1, 2, 3])
    scene.end()
    (scene.folder / "trackers" / "wandb" / "sent.jsonl").write_text("[1, 0]\n[2, 0]\n")
    scene.mirror = scene.open()
    scene.log(4)
    scene.end()
    assert scene.arrived() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("mode", "said"),
    [
        ("absent", "wandb stopped (ModuleNotFoundError: No module named 'wandb'); metrics.jsonl has everything"),
        ("raises at init", "wandb stopped (RuntimeError: no API key)"),
        ("raises", "wandb stopped (RuntimeError: no route to host)"),
    ],
)
def test_an_error_costs_one_warning(scene, monkeypatch, caplog, mode, said):
    monkeypatch.setenv("FAKE_WANDB", mode)
    scene.log(1, 2, 3)
    scene.mirror._process.wait(30)
    with caplog.at_level(logging.WARNING):
        scene.log(4, 5)
        Mirrors([scene.mirror]).close()
    assert caplog.text.count("wandb stopped") == 1 and said in caplog.text


def test_a_mirror_that_died_is_replaced_after_a_while(scene, monkeypatch):
    monkeypatch.setattr(mirrors, "RETRY", 0)
    scene.log(1, 2)
    scene.until([1, 2])
    scene.mirror._process.kill()
    scene.mirror._process.wait()
    scene.log(3)
    scene.end()
    assert scene.arrived() == [1, 2, 3]


@pytest.mark.parametrize("mode", ["hangs at import", "hangs at init", "hangs"])
def test_what_hangs_is_waited_for_by_nobody_and_ends_by_itself(scene, monkeypatch, caplog, mode):
    monkeypatch.setenv("FAKE_WANDB", mode)
    scene.log(*range(1000))
    process = scene.mirror._process
    time.sleep(1)  # it is hanging now
    with caplog.at_level(logging.WARNING):
        Mirrors([scene.mirror]).close()
    assert process.poll() is None, "the stage's end waited for what hangs"
    assert "the last lines go to wandb in the background" in caplog.text
    process.kill()
    process.wait()


def test_a_mirror_ends_within_its_grace_period(scene, monkeypatch, root):
    monkeypatch.setenv("FAKE_WANDB", "hangs at init")
    code = "from training.trackers import __main__ as process; process.GRACE = 1; process.main()"
    (scene.folder / "trackers" / "wandb").mkdir(parents=True)
    settings = {"tracker": "wandb", "stage": str(scene.folder), "run_id": "abc123", "config": {}}
    settings = json.dumps({**settings, "project": "baton", "name": "tiny/sft"}) + "\n"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=root, input=settings, text=True, timeout=50, capture_output=True)
    assert done.returncode == -signal.SIGALRM


def test_lines_are_read_once_they_are_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 1, "a": 2}\n{"st')
    lines = Lines(path)
    assert [key for key, _ in lines.new()] == [(1, 0), (1, 1)]
    assert list(lines.new()) == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert list(lines.new()) == [((2, 0), {"step": 2})]


def test_a_stage_keeps_its_run_id_when_it_is_resumed_and_has_another_when_it_begins_anew(micro_recipe, tmp_path):
    run_dir = load_recipe(micro_recipe).run_dir
    recipe = load_recipe(micro_recipe, [f"pretrain.parent={run_dir / 'tokenizer'}", f"output_root={tmp_path}"])

    def begin(recipe):
        from training.inputs import stage_inputs

        run = Run(recipe, "pretrain", Signals("pretrain"), engines.current())
        run.begin(stage_inputs(recipe, "pretrain"))
        run.log(1, {"loss": 1.0})
        found = run.dir.run_id()
        run.close()
        return found

    first = begin(recipe)
    assert begin(recipe) == first
    other = load_recipe(micro_recipe, [f"pretrain.parent={run_dir / 'tokenizer'}", f"output_root={tmp_path}", "seed=9"])
    assert begin(other) != first


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """No settings for wandb, and no keys."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return monkeypatch


def destination(project, name):
    found = DESTINATIONS["wandb"](project, name, Path("runs/tiny/sft/trackers/wandb"))
    return found.given, found.words


def test_what_will_happen_is_said_and_the_environments_names_hold(environment, tmp_path):
    given, words = destination("baton", "tiny/sft")
    assert given is None and "there is no key for api.wandb.ai: nothing is sent" in words
    environment.setenv("WANDB_API_KEY", "x" * 40)
    ours = {"project": "baton", "name": "tiny/sft"}
    assert destination("baton", "tiny/sft") == (ours, "metrics go to wandb at api.wandb.ai, project baton")
    environment.setenv("WANDB_PROJECT", "mine")
    environment.setenv("WANDB_NAME", "first")
    assert destination("baton", "tiny/sft")[0] == {"project": "mine", "name": "first"}
    environment.setenv("WANDB_MODE", "disabled")
    assert destination("baton", "tiny/sft")[0] is None
    environment.delenv("WANDB_API_KEY")
    environment.setenv("WANDB_MODE", "offline")
    given, words = destination("baton", "tiny/sft")
    assert given["project"] == "mine" and words.endswith("(WANDB_MODE is offline)")


def test_a_key_is_that_of_the_host(environment, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert destination("baton", "x")[0]
    environment.setenv("WANDB_BASE_URL", "https://wandb.example.org/api")
    given, words = destination("baton", "x")
    assert given is None and "no key for wandb.example.org" in words and "secret" not in words
    (tmp_path / "netrc").write_text("machine\n")
    assert destination("baton", "x")[0] is None


def test_without_a_key_no_mirror_is_started(environment, micro_recipe, tmp_path, capsys):
    run_dir = load_recipe(micro_recipe).run_dir
    recipe = load_recipe(micro_recipe, [f"pretrain.parent={run_dir / 'tokenizer'}", f"output_root={tmp_path}"])
    run = Run(recipe, "pretrain", Signals("pretrain"), engines.current())
    run.mirror(["wandb"])
    run.dir.path.mkdir(parents=True)
    run.log(1, {"loss": 1.0})
    run.close()
    assert "nothing is sent" in capsys.readouterr().out
    assert [path.name for path in run.dir.path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.slow
def test_a_stage_is_mirrored_from_its_first_line_to_its_last(micro_recipe, tmp_path, scene, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    run_dir = load_recipe(micro_recipe).run_dir
    keys = [f"pretrain.parent={run_dir / 'tokenizer'}", f"output_root={tmp_path}", "pretrain.train.report_to=wandb"]
    recipe = load_recipe(micro_recipe, [*keys, "pretrain.train.logging_steps=1"])
    run_section(recipe, "pretrain")
    folder = recipe.run_dir / "pretrain"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    deadline = time.monotonic() + 30
    while not (scene.server / "finished").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server = scene.server / f"server-{json.loads((folder / 'started.json').read_text())['run_id']}.jsonl"
    sent = [json.loads(line) for line in server.read_text().splitlines()]
    assert sent == [{"_step": number, **line} for number, line in enumerate(lines)] and len(lines) >= 10


@pytest.mark.slow
def test_the_real_package_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    scene = Scene(tmp_path)
    scene.log(1, loss=2.125)
    scene.log(2, loss=1.625)
    scene.log(3, loss=1.375)
    scene.end()
    said = (scene.folder / "trackers" / "wandb" / "mirror.log").read_text()
    assert len(list(scene.folder.glob("trackers/wandb/offline-run-*-abc123/*.wandb"))) == 1, said
    assert (scene.folder / "trackers" / "wandb" / "sent.jsonl").read_text().splitlines() == [
        "[1, 0]",
        "[2, 0]",
        "[3, 0]",
    ], said
    content = next(scene.folder.glob("trackers/wandb/offline-run-*/*.wandb")).read_bytes()
    assert all(loss in content for loss in (b"2.125", b"1.625", b"1.375"))
