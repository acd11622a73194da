"""Exact resume: a killed and restarted stage equals an undisturbed one in every tensor of the weights and saved states,
and in every logged value and sample; and a state that is not whole is refused by name.

SIGKILL from outside, on one process and on several, under every engine, falls at or after a given step. Where the
exact line matters, an exception is raised there instead, in this process.
"""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from benchmarks.faults_setup import Scene, differences, metrics_of, prepare
from handoff.errors import HandoffError
from handoff.stage import StageDir
from handoff.state import StateStore
from stages.ppo.sampler import Sampler
from stages.ppo.saves import Saves
from tests.conftest import ROOT
from tests.launching import ranked, variables
from training.engines.single import Single
from training.recipe import load_recipe
from training.run import run_section
from training.trainer import StageTrainer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    """The undisturbed pipeline of the fault campaign: an epoch has 5 to 11 steps, an iteration 4."""
    return prepare(tmp_path_factory.mktemp("resume"))


# ---- from outside: SIGKILL


class Group:
    """The processes of one stage, as `accelerate launch` would start them."""

    def __init__(self, scene: Scene, root: Path, section: str, members: list[dict[str, str]], *overrides: str) -> None:
        """`members`: the variables of each process."""
        self.stage = root / "faults" / section
        self.log = root / "log"
        self.members = [scene.child(root, section, self.log, *overrides, **member) for member in members]

    def killed_after(self, step: int) -> bool:
        """Sends SIGKILL once that step is logged. Returns False if it was too late or the stage ended by itself."""
        while all(child.running for child in self.members):
            if last_step(self.stage) >= step:
                for child in self.members:
                    child.send(signal.SIGKILL)
                return [child.wait() for child in self.members] == [-signal.SIGKILL] * len(self.members)
            time.sleep(0.001)
        return False

    def ends(self) -> None:
        codes = [child.wait() for child in self.members]
        assert codes == [0] * len(codes), self.log.read_text()[-3000:]


def last_step(stage: Path) -> int:
    path = stage / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(lines[-1].split(b'"step": ')[1].split(b",")[0].split(b"}")[0]) if lines else 0


ENGINES = {"ddp": "cpu2", "zero2": "cpu2_zero2", "zero3": "cpu2_zero3", "fsdp2": "cpu2_fsdp2"}
"""Engines with their launch files."""
STEPS = {"pretrain": (4, 16), "sft": (4, 16), "reward": (2, 8), "dpo": (2, 8), "ppo": (3, 6), "grpo": (3, 6)}
"""Steps after which to kill: one in the first epoch and one in the second; in RL, one in an iteration that follows a
state and one in an iteration that does not."""
VARIANTS = {"rloo": ["grpo.advantage=leave_one_out"], "global_baseline": ["grpo.advantage=global_baseline"]}


def batch_of_three(section: str) -> list[str]:
    """Batches that three processes can share."""
    if section in ("ppo", "grpo"):
        return [f"{section}.train.rollout_batch_size=12"]
    return [f"{section}.train.global_batch_size=6", f"{section}.train.per_device_train_batch_size=1"]


def killed_and_whole(scene: Scene, tmp_path: Path, section: str, engine: str, processes: int, keys: list[str]) -> None:
    """Kills the section twice, starts it again, and compares it with an undisturbed run."""
    overrides = list(keys) + (batch_of_three(section) if processes == 3 else [])
    if engine != "ddp" and section == "pretrain":
        overrides.append("pretrain.train.optim=adamw")  # Muon is not for engines that shard matrices
    alone = engine == "ddp" and processes == 1
    shared = {} if alone else variables(ROOT, ENGINES[engine])

    def group(root: Path) -> Group:
        members = [{}] if alone else [shared | member for member in ranked(processes)]
        return Group(scene, root, section, members, *overrides)

    if alone and not overrides:
        whole = scene.reference / section
    else:
        scene.copy(tmp_path / "whole", section)
        undisturbed = group(tmp_path / "whole")
        undisturbed.ends()
        whole = undisturbed.stage
    for attempt in range(5):  # on a slow machine, the stage may have ended before the step is seen
        root = tmp_path / f"killed{attempt}"
        scene.copy(root, section)
        if all(group(root).killed_after(step) for step in STEPS[section]):
            break
    else:
        pytest.fail("in five attempts it was never killed in time")
    assert not (root / "faults" / section / "stage.json").exists()
    again = group(root)
    again.ends()
    assert "resum" in again.log.read_text()
    assert differences(again.stage, whole) == []


@pytest.mark.parametrize(
    ("section", "engine", "processes"),
    [
        *((section, "ddp", 1) for section in STEPS),
        ("pretrain", "ddp", 2),
        ("sft", "ddp", 3),  # with more than two, the order in which DDP adds numbers matters
        ("ppo", "ddp", 4),
        ("reward", "zero2", 3),
        ("ppo", "zero3", 2),
        ("dpo", "fsdp2", 2),
    ],
)
def test_killed_twice_it_ends_as_if_it_had_not_been(scene, section, engine, processes, tmp_path):
    killed_and_whole(scene, tmp_path, section, engine, processes, [])


@pytest.mark.parametrize("variant", VARIANTS)
def test_so_do_other_advantages(scene, variant, tmp_path):
    killed_and_whole(scene, tmp_path, "grpo", "ddp", 1, VARIANTS[variant])


@pytest.mark.skipif("BATON_RESUME" not in os.environ, reason="an hour: set BATON_RESUME=all")
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("section", STEPS)
def test_the_whole_matrix(scene, section, engine, processes, tmp_path):
    killed_and_whole(scene, tmp_path, section, engine, processes, [])


@pytest.mark.parametrize("section", ["sft", "ppo"])
def test_two_runs_are_equal(scene, section, tmp_path):
    scene.copy(tmp_path, section)
    group = Group(scene, tmp_path, section, [{}])
    group.ends()
    assert differences(group.stage, scene.reference / section) == []


def test_a_killed_tokenizer_is_trained_again(scene, tmp_path):
    scene.copy(tmp_path, "tokenizer")
    child = scene.child(tmp_path, "tokenizer", tmp_path / "log")
    while child.running and not (tmp_path / "faults" / "tokenizer" / "started.json").exists():
        time.sleep(0.001)
    child.kill()
    assert not (tmp_path / "faults" / "tokenizer" / "stage.json").exists()
    again = Group(scene, tmp_path, "tokenizer", [{}])
    again.ends()
    assert differences(again.stage, scene.reference / "tokenizer") == []


# ---- from inside: an exception at a place


class Death(BaseException):
    """Nothing catches it."""


@contextmanager
def dies(owner: object, name: str, when: Callable[..., bool], after: bool = False) -> Iterator[None]:
    """Makes a method raise Death if `when(call number, *arguments)`, before its work or `after` it."""
    method = getattr(owner, name)
    calls = 0

    def dying(*args, **kwargs):
        nonlocal calls
        calls += 1
        fatal = when(calls, *args)
        if fatal and not after:
            raise Death
        result = method(*args, **kwargs)
        if fatal:
            raise Death
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Death):
        patch.setattr(owner, name, dying)
        yield


class Section:
    """A section with overrides, run whole and run with deaths, in this process."""

    def __init__(self, scene: Scene, tmp_path: Path, name: str, overrides: list[str]) -> None:
        self.name = name
        keys = [f"{name}.{key}" for key in overrides]
        self.whole, self.cut = (
            load_recipe(scene.recipe, [f"output_root={tmp_path / where}", *keys]) for where in ("whole", "cut")
        )
        for where in ("whole", "cut"):
            scene.copy(tmp_path / where, name)

    def check(self, *deaths: Callable[[], object]) -> list[dict]:
        """Starts the section once per death, and once more to finish. Returns the metrics."""
        run_section(self.whole, self.name)
        for death in deaths:
            with death():
                run_section(self.cut, self.name)
        folder = self.cut.run_dir / self.name
        assert not (folder / "stage.json").exists()
        run_section(self.cut, self.name)
        assert differences(folder, self.whole.run_dir / self.name) == []
        return metrics_of(folder)


def in_step(step: int) -> Callable[[], object]:
    return lambda: dies(StageTrainer, "training_step", lambda _, trainer, *__: trainer.state.global_step == step)


def after_state(step: int) -> Callable[[], object]:
    return lambda: dies(StateStore, "commit", lambda _, store, at, *__: at == step, after=True)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        # With dropout, the state of the random number generators must be restored too.
        (
            "pretrain",
            ["model={architecture: gpt2, n_embd: 32, n_layer: 2, n_head: 2, n_positions: 128}", "train.optim=adamw"],
        ),
        ("sft", ["packing=true", "train.max_steps=12", "train.save_steps=2"]),
        ("sft", ["train.logging_steps=5", "train.save_steps=4", "train.eval_steps=0"]),  # states between two lines
    ],
    ids=["dropout", "packing", "between two lines"],
)
def test_trainers_die_inside_a_step_and_after_a_save(scene, tmp_path, name, overrides):
    section = Section(scene, tmp_path, name, overrides)
    every = section.whole.sections[name].config.train.save_steps
    section.check(in_step(1), in_step(every + 1), after_state(2 * every), in_step(2 * every + 1), in_step(11))


def in_sampling(iteration: int) -> Callable[[], object]:
    return lambda: dies(Sampler, "batch", lambda _, sampler, stream, cursor, at: at == iteration, after=True)


def between_minibatches(call: int) -> Callable[[], object]:
    return lambda: dies(Single, "step", lambda number, *_: number == call)


def before_save(iteration: int) -> Callable[[], object]:
    return lambda: dies(Saves, "after_iteration", lambda _, saves, at, *__: at.iteration == iteration)


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("ppo", []),
        ("ppo", ["train.critic_warmup_iterations=2", "train.lam=length_adaptive", "train.critic_lam=1.0"]),
        ("grpo", ["train.sync_ref_model=true", "train.ref_model_sync_steps=1", "train.policy_loss=dual_clip"]),
    ],
    ids=["moving reference and adaptive coefficient", "critic's warm-up", "groups, reference moves every time"],
)
def test_rl_dies_inside_an_iteration_and_at_its_edge(scene, tmp_path, name, overrides):
    """States are saved at iterations 2, 4 and 6, and whenever an evaluation finds the best policy so far."""
    section = Section(scene, tmp_path, name, overrides)
    lines = section.check(
        in_sampling(0), between_minibatches(6), before_save(2), in_sampling(3), after_state(4), between_minibatches(2)
    )
    if name == "ppo" and not overrides:
        assert len({line["objective/kl_coef"] for line in lines if "episode" in line}) > 4


def test_groups_that_were_drawn_again_are_drawn_again(scene, tmp_path):
    """With dynamic sampling, the position in the prompts depends on the answers."""
    reward = (
        'reward=[{"function": "world_correct"}, {"function": "length_penalty", "weight": 0.01, "args": {"free": 14}}]'
    )
    section = Section(scene, tmp_path, "grpo", [reward])
    lines = section.check(in_sampling(3), between_minibatches(5), after_state(6))
    assert any(line["sampling/rounds"] > 1 for line in lines if "episode" in line)


def test_an_ensemble_of_rewards(scene, tmp_path):
    """Two reward models from the reference, one of them outside the run."""
    outside = shutil.copytree(scene.reference / "reward", tmp_path / "outside")
    reward = f'reward=[{{"models": ["reward", "{outside}"], "combine": "mean_minus_std"}}]'
    section = Section(scene, tmp_path, "ppo", [reward, "critic=reward", "train.iterations=4"])
    lines = section.check(in_sampling(1), after_state(2), between_minibatches(3))
    assert all("objective/disagreement" in line for line in lines if "episode" in line)


TOY = """
def longer(prompts, completions, completion_ids, **columns):
    return [len(ids) / 8 for ids in completion_ids]
def shorter(prompts, completions, completion_ids, **columns):
    return [-len(ids) / 8 for ids in completion_ids]
"""


def test_a_rollback_and_the_best_policy_are_remembered(scene, tmp_path, monkeypatch):
    """The run rolls back to its best policy; it dies before, during and after the rollback."""
    (tmp_path / "toy_resume.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = ['reward=[{"function": "toy_resume:longer"}]', 'monitor=[{"function": "toy_resume:shorter"}]']
    keys += ["train={iterations: 10, rollout_batch_size: 16, max_completion_length: 16, missing_eos_penalty: 0, "]
    keys[-1] += "sample_iterations: 1, save_iterations: 4, kl_coef: 0.0, learning_rate: 3.0e-3, lr_decay: none}"
    keys += ["guards={max_truncated: 1, patience: 100, entropy_floor: 0, on_overoptimization: rollback}"]
    section = Section(scene, tmp_path, "ppo", [*keys, "eval_data.0.size=32"])
    section.check(before_save(3), after_state(4), in_sampling(6), before_save(8))
    manifest = StageDir(section.cut.run_dir / "ppo").manifest()
    assert manifest is not None and "over-optimisation" in manifest.extra["alarms"][0]
    assert manifest.metrics["kept_iteration"] < 10


# ---- states that are not whole


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_each_part_of_a_state_that_is_deleted_or_altered_is_named(scene, tmp_path, name, caplog):
    """With an older state, the broken one is skipped by name; without, the stage refuses and names it."""
    state = shutil.copytree(scene.reference / name / "state", tmp_path / "state")
    store = StateStore(state)
    newest = max(state.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    older = min(state.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))
    parts = sorted(path for path in newest.rglob("*") if path.is_file())
    assert len(parts) >= 3 and older != newest
    hidden = tmp_path / "hidden"
    for part in parts:
        content = part.read_bytes()
        for damaged in (
            None,
            content[:-2],
            bytes([content[0] ^ 4]) + content[1:],
            content[:-1] + bytes([content[-1] ^ 1]),
        ):
            part.unlink()
            if damaged is not None:
                part.write_bytes(damaged)
            caplog.clear()
            found = store.latest()
            assert found is not None and found.path == older
            assert str(part) in caplog.text and f"state {newest.name} is skipped" in caplog.text
            older.rename(hidden)
            with pytest.raises(HandoffError, match="no valid state is left") as refused:
                store.latest()
            assert str(part) in str(refused.value)
            hidden.rename(older)
            part.write_bytes(content)
    found = store.latest()
    assert found is not None and found.path == newest


@pytest.mark.parametrize("name", ["sft", "ppo"])
def test_a_stage_refuses_a_broken_state_and_goes_on_when_it_is_whole_again(scene, tmp_path, name, caplog):
    section = Section(scene, tmp_path, name, [])
    with after_state(4 if name == "ppo" else 6)():
        run_section(section.cut, name)
    states = sorted((section.cut.run_dir / name / "state").glob("step-*"))
    assert len(states) == 2
    before = metrics_of(section.cut.run_dir / name)
    parts = [max(state.iterdir(), key=lambda path: path.stat().st_size) for state in states]
    contents = [part.read_bytes() for part in parts]
    for part in parts:
        part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(HandoffError, match="no valid state is left to resume from") as refused:
        run_section(section.cut, name)
    assert all(str(part) in str(refused.value) for part in parts)
    assert metrics_of(section.cut.run_dir / name) == before
    parts[0].write_bytes(contents[0])
    run_section(section.cut, name)
    assert f"state {states[1].name} is skipped" in caplog.text
    assert differences(section.cut.run_dir / name, scene.reference / name) == []
