"""What `baton plan` predicts, beside what the stages take: the peak of resident memory of one process.

    python -m benchmarks.plan [--only CASE ...] [--json FILE]

Each case is a recipe of one section on random weights and random words. `baton plan --probe` runs it for three steps,
in a process of its own, by the stage's unchanged code. The peak (VmHWM in /proc/self/status) is counted above the level
after the imports, and of several processes the largest counts. Every fourth row is shorter, so that there is padding.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from baton.plan import plan
from baton.probe import probe
from benchmarks.table import Row, report

ROOT = Path(__file__).resolve().parent.parent
MIB = 2**20
_SIZES: dict[str, dict[str, Any]] = {
    "5M": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6, "num_attention_heads": 8},
    "25M": {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 7, "num_attention_heads": 8},
    "60M": {"hidden_size": 768, "intermediate_size": 2064, "num_hidden_layers": 8, "num_attention_heads": 12},
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3},
}
"""Llamas with tied embeddings; the last one has the sizes of SmolLM2-135M."""
_VOCABULARY = {"5M": 4096, "25M": 4096, "60M": 8192, "135M": 49152}
_STEPS = {"max_steps": 3, "save_steps": 3, "logging_steps": 1}


@dataclass(frozen=True)
class Case:
    """One section."""

    name: str
    stage: str
    size: str
    length: int
    train: dict[str, Any]
    keys: dict[str, Any] = field(default_factory=dict)
    launch: str = ""

    @property
    def sampled(self) -> bool:
        """Whether the section samples answers."""
        return "iterations" in self.train


def _trainer(rows: int, batch: int, **more: Any) -> dict[str, Any]:
    sizes = {"per_device_train_batch_size": rows, "global_batch_size": batch, "per_device_eval_batch_size": rows}
    return {**sizes, **_STEPS, **more}


def _sampler(rows: int, batch: int, answer: int, **more: Any) -> dict[str, Any]:
    sizes = {"rollout_batch_size": batch, "per_device_train_batch_size": rows, "max_completion_length": answer}
    loop = {"iterations": 3, "save_iterations": 3, "num_ppo_epochs": 1, "num_mini_batches": 1}
    return {**sizes, **loop, "rollout_micro_batch_size": rows, **more}


_GROUP = {"advantage": "group", "reward": [{"function": "benchmarks.rl_setup:score"}]}
_LORA = {"adapter": {"r": 16}}
_NF4 = _LORA | {"quantization": "nf4"}
_FOUR = {"num_generations": 4}
CASES = (
    Case("pretrain 5M", "pretrain", "5M", 128, _trainer(8, 8)),
    Case("pretrain 25M, accumulation", "pretrain", "25M", 128, _trainer(4, 8)),
    Case("pretrain 60M, Muon", "pretrain", "60M", 64, _trainer(4, 4, optim="muon")),
    Case("sft 25M", "sft", "25M", 128, _trainer(8, 8)),
    Case("sft 60M, checkpointing", "sft", "60M", 128, _trainer(8, 8, gradient_checkpointing=True)),
    Case("sft 135M", "sft", "135M", 64, _trainer(4, 4)),
    Case("sft 135M, checkpointing", "sft", "135M", 64, _trainer(8, 8, gradient_checkpointing=True)),
    Case("sft 60M, bf16", "sft", "60M", 128, _trainer(4, 4, bf16=True)),
    Case("reward 25M", "reward_model", "25M", 128, _trainer(4, 4)),
    Case("reward 135M", "reward_model", "135M", 64, _trainer(2, 2)),
    Case("dpo 25M", "dpo", "25M", 128, _trainer(4, 4)),
    Case("dpo 135M", "dpo", "135M", 64, _trainer(1, 2)),
    Case("ppo 5M", "ppo", "5M", 64, _sampler(8, 16, 32)),
    Case("ppo 25M", "ppo", "25M", 64, _sampler(8, 16, 32, bf16=False)),
    Case("ppo 60M, bf16", "ppo", "60M", 64, _sampler(8, 8, 32, bf16=True)),
    Case("ppo 135M", "ppo", "135M", 32, _sampler(4, 4, 32, bf16=False)),
    Case("grpo 25M", "ppo", "25M", 64, _sampler(8, 16, 32, **_FOUR, bf16=False), _GROUP),
    Case("grpo 135M", "ppo", "135M", 32, _sampler(4, 8, 32, **_FOUR, bf16=False), _GROUP),
    Case("sft 25M, LoRA", "sft", "25M", 128, _trainer(8, 8), _LORA),
    Case("sft 25M, NF4", "sft", "25M", 128, _trainer(8, 8), _NF4),
    Case("sft 135M, NF4", "sft", "135M", 64, _trainer(4, 4), _NF4),
    Case("sft 60M, int8", "sft", "60M", 128, _trainer(4, 4), _LORA | {"quantization": "int8"}),
    Case("dpo 25M, NF4", "dpo", "25M", 128, _trainer(4, 4), _NF4),
    Case("ppo 25M, NF4", "ppo", "25M", 64, _sampler(8, 16, 32, bf16=False), _NF4),
    Case("ppo 25M, LoRA", "ppo", "25M", 64, _sampler(8, 16, 32, bf16=False), _LORA),
    Case("sft 25M, DDP", "sft", "25M", 64, _trainer(4, 8), launch="cpu2"),
    Case("sft 25M, ZeRO-2", "sft", "25M", 64, _trainer(4, 8), launch="cpu2_zero2"),
    Case("sft 60M, ZeRO-3", "sft", "60M", 128, _trainer(4, 8), launch="cpu2_zero3"),
    Case("dpo 25M, ZeRO-2", "dpo", "25M", 128, _trainer(4, 8), launch="cpu2_zero2"),
    Case("ppo 25M, ZeRO-3", "ppo", "25M", 64, _sampler(8, 16, 32), launch="cpu2_zero3"),
    Case("sft 25M, FSDP2", "sft", "25M", 64, _trainer(4, 8), launch="cpu2_fsdp2"),
)


def write(case: Case, folder: Path) -> Path:
    """Writes the case's model, data and recipe; returns the recipe's path."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from transformers.utils import logging

    from benchmarks.rl_setup import publish_reward, word_tokenizer
    from data.template import STOP_TOKENS

    logging.disable_progress_bar()
    vocabulary = _VOCABULARY[case.size]
    tokenizer = word_tokenizer(vocabulary)
    config = LlamaConfig(
        **_SIZES[case.size],
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    policy = LlamaForCausalLM(config)
    policy.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(list(STOP_TOKENS))
    policy.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    keys: dict[str, Any] = {"train": case.train, **case.keys}
    if case.stage == "ppo" and "reward" not in case.keys:
        reward = LlamaForSequenceClassification(LlamaConfig(**{**config.to_dict(), "num_labels": 1}))
        publish_reward(folder / "reward", reward, tokenizer)
        keys["reward"] = [{"model": str(folder / "reward")}]
    for name, rows in (("rows", 32), ("held", 8)):
        lines = [json.dumps(row(case, i, vocabulary, name)) for i in range(rows)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    source = {"source": "file", "path": str(folder / "rows.jsonl")}
    if case.sampled:  # random weights never end an answer
        keys |= {"max_prompt_length": case.length, "guards": {"probe_prompts": 0}}
    elif case.stage == "pretrain":
        keys |= {"block_size": case.length}
    else:
        keys |= {"max_length": case.length, "truncation": "keep_end"}
    if case.stage in ("sft", "dpo"):
        keys |= {"eval_answers": 2, "max_new_tokens": 4}
    if not case.sampled:
        keys |= {"eval_data": [source | {"path": str(folder / "held.jsonl")}]}
    section = {"stage": case.stage, "parent": str(folder / "policy"), "data": [source], **keys}
    path = folder / "recipe.yaml"
    content = {"name": "plan", "output_root": str(folder / "runs"), "stages": {"section": section}}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def row(case: Case, number: int, vocabulary: int, name: str) -> dict[str, str]:
    """One row of random words. Every fourth one is shorter than `case.length`; the others fill it."""
    from data.sampling import uniform
    from data.template import SPECIAL_TOKENS

    first = len(SPECIAL_TOKENS)

    def words(count: int, which: str) -> str:
        draws = uniform(count, 0, name, which, number)
        return " ".join(f"w{first + int(draw * (vocabulary - first))}" for draw in draws)

    half = case.length // 2
    if case.sampled:
        return {"prompt": words(case.length - (12 if number % 4 == 0 else 4), "prompt"), "completion": "w9"}
    if case.stage == "pretrain":
        return {"text": words(4 * case.length, "text")}
    # What is longer than a row may be loses its beginning.
    prompt = words(half - 16 if number % 4 == 0 else case.length, "prompt")
    answer = words(half, "answer")
    if case.stage == "sft":
        return {"prompt": prompt, "completion": answer}
    return {"prompt": prompt, "chosen": answer, "rejected": words(len(answer.split()), "rejected")}


def both(case: Case, path: Path) -> tuple[float, float]:
    """What `baton plan` says, and the peak that its probe measures, MiB."""
    launch = ROOT / "recipes" / "launch" / f"{case.launch}.yaml" if case.launch else None
    found = plan(path, launch=launch)
    (section,) = found.sections
    return section.peak / MIB, probe(found.recipe, section, launch) / MIB


def main(path: Path | None, only: Sequence[str] = ()) -> None:
    """Prints each case, and writes the rows to `path`."""
    rows = []
    print(f"{'case':<28}{'predicted':>12}{'measured':>12}{'ratio':>8}", flush=True)
    for case in CASES:
        if only and case.name not in only:
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark-plan-") as name:
            folder = Path(name)
            recipe = write(case, folder)
            ours, peer = both(case, recipe)
        print(f"{case.name:<28}{ours:>8.0f} MiB{peer:>8.0f} MiB{ours / peer:>8.2f}", flush=True)
        rows.append(Row(row=case.name, ours=ours, peer=peer, unit="MiB", ratio=ours / peer))
    print()
    report(rows, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", nargs="*", default=(), metavar="CASE", help="of these names only")
    options = parser.parse_args()
    main(options.json, options.only)
