"""Reward over-optimisation: gold and proxy score as functions of the distance from the reference.

    python -m benchmarks.overoptimization [--json FILE]

Runs recipes/overoptimize.yaml (PPO without KL penalty against reward models of three sizes), and fits
R(d) = d (α − β log d) with d = √KL to the evaluations on held-out prompts, the form that Gao et al. 2022
(arXiv:2210.10760, section 3) found for reinforcement learning. R is the gain over the parent. A β above 0 means
over-optimisation. In the table `ours` is the gold score and `peer` the optimised proxy, both in units of their standard
deviation over the parent's answers.
"""

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.table import Row, json_path, report

RECIPE = Path(__file__).parent.parent / "recipes" / "overoptimize.yaml"
SIZES = ("small", "medium", "large")


def fit(kl: Sequence[float], gain: Sequence[float]) -> tuple[float, float, float]:
    """Least squares for α and β, and R². Points without distance (KL ≤ 0) are left out."""
    points = [(math.sqrt(k), g) for k, g in zip(kl, gain, strict=True) if k > 0]
    d, r = np.array([p[0] for p in points]), np.array([p[1] for p in points])
    terms = np.stack([d, -d * np.log(d)], axis=-1)  # (points, 2)
    (alpha, beta), *_ = np.linalg.lstsq(terms, r, rcond=None)
    residual = ((r - terms @ np.array([alpha, beta])) ** 2).sum()
    return float(alpha), float(beta), float(1 - residual / ((r - r.mean()) ** 2).sum())


def course(folder: Path) -> dict[str, list[float]]:
    """KL, gold and proxy score at every evaluation, as gains over the first one."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    looks = [line for line in lines if "eval/monitor" in line]
    return {
        "kl": [look["eval/kl"] for look in looks],
        "gold": [look["eval/monitor"] - looks[0]["eval/monitor"] for look in looks],
        "proxy": [look["eval/scores"] - looks[0]["eval/scores"] for look in looks],
    }


def main(path: Path | None) -> None:
    """Runs the sections that are not up to date, fits and prints."""
    subprocess.run([Path(sys.executable).parent / "baton", "run", RECIPE], check=True)
    rows = []
    for size in SIZES:
        looks = course(Path("runs") / "overoptimize" / f"ppo_{size}")
        gold, proxy = fit(looks["kl"], looks["gold"]), fit(looks["kl"], looks["proxy"])
        for name, unit, ours, peer in zip(("alpha", "beta", "r2"), ("1/√nat", "1/√nat", ""), gold, proxy, strict=True):
            rows.append(Row(row=f"{size}_{name}", ours=ours, peer=peer, unit=unit, ratio=ours / peer))
        top = int(np.argmax(looks["gold"]))
        print(
            f"{size}: gold gains {looks['gold'][top]:.3f} at {looks['kl'][top]:.1f} nats, and ends at "
            f"{looks['gold'][-1]:+.3f} at {looks['kl'][-1]:.1f}; the proxy ends at {looks['proxy'][-1]:+.2f}"
        )
    report(rows, path)


if __name__ == "__main__":
    main(json_path(__doc__.splitlines()[0]))
