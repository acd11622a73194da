"""Reinforcement learning against TRL: an update of PPO and of GRPO, and PPO's memory.

    python -m benchmarks.rl [--json FILE] [--only ROW ...] [--turns N] [--threads N] [--clock cpu]

The same random Llama of 5.8 million parameters on both sides, the same prompts of 32 tokens, answers of one fixed
length, the same batch, micro-batch and epochs. Each side is a process of its own that stands still while the other
works (benchmarks/turns.py), and the turns alternate.

| row | what |
| --- | --- |
| `ppo_same_precision` | a PPO update: 32 answers of 48 tokens, 4 epochs, micro-batches of 8; both sides in float32 |
| `ppo_default` | the same; precision, recomputation and kernels as each side chooses them by itself |
| `grpo_same_precision` | a GRPO step: 4 prompts with 8 answers each of 64 tokens, micro-batches of 8; float32 |
| `grpo_default` | the same, each side at its defaults |
| `ppo_peak_memory` | most resident memory of `ppo_same_precision`'s processes, above that before a model was made; \
here the ratio is ours / the peer's, and less is better |

PPO's peer is TRL 1.12.0, the last release that has a PPOTrainer: it gets an environment of its own, made once, below
`.benchmarks/`. GRPO's is the TRL of requirements.lock. TRL's PPOTrainer makes its accelerator without a precision, so
its default is float32 in spite of `bf16`; its GRPOTrainer's is bfloat16 autocast with activations recomputed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.table import Row, in_turns, report
from benchmarks.turns import Worker

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".benchmarks"
PPO_PEER = "trl==1.12.0"
_PEER_NEEDS = ("torch", "transformers", "accelerate", "datasets", "pandas", "rich")
ROWS = ("ppo_same_precision", "ppo_default", "grpo_same_precision", "grpo_default", "ppo_peak_memory")
PROMPT, ANSWERS, MICRO_BATCH, EPOCHS, GENERATIONS = 32, 32, 8, 4, 8
LENGTHS = {"ppo": 48, "grpo": 64}
PROMPTS = 512


@dataclass(frozen=True)
class Side:
    """How one side is started, and what it is called in its log's name."""

    name: str
    command: Sequence[str]


def peer_python(requirement: str = PPO_PEER, root: Path = ENVIRONMENTS) -> Path:
    """The Python of an environment with the peer in it, made when it is not there.

    Everything that the peer needs has the version of requirements.lock, so that nothing but the peer differs.
    """
    locked = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = [line for line in locked if not line.startswith("trl==")]
    wanted = "\n".join([requirement, *(pin for pin in pins if pin.split("==")[0] in _PEER_NEEDS)])
    folder = root / requirement.replace("==", "-")
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {requirement} into {folder.relative_to(ROOT)}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "-c", str(constraints), *wanted.split()]
    subprocess.run(install, check=True)
    marker.write_text(wanted, encoding="utf-8")
    return python


def our_section(kind: str, reward: Path, same_precision: bool) -> dict[str, Any]:
    """The section of our recipe: sizes, and no setting that only one side would have."""
    train: dict[str, Any] = {
        "iterations": 10**6,
        "rollout_batch_size": ANSWERS,
        "num_ppo_epochs": EPOCHS if kind == "ppo" else 1,
        "num_mini_batches": 1,
        "per_device_train_batch_size": MICRO_BATCH,
        "max_completion_length": LENGTHS[kind],
        "learning_rate": 1e-6,
        "save_iterations": 10**6,
    }
    if same_precision:
        train["bf16"] = False
    if kind == "ppo":
        return {"reward": [{"model": str(reward)}], "train": train | {"critic_learning_rate": 1e-6}}
    section = {"reward": [{"function": "benchmarks.rl_setup:score"}], "advantage": "group"}
    return {**section, "train": train | {"num_generations": GENERATIONS, "kl_coef": 0.0}}


def sides(kind: str, folder: Path, python: Path, same_precision: bool) -> tuple[Side, Side]:
    """Our worker and the peer's."""
    from benchmarks.rl_setup import make, recipe

    material = make(folder, "5M", PROMPT, PROMPTS)
    path = recipe(folder, material, our_section(kind, material.reward, same_precision))
    arguments: dict[str, Any] = {"learning_rate": 1e-6}
    if same_precision:
        arguments |= {"bf16": False, "gradient_checkpointing": False}
    settings = {
        "policy": str(material.policy),
        "reward": str(material.reward / "model"),
        "prompts": str(material.prompts),
        "output": str(folder / "peer"),
        "rows": ANSWERS,
        "micro_batch": MICRO_BATCH,
        "response": LENGTHS[kind],
        "epochs": EPOCHS if kind == "ppo" else 1,
        "generations": GENERATIONS,
        "arguments": arguments,
    }
    return (
        Side("ours", [sys.executable, "-m", "benchmarks.rl_ours", str(path), "rl"]),
        Side("peer", [str(python), str(ROOT / "benchmarks" / "rl_peer.py"), kind, json.dumps(settings)]),
    )


def measure(name: str, pair: tuple[Side, Side], folder: Path, turns: int, threads: int, clock: str) -> tuple[Row, Row]:
    """Runs both sides in turns. -> the row of speed, in answers a second, and that of memory."""
    workers: list[Worker] = []
    try:
        for side in pair:  # one after the other: loading and a first update are work, too
            workers.append(Worker(side.command, threads, folder / f"{side.name}.log", ROOT))
        ours, peer = workers
        speed = in_turns(name, "answers/s", _rate(ours, clock), _rate(peer, clock), turns)
        ours_mib, peer_mib = (worker.last["peak"] / 2**20 for worker in workers)
    finally:
        for worker in workers:
            worker.close()
    length = ours.last["completions/mean_length"]
    wanted = LENGTHS[name.split("_")[0]]
    assert length == wanted, f"{name}: our answers have {length} tokens on average, not {wanted}"
    return speed, Row(row="ppo_peak_memory", ours=ours_mib, peer=peer_mib, unit="MiB, less", ratio=ours_mib / peer_mib)


def _rate(worker: Worker, clock: str) -> Callable[[], float]:
    return lambda: ANSWERS / worker.turn()[clock]


def main(
    path: Path | None, only: Sequence[str] = ROWS, turns: int = 5, threads: int | None = None, clock: str = "wall"
) -> None:
    """Measures the rows `only`, prints the table and writes it to `path`."""
    threads = threads or len(os.sched_getaffinity(0))
    rows = []
    for name in ("ppo_same_precision", "ppo_default", "grpo_same_precision", "grpo_default"):
        memory = name == "ppo_same_precision" and "ppo_peak_memory" in only
        if name not in only and not memory:
            continue
        kind = name.split("_")[0]
        python = peer_python() if kind == "ppo" else Path(sys.executable)
        with tempfile.TemporaryDirectory(prefix="benchmark-rl-") as folder:
            pair = sides(kind, Path(folder), python, name.endswith("same_precision"))
            speed, peak = measure(name, pair, Path(folder), turns, threads, clock)
        rows += [speed] if name in only else []
        rows += [peak] if memory else []
    print(f"{threads} thread(s), {clock} time, median of {turns} pairs of turns")
    print("ppo_peak_memory: less is better, at most 0.8 is wanted; in the other rows more is better")
    report(sorted(rows, key=lambda row: ROWS.index(row["row"])), path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS), help="only these rows")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, help="of each side; by default one for each core")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: of a side's threads together, for a machine that others use too (with --threads 1)",
    )
    options = parser.parse_args()
    main(options.json, options.only, options.turns, options.threads, options.clock)
