"""A chain of tiny published stages for the tests of the training stages, on data defined here.

It does not use the embedded world, so that the golden curves change only when training changes. The chain is made once
per test session; tests run a stage again from these parents in a separate folder.
"""

import json
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data.sampling import uniform
from handoff.manifest import Manifest
from handoff.stage import StageDir
from training.recipe import Recipe, load_recipe
from training.run import run_section

NAMES = ("Ann", "Bob", "Cleo", "Dan", "Eve", "Finn")
THINGS = ("apple", "ball", "cat", "dog", "egg", "fish")
LLAMA = (
    "{architecture: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 2, tie_word_embeddings: true}"
)
RECIPE = f"""
name: tiny
seed: 3
data_root: DATA
output_root: RUNS
stages:
  tokenizer:
    vocab_size: 400
    data: [{{source: file, path: documents.jsonl, format: text}}, {{source: file, path: chats.jsonl}}]
    eval_data: [{{source: file, path: held_chats.jsonl}}]
  pretrain:
    parent: tokenizer
    model: {LLAMA}
    block_size: 48
    data: [{{source: file, path: documents.jsonl, format: text}}]
    eval_data: [{{source: file, path: held_documents.jsonl, format: text}}]
    train: {{learning_rate: 1.0e-2, max_steps: 20, global_batch_size: 8, logging_steps: 1}}
  sft:
    parent: pretrain
    max_length: 64
    data: [{{source: file, path: chats.jsonl}}]
    eval_data: [{{source: file, path: held_chats.jsonl}}]
    eval_answers: 4
    max_new_tokens: 8
    train: {{learning_rate: 1.0e-2, max_steps: 20, global_batch_size: 8, logging_steps: 1}}
  reward:
    stage: reward_model
    parent: sft
    max_length: 64
    data: [{{source: file, path: pairs.jsonl}}]
    eval_data: [{{source: file, path: held_pairs.jsonl}}]
    train: {{learning_rate: 3.0e-3, max_steps: 20, global_batch_size: 8, logging_steps: 1}}
  dpo:
    parent: sft
    max_length: 64
    data: [{{source: file, path: pairs.jsonl}}]
    eval_data: [{{source: file, path: held_pairs.jsonl}}]
    eval_answers: 4
    max_new_tokens: 8
    train: {{learning_rate: 3.0e-3, max_steps: 20, global_batch_size: 8, logging_steps: 1}}
"""
PARENTS = {"pretrain": "tokenizer", "sft": "pretrain", "reward": "sft", "dpo": "sft"}


@dataclass
class Result:
    """A stage's results. `lines` are those of metrics.jsonl, without values that depend on the clock."""

    folder: Path
    weights: dict[str, torch.Tensor]
    lines: list[dict[str, Any]]
    manifest: Manifest

    def of(self, key: str) -> list[float]:
        """A metric's values at the steps that logged it."""
        return [line[key] for line in self.lines if key in line]


def run_stage(name: str, output: Path, *overrides: str) -> Result:
    """Runs a section in `output`, from the chain's parents unless an override names another."""
    recipe = stage_recipe(name, output, *overrides)
    run_section(recipe, name)
    return result(recipe, name)


def stage_recipe(name: str, output: Path, *overrides: str) -> Recipe:
    parent = f"{name}.parent={runs() / 'tiny' / PARENTS[name]}"
    own = [f"{name}.{override}" for override in overrides]
    return load_recipe(chain(), [f"output_root={output}", parent, *own])


def result(recipe: Recipe, name: str) -> Result:
    folder = recipe.run_dir / name
    manifest = StageDir(folder).manifest()
    assert manifest is not None
    weights = "model.safetensors" if manifest.adapter is None else "adapter_model.safetensors"
    return Result(folder, load_file(folder / "model" / weights), lines_of(folder), manifest)


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


@cache
def _root() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="stage-chain-")


def runs() -> Path:
    return Path(_root().name) / "runs"


@cache
def chain() -> Path:
    """The recipe file, after publishing its stages up to SFT."""
    root = Path(_root().name)
    write_data(root)
    path = root / "recipe.yaml"
    path.write_text(RECIPE.replace("DATA", str(root)).replace("RUNS", str(runs())))
    recipe = load_recipe(path)
    for name in ("tokenizer", "pretrain", "sft"):
        run_section(recipe, name)
    return path


def foreign_checkpoint(folder: Path) -> Path:
    """Makes a foreign checkpoint: no stage.json, its own template and settings, bfloat16, unused embedding rows."""
    chain()
    tokenizer = AutoTokenizer.from_pretrained(runs() / "tiny" / "tokenizer" / "model")
    tokenizer.chat_template = (
        "{% for m in messages %}<|reserved_0|>{{ m.role }}: {{ m.content }}<|reserved_1|>{% endfor %}"
        "{% if add_generation_prompt %}<|reserved_0|>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.generation_config.eos_token_id = [1, 9]
    model.generation_config.repetition_penalty = 1.1
    model.save_pretrained(folder)
    return folder


def write_data(root: Path) -> None:
    for split, sizes in (("", (300, 200, 150)), ("held_", (20, 40, 40))):
        documents, chats, pairs = sizes
        _write(root / f"{split}documents.jsonl", [{"text": _document(split, i)} for i in range(documents)])
        _write(root / f"{split}chats.jsonl", [_chat(split, i) for i in range(chats)])
        _write(root / f"{split}pairs.jsonl", [_pair(split, i) for i in range(pairs)])


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _draw(count: int, *key: Any) -> list[int]:
    return [int(value * 1000) for value in uniform(count, 0, *key)]


def _document(split: str, index: int) -> str:
    draws = _draw(40, split, "document", index)
    return " ".join(
        f"{NAMES[draws[4 * i] % 6]} has {draws[4 * i + 1] % 90} {THINGS[draws[4 * i + 2] % 6]}s."
        for i in range(2 + draws[3] % 6)
    )


def _question(split: str, kind: str, index: int) -> tuple[str, str]:
    draws = _draw(12, split, kind, index)
    if draws[0] % 3 == 0:
        word = THINGS[draws[1] % 6]
        return f"uppercase {word}", word.upper()
    if draws[0] % 3 == 1:
        return f"max of {draws[1] % 10} and {draws[2] % 10}", str(max(draws[1] % 10, draws[2] % 10))
    words = " ".join(THINGS[draw % 6] for draw in draws[2 : 4 + draws[1] % 7])
    return f"repeat: {words}", words


def _chat(split: str, index: int) -> dict[str, Any]:
    question, answer = _question(split, "chat", index)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _pair(split: str, index: int) -> dict[str, Any]:
    question, answer = _question(split, "pair", index)
    worse = THINGS[_draw(1, split, "worse", index)[0] % 6]
    return {"prompt": question, "chosen": answer, "rejected": f"{answer} {worse}" if index % 2 else f"no {worse}"}
