"""The material for both sides of the reinforcement-learning benchmarks: a random policy, a reward model, prompts.

The weights are random, since speed does not depend on them, with one exception: how often a stop token is drawn. For
that, channel 0 of the residual stream is constant (no block writes to it), and the rows of the tied embedding that
belong to stop tokens have a special value there. So the chance of ending, `hazard`, is the same at every position. With
0 no answer ends by itself, and every answer has exactly the requested length.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from data.sampling import uniform
from data.template import BOS, CHAT_TEMPLATE, EOS, PAD, SPECIAL_TOKENS, STOP_TOKENS
from handoff.manifest import EngineRecord, Inputs
from handoff.stage import StageDir

VOCABULARY = 4096
SIZES: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "num_attention_heads": 8},
    "60M": {"hidden_size": 768, "intermediate_size": 2064, "num_hidden_layers": 8, "num_attention_heads": 12},
    "100M": {"hidden_size": 1024, "intermediate_size": 2560, "num_hidden_layers": 8, "num_attention_heads": 16},
    "135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
}
"""Llamas with tied embeddings; with a vocabulary of 4096, if none is given, they have 5.8, 24, 60 and 101 million
parameters. The last is SmolLM2's shape."""
_OUTSIDE = 4
"""Tokens of a rendered one-turn prompt besides the question: bos, user, end, assistant."""


@dataclass(frozen=True)
class Material:
    """Paths. `prompts`: JSON lines with `prompt`, each `prompt_tokens` long once rendered."""

    policy: Path
    reward: Path
    prompts: Path


def make(root: Path, size: str, prompt_tokens: tuple[int, int], prompts: int, hazard: float) -> Material:
    """Writes a policy checkpoint, a published reward model of the same size and the prompts below `root`.

    Args:
        root: an existing folder.
        size: a key of SIZES.
        prompt_tokens: shortest and longest prompt, once it is rendered.
        prompts: number of prompts, with lengths spread evenly between the two.
        hazard: chance that an answer ends at a token, in [0, 1).
    """
    shape = {"vocab_size": VOCABULARY, **SIZES[size]}
    vocabulary = shape["vocab_size"]
    tokenizer = word_tokenizer(vocabulary)
    config = LlamaConfig(
        **shape,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    transformers_logging.disable_progress_bar()
    stops = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    assert isinstance(stops, list)
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    _set_stops(policy, stops, tokenizer.eos_token_id, hazard)
    policy.generation_config.eos_token_id = stops
    policy.save_pretrained(root / "policy")
    tokenizer.save_pretrained(root / "policy")

    reward = LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 1}))
    publish_reward(root / "reward", reward, tokenizer)

    path = root / "prompts.jsonl"
    lines = []
    for index in range(prompts):
        low, high = prompt_tokens
        length = low + int(uniform(1, 0, "benchmark prompt's length", index)[0] * (high - low + 1))
        draws = uniform(length - _OUTSIDE, 0, "benchmark prompt", index)
        words = (f"w{len(SPECIAL_TOKENS) + int(d * (vocabulary - len(SPECIAL_TOKENS)))}" for d in draws)
        lines.append(json.dumps({"prompt": " ".join(words)}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return Material(root / "policy", root / "reward", path)


def recipe(root: Path, material: Material, section: dict[str, Any]) -> Path:
    """A recipe with one section, `rl`, whose parent and data are the material's. JSON, which is YAML too."""
    path = root / "recipe.yaml"
    source = {"source": "file", "path": str(material.prompts), "format": "prompt_completion"}
    whole = {"stage": "ppo", "parent": str(material.policy), "data": [source], **section}
    content = {"name": "benchmark", "output_root": str(root / "runs"), "stages": {"rl": whole}}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def score(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float | None]:
    """A reward that costs nothing and differs within a group: the answer's first word as a number in [0, 1)."""
    return [int(text.partition(" ")[0].removeprefix("w") or 0) / VOCABULARY for text in completions]


def word_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the words w0, w1, ... besides the special tokens."""
    words = [*SPECIAL_TOKENS, *(f"w{i}" for i in range(len(SPECIAL_TOKENS), vocabulary))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=SPECIAL_TOKENS[-1]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def _set_stops(model: LlamaForCausalLM, stops: Sequence[int], eos: int, hazard: float) -> None:
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    embedding[:, 0] = 1.0
    embedding[list(stops), 0] = -1.0
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[0] = 0.0
        layer.mlp.down_proj.weight[0] = 0.0
    if hazard == 0:
        return
    ids = torch.randint(len(SPECIAL_TOKENS), len(embedding), (8, 64), generator=torch.Generator().manual_seed(0))
    out = model(ids, output_hidden_states=True)
    channel, others = out.hidden_states[-1][..., 0], out.logits.logsumexp(-1)
    low, high = -10.0, 10.0
    for _ in range(40):  # bisection: the chance rises with the value
        middle = (low + high) / 2
        chance = torch.sigmoid(channel * middle - others).mean().item()
        low, high = (middle, high) if chance < hazard else (low, middle)
    embedding[eos] = 0.0
    embedding[eos, 0] = middle


def publish_reward(path: Path, model: LlamaForSequenceClassification, tokenizer: PreTrainedTokenizerFast) -> None:
    """Publishes a reward model in `path`, as its stage does."""

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    stage = StageDir(path)
    inputs = Inputs(recipe={}, parents={}, data={}, code="benchmark", seed=0)
    stage.begin(inputs)
    stage.publish(
        write,
        name="reward",
        stage="reward_model",
        kind="reward_model",
        inputs=inputs,
        parents={},
        recipe={},
        data={},
        seed=0,
        engine=EngineRecord(name="single"),
        versions={},
        metrics={},
        extra={"reward_mean": 0.0, "reward_std": 1.0},
    )
    stage.close()
