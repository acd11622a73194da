"""`baton replay`: a step repeated from a saved state gives the logged numbers, and the run is not changed."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from baton.cli import main
from baton.replay import Replayed, replay_step
from handoff.errors import UserError
from tests import stage_chain
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow


def content(folder: Path) -> dict[str, str]:
    """Every file's content, without times."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def baton(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["baton", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run whose SFT has lines at 4, 8, 12 and 14, and states of 6, 12 and 14."""
    keys = ["train.max_steps=14", "train.logging_steps=4", "train.save_steps=6", "train.save_total_limit=3"]
    return stage_chain.run_stage("sft", tmp_path_factory.mktemp("replay"), *keys).folder.parent


def tamper(folder: Path, step: int, key: str, change: float) -> None:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if line["step"] == step and key in line]
    line[key] += change
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(("step", "line", "state"), [(7, 8, 6), (12, 12, 6), (13, 14, 12)])
def test_a_step_of_a_trainer_comes_out_as_it_was_logged(sft, step, line, state):
    """Also between two lines: the average of steps 5 to 8 is recomputed from the state of step 6."""
    before = content(sft)
    found = replay_step(sft, "sft", step)
    assert (found.line, found.state) == (line, state)
    assert found.agrees and found.logged.keys() == {"loss", "grad_norm"} and not found.changes
    assert content(sft) == before
    assert not list(sft.parent.glob(".replay-*"))


def test_an_altered_line_is_shown_with_both_values(sft, monkeypatch, capsys):
    assert baton(monkeypatch, "replay", str(sft), "--stage", "sft", "--step", "14") == 0
    assert "equal to the last bit" in capsys.readouterr().out
    kept = (sft / "sft" / "metrics.jsonl").read_bytes()
    tamper(sft / "sft", 14, "loss", 1e-12)
    altered = replay_step(sft, "sft", 14)
    assert not altered.agrees
    assert baton(monkeypatch, "replay", str(sft), "--stage", "sft", "--step", "14") == 1
    out = capsys.readouterr().out
    assert repr(altered.logged["loss"]) in out and repr(altered.again["loss"]) in out and "not equal" in out
    (sft / "sft" / "metrics.jsonl").write_bytes(kept)


def test_steps_that_cannot_be_replayed_say_why(sft, monkeypatch, capsys):
    with pytest.raises(
        UserError, match=r"no whole state .* before step 6 \(steps with a line: 4, 8, 12, 14; states: 6, "
    ):
        replay_step(sft, "sft", 6)
    with pytest.raises(UserError, match="has no line of step 15 or after it"):
        replay_step(sft, "sft", 15)
    with pytest.raises(UserError, match=r"no such stage; .* has sft"):
        replay_step(sft, "dpo", 1)
    assert baton(monkeypatch, "replay", str(sft), "--stage", "sft", "--step", "2") == 2
    assert "no whole state is left from before step 2" in capsys.readouterr().err
    started = sft / "sft" / "started.json"
    kept = started.read_text()
    started.write_text(json.dumps({key: value for key, value in json.loads(kept).items() if key != "origin"}))
    with pytest.raises(UserError, match="does not say from which recipe"):
        replay_step(sft, "sft", 14)
    started.write_text(kept)
    with pytest.raises(UserError, match="the stage tokenizer has no steps"):
        replay_step(stage_chain.runs() / "tiny", "tokenizer", 1)


def test_other_logging_steps_than_the_runs_do_not_change_what_is_compared(tmp_path):
    """The recipe's file was changed after the run, which leaves the stage up to date."""
    path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load(stage_chain.chain().read_text())
    recipe["output_root"] = str(tmp_path)
    recipe["stages"] = {"sft": recipe["stages"]["sft"] | {"parent": str(stage_chain.runs() / "tiny" / "pretrain")}}
    recipe["stages"]["sft"]["train"] |= {"max_steps": 8, "save_steps": 3, "logging_steps": 2, "save_total_limit": 4}
    path.write_text(yaml.safe_dump(recipe))
    run_section(load_recipe(path), "sft")
    for every in (1, 3, 8):
        recipe["stages"]["sft"]["train"]["logging_steps"] = every
        path.write_text(yaml.safe_dump(recipe))
        found = replay_step(tmp_path / "tiny", "sft", 6)
        assert (found.line, found.state) == (6, 3) and found.agrees, found.told()


def test_an_altered_state_is_skipped(sft):
    part = sft / "sft" / "state" / "step-12" / "optimizer.safetensors"
    kept = part.read_bytes()
    part.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    found = replay_step(sft, "sft", 14)
    part.write_bytes(kept)
    assert found.state == 6 and found.agrees


def test_another_recipe_is_another_training(tmp_path):
    path = tmp_path / "recipe.yaml"
    recipe = yaml.safe_load(stage_chain.chain().read_text())
    recipe["output_root"] = str(tmp_path)
    recipe["stages"] = {"sft": recipe["stages"]["sft"] | {"parent": str(stage_chain.runs() / "tiny" / "pretrain")}}
    recipe["stages"]["sft"]["train"] |= {"max_steps": 3, "save_steps": 1}
    path.write_text(yaml.safe_dump(recipe))
    run_section(load_recipe(path), "sft")
    recipe["stages"]["sft"]["train"]["learning_rate"] = 1.0e-3
    path.write_text(yaml.safe_dump(recipe))
    with pytest.raises(UserError, match=r"cannot be taken again, since this has changed: recipe: train\.learning_rate"):
        replay_step(tmp_path / "tiny", "sft", 3)


def test_an_iteration_of_ppo_comes_out_as_it_was_logged(micro_recipe, monkeypatch, capsys):
    run_section(load_recipe(micro_recipe), "ppo")
    run = micro_recipe.parent / "runs" / "micro"
    before = content(run)
    found = replay_step(run, "ppo", 4)
    assert (found.line, found.state) == (4, 2) and found.agrees
    assert found.logged.keys() == {"objective/kl", "loss/policy_avg", "loss/value_avg", "grad_norm"}
    assert content(run) == before
    tamper(run / "ppo", 4, "objective/kl", 1e-9)
    assert baton(monkeypatch, "replay", str(micro_recipe), "--stage", "ppo", "--step", "4") == 1
    assert "objective/kl" in capsys.readouterr().out


def test_dpo_reuses_the_stored_reference(tmp_path):
    """The reference's log-probabilities are stored beside the states."""
    run = stage_chain.run_stage("dpo", tmp_path, "train.max_steps=4", "train.save_steps=2").folder.parent
    before = content(run)
    assert replay_step(run, "dpo", 4).agrees
    assert content(run) == before


def test_another_engine_agrees_within_a_tolerance():
    def found(again: float, elsewhere: bool) -> bool:
        return Replayed("sft", 2, 2, 1, {"loss": 1.0}, {"loss": again}, elsewhere, []).agrees

    assert found(1.0, elsewhere=False) and not found(1.00001, elsewhere=False)
    assert found(1.00001, elsewhere=True) and not found(1.001, elsewhere=True)
    assert not Replayed("sft", 2, 2, 1, {"loss": 1.0}, {}, True, []).agrees
