"""Adapters: PPO's memory against full training, and SFT and GRPO against TRL with peft.

    python -m benchmarks.adapters [--json FILE] [--only ROW ...] [--turns N] [--threads N]

A random Llama of SmolLM2's shape (135 million parameters, a vocabulary of 49,152), LoRA of rank 16 on all linear
layers. Both sides have the same rows, lengths, batch and micro-batch, and work in turns (benchmarks/turns.py).

| row | what |
| --- | --- |
| `ppo_peak_memory_lora` | most resident memory of PPO with adapters, above the level before the model was made; the \
peer is our own full training. The reward model is an adapter on the same base, or trained as a whole |
| `sft_lora` | a step of 16 chats of 24 to 128 tokens, micro-batches of 8, loss on the answers, float32 |
| `sft_lora_default` | the same; precision, recomputation and kernels at each side's defaults |
| `sft_peak_memory_lora` | most resident memory of `sft_lora` |
| `grpo_lora` | a step of 4 prompts with 8 answers each of up to 64 tokens, micro-batches of 8, float32 |
| `grpo_lora_default` | the same at each side's defaults |

In rows of memory the ratio is ours / the peer's, and less is better.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.rl import ANSWERS, GENERATIONS, LEARNING_RATE, MICRO_BATCH, ROOT, our_section, work
from benchmarks.table import Row, in_turns, report
from benchmarks.turns import Worker
from data.sampling import uniform

SIZE, RANK, ALPHA = "135M", 16, 32
CHATS, ROWS, SHORTEST, LONGEST = 512, 16, 24, 128
SPEED = ("sft_lora", "sft_lora_default", "grpo_lora", "grpo_lora_default")
PPO_MEMORY, SFT_MEMORY = "ppo_peak_memory_lora", "sft_peak_memory_lora"
EVERY = (PPO_MEMORY, "sft_lora", SFT_MEMORY, "sft_lora_default", "grpo_lora", "grpo_lora_default")
ADAPTER = {"r": RANK, "lora_alpha": ALPHA}


def chats(path: Path, vocabulary: int) -> Path:
    """Writes rows with `prompt` and `completion`, between them SHORTEST to LONGEST words, half of them in each."""
    from data.template import SPECIAL_TOKENS

    lines = []
    for index in range(CHATS):
        words = SHORTEST + int(uniform(1, 0, "benchmark chat's length", index)[0] * (LONGEST - SHORTEST + 1))
        draws = uniform(words, 0, "benchmark chat", index)
        text = [f"w{len(SPECIAL_TOKENS) + int(d * (vocabulary - len(SPECIAL_TOKENS)))}" for d in draws]
        row = {"prompt": " ".join(text[: words // 2]), "completion": " ".join(text[words // 2 :])}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def write_recipe(folder: Path, stages: dict[str, Any]) -> Path:
    """A recipe with these sections. JSON, which is YAML too."""
    path = folder / "recipe.yaml"
    content = {"name": "benchmark", "output_root": str(folder / "runs"), "stages": stages}
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return path


def sft_commands(folder: Path, same_precision: bool) -> tuple[list[str], list[str]]:
    """The commands that start our worker and TRL's."""
    from benchmarks.rl_setup import SIZES, VOCABULARY, make

    material = make(folder, SIZE, (8, 8), 1, 0.0)
    rows = chats(folder / "chats.jsonl", SIZES[SIZE].get("vocab_size", VOCABULARY))
    train = {
        "max_steps": 10**6,
        "global_batch_size": ROWS,
        "per_device_train_batch_size": MICRO_BATCH,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "save_steps": 10**6,
    }
    section = {
        "stage": "sft",
        "parent": str(material.policy),
        "data": [{"source": "file", "path": str(rows)}],
        "max_length": 2 * LONGEST,
        "adapter": ADAPTER,
        "train": train | ({"bf16": False} if same_precision else {}),
    }
    settings = _settings(material, folder, same_precision) | {"prompts": str(rows), "rows": ROWS}
    return _pair(write_recipe(folder, {"rl": section}), "sft", settings)


def grpo_commands(folder: Path, same_precision: bool) -> tuple[list[str], list[str]]:
    """The commands that start our worker and TRL's."""
    from benchmarks.rl_setup import make, recipe

    job = work("grpo", full_lengths=False)
    material = make(folder, SIZE, job.prompt, CHATS, job.hazard)
    path = recipe(folder, material, our_section(job, material.reward, same_precision) | {"adapter": ADAPTER})
    settings = {"response": job.response, "epochs": job.epochs, "generations": GENERATIONS}
    return _pair(path, "grpo", _settings(material, folder, same_precision) | settings)


def _settings(material: Any, folder: Path, same_precision: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {"learning_rate": LEARNING_RATE}
    if same_precision:
        arguments |= {"bf16": False, "gradient_checkpointing": False}
    return {
        "policy": str(material.policy),
        "prompts": str(material.prompts),
        "output": str(folder / "peer"),
        "rows": ANSWERS,
        "micro_batch": MICRO_BATCH,
        "adapter": ADAPTER,
        "arguments": arguments,
    }


def _pair(path: Path, kind: str, settings: dict[str, Any]) -> tuple[list[str], list[str]]:
    peer = [sys.executable, str(ROOT / "benchmarks" / "rl_peer.py"), kind, json.dumps(settings)]
    return [sys.executable, "-m", "benchmarks.rl_ours", str(path), "rl"], peer


def ppo_command(folder: Path, adapter: dict[str, int] | None) -> list[str]:
    """The command that starts PPO against a reward model that was trained in the same way, for one step, here."""
    from benchmarks.rl_setup import make

    job = work("ppo", full_lengths=False)
    material = make(folder, SIZE, job.prompt, CHATS, job.hazard)
    own = {} if adapter is None else {"adapter": adapter}
    pairs = folder / "pairs.jsonl"
    pairs.write_text(
        "".join(json.dumps({"prompt": f"w{i}", "chosen": "w20 w21", "rejected": "w22"}) + "\n" for i in range(30, 38)),
        encoding="utf-8",
    )
    reward = {
        "stage": "reward_model",
        "parent": str(material.policy),
        "data": [{"source": "file", "path": str(pairs)}],
        "train": {"max_steps": 1, "global_batch_size": 2},
        **own,
    }
    section = our_section(job, material.reward, same_precision=True) | {
        "stage": "ppo",
        "parent": str(material.policy),
        "reward": [{"model": "reward"}],
        "data": [{"source": "file", "path": str(material.prompts), "format": "prompt_completion"}],
        **own,
    }
    path = write_recipe(folder, {"reward": reward, "rl": section})
    train = [sys.executable, "-m", "stages.reward_model", str(path), "--section", "reward"]
    subprocess.run(train, cwd=ROOT, check=True, capture_output=True)
    return [sys.executable, "-m", "benchmarks.rl_ours", str(path), "rl"]


def compare(
    name: str, memory: str | None, pair: tuple[list[str], list[str]], folder: Path, turns: int, threads: int
) -> list[Row]:
    """The row of speed, in rows or answers per second, and the row of memory if it has a name."""
    each = ROWS if name.startswith("sft") else ANSWERS
    workers: list[Worker] = []
    try:
        for side, command in zip(("ours", "peer"), pair, strict=True):
            workers.append(Worker(command, threads, folder / f"{side}.log", ROOT))
        ours, peer = workers
        rows = [in_turns(name, "rows/s", lambda: each / ours.turn()["wall"], lambda: each / peer.turn()["wall"], turns)]
        peaks = [worker.last["peak"] / 2**20 for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    return rows if memory is None else [*rows, _memory(memory, *peaks)]


def ppo_memory(folder: Path, threads: int) -> Row:
    """Peaks of two updates, one side after the other."""
    peaks = []
    for side, adapter in (("lora", ADAPTER), ("full", None)):
        place = folder / side
        place.mkdir()
        worker = Worker(ppo_command(place, adapter), threads, place / "log", ROOT)
        try:
            peaks.append(worker.turn()["peak"] / 2**20)
        finally:
            worker.close()
    return _memory(PPO_MEMORY, *peaks)


def _memory(name: str, ours: float, peer: float) -> Row:
    return Row(row=name, ours=ours, peer=peer, unit="MiB, less", ratio=ours / peer)


def main(path: Path | None, only: Sequence[str] = EVERY, turns: int = 5, threads: int | None = None) -> None:
    """Measures the rows `only`, prints the table and writes it to `path`."""
    threads = threads or len(os.sched_getaffinity(0))
    rows: list[Row] = []
    for name in (PPO_MEMORY, *SPEED):
        memory = SFT_MEMORY if name == "sft_lora" and SFT_MEMORY in only else None
        if name not in only and memory is None:
            continue
        with tempfile.TemporaryDirectory(prefix="benchmark-adapters-") as place:
            folder = Path(place)
            if name == PPO_MEMORY:
                rows.append(ppo_memory(folder, threads))
                continue
            commands = sft_commands if name.startswith("sft") else grpo_commands
            found = compare(name, memory, commands(folder, not name.endswith("default")), folder, turns, threads)
            rows += [row for row in found if row["row"] in only]
    print(f"{threads} thread(s), wall time, median of {turns} pairs of turns; of memory less is better")
    report(rows, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", nargs="+", choices=EVERY, default=list(EVERY), help="these rows")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, help="of each side; by default one for each core")
    options = parser.parse_args()
    main(options.json, options.only, options.turns, options.threads)
