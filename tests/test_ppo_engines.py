"""PPO under every engine, on two CPU processes: what was asked for came up, and the losses are those of one process."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from handoff.stage import StageDir
from tests.launching import grouped, launched
from tests.recorded_ppo import recorded
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

ENGINES = {  # {launch file: (engine, ZeRO stage, seed)}
    "cpu2": ("ddp", None, 1),
    "cpu2_zero2": ("deepspeed", 2, 7),
    "cpu2_zero3": ("deepspeed", 3, 1),
    "cpu2_fsdp2": ("fsdp2", None, 7),
}
SEEDS = (1, 7)
COMPARED = ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "eval/scores", "eval/kl")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(micro_recipe, tmp_path_factory) -> dict[int, tuple[Path, list[dict]]]:
    """For each seed what one process sampled, and its metrics."""
    found = {}
    for seed in SEEDS:
        record = tmp_path_factory.mktemp("alone") / "record.jsonl"
        recipe = load_recipe(micro_recipe, [f"seed={seed}"])
        shutil.rmtree(recipe.run_dir / "ppo", ignore_errors=True)
        with pytest.MonkeyPatch.context() as patch:
            recorded(record, patch)
            run_section(recipe, "ppo")
        found[seed] = record, lines(recipe.run_dir / "ppo")
    return found


@pytest.mark.parametrize("launch", ENGINES)
def test_two_processes_equal_one(launch, micro_recipe, alone, root):
    """On the same completions. Those that the engine samples itself are nearly all the same."""
    name, zero, seed = ENGINES[launch]
    folder = load_recipe(micro_recipe).run_dir / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    record, expected = alone[seed]
    done = grouped(root, launch, "tests.recorded_ppo", record, micro_recipe, f"seed={seed}")
    assert done.returncode == 0, done.stderr[-3000:]
    # A sharded model has no values until it is prepared; what is tried on it must wait for them.
    assert "rows are padded" not in done.stderr and "plain generation" not in done.stderr, done.stderr[-3000:]

    manifest = StageDir(folder).manifest()
    assert manifest is not None
    engine = manifest.engine
    assert (engine.name, engine.zero_stage, engine.processes, engine.device) == (name, zero, 2, "cpu")

    counts = [json.loads(record.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    sampled = sum(count["completions"] for count in counts)
    assert sampled == len(record.read_text().splitlines())
    assert sum(count["same"] for count in counts) >= 0.98 * sampled

    together = lines(folder)
    assert [line["step"] for line in together] == [line["step"] for line in expected]
    for ours, theirs in zip(together, expected, strict=True):
        for key in COMPARED:
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (ours["step"], key)
        if "grad_norm" in theirs:
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
    with safe_open(folder / "model" / "model.safetensors", "pt") as saved:
        assert all(saved.get_tensor(key).numel() > 0 for key in saved.keys())  # noqa: SIM118


def test_groups_on_two_processes_equal_groups_on_one(micro_recipe, root):
    """GRPO: tokens, advantages and steps do not depend on which process answers which prompt."""
    section = ["advantage=group", "train.num_generations=4", "train.kl_in=loss", "train.loss_normaliser=sequence"]
    recipe = load_recipe(micro_recipe, [f"ppo.{key}" for key in section])
    folder = recipe.run_dir / "ppo"
    shutil.rmtree(folder, ignore_errors=True)
    run_section(recipe, "ppo")
    one, samples = lines(folder), (folder / "samples.jsonl").read_text()
    shutil.rmtree(folder)
    done = grouped(root, "cpu2", "stages.ppo", micro_recipe, *section)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(lines(folder), one, strict=True):
        for key in (*COMPARED, "frac_reward_zero_std", "reward_std"):
            if key in theirs:
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (ours["step"], key)
    assert [json.loads(s)["completion"] for s in (folder / "samples.jsonl").read_text().splitlines()[:8]] == [
        json.loads(s)["completion"] for s in samples.splitlines()[:8]
    ]


def test_minibatches_that_the_processes_cannot_share_are_refused(micro_recipe, root):
    keys = ["train.rollout_batch_size=18", "train.num_mini_batches=18"]
    done = launched(root, "cpu2", "stages.ppo", micro_recipe, *keys)
    assert "which 18 minibatches on 2 processes do not divide; take a multiple of 36" in done.stderr
    assert "exitcode  : 2" in done.stderr
