"""Model families go through every stage as published, or are refused by name before the first step.

Each is a tiny random model of its own architecture, with its published chat template where TRL has that. Six run in
`make test`; `BATON_FAMILIES=all` runs every one (a minute).
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from data.template import CHAT_TEMPLATE
from handoff.errors import UserError
from tests.test_chat_templates import LLAMA2, MIXTRAL, NAMES, TEMPLATES, tokenizer
from tests.test_data_encode import CHATML
from training.recipe import load_recipe
from training.run import run_section

pytestmark = pytest.mark.slow

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = SMALL | {"intermediate_size": 64, "num_key_value_heads": 2}
GEMMA = WIDE | {"head_dim": 8}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
NEMOTRON = {**GEMMA, "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8, "n_groups": 1, "chunk_size": 8}
NEMOTRON |= {"layers_block_type": ["mamba", "attention"]}
DEEPSEEK = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK |= {"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
DEEPSEEK |= {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}

# {family: (model type, keys of its configuration, chat template)}
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Llama 2": ("llama", WIDE, LLAMA2),
    "Llama 3": ("llama", WIDE, TEMPLATES["llama3"]),
    "Llama 3.2": ("llama", WIDE | {"tie_word_embeddings": True}, TEMPLATES["llama3_2"]),
    "Mistral": ("mistral", WIDE | {"sliding_window": 16}, MIXTRAL),
    "Qwen2.5": ("qwen2", WIDE, TEMPLATES["qwen2_5"]),
    "Qwen3": ("qwen3", GEMMA | {"tie_word_embeddings": True}, TEMPLATES["qwen3"]),
    "Gemma 2": ("gemma2", GEMMA, TEMPLATES["gemma"]),
    "Gemma 3": ("gemma3_text", GEMMA, TEMPLATES["gemma3"]),
    "OLMo 2": ("olmo2", WIDE, CHAT_TEMPLATE),
    "OLMo 3": ("olmo3", WIDE, CHAT_TEMPLATE),
    "Phi-3": ("phi3", WIDE, TEMPLATES["phi3"]),
    "SmolLM3": ("smollm3", WIDE, CHATML),
    "GPT-2": ("gpt2", SMALL | {"n_positions": 512}, CHAT_TEMPLATE),
    "Pythia": ("gpt_neox", SMALL | {"intermediate_size": 64}, CHAT_TEMPLATE),
    "OPT": ("opt", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}, CHAT_TEMPLATE),
    "Falcon": ("falcon", SMALL, CHAT_TEMPLATE),
    "Mixtral": ("mixtral", WIDE | {"num_local_experts": 4, "num_experts_per_tok": 2}, MIXTRAL),
    "Qwen3-MoE": ("qwen3_moe", GEMMA | MOE, TEMPLATES["qwen3"]),
    "GPT-OSS": ("gpt_oss", GEMMA | {"num_local_experts": 4, "num_experts_per_tok": 2}, TEMPLATES["gptoss_training"]),
    "DeepSeek-V3": ("deepseek_v3", WIDE | DEEPSEEK, TEMPLATES["deepseekv3"]),
    "Mamba 2": ("mamba2", SMALL | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1}, CHAT_TEMPLATE),
    "Granite 4": ("granitemoehybrid", WIDE | MAMBA | {"layer_types": ["mamba", "attention"]}, CHAT_TEMPLATE),
    "Nemotron-H": ("nemotron_h", NEMOTRON, TEMPLATES["nemotron_3_nano"]),
    "SmolLM2": ("llama", WIDE | {"tie_word_embeddings": True}, CHATML),
    "StableLM": ("stablelm", WIDE, CHAT_TEMPLATE),
}
# A dense model, tied and with thoughts; experts; no attention kernel but eager; learned positions; parallel layers.
USUAL = ("Llama 3", "Qwen3", "Qwen3-MoE", "Gemma 2", "GPT-2", "Pythia")
# What is said before the first step of a stage that a family cannot go through: {family: {stage: message}}.
NO_SCORES = "transformers has no sequence classification, which a reward model needs"
NO_REWARDS = {"reward": NO_SCORES, "ppo": "not published"}
REFUSED = {"Mamba 2": NO_REWARDS, "Granite 4": NO_REWARDS, "Nemotron-H": NO_REWARDS}
USUAL_QUANTISED = ("Qwen3",)
# Most weights of these are no linear layers: the experts of a layer are one tensor.
NOT_QUANTISED = ("Mixtral", "Qwen3-MoE", "GPT-OSS")
NOT_LINEAR = "bitsandbytes quantises linear layers alone"

TRAIN = {"max_steps": 2, "global_batch_size": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
RECIPE: dict[str, Any] = {
    "sft": {
        "parent": "MODEL",
        "max_length": 320,
        "max_drop_fraction": 1,
        "data": [{"source": "world", "kind": "chats", "size": 24}],
        "eval_data": [{"source": "world", "kind": "chats", "size": 4, "split": "validation"}],
        "eval_answers": 2,
        "max_new_tokens": 4,
        "train": TRAIN,
    },
    "reward": {
        "stage": "reward_model",
        "parent": "sft",
        "max_length": 320,
        "data": [{"source": "world", "kind": "preferences", "size": 12}],
        "train": TRAIN,
    },
    "dpo": {
        "parent": "sft",
        "max_length": 320,
        "data": [{"source": "world", "kind": "preferences", "size": 12}],
        "train": TRAIN,
    },
    "ppo": {
        "parent": "sft",
        "reward": [{"model": "reward"}],
        "guards": {"probe_prompts": 0},
        "max_prompt_length": 320,
        "data": [{"source": "world", "kind": "prompts", "size": 12}],
        "train": {
            **{"iterations": 1, "rollout_batch_size": 4, "max_completion_length": 8, "learning_rate": 1e-4},
            "per_device_train_batch_size": 2,
        },
    },
    "evaluate": {
        "models": ["sft", "ppo"],
        "tasks": [
            {
                "name": "prompts",
                "data": [{"source": "world", "kind": "prompts", "size": 4, "split": "validation"}],
                "max_prompt_length": 320,
                "max_new_tokens": 4,
            },
            {
                "name": "documents",
                "kind": "documents",
                "data": [{"source": "world", "kind": "documents", "size": 4, "split": "validation"}],
            },
        ],
    },
}


def publish(folder: Path, family: str) -> None:
    """A model as its makers would publish it."""
    kind, keys, template = FAMILIES[family]
    made = tokenizer()
    made.chat_template = template
    made.save_pretrained(folder)
    ids = {f"{name}_id": made.convert_tokens_to_ids(text) for name, text in NAMES.items()}
    config = AutoConfig.for_model(kind, **keys, vocab_size=len(made) + 8, **ids)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


ALL = os.environ.get("BATON_FAMILIES") == "all"
WHOLE: dict[str, Any] = {}
ADAPTED: dict[str, Any] = {"adapter": {"r": 4}}
QUANTISED = ADAPTED | {"quantization": "nf4"}


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        *((family, keys) for family in (FAMILIES if ALL else USUAL) for keys in (WHOLE, ADAPTED)),
        *((family, QUANTISED) for family in (FAMILIES if ALL else USUAL_QUANTISED)),
    ],
    ids=lambda value: value if isinstance(value, str) else " over ".join(value) or "all weights",
)
def test_a_family_goes_through_every_stage_or_is_refused_before_the_first_step(
    family: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    publish(tmp_path / "model", family)
    sections = {name: section | {"parent": str(tmp_path / "model")} if section.get("parent") == "MODEL" else section
                for name, section in RECIPE.items()}  # fmt: skip
    sections = {name: section if name == "evaluate" else section | keys for name, section in sections.items()}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "family", "output_root": str(tmp_path / "runs"), "stages": sections}))
    recipe = load_recipe(path)
    for name in sections:
        message = REFUSED.get(family, {}).get(name)
        if keys == QUANTISED and family in NOT_QUANTISED:
            message = NOT_LINEAR if name == "sft" else "published"
        if message is None:
            run_section(recipe, name)
            assert (recipe.run_dir / name / "stage.json").is_file()
            continue
        with pytest.raises(UserError, match=message):
            run_section(recipe, name)
        assert not (recipe.run_dir / name / "metrics.jsonl").exists()


def test_the_families_that_run_every_time_are_of_the_matrix() -> None:
    assert set(USUAL) | REFUSED.keys() <= FAMILIES.keys()
