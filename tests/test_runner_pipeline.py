"""The pipeline runner: what it runs, skips and prints, with stages that take no time."""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from baton.launched import LaunchedStage, own_words
from baton.runner import Runner, check_data, run_pipeline, start_of
from baton.status import State, overview
from baton.supervisor import Start
from data.errors import DataError
from handoff.errors import HandoffError, UserError
from handoff.lock import RunLock
from handoff.manifest import EngineRecord
from handoff.stage import StageDir
from training.inputs import stage_inputs
from training.recipe import Recipe, Section, load_recipe
from training.registry import Registry

CONFIG = """
from training.config import StageConfig
from training.declaration import Declaration

DECLARATION = Declaration("a toy")


class Config(StageConfig):
    parent: str | None = None
    look_at: list[str] = []
    effort: int = 1
    result: str = "same"


def parents(config):
    return {} if config.parent is None else {"parent": config.parent}


def soft_parents(config):
    return {f"look:{ref}": ref for ref in config.look_at}
"""
RECIPE = """\
name: r
stages:
  judge: {stage: work, look_at: [leaf, twig]}
  leaf: {stage: work, parent: root}
  root: {stage: work}
  twig: {stage: work, parent: root}
"""


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    """One stage, work, whose result is the value of its key `result`."""
    folder = tmp_path_factory.mktemp("works")
    (folder / "runner_stages" / "work").mkdir(parents=True)
    for package in ("", "work"):
        (folder / "runner_stages" / package / "__init__.py").touch()
    (folder / "runner_stages" / "work" / "config.py").write_text(CONFIG)
    sys.path.insert(0, str(folder))
    yield Registry("runner_stages")
    sys.path.remove(str(folder))


def publish(recipe: Recipe, name: str) -> None:
    """A stage that does no real work."""
    section, inputs, directory = recipe.sections[name], stage_inputs(recipe, name), StageDir(recipe.run_dir / name)
    directory.begin(inputs)
    directory.made("result.json").write_text(json.dumps(section.config.result))
    directory.publish(
        None,
        name=name,
        stage=section.stage,
        kind="evaluation",
        inputs=inputs,
        parents={},
        recipe=section.resolved,
        data={},
        seed=recipe.seed,
        engine=EngineRecord(name="single"),
        versions={},
        metrics={"time/total": 1.0},
        files=["result.json"],
    )
    directory.close()


class Scene:
    """A recipe, the stages that were started, and how some of them behave."""

    def __init__(self, folder: Path, registry: Registry, capfd: pytest.CaptureFixture[str]) -> None:
        self.path = folder / "r.yaml"
        self.path.write_text(RECIPE + f"output_root: {folder}\n")
        self.registry = registry
        self.capfd = capfd
        self.started: list[str] = []
        self.behaviour: dict[str, tuple[str, int]] = {}  # section -> what it prints, its exit code
        self.out = self.err = ""

    def recipe(self, *overrides: str) -> Recipe:
        return load_recipe(self.path, overrides, registry=self.registry)

    def start(self, recipe: Recipe, section: Section) -> Start:
        self.started.append(section.name)

        def begin(descriptor: int) -> "InThread":
            own = os.dup(descriptor)  # the runner closes its own once the stage has been started
            return InThread(lambda: self._work(recipe, section, own))

        return Start(["do", section.name], begin)

    def _work(self, recipe: Recipe, section: Section, descriptor: int) -> int:
        text, code = self.behaviour.get(section.name, ("working\n", 0))
        os.write(descriptor, text.encode())
        os.close(descriptor)
        if code == 0 and text != "lazy\n":
            publish(recipe, section.name)
        return code

    def run(self, *overrides: str, to: tuple[str, ...] = (), force: tuple[str, ...] = (), max_restarts: int = 0) -> int:
        self.started.clear()
        recipe = self.recipe(*overrides)
        runner = Runner(recipe, self.start, Console(highlight=False), max_restarts=max_restarts)
        code = runner.run(recipe.order(to or None), force)
        self.out, self.err = self.capfd.readouterr()
        return code

    def line(self, name: str) -> str:
        """The runner's output about a section."""
        return next(line for line in self.out.splitlines() if line.startswith(name)).removeprefix(name).strip()


class InThread:
    """A stage that runs inside the test."""

    def __init__(self, work: Callable[[], int]) -> None:
        self._codes: list[int] = []
        self._thread = threading.Thread(target=lambda: self._codes.append(work()))
        self._thread.start()

    def send(self, signum: int) -> None:
        raise AssertionError("nothing sends signals here")

    def wait(self) -> int:
        self._thread.join()
        return self._codes[0]


@pytest.fixture
def scene(tmp_path, registry, capfd) -> Scene:
    return Scene(tmp_path, registry, capfd)


def test_everything_runs_once_parents_first(scene):
    assert scene.run() == 0
    assert scene.started == ["root", "leaf", "twig", "judge"]
    assert scene.line("root") == "new"
    assert scene.run() == 0
    assert scene.started == []
    assert scene.line("judge") == "up to date, skipped"


@pytest.mark.parametrize(
    ("code", "starts"), [(1, 3), (-signal.SIGKILL, 3), (134, 3), (2, 1), (3, 1), (143, 1), (-signal.SIGTERM, 1)]
)
def test_a_stage_that_breaks_is_started_again_and_no_other(scene, code, starts):
    """Not after a mistake of the user, a missed gate or a request to end."""
    scene.behaviour["root"] = ("oh\n", code)
    assert scene.run(max_restarts=2) == (code if code > 0 else 128 - code)
    assert scene.started == ["root"] * starts
    assert scene.out.count("root is started again (") == starts - 1
    assert scene.run() != 0 and scene.started == ["root"]


def test_a_stage_that_succeeds_in_the_second_start_is_followed_by_its_children(scene):
    codes = [1, 0]
    original = scene._work
    scene._work = lambda recipe, section, descriptor: (
        scene.behaviour.update(root=("working\n", codes.pop(0) if codes else 0))
        or original(recipe, section, descriptor)
    )
    assert scene.run(to=("leaf",), max_restarts=1) == 0
    assert scene.started == ["root", "root", "leaf"]


def test_a_target_runs_only_what_it_needs(scene):
    assert scene.run(to=("leaf",)) == 0
    assert scene.started == ["root", "leaf"]
    assert scene.run(to=("judge",)) == 0  # evaluates the existing stages
    assert scene.started == ["judge"]
    assert scene.run() == 0
    assert scene.started == ["twig", "judge"]
    assert scene.line("judge").startswith("stale: parent twig")


def test_a_child_reruns_only_if_its_parents_result_changed(scene):
    scene.run()
    assert scene.run("root.effort=2") == 0
    assert scene.started == ["root"]
    assert scene.line("root") == "stale: recipe: effort 1 → 2"
    assert scene.line("leaf") == "up to date, skipped"
    assert scene.run("root.effort=2", "root.result=other") == 0
    assert scene.started == ["root", "leaf", "twig"]
    assert "retrained" in scene.line("leaf")
    assert scene.line("judge") == "up to date, skipped"  # leaf and twig gave the same result as before


@pytest.mark.parametrize(("damage", "words"), [("altered", "was altered"), ("removed", "is missing")])
def test_a_stage_whose_files_were_damaged_is_stale(scene, damage, words):
    scene.run()
    name = next(iter(StageDir(scene.recipe().run_dir / "root").manifest().files))
    path = scene.recipe().run_dir / "root" / name
    before = path.read_bytes()
    path.touch()  # the content alone counts
    assert scene.run() == 0 and scene.started == []
    path.unlink()
    if damage == "altered":
        path.write_bytes(before + b" ")
    assert scene.run(to=("root",)) == 0
    assert scene.started == ["root"] and scene.line("root") == f"stale: {name} {words}"
    assert path.read_bytes() == before


def test_another_seed_makes_everything_stale(scene):
    scene.run()
    assert scene.run("seed=7") == 0
    assert scene.started == ["root", "leaf", "twig", "judge"]
    assert scene.line("twig").startswith("stale: seed 42 → 7")


def test_force_runs_one_section_from_its_start(scene):
    scene.run()
    assert scene.run(force=("leaf",)) == 0
    assert scene.started == ["leaf"]
    assert scene.line("leaf") == "stale: forced"
    assert (scene.recipe().run_dir / ".previous" / "leaf" / "1" / "stage.json").exists()
    scene.run("leaf.effort=2")
    assert scene.run() == 0
    assert scene.started == []  # the forced result comes back, not the one before it


def test_what_a_changed_recipe_set_aside_comes_back_with_the_recipe(scene):
    scene.run()
    changed = ("root.result=other",)
    assert scene.run(*changed) == 0
    assert scene.started == ["root", "leaf", "twig"]  # judge's own parents gave the same result
    found = overview(scene.recipe())
    assert "what an earlier start with this recipe made comes back" in found["root"].reasons
    for overrides in ((), changed, ()):
        assert scene.run(*overrides) == 0
        assert scene.started == []
        for name in ("root", "leaf", "twig"):
            assert scene.line(name) == "up to date: brought back from .previous, skipped"
    assert scene.run() == 0
    assert scene.line("root") == "up to date, skipped"


def interrupt(recipe, *steps):
    """Leaves the stage `root` as a start leaves it that was killed after it had saved states of these steps."""
    directory = StageDir(recipe.run_dir / "root")
    directory.begin(stage_inputs(recipe, "root"))
    for step in steps:
        (directory.state_dir / f"step-{step}").mkdir(parents=True)
    directory.close()


def test_the_states_of_an_interrupted_stage_come_back_with_the_recipe(scene):
    interrupt(scene.recipe(), 5)
    assert scene.run("root.effort=3", to=("root",)) == 0
    assert scene.run(to=("root",)) == 0
    assert scene.line("root") == "unfinished: brought back from .previous; resumes from step 5"
    assert scene.started == ["root"]


def test_an_interrupted_stage_is_resumed(scene):
    interrupt(scene.recipe(), 5, 10)
    assert scene.run(to=("root",)) == 0
    assert scene.line("root") == "unfinished: resumes from step 10"


def test_an_interrupted_stage_with_a_changed_recipe_starts_anew(scene):
    interrupt(scene.recipe(), 5)
    assert scene.run("root.effort=3", to=("root",)) == 0
    assert scene.line("root") == "stale: was not finished; recipe: effort 1 → 3"


def test_a_failure_shows_its_last_lines_the_log_and_the_command(scene):
    scene.behaviour["leaf"] = ("".join(f"line {n}\n" for n in range(100)), 7)
    assert scene.run() == 7
    assert scene.started == ["root", "leaf"]
    said = scene.err.splitlines()
    assert said[0].startswith("leaf failed with exit code 7")
    assert said[1:21] == [f"  | line {n}" for n in range(80, 100)]
    log = scene.recipe().run_dir / "logs" / "leaf.log"
    assert said[21:] == [f"log:    {log}", "repeat: do leaf"]
    assert log.read_text().splitlines()[1:] == [f"line {n}" for n in range(100)]
    scene.behaviour.clear()
    assert scene.run() == 0
    assert scene.started == ["leaf", "twig", "judge"]


def test_a_stage_that_was_killed_gives_the_code_of_its_signal(scene):
    scene.behaviour["root"] = ("", -signal.SIGKILL)
    assert scene.run() == 128 + signal.SIGKILL
    said = scene.err.splitlines()[0]
    assert said.startswith("root was killed after 0 s: by the system for lack of memory, or by someone; ")
    assert "the same command goes on with it" in said and "exit code" not in said
    scene.behaviour["root"] = ("", -signal.SIGSEGV)
    assert scene.run() == 128 + signal.SIGSEGV
    assert scene.err.startswith(f"root failed with exit code {128 + signal.SIGSEGV}")


def test_exit_code_0_without_a_result_is_a_failure(scene):
    scene.behaviour["root"] = ("lazy\n", 0)
    assert scene.run() == 1
    assert "ended without publishing" in scene.err


def test_a_second_run_of_the_same_directory_is_refused(scene):
    with RunLock(scene.recipe().run_dir, "baton run"), pytest.raises(HandoffError, match=f"process {os.getpid()}"):
        scene.run()
    assert scene.started == []


def test_an_impossible_output_folder_is_refused(scene, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(HandoffError, match="is a file, not a directory"):
        scene.run(f"output_root={tmp_path / 'file'}")
    assert scene.started == []


def test_the_overview_shows_dependencies(scene):
    scene.run()
    found = overview(scene.recipe("root.effort=2", "twig.effort=2"))
    assert {name: one.state for name, one in found.items()} == dict.fromkeys(found, State.STALE)
    assert found["leaf"].reasons == ("parent root is stale",)
    assert found["twig"].reasons == ("recipe: effort 1 → 2",)


def test_the_overview_of_an_empty_run(scene):
    found = overview(scene.recipe())
    assert {one.state for one in found.values()} == {State.NEW}


def test_a_dry_run_prints_the_plan_and_changes_nothing(scene, capfd):
    assert run_pipeline(scene.recipe(), ["leaf"], [], None, dry_run=True) == 0
    assert [line.split() for line in capfd.readouterr().out.splitlines()] == [
        ["root", "new"],
        ["leaf", "new:", "parent", "root", "is", "new"],
    ]
    assert not scene.recipe().run_dir.exists()


def test_a_dry_run_of_a_section_that_cannot_run_ends_with_2(scene, capfd, tmp_path):
    (tmp_path / "empty").mkdir()
    recipe = scene.recipe(f"root.parent={tmp_path / 'empty'}")
    assert run_pipeline(recipe, ["root"], [], None, dry_run=True) == 2
    assert "blocked: " in capfd.readouterr().out


def test_options_with_unknown_names_are_refused(scene, tmp_path):
    with pytest.raises(UserError, match="not among those to be run"):
        run_pipeline(scene.recipe(), ["root"], ["leaf"], None, dry_run=True)
    with pytest.raises(UserError, match="no such file"):
        run_pipeline(scene.recipe(), [], [], tmp_path / "ddp.yaml", dry_run=True)


def test_missing_data_stops_a_run_before_its_first_stage(tmp_path):
    path = tmp_path / "r.yaml"
    text = "# How to get the data: docs/real.md.\nname: r\nstages:\n"
    text += "  tokenizer: {data: [{source: world, kind: documents}]}\n"
    text += "  pretrain: {parent: tokenizer, data: [{source: file, path: missing.jsonl}]}\n"
    path.write_text(text)
    recipe = load_recipe(path, [f"data_root={tmp_path}"])
    check_data(recipe, ["tokenizer"])
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        check_data(recipe, recipe.order())
    with pytest.raises(UserError, match=r"no folder /nowhere; docs/real\.md says what belongs there"):
        check_data(load_recipe(path, ["data_root=/nowhere"]), ["tokenizer"])


def test_the_command_that_repeats_a_stage(tmp_path, root, monkeypatch):
    monkeypatch.chdir(root)
    path = tmp_path / "r.yaml"
    path.write_text(
        "name: r\nstages:\n  words: {stage: tokenizer, data: [{source: world, kind: documents}]}\n"
        "  pretrain: {parent: words, data: [{source: world, kind: documents}]}\n"
    )
    recipe = load_recipe(path, ["seed=1"])
    python, *rest = start_of(recipe, recipe.sections["pretrain"], None, preload=False).command
    assert Path(python).name == "python"
    assert rest == ["-m", "stages.pretrain", str(path), "seed=1", "--section", "pretrain"]
    launch = Path("recipes/launch/x.yaml")
    program, *rest = start_of(recipe, recipe.sections["pretrain"], launch, preload=False).command
    assert Path(program).name == "accelerate"
    module = ["-m", "stages.pretrain", str(path), "seed=1", "--section", "pretrain"]
    assert rest == ["launch", "--config_file", str(launch), *module]
    single = start_of(recipe, recipe.sections["words"], launch, preload=False).command
    assert single[1:3] == ["-m", "stages.tokenizer"]


SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from baton.launched import LaunchedStage
from baton.runner import Runner
from baton.supervisor import Start
from training.recipe import load_recipe
from training.registry import Registry

sys.path.insert(0, sys.argv[1])
recipe = load_recipe(sys.argv[2], registry=Registry("runner_stages"))
child = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(9)))"
child += "; print('ready', flush=True); time.sleep(60)"
start = Start(["x"], lambda fd: LaunchedStage([sys.executable, "-c", child], fd))
sys.exit(Runner(recipe, lambda r, s: start, Console()).run(["root"]))
"""


def test_a_signal_is_forwarded_once_and_the_runner_waits(scene, registry, root):
    package = Path(sys.modules["runner_stages.work.config"].__file__).parent.parent.parent
    command = [sys.executable, "-c", SCRIPT, str(package), str(scene.path)]
    runner = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert runner.stdout.readline().split() == ["root", "new"]
    assert runner.stdout.readline() == "ready\n"
    runner.send_signal(signal.SIGTERM)
    out, err = runner.communicate(timeout=30)
    assert runner.returncode == 9
    assert out == "saved\n"
    assert "root was stopped" in err


def test_the_processes_of_a_launched_stage_hear_signals_and_its_launcher_tells_how_they_ended():
    read, write = os.pipe()
    grandchild = "import time; print('up', flush=True); time.sleep(60)"  # its message shows that it has started
    child = f"import subprocess as s, sys; sys.exit(128 - s.run([sys.executable, '-c', {grandchild!r}]).returncode)"
    stage = LaunchedStage([sys.executable, "-c", child], write)
    os.close(write)
    with os.fdopen(read) as output:
        assert output.readline() == "up\n"
        stage.send(signal.SIGTERM)
        assert stage.wait() == 128 + signal.SIGTERM  # of the launched process; the launcher reports its exit
        assert output.read() == ""  # returns only when no process holds the other end


ELASTIC = """\
step 1
LaunchError: take two
E1124 11:32:43 29482 x/torch/distributed/elastic/multiprocessing/api.py:1002] failed (exitcode: 2) local_rank: 0
Traceback (most recent call last):
  File "<frozen runpy>", line 198, in _run_module_as_main
  File "<frozen runpy>", line 88, in _run_code
  File "x/accelerate/commands/launch.py", line 1423, in <module>
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
Failures:
[1]:
  exitcode  : -15 (pid: 29486)  (SIGTERM)
Root Cause (first observed failure):
[0]:
  exitcode  : 2 (pid: 29485)
"""
SIMPLE = """\
Traceback (most recent call last):
  File "x/training/run.py", line 3, in main
KeyError: 3
Traceback (most recent call last):
  File "x/bin/accelerate", line 10, in <module>
  File "x/accelerate/commands/launch.py", line 1423, in main
subprocess.CalledProcessError: Command '['python']' returned non-zero exit status 3.
"""


def test_the_launchers_output_does_not_hide_the_stages():
    assert own_words(ELASTIC.splitlines(), 1) == (["step 1", "LaunchError: take two"], 2)
    assert own_words(ELASTIC.replace(": 2 (pid", ": -9 (pid").splitlines(), 1)[1] == -9
    assert own_words(SIMPLE.splitlines(), 1) == (SIMPLE.splitlines()[:3], 3)
    killed = SIMPLE.replace("returned non-zero exit status 3", "died with <Signals.SIGKILL: 9>")
    assert own_words(killed.splitlines(), 1)[1] == -9
    refused = [*SIMPLE.splitlines()[3:6], "ValueError: The configuration has unknown keys"]
    assert own_words(["a note", *refused], 1) == (["a note", refused[-1]], 1)
    assert own_words(refused, 1) == ([refused[-1]], 1)
    own = SIMPLE.replace("accelerate/commands/launch.py", "training/run.py").splitlines()
    assert own_words(own, 1) == (own, 1)
