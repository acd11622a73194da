"""An adapter under every engine on two processes: the losses of one process, and a whole adapter is published.

The second of two sections starts from the adapter of the first.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handoff.stage import StageDir
from tests.launching import grouped, launched
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

ENGINES = ("cpu2", "cpu2_zero2", "cpu2_zero3", "cpu2_fsdp2")
RECIPE = """
name: launched
output_root: {root}
stages:
  first:
    stage: sft
    parent: {parent}
    data: &data [{{source: world, kind: chats, size: 40}}]
    eval_data: &held [{{source: world, kind: chats, size: 7, split: validation}}]
    eval_answers: 3
    max_new_tokens: 6
    max_length: 128
    adapter: {{r: 4, modules_to_save: [layers.1.input_layernorm]}}
    train: &train {{learning_rate: 2.0e-3, adam_epsilon: 1.0e-3, max_steps: 4, global_batch_size: 8, max_grad_norm: 0.2,
                    per_device_train_batch_size: 2, logging_steps: 1, save_steps: 2}}
  second:
    stage: sft
    parent: first
    data: *data
    eval_data: *held
    eval_answers: 0
    max_length: 128
    adapter: {{r: 2, target_modules: [q_proj, down_proj], merge: {merge}}}
    train: *train
"""


def trained(config: str, root: Path, micro_recipe: Path, folder: Path, merge: bool) -> dict[str, tuple]:
    recipe = folder / "launched.yaml"
    parent = micro_recipe.parent / "runs" / "micro" / "pretrain"
    recipe.write_text(RECIPE.format(root=folder, parent=parent, merge=str(merge).lower()))
    found = {}
    for section in ("first", "second"):
        done = grouped(root, config, "stages.sft", recipe, "--section", section, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        stage = StageDir(folder / "launched" / section)
        lines = [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]
        name = "model" if merge and section == "second" else "adapter_model"
        found[section] = lines, load_file(stage.model_dir / f"{name}.safetensors")
    return found


@pytest.fixture(scope="module")
def alone(root: Path, micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], dict]:
    """What one process trains; the argument says whether the second adapter is merged."""
    return cache(lambda merge: trained("cpu", root, micro_recipe, tmp_path_factory.mktemp("alone"), merge))


EVERY = [*((config, False) for config in ENGINES), ("cpu2_zero3", True)]
"""The whole matrix takes four minutes: set BATON_ENGINES=all."""


@pytest.mark.parametrize(
    ("config", "merge"),
    EVERY if "BATON_ENGINES" in os.environ else [("cpu2_fsdp2", False), ("cpu2_zero3", True)],
    ids=str,
)
def test_adapters_train_as_on_one_process(config, merge, alone, root, micro_recipe, tmp_path):
    expected = alone(merge)
    found = trained(config, root, micro_recipe, tmp_path, merge)
    for section, (lines, weights) in found.items():
        one_lines, one_weights = expected[section]
        assert [line["step"] for line in lines] == [line["step"] for line in one_lines]
        compared = 0
        for mine, theirs in zip(one_lines, lines, strict=True):
            for key in {"loss", "grad_norm", "eval_loss"} & mine.keys():
                assert theirs[key] == pytest.approx(mine[key], rel=1e-4 if key == "grad_norm" else 1e-5), key
                compared += 1
        assert compared >= 10
        assert weights.keys() == one_weights.keys()
        for key, value in weights.items():
            torch.testing.assert_close(value, one_weights[key], rtol=1e-4, atol=1e-5)
        state = load_file(tmp_path / "launched" / section / "state" / "step-4" / "model.safetensors")
        assert all("lora" in name or "modules_to_save" in name for name in state)


@pytest.mark.parametrize("config", ["cpu2_fsdp2"])
def test_dora_is_refused_where_matrices_are_cut(config, root, micro_recipe, tmp_path):
    recipe = tmp_path / "launched.yaml"
    parent = micro_recipe.parent / "runs" / "micro" / "pretrain"
    recipe.write_text(RECIPE.format(root=tmp_path, parent=parent, merge="false"))
    override = "first.adapter.use_dora=true"
    done = launched(root, config, "stages.sft", recipe, override, "--section", "first", timeout=300)
    assert done.returncode != 0
    assert "adapter.use_dora: DoRA measures whole matrices" in done.stderr


def test_a_quantised_base_under_ddp_trains_as_on_one_process(root, micro_recipe, tmp_path):
    found = {}
    for config in ("cpu", "cpu2"):
        recipe = tmp_path / f"{config}.yaml"
        parent = micro_recipe.parent / "runs" / "micro" / "pretrain"
        recipe.write_text(RECIPE.format(root=tmp_path / config, parent=parent, merge="false"))
        done = grouped(root, config, "stages.sft", recipe, "first.quantization=nf4", "--section", "first", timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
        stage = StageDir(tmp_path / config / "launched" / "first")
        lines = [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]
        found[config] = lines, load_file(stage.model_dir / "adapter_model.safetensors")
    (one_lines, one), (lines, together) = found.values()
    for mine, theirs in zip(one_lines, lines, strict=True):
        for key in {"loss", "grad_norm", "eval_loss"} & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4 if key == "grad_norm" else 1e-5), key
    for key, value in one.items():
        torch.testing.assert_close(together[key], value, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def adapters(micro_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of an SFT and a reward model on it, both adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    micro = load_recipe(micro_recipe).run_dir
    keys = [f"{name}.{key}" for name in ("sft", "reward") for key in ("adapter.r=4", "train.max_steps=4")]
    recipe = load_recipe(micro_recipe, [f"output_root={folder}", f"sft.parent={micro / 'pretrain'}", *keys])
    for name in ("sft", "reward"):
        run_section(recipe, name)
    return recipe.run_dir


def reinforced(config: str, root: Path, micro_recipe: Path, adapters: Path, folder: Path) -> list[dict]:
    overrides = [
        f"output_root={folder}",
        f"ppo.parent={adapters / 'sft'}",
        "ppo.reward=[{model: " + str(adapters / "reward") + "}]",
        "ppo.guards={probe_prompts: 0, keep: last}",
        "ppo.adapter.r=4",
        "ppo.train.iterations=2",
    ]
    done = grouped(root, config, "stages.ppo", micro_recipe, *overrides, "--section", "ppo", timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    stage = StageDir(folder / "micro" / "ppo")
    return [json.loads(line) for line in stage.metrics_path.read_text().splitlines()]


@pytest.fixture(scope="module")
def reinforced_alone(root: Path, micro_recipe: Path, adapters: Path, tmp_path_factory: pytest.TempPathFactory) -> list:
    return reinforced("cpu", root, micro_recipe, adapters, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize("config", ["cpu2", "cpu2_fsdp2"])
def test_policy_and_critic_train_as_on_one_process(config, reinforced_alone, root, micro_recipe, adapters, tmp_path):
    """On one process and under DDP they share a base; engines that shard weights give each its own."""
    alone = reinforced_alone
    found = reinforced(config, root, micro_recipe, adapters, tmp_path / "together")
    compared = 0
    for mine, theirs in zip(alone, found, strict=True):
        for key in {"grad_norm", "loss/value_avg", "objective/scores"} & mine.keys():
            assert theirs[key] == pytest.approx(mine[key], rel=1e-4), key
            compared += 1
    assert compared == 6
