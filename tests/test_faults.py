"""The fault campaign (benchmarks/faults.py): twenty trials survive, and the campaign notices a failure."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import faults
from benchmarks.faults_hostile import HOSTILE
from benchmarks.faults_kinds import KINDS
from benchmarks.faults_setup import SECTIONS, differences
from handoff.errors import UserError
from handoff.parent import open_parent
from tests.hostile_models import write_good
from training.model import load_encoder
from training.recipe import load_recipe

pytestmark = pytest.mark.slow
TRIALS, SEED = 23, 0


def test_a_round_of_faults_is_survived(root, tmp_path):
    result = tmp_path / "faults.json"
    command = [sys.executable, "-m", "benchmarks.faults", "--trials", str(TRIALS), "--seed", str(SEED)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [*command, "--json", str(result)], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]
    found = json.loads(result.read_text())
    assert (found["trials"], found["failures"], found["survived"], found["bytes_of_damage"]) == (TRIALS, 0, TRIALS, 0)
    assert sum(tally["trials"] for tally in found["by_fault"].values()) == TRIALS
    assert found["by_fault"].keys() == KINDS.keys() - set(found["left_out"])


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_parent_is_refused_by_name_and_runs_nothing(name, tmp_path):
    folder, mark = write_good(tmp_path / "hostile"), tmp_path / "mark"
    HOSTILE[name](folder, mark)
    with pytest.raises(UserError, match=str(folder)):
        load_encoder(open_parent(str(folder), tmp_path / "run", {"causal_lm"}))
    assert not mark.exists()


@pytest.fixture
def twins(micro_recipe, tmp_path) -> tuple[Path, Path]:
    """A published stage with states, and a copy of it."""
    stage = load_recipe(micro_recipe).run_dir / "sft"
    for name in ("one", "two"):
        shutil.copytree(stage, tmp_path / name)
    (tmp_path / "one" / "samples.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "two" / "samples.jsonl").write_text('{"step": 1}\n')
    assert differences(tmp_path / "one", tmp_path / "two") == []
    return tmp_path / "one", tmp_path / "two"


def newest_state(stage: Path) -> Path:
    return max((stage / "state").glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def alter_weights(path: Path) -> None:
    weights = load_file(path)
    name = sorted(weights)[0]
    weights[name].view(-1)[0] = torch.nextafter(weights[name].view(-1)[0], torch.tensor(9.0))
    save_file(weights, path, {"format": "pt"})


def test_each_kind_of_difference_is_found(twins):
    """In the last bit of a weight, in a line, in a sample, in a tensor of a state, and in leftovers."""
    one, two = twins

    def seen(change, words):
        change()
        found = differences(one, two)
        assert len(found) == 1 and words in found[0], found
        shutil.rmtree(one)
        shutil.copytree(two, one)

    seen(lambda: alter_weights(one / "model" / "model.safetensors"), "model/model.safetensors differs")
    lines = (one / "metrics.jsonl").read_text().splitlines(keepends=True)
    seen(lambda: (one / "metrics.jsonl").write_text("".join(lines[:-1])), "metrics.jsonl differs from line")
    seen(lambda: (one / "samples.jsonl").write_text(""), "samples.jsonl differs")
    state = newest_state(one)
    seen(lambda: alter_weights(state / "model.safetensors"), f"state {state.name}, model.safetensors: ")
    seen(lambda: shutil.rmtree(state), "states [")
    seen(lambda: (one / ".writing").write_text(""), ".writing was left behind")
    seen(lambda: (one / "stage.json").unlink(), "it is not published")
    times = [json.dumps({**json.loads(line), "time/step": 9.0}) + "\n" for line in lines]
    (one / "metrics.jsonl").write_text("".join(times))
    assert differences(one, two) == []


def test_a_round_has_every_kind_in_an_order_of_its_seed():
    rounds = [faults.kinds_of(seed, list(KINDS)) for seed in (0, 0, 1)]
    assert rounds[0] == rounds[1] != rounds[2]
    assert all(set(names) == set(KINDS) and len(names) == TRIALS for names in rounds)
    assert all(set(kind.sections) <= set(SECTIONS) for kind in KINDS.values())


def test_a_broken_promise_fails_the_campaign(monkeypatch, capsys):
    tally = faults.Campaign(1, 7, failures=1, failed=[{"trial": 3, "fault": "kill", "section": "sft"}])
    tally.failed[0] |= {"why": "sft: samples.jsonl differs", "again": "--seed 7 --only 3"}
    monkeypatch.setattr(faults, "campaign", lambda trials, seed, folder: tally)
    assert faults.main([3], 7, None) == 1
    said = capsys.readouterr().out
    assert "1 failed" in said and "--seed 7 --only 3" in said and "samples.jsonl differs" in said
