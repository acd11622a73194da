"""A real model of 135 M parameters goes through every stage of its recipe: two steps each, on published data."""

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from benchmarks import real_model
from handoff.stage import StageDir
from handoff.verify import verify_run
from tests.smollm2 import gguf_file
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow
TRAINED = {
    "sft": ["eval_answers=2", "max_new_tokens=8"],
    "reward": [],
    "dpo": ["eval_answers=2", "max_new_tokens=8"],
    "ppo": ["train.rollout_batch_size=4"],
    "grpo": ["train.rollout_batch_size=4", "train.num_generations=2", "train.num_mini_batches=2"],
}
TWO_STEPS = ["train.max_steps=2", "train.global_batch_size=2", "train.per_device_train_batch_size=2"]
TWO_ITERATIONS = ["train.iterations=2", "train.max_completion_length=8", "guards.max_truncated=1"]


def test_smollm2_goes_through_every_stage(tmp_path, tmp_path_factory, shared_data):
    file = gguf_file(tmp_path_factory.mktemp("smollm2"))
    overrides = [f"output_root={tmp_path}", f"data_root={shared_data}", f"sft.parent={file}"]
    for name, keys in TRAINED.items():
        short = TWO_ITERATIONS if name in ("ppo", "grpo") else TWO_STEPS
        few = ["data.0.size=12", "eval_data.0.size=4"] if name == "grpo" else ["data.0.limit=12", "eval_data.0.limit=4"]
        overrides += [f"{name}.{key}" for key in [*keys, *short, *few]]
    overrides.append(f"evaluate.models.0={file}")
    recipe = load_recipe(real_model.RECIPE, overrides)
    for name in TRAINED:
        run_section(recipe, name)
        assert StageDir(recipe.run_dir / name).manifest() is not None
        size = sum(part.stat().st_size for part in (recipe.run_dir / name / "model").glob("*.safetensors"))
        assert 0 < size < 100 << 20, "an adapter is published, and not the model"
    assert verify_run(recipe.run_dir) == []
    (base,) = (tmp_path / ".unpacked").iterdir()
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), recipe.run_dir / "ppo" / "model")
    assert any("lora_" in name for name, _ in loaded.named_parameters())
