"""Fixtures for all test files."""

from pathlib import Path

import pytest

from training.threads import settle

settle()
ROOT = Path(__file__).resolve().parent.parent
MICRO = """
name: micro
output_root: {root}
seed: 1
stages:
  tokenizer:
    vocab_size: 600
    data: [{{source: world, kind: documents, size: 200}}, {{source: world, kind: chats, size: 200}}]
  pretrain:
    parent: tokenizer
    model:
      {{architecture: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4}}
    data: [{{source: world, kind: documents, size: 200}}]
    block_size: 128
    train: {{learning_rate: 3.0e-3, max_steps: 10, global_batch_size: 8}}
  sft:
    parent: pretrain
    data: [{{source: world, kind: chats, size: 300}}]
    max_length: 128
    train: {{learning_rate: 5.0e-3, max_steps: 30, global_batch_size: 8}}
  reward:
    stage: reward_model
    parent: sft
    data: [{{source: world, kind: preferences, size: 64}}]
    eval_data: [{{source: world, kind: preferences, size: 32, split: validation}}]
    max_length: 128
    train: {{learning_rate: 1.0e-3, max_steps: 8, global_batch_size: 8}}
  ppo:
    parent: sft
    guards: {{max_truncated: 1}}
    reward: [{{model: reward}}, {{function: length_penalty, weight: 0.5, args: {{free: 8}}}}]
    data: [{{source: world, kind: prompts, size: 50}}]
    eval_data: [{{source: world, kind: prompts, size: 8, split: validation}}]
    train: {{iterations: 4, rollout_batch_size: 16, max_completion_length: 24, sample_iterations: 2, save_iterations: 2,
             learning_rate: 1.0e-3, adam_epsilon: 1.0e-4, per_device_train_batch_size: 4}}
"""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: with two files at a time, a slow one at the end would run alone."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data in published formats, kept outside the repository; docs/real.md says how to assemble the folder."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (see docs/real.md)")
    return folder


@pytest.fixture(scope="session")
def micro_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe on the embedded world with a 0.2 M-parameter model; its stages up to the reward model are published."""
    from training.recipe import load_recipe
    from training.run import run_section

    root = tmp_path_factory.mktemp("micro")
    path = root / "micro.yaml"
    path.write_text(MICRO.format(root=root / "runs"))
    recipe = load_recipe(path)
    for name in ("tokenizer", "pretrain", "sft", "reward"):
        run_section(recipe, name)
    return path
