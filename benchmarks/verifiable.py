"""The gain of GRPO on verifiable rewards over instruction tuning on few demonstrations: held-out prompts, three seeds.

    python -m benchmarks.verifiable [--json FILE]

For each seed the tiny recipe runs up to its sections `grpo` and `sft`. Then the models answer the same test prompts of
the embedded world, once greedily and four times with training's sampling (temperature 1). A row is the mean accuracy
over the instruction families, with equal weights. `ours` is GRPO; `peer` is its parent (`cold_start`), and in the rows
`..._sft` the model tuned on six times as many demonstrations. It also prints the family that lost most.
"""

import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from benchmarks.table import Row, json_path, report
from data.accounting import Accounting
from data.config import WorldSource
from data.encode import Encoder
from data.load import read
from data.records import Prompt
from data.world import correct
from rollout.engine import generate
from rollout.sampling import SamplingSpec

SEEDS, PROMPTS, SAMPLES = (42, 1, 2), 1300, 4
RECIPE = Path(__file__).parent.parent / "recipes" / "tiny.yaml"


def accuracies(model_dir: Path, prompts: list[Prompt], temperature: float, samples: int) -> dict[str, float]:
    """Share of right answers by family."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    encoder = Encoder.from_pretrained(model_dir)
    spec = SamplingSpec.of(encoder, 64, temperature=temperature)
    rows = [p for p in prompts for _ in range(samples)]
    ids = [encoder.prompt(p.messages) for p in rows]
    answers = generate(model, ids, spec, [("verifiable", i) for i in range(len(rows))], seed=0)
    right: dict[str, list[bool]] = defaultdict(list)
    for prompt, answer in zip(rows, answers, strict=True):
        right[prompt.columns["family"]].append(correct(prompt.columns, encoder.decode(answer.ids)))
    return {family: sum(found) / len(found) for family, found in right.items()}


def main(path: Path | None) -> None:
    """Runs the sections that are not up to date, measures and prints."""
    source = WorldSource(source="world", kind="prompts", size=PROMPTS, split="test")
    prompts = list(read([source], Prompt, None, 0, Accounting()))
    rows = []
    for seed in SEEDS:
        name = "tiny" if seed == SEEDS[0] else f"tiny-seed{seed}"
        baton = Path(sys.executable).parent / "baton"
        subprocess.run(
            [baton, "run", RECIPE, f"name={name}", f"seed={seed}", "--to", "grpo", "--to", "sft"], check=True
        )
        for label, temperature, samples in (("greedy", 0.0, 1), ("sampled", 1.0, SAMPLES)):
            before, tuned, after = (
                accuracies(Path("runs") / name / section / "model", prompts, temperature, samples)
                for section in ("cold_start", "sft", "grpo")
            )
            worst = min(before, key=lambda family: after[family] - before[family])
            print(
                f"seed {seed}, {label}: most lost in {worst}, {before[worst]:.3f} → {after[worst]:.3f}; "
                + ", ".join(f"{family} {before[family]:.2f} → {after[family]:.2f}" for family in before)
            )
            ours, *peers = (sum(found.values()) / len(found) for found in (after, before, tuned))
            rows += [
                Row(row=f"seed{seed}_{label}{ending}", ours=ours, peer=peer, unit="accuracy", ratio=ours / peer)
                for ending, peer in zip(("", "_sft"), peers, strict=True)
            ]
    report(rows, path)


if __name__ == "__main__":
    main(json_path(__doc__.splitlines()[0]))
