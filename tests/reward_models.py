"""Tiny published models with a tokenizer that encodes any text: a policy, and reward models for it."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from data.encode import Encoder
from data.template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS
from handoff.parent import Parent, open_parent
from tests.handoff_models import published

NO_SYSTEM = (
    "{%- for m in messages %}{%- if m['role'] == 'system' %}{{- raise_exception('no system role') }}{%- endif %}"
    "{{- '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}{{- m['content'] + '<|end|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)


def bytes_tokenizer(template: str = CHAT_TEMPLATE, spare: int = 0) -> PreTrainedTokenizerFast:
    """One token per byte; `spare` tokens before them shift the ids, so that the same text has different ids."""
    first = [*SPECIAL_TOKENS, *(f"<|spare_{i}|>" for i in range(spare))]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*first, *letters])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(first)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD)
    tokenizer.chat_template = template
    return tokenizer


def publish_model(folder: Path, seed: int = 0, *, reward: bool = True, **tokenizer: Any) -> Parent:
    """A published model with random weights, opened; a reward model's manifest has mean `seed` and deviation 2."""
    made = bytes_tokenizer(**tokenizer)

    def write(path: Path) -> None:
        made.save_pretrained(path)
        torch.manual_seed(seed)
        config = LlamaConfig(vocab_size=len(made), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                             num_attention_heads=2, num_labels=1, pad_token_id=made.pad_token_id)  # fmt: skip
        kind = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
        kind.from_config(config).save_pretrained(path)
        GenerationConfig(eos_token_id=Encoder(made).stop_ids, pad_token_id=made.pad_token_id).save_pretrained(path)

    kind = "reward_model" if reward else "causal_lm"
    extra = {"reward_mean": float(seed), "reward_std": 2.0} if reward else {}
    published(folder, write, kind=kind, extra=extra)
    return open_parent(str(folder), folder.parent, {kind})


def load_reward(parent: Parent) -> torch.nn.Module:
    """Its model, in evaluation mode."""
    return AutoModelForSequenceClassification.from_pretrained(parent.model_dir).eval()
