"""Packed rows must not see each other: a trial before the first step, on architectures that do and do not part them."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.stage_chain import run_stage
from training.isolation import leak
from training.recipe import RecipeError

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
APART = {
    "llama": {**SMALL, "intermediate_size": 48},
    "gemma2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 4},
    "mixtral": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "num_local_experts": 4},
    "gpt2": {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 2},
}
LEAKING = {
    "mamba2": {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 4, "head_dim": 16,
               "n_groups": 1, "state_size": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "gpt_oss": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4,
                "num_experts_per_tok": 2},
    "opt": {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "word_embed_proj_dim": 32},
}  # fmt: skip


def build(architecture: str, keys: dict):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **keys))


@pytest.mark.parametrize("architecture", APART)
def test_rows_that_are_kept_apart_pass_whatever_the_dropout(architecture):
    model = build(architecture, APART[architecture]).train()
    assert leak(model) is None
    assert model.training


@pytest.mark.parametrize("architecture", LEAKING)
def test_a_network_whose_rows_see_each_other_is_found(architecture):
    assert leak(build(architecture, LEAKING[architecture])) is not None


@pytest.mark.slow
def test_it_is_refused_by_name_before_the_first_step(tmp_path):
    shape = "hidden_size: 32, ffn_dim: 48, num_hidden_layers: 2, num_attention_heads: 2, word_embed_proj_dim: 32"
    keys = [f"model={{architecture: opt, {shape}}}", "train.max_steps=1"]
    with pytest.raises(
        RecipeError, match=r"pretrain\.isolate_documents: OPTForCausalLM does not keep packed rows apart"
    ):
        run_stage("pretrain", tmp_path, *keys, "isolate_documents=true")
    assert not list(tmp_path.rglob("metrics.jsonl")) and not list(tmp_path.rglob("step-*"))
    parent = run_stage("pretrain", tmp_path, *keys).folder
    with pytest.raises(RecipeError, match=r"sft\.packing: OPTForCausalLM .* set packing: false"):
        run_stage("sft", tmp_path, f"parent={parent}", "packing=true", "train.max_steps=1")
