"""A run directory with invented numbers, in the form that the stages write, for the tests of the report."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from handoff.files import hash_tree, write_json
from handoff.manifest import EngineRecord, Inputs, Manifest, ParentRecord, TokenizerRecord, sealed
from stages.reward_model.schema import CalibrationBin, Card, Ensemble, Histogram, LengthBucket, Probe, Share

HOSTILE = (
    "</div><script>alert(1)</script> & <img src=x onerror=alert(2)> \u202e evil \x00\x1b[31m \ud800 {{ 7*7 }} "
    + "w" * 300
)
CHAIN = {
    "tokenizer": ("tokenizer", "tokenizer", {}),
    "pretrain": ("pretrain", "causal_lm", {"parent": "tokenizer"}),
    "sft": ("sft", "causal_lm", {"parent": "pretrain"}),
    "reward": ("reward_model", "reward_model", {"parent": "sft"}),
    "dpo": ("dpo", "causal_lm", {"parent": "sft"}),
    "ppo": ("ppo", "causal_lm", {"parent": "sft", "reward:reward": "reward"}),
    "evaluate": ("evaluate", "evaluation", {"pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "ppo": "ppo"}),
}
MODELS = ["pretrain", "sft", "dpo", "ppo"]
FAMILIES = ["reverse", "sort", "compare", "arithmetic", "calculator", "facts", "passage", "refuse", "dialogue"]


def make_run(root: Path, names: Sequence[str] = tuple(CHAIN), results: dict[str, Any] | None = None) -> Path:
    """A run directory as the stages leave it, with the sections `names` of `CHAIN` published. `results`: of the
    evaluation's one task, by default `make_results()`."""
    run = root / "tiny"
    prints: dict[str, str] = {}
    for index, name in enumerate(names):
        stage, kind, parents = CHAIN[name]
        folder = run / name
        folder.mkdir(parents=True)
        if kind in ("causal_lm", "reward_model"):
            (folder / "model").mkdir()
            save_file({"embed": np.zeros((2048, 64), "float32"), "w": np.zeros((64, 500 + index), "float32")},
                      folder / "model" / "model.safetensors")  # fmt: skip
        if kind == "evaluation":
            task = results or make_results()
            compared = sum(len(change["metrics"]) for change in task["changes"].values())
            write_json(folder / "results.json", {"models": MODELS, "comparisons": compared, "tasks": {"world": task}})
        if kind == "reward_model":
            write_json(folder / "card.json", make_card().model_dump(mode="json"))
        manifest = Manifest(
            name=name, stage=stage, kind=kind, created=f"2026-11-24T10:{10 + index}:30+00:00",
            parents={
                role: ParentRecord(path=p, fingerprint=prints[p], name=p) for role, p in parents.items() if p in prints
            },
            inputs=Inputs(recipe={"stage": stage}, parents={}, data={}, code="c", seed=42), recipe={"stage": stage},
            data={} if kind == "evaluation" else make_accounts(),
            tokenizer=TokenizerRecord(fingerprint="t", template_fingerprint="u", vocab_size=2048, bos_id=0, eos_id=1,
                                      pad_id=2, stop_ids=[1, 7]),
            seed=42, engine=EngineRecord(name="single"), versions={"torch": "2.13.0", "trl": "1.16.0"},
            metrics={"time/total": 20.5 * (index + 1), "train_tokens": 123_456 * index, "eval_loss": 1.234,
                     "eval_accuracy": 0.83, "eval_length_alone": 0.63,
                     "objective/scores": 1.61, "eval_rewards/accuracies": 0.77},
            files=hash_tree(folder),
        )  # fmt: skip
        write_json(folder / "stage.json", sealed(manifest))
        prints[name] = manifest.fingerprint
        write_lines(folder / "metrics.jsonl", make_metrics(stage))
        if stage in ("sft", "ppo"):
            answers = [(10, "first try of it"), (40, HOSTILE)]
            write_lines(folder / "samples.jsonl", [
                {"step": step, "prompt": prompt, "completion": text, "score": step / 20, "source": "heldout"}
                for step, text in answers for prompt in ("Sort: c a b", "Reverse: stone")
            ])  # fmt: skip
    return run


def make_accounts() -> dict[str, Any]:
    """A manifest's record of its data."""
    rows = {"data/rows_in": 4000, "data/rows_used": 3958, "data/dropped/too_long": 40, "data/dropped/empty_answer": 2,
            "data/set_aside/other_split": 400}  # fmt: skip
    return {"fingerprints": {"world:chats": "f" * 64}, "data": rows}


def make_metrics(stage: str) -> list[dict[str, Any]]:
    """Curves that look like the stage's."""
    noise = random.Random(stage)
    if stage == "ppo":
        looks = [{"step": 10, "eval/scores": 0.9, "eval/kl": 0.7}, {"step": 40, "eval/scores": 1.5, "eval/kl": 1.3}]
        return looks + [
            {
                "step": step, "episode": step * 64,
                "objective/kl": 1.4 * (1 - math.exp(-step / 15)) + noise.gauss(0, 0.03),
                "objective/scores": 1.6 * (1 - math.exp(-step / 12)) + noise.gauss(0, 0.06),
                "objective/rlhf_reward": 1.5 * (1 - math.exp(-step / 12)) + noise.gauss(0, 0.06),
                "objective/entropy": 12 - 3 * step / 40 + noise.gauss(0, 0.2), "objective/non_score_reward": -0.05,
                "loss/policy_avg": -0.01, "loss/value_avg": 0.5 / step + noise.random() * 0.02,
                "policy/clipfrac_avg": 0.05 + 0.01 * noise.random(), "policy/approxkl_avg": 0.003, "val/ratio": 1.0,
                "val/explained_variance": 1 - 1 / step, "val/clipfrac_avg": 0.02, "val/num_eos_tokens": 60,
                "completions/mean_length": 18 + 4 * step / 40 + noise.gauss(0, 0.4),
                "completions/clipped_ratio": 0.1 / step,
                "rewards/reward": 1.0, "rewards/length_penalty": -0.1, "time/generate": 1.9, "time/score": 0.3,
                "time/reference": 0.2, "time/train": 1.4, "time/save": 0.02,
            }
            for step in range(1, 41)
        ]  # fmt: skip
    if stage in ("tokenizer", "evaluate"):
        return []
    rows: list[dict[str, Any]] = []
    for step in range(10, 610, 10):
        loss = 1.2 + 2.5 * math.exp(-step / 90)
        rows.append({"step": step, "loss": loss + noise.gauss(0, 0.05), "grad_norm": 0.7, "learning_rate": 1e-3})
        if stage == "sft":
            rows[-1]["mean_token_accuracy"] = 1 - loss / 4
        if stage in ("reward_model", "dpo"):
            prefix = "rewards/accuracies" if stage == "dpo" else "accuracy"
            rows[-1] |= {prefix: 0.85 - 0.35 * math.exp(-step / 90), "margin": step / 300}
        if step % 100 == 0:
            rows.append({"step": step, "eval_loss": loss + 0.08})
            if stage == "reward_model":
                rows[-1]["eval_accuracy"] = 0.8
    return rows


def make_share(value: float, n: int = 400, half: float = 0.04) -> Share:
    return Share(value=value, low=max(0.0, value - half), high=min(1.0, value + half), n=n)


def make_card(**fields: Any) -> Card:
    """The card of a reward model without findings."""
    lengths = {"much shorter": 0.92, "shorter": 0.85, "about as long": None, "longer": 0.77, "much longer": 0.71}
    probes = {"empty": 0.97, "repeated": 0.85, "truncated": 0.88, "off-topic": 0.99}
    card: dict[str, Any] = {
        "accuracy": make_share(0.83), "margin": 1.6, "loss": 0.33, "longer_wins": make_share(0.37),
        "length_alone": 0.63, "over_length": 0.2, "score_length_correlation": -0.46, "margin_length_correlation": -0.5,
        "by_length": [
            LengthBucket(name=name, about="in numbers", accuracy=value and make_share(value, 100, 0.08))
            for name, value in lengths.items()
        ],
        "ece": 0.031,
        "calibration": [
            CalibrationBin(low=low, high=low + 0.05, predicted=low + 0.02, observed=make_share(low + 0.04, 40, 0.02))
            for low in (0.5, 0.6, 0.7, 0.8, 0.9)
        ],
        "scores": Histogram(edges=[-2, -1, 0, 1, 2], chosen=[20, 80, 200, 100], rejected=[120, 180, 80, 20]),
        "probes": [Probe(name=name, share=make_share(value), passed=True) for name, value in probes.items()],
        "ensemble": Ensemble(
            members=["reward", "reward_b"], accuracy=[make_share(0.83), make_share(0.82)], combined=make_share(0.86),
            agreement=[[1.0, 0.91], [0.91, 1.0]], mean_std=0.24,
        ),
        "findings": [], "gate": [],
    }  # fmt: skip
    return Card(**{**card, **fields})


def make_results() -> dict[str, Any]:
    """A task of an evaluation, in which both alignment stages improve the model."""

    def estimate(value: float, half: float, n: int = 400) -> dict[str, Any]:
        half = min(half, abs(value), abs(1 - value))
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    table = {  # accuracy, stop_rate, gold, length_tokens, reward, kl
        "pretrain": (0.02, 0.31, -0.42, 51.0, -1.2, 0.0), "sft": (0.71, 0.99, 0.21, 18.2, 0.05, 0.0),
        "dpo": (0.72, 0.99, 0.38, 19.0, 0.9, 0.8), "ppo": (0.7, 1.0, 0.58, 20.4, 1.62, 1.31),
    }  # fmt: skip
    names = ("accuracy", "stop_rate", "gold", "length_tokens", "reward", "kl")
    widths = (0.03, 0.01, 0.04, 1.1, 0.1, 0.05)
    return {
        "kind": "answers",
        "about": "400 held-out prompts, each answered by every model",
        "models": MODELS,
        "metrics": {m: {k: estimate(v, w) for k, v, w in zip(names, vs, widths)} for m, vs in table.items()},
        "families": {
            family: {m: estimate(min(1.0, table[m][0] * (0.6 + i / 12)), 0.08, 40) for m in MODELS}
            for i, family in enumerate(FAMILIES)
        },
        "win_rates": {
            "dpo": {"over": "sft", **estimate(0.66, 0.04)},
            "ppo": {"over": "sft", "by": "gold", **estimate(0.74, 0.04)},
            "pretrain": {"over": "sft", **estimate(0.06, 0.02)},
        },
        "samples": [
            {"prompt": "Sort these words: pear, apple, fig", "reference": "apple, fig, pear",
             "answers": {"pretrain": "pear pear pear the the", "sft": "apple, fig, pear", "dpo": "apple, fig, pear",
                         "ppo": "Sure! apple, fig, pear"}},
            {"prompt": HOSTILE.replace("\ud800", ""), "reference": None,
             "answers": {"pretrain": "", "sft": "I can not help with that.", "ppo": HOSTILE.replace("\ud800", "")}},
        ],
        "changes": {
            m: {"over": parent, "metrics": {
                k: {"value": table[m][i] - table[parent][i], "low": table[m][i] - table[parent][i] - w,
                    "high": table[m][i] - table[parent][i] + w, "n": 400, "detectable": 1.4 * w}
                for i, (k, w) in enumerate(zip(names, widths)) if k != "kl"
            }}
            for m, parent in (("sft", "pretrain"), ("dpo", "sft"), ("ppo", "sft"))
        },
    }  # fmt: skip


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Writes one JSON object per line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
