"""What an adapter learns, beside what full training learns: the tiny recipe, three seeds.

    python -m benchmarks.adapter_learning [--json FILE] [SEED ...]

For each seed the tiny recipe runs with its sections `sft`, `ppo` and `grpo` twice: once as they are, and once with a
LoRA adapter of the default rank and ten times the learning rate, from the same parent. Then all models answer the same
test prompts. A row is a gain over the parent: `ours` with the adapter, `peer` with all weights. `grpo` is shortened,
since the gain of its first iterations says as much.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.table import Row, report
from training.config import ADAPTER_RATE
from training.recipe_text import read_document

SEEDS = (42, 1, 2)
TINY = Path(__file__).resolve().parent.parent / "recipes" / "tiny.yaml"
ITERATIONS = 80
"""Of GRPO, instead of 240."""
GAINS = {"sft": "accuracy", "ppo": "gold", "grpo": "accuracy_sampled"}
"""{section: the metric of the evaluation's task `world` that it raises}."""


def recipe(seed: int) -> dict[str, Any]:
    """The tiny recipe with a copy of each section that trains an adapter."""
    found: dict[str, Any] = read_document(TINY).value
    stages = found["stages"]
    stages["grpo"]["train"] = stages["grpo"]["train"] | {"iterations": ITERATIONS}
    for name in GAINS:
        rates = {
            key: ADAPTER_RATE * rate for key, rate in stages[name]["train"].items() if key.endswith("learning_rate")
        }
        lora = {"stage": "ppo" if name == "grpo" else name, "adapter": {}, "train": stages[name]["train"] | rates}
        stages[f"{name}_lora"] = stages[name] | lora
    wanted = [name for section in GAINS for name in (section, f"{section}_lora")]
    stages["evaluate"]["models"] = ["pretrain", "cold_start", *wanted]
    for unused in ("rloo", "dpo"):
        del stages[unused]
    return found | {"name": f"adapter-learning-seed{seed}", "seed": seed}


def main(path: Path | None, seeds: Sequence[int] = SEEDS) -> None:
    """Runs what is not up to date, and prints."""
    rows = []
    for seed in seeds:
        content = recipe(seed)
        file = Path("runs") / f"{content['name']}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(yaml.safe_dump(content), encoding="utf-8")
        # In the order in which they are needed, since an evaluation does not wait for the models that it compares.
        wanted = [word for name in GAINS for word in ("--to", name, "--to", f"{name}_lora")]
        baton = [str(Path(sys.executable).parent / "baton"), "run", str(file)]
        subprocess.run([*baton, *wanted], check=True)
        subprocess.run([*baton, "--to", "evaluate"], check=True)
        results = json.loads((Path("runs") / content["name"] / "evaluate" / "results.json").read_text(encoding="utf-8"))
        measured = results["tasks"]["world"]["metrics"]
        for name, metric in GAINS.items():
            parent = content["stages"][name]["parent"]
            ours, peer = (
                measured[model][metric]["value"] - measured[parent][metric]["value"] for model in (f"{name}_lora", name)
            )
            rows.append(Row(row=f"seed{seed}_{name}", ours=ours, peer=peer, unit=metric, ratio=ours / peer))
    report(rows, path)
    for name in GAINS:
        ours, peer = (sum(row[side] for row in rows if row["row"].endswith(f"_{name}")) for side in ("ours", "peer"))
        print(f"{name}: {ours / peer:.2f} of the gain of full training, over {len(seeds)} seeds")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapter_learning", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    parser.add_argument("seeds", nargs="*", type=int, help=f"by default {', '.join(map(str, SEEDS))}")
    options = parser.parse_args()
    main(options.json, options.seeds or SEEDS)
