"""What two processes exchange in an iteration of the policy gradient: packed tensors against pickled lists.

    python -m benchmarks.exchange [--json FILE]

4,096 answers of 512 tokens, half of them on each of two processes on gloo: first the answers with log-probabilities and
scores, then values and the reference's log-probabilities, of which each process has computed those of its half. The
peer is what this project did before: one object an answer, with lists of numbers, its prompt and its text, pickled.

- `exchange_seconds`: for both exchanges together, the slower process's; the median over turns.
- `exchange_memory`: by how much a process's resident memory grows at most (MB), in a first exchange of either kind.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.table import Row, json_path, report

ROOT = Path(__file__).resolve().parent.parent
ANSWERS, TOKENS, PROMPT, VOCABULARY, TURNS = 4096, 512, 64, 32000, 3


@dataclass
class Pickled:
    """An answer as it used to travel."""

    row: int
    prompt: Any
    ids: list[int]
    stopped: bool
    text: str
    engine_logp: list[float]
    old_logp: list[float]
    ref_logp: list[float] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    score: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


def worker(path: Path) -> None:
    """One of the two processes. The main one writes {"ours": {"seconds", "bytes"}, "peer": ...} to `path`."""
    from training import engines

    engine = engines.start()
    import torch

    from benchmarks.turns import forget_peak, resident
    from data.encode import EncodedPrompt
    from data.records import Message, Origin, Prompt
    from rollout.trajectory import Trajectory, TrajectoryBatch, Turn
    from training.engines.exchange import join_columns, join_trajectories

    generator = torch.Generator().manual_seed(engine.data_rank)
    record = Prompt((Message("user", "w" * 4 * PROMPT),), Origin("prompts.jsonl", 1), {"answer": "42"})
    prompts = [EncodedPrompt([(7 * i + p) % VOCABULARY for i in range(PROMPT)], record) for p in range(ANSWERS)]
    rows = engine.share(ANSWERS)

    def numbers() -> torch.Tensor:
        return torch.randn(TOKENS, generator=generator)

    share = TrajectoryBatch.pack(
        [
            Trajectory(
                row=row,
                prompt_ids=torch.tensor(prompts[row].ids, dtype=torch.int32),
                ids=torch.randint(VOCABULARY, (TOKENS,), generator=generator, dtype=torch.int32),
                turns=(Turn("policy", 0, TOKENS),),
                end="stop",
                engine_logp=numbers(),
                score=0.5,
            )
            for row in rows
        ]
    )
    assert share.score is not None
    share = share.with_columns(part_names=("reward",), parts=share.score[:, None])
    annotations = {name: torch.randn(len(share.ids), generator=generator) for name in ("values", "ref_logp")}

    def ours() -> Any:
        batch = join_trajectories(engine, share, prompts, 1)
        return batch.with_columns(old_logp=batch.engine_logp, **join_columns(engine, annotations, batch))

    lists = {
        name: [piece.tolist() for piece in column.split(TOKENS)]
        for name, column in ({"ids": share.ids, "logp": share.engine_logp} | annotations).items()
    }
    answers = [
        Pickled(row, prompts[row], ids, True, "word " * TOKENS, logp, logp, score=0.5, parts={"reward": 0.5})
        for row, ids, logp in zip(rows, lists["ids"], lists["logp"], strict=True)
    ]

    def peer() -> Any:
        gathered = engine.of_all(answers)
        batch = sorted((row for part in gathered for row in part), key=lambda r: r.row)
        known = list(zip(rows, lists["values"], lists["logp"], lists["ref_logp"], strict=True))
        for i, values, old_logp, ref_logp in (entry for part in engine.of_all(known) for entry in part):
            batch[i].values, batch[i].old_logp, batch[i].ref_logp = values, old_logp, ref_logp
        return batch

    def measured(exchange: Callable[[], Any]) -> tuple[float, float]:
        """(seconds, bytes): the larger of both processes."""
        engine.release_memory()
        before = forget_peak()
        engine.barrier()
        started = time.perf_counter()
        result = exchange()
        seconds = time.perf_counter() - started
        grown = resident("VmHWM") - before
        assert len(result) == ANSWERS
        slowest, most = engine.largest(seconds, grown)
        return slowest, most

    turns = [(measured(ours), measured(peer)) for _ in range(1 + TURNS)]
    found = {
        name: {"seconds": statistics.median(turn[i][0] for turn in turns[1:]), "bytes": turns[0][i][1]}
        for i, name in enumerate(("ours", "peer"))
    }
    if engine.is_main:
        path.write_text(json.dumps(found), encoding="utf-8")
    engine.shutdown()


def main(path: Path | None) -> None:
    """Measures and reports."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.json"
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
        command += [str(ROOT / "recipes" / "launch" / "cpu2.yaml"), "-m", "benchmarks.exchange", "--worker", str(found)]
        subprocess.run(command, cwd=ROOT, check=True)
        sides = json.loads(found.read_text(encoding="utf-8"))
    ours, peer = sides["ours"], sides["peer"]
    rows = [
        Row(
            row=f"exchange_{name}",
            ours=ours[key] * scale,
            peer=peer[key] * scale,
            unit=unit,
            ratio=peer[key] / ours[key],
        )
        for name, key, unit, scale in (("seconds", "seconds", "s", 1), ("memory", "bytes", "MB", 1e-6))
    ]
    report(rows, path)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(Path(sys.argv[2]))
    else:
        main(json_path("What two processes exchange in an iteration of the policy gradient."))
