"""TensorBoard, MLflow and Trackio: what their own readers find in what a mirror wrote, and that it is there once."""

import json
import math
import subprocess
import sys
import threading
from types import ModuleType

import pytest

from baton.runner import run_pipeline
from handoff.stage import StageDir
from tests.conftest import MICRO
from training.recipe import RecipeError, load_recipe
from training.trackers import check_trackers
from training.trackers.destinations import DESTINATIONS
from training.trackers.mirror import start_mirrors
from training.trackers.sending import send
from training.trackers.sinks import SINKS

LINES = [
    {"step": 1, "loss": 2.5, "rewards/is it right?": 0.25, "time/step": 0.125},
    {"step": 2, "loss": 2.25, "skipped/rows": [3, 4], "note": "text"},
    {"step": 2, "eval_loss": 2.125},
    {"step": 3, "loss": math.nan},
]


class Scene:
    """A stage's folder, whose lines are sent to one tracker in this process."""

    def __init__(self, tmp_path, tracker):
        self.stage, self.tracker = tmp_path / "stage", tracker
        self.folder = self.stage / "trackers" / tracker
        self.folder.mkdir(parents=True)
        self.lines([])

    def lines(self, lines):
        (self.stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def send(self, lines, made=None):
        """Writes the lines and sends what was not sent before, as a start of the stage does."""
        self.lines(lines)
        ended = threading.Event()
        ended.set()
        given = DESTINATIONS[self.tracker]("baton", "tiny/sft", self.folder).given
        sink = SINKS[self.tracker](self.folder, run_id="abc123", config={"train": {"learning_rate": 0.5}}, **given)
        with (self.folder / "sent.jsonl").open("a+") as record:
            send(made(sink) if made else sink, self.stage / "metrics.jsonl", record, ended)

    def forget(self, sent):
        """What a kill leaves: lines that arrived and are not recorded."""
        record = self.folder / "sent.jsonl"
        record.write_text("".join(record.read_text().splitlines(keepends=True)[:sent]))


@pytest.fixture
def clean(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return monkeypatch


def in_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def in_mlflow(folder):
    """(the runs, {metric: [(step, value)]} of the first one)."""
    from mlflow import MlflowClient

    client = MlflowClient(folder.as_uri())
    runs = client.search_runs([client.get_experiment_by_name("baton").experiment_id])
    run = runs[0]
    found = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
    return runs, {key: [(one.step, one.value) for one in history] for key, history in found.items()}


def test_tensorboard_reads_every_number_once_after_kills_and_cuts(tmp_path):
    pytest.importorskip("tensorboard")
    scene = Scene(tmp_path, "tensorboard")
    scene.send(LINES[:3])
    scene.forget(1)
    scene.send(LINES[:2])  # cut back to a saved state
    scene.send(LINES)
    found = in_tensorboard(scene.folder)
    assert {tag: [step for step, _ in values] for tag, values in found.items()} == {
        "loss": [1, 2, 3],
        "rewards/is it right?": [1],
        "time/step": [1],
        "eval_loss": [2],
    }
    assert found["eval_loss"] == [(2, 2.125)] and math.isnan(found["loss"][2][1])


def test_lines_that_a_crash_of_the_machine_took_from_tensorboards_file_are_sent_again(tmp_path):
    pytest.importorskip("tensorboard")
    scene = Scene(tmp_path, "tensorboard")
    scene.send(LINES[:3])
    (events,) = scene.folder.glob("events.out.tfevents.*")
    events.write_bytes(events.read_bytes()[:-9])  # in the middle of the last line
    scene.send(LINES[:3])
    assert in_tensorboard(scene.folder)["eval_loss"] == [(2, 2.125)]
    assert [step for step, _ in in_tensorboard(scene.folder)["loss"]] == [1, 2]


def test_lines_that_another_start_put_in_place_are_not_sent(tmp_path):
    """The stage did not pass its gate, and the content of an earlier start came back."""
    pytest.importorskip("tensorboard")
    scene = Scene(tmp_path, "tensorboard")
    scene.send(LINES[:1])
    (scene.stage / "started.json").write_text('{"run_id": "another"}')
    scene.lines(LINES)
    settings = {"tracker": "tensorboard", "stage": str(scene.stage), "run_id": "abc123", "config": {}}
    command = [sys.executable, "-m", "training.trackers"]
    subprocess.run(command, input=json.dumps(settings) + "\n", text=True, check=True, timeout=100)
    assert in_tensorboard(scene.folder)["loss"] == [(1, 2.5)]


class Torn:
    """A sink whose process dies in the middle of a line: after its numbers, before what marks it as arrived."""

    def __init__(self, sink):
        self.sink, self.arrived = sink, sink.arrived

    def send(self, place, line):
        batch = self.sink._client.log_batch
        if place == 2:
            self.sink._client.log_batch = lambda run, metrics, tags: batch(run, metrics=metrics[:1])
        self.sink.send(place, line)
        if place == 2:
            raise KeyboardInterrupt

    def close(self):
        raise AssertionError


def test_mlflow_has_one_run_with_every_number_once_after_kills_and_cuts(tmp_path, clean):
    pytest.importorskip("mlflow")
    scene = Scene(tmp_path, "mlflow")
    with pytest.raises(KeyboardInterrupt):
        scene.send(LINES[:3], Torn)
    scene.send(LINES[:3])
    scene.forget(1)
    (scene.stage / "stage.json").touch()
    scene.send(LINES)
    runs, found = in_mlflow(scene.folder)
    assert len(runs) == 1 and runs[0].info.run_name == "tiny/sft" and runs[0].info.status == "FINISHED"
    assert runs[0].data.params == {"train.learning_rate": "0.5"}
    assert {key: [step for step, _ in values] for key, values in found.items()} == {
        "loss": [1, 2, 3],
        "rewards/is it right_": [1],
        "time/step": [1],
        "eval_loss": [2],
    }
    assert found["loss"][:2] == [(1, 2.5), (2, 2.25)] and math.isnan(found["loss"][2][1])


def test_trackio_resumes_the_run_of_its_name(tmp_path, clean):
    """A stand-in: the package cannot be installed beside this version of pillow."""
    said = []
    trackio = ModuleType("trackio")
    trackio.init = lambda **given: said.append(("init", given))
    trackio.log = lambda numbers, step: said.append((step, numbers))
    trackio.finish = lambda: said.append("finish")
    clean.setitem(sys.modules, "trackio", trackio)
    scene = Scene(tmp_path, "trackio")
    scene.send(LINES[:1])
    scene.send(LINES[:3])
    config = {"train": {"learning_rate": 0.5}}
    begin = ("init", {"project": "baton", "name": "tiny/sft-abc123", "config": config, "resume": "allow"})
    first = (1, {"loss": 2.5, "rewards/is it right?": 0.25, "time/step": 0.125})
    assert said == [begin, first, "finish", begin, (2, {"loss": 2.25}), (2, {"eval_loss": 2.125}), "finish"]


def test_where_lines_go_is_said_without_a_password(tmp_path, clean):
    assert f"go to mlflow, to {tmp_path}" in DESTINATIONS["mlflow"]("baton", "tiny/sft", tmp_path).words
    clean.setenv("MLFLOW_TRACKING_URI", "https://user:secret@mlflow.example.org/x")
    clean.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    found = DESTINATIONS["mlflow"]("baton", "tiny/sft", tmp_path)
    assert found.words == "metrics go to mlflow, to https://mlflow.example.org/x, experiment mine"
    assert found.given["uri"].startswith("https://user:secret@") and found.given["project"] == "mine"
    assert "in its own folder" in DESTINATIONS["trackio"]("baton", "tiny/sft", tmp_path).words


def test_several_trackers_run_at_once_and_the_failure_of_one_is_its_own(tmp_path, clean, caplog, root):
    pytest.importorskip("tensorboard")
    stage = StageDir(tmp_path / "stage")
    stage.path.mkdir()
    clean.setattr(StageDir, "run_id", lambda self: "abc123")
    clean.setenv("PYTHONPATH", str(root))
    clean.setenv("MLFLOW_TRACKING_URI", "nothing://to.be.found")
    said = []
    mirrors = start_mirrors(["tensorboard", "mlflow"], stage, "tiny/sft", {}, said.append)
    assert len(said) == 2
    for line in LINES[:2]:
        with (stage.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        mirrors.wake()
    processes = [mirror._process for mirror in mirrors.mirrors]
    processes[1].wait(60)
    mirrors.close()
    assert processes[0].wait(60) == 0
    assert "mlflow stopped (" in caplog.text and "metrics.jsonl has everything" in caplog.text
    assert [step for step, _ in in_tensorboard(stage.trackers_dir / "tensorboard")["loss"]] == [1, 2]


def recipe_with(tmp_path, **train):
    path = tmp_path / "micro.yaml"
    path.write_text(MICRO.format(root=tmp_path / "runs"))
    return load_recipe(path, [f"pretrain.train.{key}={value}" for key, value in train.items()])


def test_a_name_alone_none_and_a_list_are_taken(tmp_path):
    named = {"none": [], "wandb": ["wandb"], "[mlflow, tensorboard]": ["mlflow", "tensorboard"], "[]": []}
    for given, meant in named.items():
        assert recipe_with(tmp_path, report_to=given).sections["pretrain"].config.train.report_to == meant


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("tensorbord", "report_to: 'tensorbord' is none of wandb, tensorboard, mlflow, trackio, did you mean"),
        ("[wandb, comet]", "'comet' is none of wandb, tensorboard, mlflow, trackio"),
        ("[wandb, wandb]", "names wandb twice"),
    ],
)
def test_an_unknown_tracker_is_refused(tmp_path, given, said):
    with pytest.raises(RecipeError) as refused:
        recipe_with(tmp_path, report_to=given)
    assert said in str(refused.value)


def test_a_tracker_whose_package_is_missing_is_refused_before_anything_starts(tmp_path, monkeypatch):
    """Also where the working directory has a folder of its name, as wandb makes one."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    recipe = recipe_with(tmp_path, report_to="tensorboard")
    with pytest.raises(RecipeError) as refused:
        run_pipeline(recipe, (), (), None, dry_run=True)
    assert "pretrain.train.report_to: tensorboard is not installed: pip install 'baton-align[track]'" in str(
        refused.value
    )
    assert not recipe.run_dir.exists()
    (tmp_path / "trackio").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="trackio is not installed: pip install 'trackio'"):
        check_trackers(recipe_with(tmp_path, report_to="trackio"), ["pretrain"])
