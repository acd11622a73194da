"""`accelerate launch -m stages.sft` under every engine: the requested engine ran, with the losses of one process."""

import json
import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from handoff.stage import StageDir
from tests.launching import launched

pytestmark = pytest.mark.slow

ENGINES = {
    "cpu": ("single", None, 1),
    "cpu2": ("ddp", None, 2),
    "cpu2_zero2": ("deepspeed", 2, 2),
    "cpu2_zero3": ("deepspeed", 3, 2),
    "cpu2_fsdp2": ("fsdp2", None, 2),
}
# Accumulation on both sides, a held-out set that does not divide, clipping below the gradients' norm.
RECIPE = """
name: launched
output_root: {root}
stages:
  sft:
    parent: {parent}
    data: [{{source: world, kind: chats, size: 40}}]
    eval_data: [{{source: world, kind: chats, size: 7, split: validation}}]
    eval_answers: 3
    max_new_tokens: 6
    max_length: 128
    train: {{learning_rate: 2.0e-3, adam_epsilon: 1.0e-3, max_steps: 4, global_batch_size: 8, max_grad_norm: 0.2,
             per_device_train_batch_size: 2, logging_steps: 1, save_steps: 2}}
"""


def launch(
    config: str, root: Path, micro_recipe: Path, folder: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    folder.mkdir(exist_ok=True)
    recipe = folder / "launched.yaml"
    recipe.write_text(RECIPE.format(root=folder, parent=micro_recipe.parent / "runs" / "micro" / "pretrain"))
    return launched(root, config, "stages.sft", recipe, options=options, timeout=300)


def trained(config: str, root: Path, micro_recipe: Path, folder: Path) -> tuple[list[dict], dict]:
    done = launch(config, root, micro_recipe, folder)
    assert done.returncode == 0, done.stderr[-4000:]
    stage = StageDir(folder / "launched" / "sft")
    manifest = stage.manifest()
    assert manifest is not None
    name, zero_stage, processes = ENGINES[config]
    ran = manifest.engine
    assert (ran.name, ran.zero_stage, ran.processes, ran.device) == (name, zero_stage, processes, "cpu")
    lines = [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]
    return lines, load_file(stage.model_dir / "model.safetensors")


@pytest.fixture(scope="module")
def alone(root: Path, micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict]:
    return trained("cpu", root, micro_recipe, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("config", [name for name in ENGINES if name != "cpu"])
def test_sft_trains_as_one_process_does(
    config: str, alone: tuple[list[dict], dict], root: Path, micro_recipe: Path, tmp_path: Path
) -> None:
    import torch

    one_lines, one_weights = alone
    lines, weights = trained(config, root, micro_recipe, tmp_path)
    assert [line["step"] for line in lines] == [line["step"] for line in one_lines]
    compared = 0
    for mine, theirs in zip(one_lines, lines, strict=True):
        for key in {"loss", "grad_norm", "eval_loss", "eval_mean_token_accuracy"} & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=1e-5), key
            compared += 1
    assert compared >= 12  # four steps, two evaluations
    assert weights.keys() == one_weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(value, one_weights[key], rtol=1e-4, atol=1e-5)


def test_gpu_launch_file_is_refused_where_there_is_no_gpu(root: Path, micro_recipe: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = launch("zero3", root, micro_recipe, tmp_path, "--num_processes", "2")
    assert done.returncode != 0
    assert done.stderr.count("LaunchError: the launch file asks for 2 GPUs") == 1  # both processes find it
    assert "recipes/launch/cpu2_zero3.yaml" in done.stderr
    assert not (tmp_path / "launched").exists()
