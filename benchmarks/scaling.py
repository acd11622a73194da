"""How the time of a PPO iteration grows with batch, answer length and model size, and which phases take it. Ours only.

    python -m benchmarks.scaling [--json FILE] [--sizes 5M 25M 60M] [--turns N] [--threads N]

Answers have exactly the given length, so that the work is known: one epoch over the answers, float32, micro-batches of
8, prompts of 32 tokens, scored by a function. Besides each iteration's seconds, the table shows the sum of the phases
as a share of the wall time, and the training phase's speed as a share of the machine's limit: the operations per second
of its matrix products, over those of a product of 2048 × 2048 matrices measured in the same run.

There is no other program as a peer: `peer` is the smallest case of the same series, and the ratio is this case's work
per second over that one's.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.rl_setup import SIZES, VOCABULARY, make, recipe
from benchmarks.table import Row, report
from benchmarks.turns import Worker

ROOT = Path(__file__).resolve().parent.parent
PROMPT = 32


@dataclass(frozen=True)
class Case:
    """One point: answers per iteration, tokens per answer, and a key of SIZES."""

    answers: int
    response: int
    size: str

    @property
    def name(self) -> str:
        """Of the row."""
        return f"scaling_{self.size}_{self.answers}x{self.response}"


BASE = Case(16, 32, "5M")
SERIES = {
    "batch": (BASE, Case(32, 32, "5M"), Case(64, 32, "5M")),
    "length": (BASE, Case(16, 64, "5M"), Case(16, 128, "5M")),
    "size": (BASE, Case(16, 32, "25M"), Case(16, 32, "60M")),
}


def section(case: Case) -> dict[str, Any]:
    """PPO with a critic initialised from the policy's body."""
    return {
        "reward": [{"function": "benchmarks.rl_setup:score"}],
        "guards": {"probe_prompts": 0, "patience": 10**6},
        "train": {
            "iterations": 10**6,
            "rollout_batch_size": case.answers,
            "num_ppo_epochs": 1,
            "num_mini_batches": 1,
            "per_device_train_batch_size": 8,
            "max_completion_length": case.response,
            "learning_rate": 1e-6,
            "critic_learning_rate": 1e-6,
            "save_iterations": 10**6,
            "bf16": False,
        },
    }


def training_operations(case: Case) -> float:
    """Floating-point operations of the training phase's matrix products: forward, and twice as many backward.

    It counts policy and critic over every token, the vocabulary projection over the answers' tokens only, and attention
    over the whole square.
    """
    shape = SIZES[case.size]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    width = PROMPT + case.response
    body = layers * (4 * hidden**2 + 3 * hidden * inner + 2 * width * hidden)
    tokens = case.answers * width
    operations: float = 6.0 * (2 * tokens * body + case.answers * case.response * hidden * VOCABULARY)
    return operations


def limit(dtype: torch.dtype, threads: int, size: int = 2048) -> float:
    """Operations per second of a matrix product, the best of five."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        started = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - started)
    torch.set_num_threads(before)
    return 2.0 * size**3 / min(seconds[1:])


def phases(answer: dict[str, Any]) -> dict[str, float]:
    """Seconds by phase in one answer of our worker, without `iteration`, which encloses them all."""
    found = {key.removeprefix("time/"): value for key, value in answer.items() if key.startswith("time/")}
    return {key: value for key, value in found.items() if key != "iteration"}


def measure(case: Case, turns: int, threads: int) -> list[dict[str, Any]]:
    """The worker's answers to `turns` requests, after a warm-up request."""
    with tempfile.TemporaryDirectory(prefix="benchmark-scaling-") as name:
        folder = Path(name)
        material = make(folder, case.size, (PROMPT, PROMPT), 256, 0.0)
        path = recipe(folder, material, section(case))
        command = [sys.executable, "-m", "benchmarks.rl_ours", str(path), "rl"]
        worker = Worker(command, threads, folder / "ours.log", ROOT)
        try:
            worker.turn()
            return [worker.turn() for _ in range(turns)]
        finally:
            worker.close()


def main(path: Path | None, sizes: Sequence[str] = tuple(SIZES), turns: int = 3, threads: int | None = None) -> None:
    """Measures every series, prints each, and writes the rows to `path`."""
    threads = threads or len(os.sched_getaffinity(0))
    fastest = limit(torch.float32, threads)
    print(
        f"{threads} thread(s); matrix products of 2048³: {fastest / 1e9:.0f} GFLOP/s in float32, "
        f"{limit(torch.bfloat16, threads) / 1e9:.0f} in bfloat16"
    )
    rates: dict[Case, float] = {}
    rows = []
    for series, cases in SERIES.items():
        print(f"\nby {series}{'':<20}{'seconds':>9}{'phases/wall':>13}{'train/limit':>13}  phases")
        for case in (case for case in cases if case.size in sizes):
            if case not in rates:
                answers = measure(case, turns, threads)
                wall = statistics.median(answer["wall"] for answer in answers)
                shares = {key: statistics.median(phases(a)[key] for a in answers) for key in phases(answers[0])}
                share = statistics.median(sum(phases(a).values()) / a["wall"] for a in answers)
                roof = training_operations(case) / shares["train"] / fastest
                longest = sorted(shares.items(), key=lambda item: -item[1])[:5]
                phases_text = "  ".join(f"{key} {value / wall:.0%}" for key, value in longest)
                print(f"{case.name:<25}{wall:>9.2f}{share:>13.1%}{roof:>13.0%}  {phases_text}", flush=True)
                rates[case] = case.answers * (PROMPT + case.response) / wall
                first = rates[cases[0]]
                rows.append(
                    Row(row=case.name, ours=rates[case], peer=first, unit="tokens/s", ratio=rates[case] / first)
                )
    print()
    report(rows, path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES), help="models")
    parser.add_argument("--turns", type=int, default=3, help="iterations that count")
    parser.add_argument("--threads", type=int, help="by default one for each core")
    options = parser.parse_args()
    main(options.json, options.sizes, options.turns, options.threads)
