"""Reinforcement learning against TRL: an update of PPO and of GRPO, and PPO's memory.

    python -m benchmarks.rl [--json FILE] [--only ROW ...] [--full-lengths] [--turns N] [--threads N] [--clock cpu]

Both sides have the same random Llama of 5.8 million parameters, the same prompts of 8 to 32 tokens, the same chance of
1/32 that an answer ends at a token, and the same longest answer, batch, micro-batch and epochs. Each side is a separate
process that waits while the other works (benchmarks/turns.py), and the turns alternate.

| row | what |
| --- | --- |
| `ppo_same_precision` | a PPO update: 32 answers of up to 48 tokens, 4 epochs, micro-batches of 8, both in float32 |
| `ppo_default` | the same; precision, recomputation and kernels at each side's defaults |
| `grpo_same_precision` | a GRPO step: 4 prompts with 8 answers each of up to 64 tokens, micro-batches of 8, float32 |
| `grpo_default` | the same, each side at its defaults |
| `ppo_peak_memory` | most resident memory in `ppo_same_precision`, above the level before the model was created; here \
the ratio is ours / the peer's, and less is better |

With `--full-lengths` every prompt has 32 tokens and no answer ends before the longest length, so that there is no
padding to save; the rows are then called `..._full`.

PPO's peer is TRL 1.12.0, the last release with a PPOTrainer; it gets a separate environment, created once below
`.benchmarks/`. GRPO's peer is the TRL in requirements.lock. TRL's PPOTrainer creates its accelerator without a
precision, so its default is float32 in spite of `bf16`; its GRPOTrainer's default is bfloat16 autocast with activations
recomputed.
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
from typing import Any, Literal

from benchmarks.table import Row, in_turns, report
from benchmarks.turns import Worker

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".benchmarks"
PPO_PEER = "trl==1.12.0"
_PEER_NEEDS = ("torch", "transformers", "accelerate", "datasets", "pandas", "rich")
SPEED = ("ppo_same_precision", "ppo_default", "grpo_same_precision", "grpo_default")
MEMORY = "ppo_peak_memory"
ANSWERS, MICRO_BATCH, GENERATIONS, PROMPTS = 32, 8, 8, 512
LEARNING_RATE = 1e-6

Kind = Literal["ppo", "grpo"]


@dataclass(frozen=True)
class Work:
    """The work of one update. `prompt`: shortest and longest; `hazard`: chance that an answer ends at a token."""

    kind: Kind
    prompt: tuple[int, int]
    response: int
    hazard: float

    @property
    def epochs(self) -> int:
        """Passes over the answers."""
        return 4 if self.kind == "ppo" else 1


def work(kind: Kind, full_lengths: bool) -> Work:
    """The workload of a row."""
    response = {"ppo": 48, "grpo": 64}[kind]
    return Work(kind, (32, 32), response, 0.0) if full_lengths else Work(kind, (8, 32), response, 1 / 32)


def peer_python(requirement: str = PPO_PEER, root: Path = ENVIRONMENTS) -> Path:
    """The Python of the peer's environment, which is created if it does not exist.

    The peer's dependencies have the versions of requirements.lock, so that only the peer itself differs.
    """
    locked = [line for line in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines() if "==" in line]
    pins = [line for line in locked if not line.startswith("trl==")]
    wanted = "\n".join([requirement, *(pin for pin in pins if pin.split("==")[0] in _PEER_NEEDS)])
    folder = root / requirement.replace("==", "-")
    python, marker = folder / "bin" / "python", folder / "installed.txt"
    if marker.is_file() and marker.read_text(encoding="utf-8") == wanted:
        return python
    print(f"installing {requirement} into {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pins), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--quiet", "--quiet", "-c", str(constraints), *wanted.split()]
    subprocess.run(install, check=True)
    marker.write_text(wanted, encoding="utf-8")
    return python


def our_section(job: Work, reward: Path, same_precision: bool) -> dict[str, Any]:
    """The section of our recipe, with the sizes and nothing that would make its work differ from the peer's."""
    train: dict[str, Any] = {
        "iterations": 10**6,
        "rollout_batch_size": ANSWERS,
        "num_ppo_epochs": job.epochs,
        "num_mini_batches": 1,
        "per_device_train_batch_size": MICRO_BATCH,
        "max_completion_length": job.response,
        "learning_rate": LEARNING_RATE,
        "save_iterations": 10**6,
    }
    if same_precision:
        train["bf16"] = False
    # Answers of random weights may never end, which would trigger the training guards.
    guards = {"probe_prompts": 0, "patience": 10**6}
    if job.kind == "ppo":
        rewards = [{"model": str(reward)}]
        return {"reward": rewards, "guards": guards, "train": train | {"critic_learning_rate": LEARNING_RATE}}
    section = {"reward": [{"function": "benchmarks.rl_setup:score"}], "advantage": "group", "guards": guards}
    return {**section, "train": train | {"num_generations": GENERATIONS, "kl_coef": 0.0}}


def commands(job: Work, folder: Path, python: Path, same_precision: bool) -> tuple[list[str], list[str]]:
    """Creates the material in `folder`; returns the commands that start our worker and the peer's."""
    from benchmarks.rl_setup import make, recipe

    material = make(folder, "5M", job.prompt, PROMPTS, job.hazard)
    path = recipe(folder, material, our_section(job, material.reward, same_precision))
    arguments: dict[str, Any] = {"learning_rate": LEARNING_RATE}
    if same_precision:
        arguments |= {"bf16": False, "gradient_checkpointing": False}
    settings = {
        "policy": str(material.policy),
        "reward": str(material.reward / "model"),
        "prompts": str(material.prompts),
        "output": str(folder / "peer"),
        "rows": ANSWERS,
        "micro_batch": MICRO_BATCH,
        "response": job.response,
        "epochs": job.epochs,
        "generations": GENERATIONS,
        "arguments": arguments,
    }
    return (
        [sys.executable, "-m", "benchmarks.rl_ours", str(path), "rl"],
        [str(python), str(ROOT / "benchmarks" / "rl_peer.py"), job.kind, json.dumps(settings)],
    )


def measure(
    name: str, pair: tuple[Sequence[str], Sequence[str]], folder: Path, turns: int, threads: int, clock: str
) -> tuple[Row, Row]:
    """Runs both sides in turns; returns the row of speed, in answers per second, and the row of memory."""
    workers: list[Worker] = []
    try:
        for side, command in zip(("ours", "peer"), pair, strict=True):
            # One after the other, because loading and the first update are work too.
            workers.append(Worker(command, threads, folder / f"{side}.log", ROOT))
        ours, peer = workers
        speed = in_turns(name, "answers/s", _rate(ours, clock), _rate(peer, clock), turns)
        peaks = [worker.last["peak"] / 2**20 for worker in workers]
    finally:
        for worker in workers:
            worker.close()
    return speed, Row(row=MEMORY, ours=peaks[0], peer=peaks[1], unit="MiB, less", ratio=peaks[0] / peaks[1])


def _rate(worker: Worker, clock: str) -> Callable[[], float]:
    return lambda: ANSWERS / worker.turn()[clock]


def main(
    path: Path | None,
    only: Sequence[str] = (*SPEED, MEMORY),
    full_lengths: bool = False,
    turns: int = 5,
    threads: int | None = None,
    clock: str = "wall",
) -> None:
    """Measures the rows `only`, prints the table and writes it to `path`."""
    threads = threads or len(os.sched_getaffinity(0))
    ending = "_full" if full_lengths else ""
    rows = []
    for name in SPEED:
        memory = name == "ppo_same_precision" and MEMORY in only
        if name not in only and not memory:
            continue
        kind: Kind = "ppo" if name.startswith("ppo") else "grpo"
        python = peer_python() if kind == "ppo" else Path(sys.executable)
        with tempfile.TemporaryDirectory(prefix="benchmark-rl-") as folder:
            pair = commands(work(kind, full_lengths), Path(folder), python, name.endswith("same_precision"))
            found = measure(name, pair, Path(folder), turns, threads, clock)
        rows += [row for row in found if row["row"] in only and (memory or row["row"] != MEMORY)]
    print(f"{threads} thread(s), {clock} time, median of {turns} pairs of turns")
    print(f"{MEMORY}: ratio is ours / the peer's, less is better; in the other rows more is")
    report([Row(**{**row, "row": row["row"] + ending}) for row in rows], path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--only", nargs="+", choices=(*SPEED, MEMORY), default=[*SPEED, MEMORY], help="these rows")
    parser.add_argument("--full-lengths", action="store_true", help="every prompt and answer has the longest length")
    parser.add_argument("--turns", type=int, default=5, help="turns of each side")
    parser.add_argument("--threads", type=int, help="of each side; by default one for each core")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: of a side's threads together, for a machine that others use too (with --threads 1)",
    )
    options = parser.parse_args()
    main(options.json, options.only, options.full_lengths, options.turns, options.threads, options.clock)
