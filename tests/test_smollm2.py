"""A real model of 135 M parameters goes through every stage with adapters: a few steps each, on published data."""

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from handoff.stage import StageDir
from handoff.verify import verify_run
from tests.smollm2 import gguf_file
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow
RECIPE = """
name: smol
output_root: {root}
data_root: {data}
stages:
  sft:
    parent: {parent}
    data: [{{source: file, path: sft/instructions-1100.json.gz, limit: 40}}]
    max_length: 64
    adapter: &adapter {{r: 4}}
    train: &short {{max_steps: 2, global_batch_size: 2, per_device_train_batch_size: 2, learning_rate: 1.0e-3}}
  reward:
    stage: reward_model
    parent: sft
    data: &pairs [{{source: file, path: preference/instructions-with-preference-1100.json.gz, limit: 12}}]
    max_length: 96
    adapter: *adapter
    train: *short
  dpo:
    parent: sft
    data: *pairs
    max_length: 96
    adapter: *adapter
    train: *short
  ppo:
    parent: sft
    reward: [{{model: reward}}]
    data: &prompts [{{source: file, path: sft/instructions-1100.json.gz, limit: 20}}]
    max_prompt_length: 64
    adapter: *adapter
    guards: &guards {{max_truncated: 1}}
    train: {{iterations: 2, rollout_batch_size: 4, max_completion_length: 8, per_device_train_batch_size: 4,
             learning_rate: 1.0e-4, critic_learning_rate: 3.0e-4}}
  grpo:
    stage: ppo
    advantage: group
    parent: sft
    reward: [{{function: length_penalty, args: {{free: 4}}}}]
    data: *prompts
    max_prompt_length: 64
    adapter: *adapter
    guards: *guards
    train: {{iterations: 2, rollout_batch_size: 4, num_generations: 2, max_completion_length: 8,
             per_device_train_batch_size: 4, learning_rate: 1.0e-4}}
"""


def test_smollm2_goes_through_every_stage(tmp_path, tmp_path_factory, shared_data):
    file = gguf_file(tmp_path_factory.mktemp("smollm2"))
    path = tmp_path / "smol.yaml"
    path.write_text(RECIPE.format(root=tmp_path / "runs", data=shared_data, parent=file))
    recipe = load_recipe(path)
    published = {}
    for name in recipe.order():
        run_section(recipe, name)
        manifest = StageDir(recipe.run_dir / name).manifest()
        assert manifest is not None
        published[name] = manifest
        size = sum(part.stat().st_size for part in (recipe.run_dir / name / "model").glob("*.safetensors"))
        assert 0 < size < 100 << 20, "an adapter is published, and not the model"
    assert set(published) == {"sft", "reward", "dpo", "ppo", "grpo"}
    assert verify_run(recipe.run_dir) == []
    (base,) = (tmp_path / "runs" / ".unpacked").iterdir()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), recipe.run_dir / "ppo" / "model")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
