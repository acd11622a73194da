"""Reward modelling with TRL's RewardTrainer, and a report card of what it has learned.

    python -m stages.reward_model recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.reward_model recipes/tiny.yaml

The score is read at the last token of prompt and answer, which is the stop token. On held-out pairs the card says: how
often the better answer scores higher, with a 95 % interval; how often "the longer one" alone would have been right, and
how far the score follows length; how often the better answer beats itself made empty, repeated, or broken off. Mean and
deviation of the scores go into the manifest, for RL to normalise by.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification
from trl import RewardConfig, RewardTrainer

from data.encode import Encoder, encode_preferences
from data.records import Preference
from reward.learned import score
from stages import models, runtime
from stages.measure import measure_rows, wilson
from stages.reward_model.config import Config
from stages.run import Run
from stages.trainer import StageTrainer, StepOrder, arguments, fit

_RELOADED = 32
# Scores before and after saving come from batches of other shapes; float32 products differ in their last bits.
_TOLERANCE = 1e-4
Row = dict[str, list[int]]
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]


class Trainer(StageTrainer, RewardTrainer):
    """TRL's trainer in our frame."""


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = models.load_encoder(parent)

    # Data: pairs of whole conversations.
    loaded = run.load(config.data, Preference)
    pairs = encode_preferences(loaded.records, encoder, config.max_length, config.truncation, loaded.accounting)
    run.account(loaded, max_drop_fraction=config.max_drop_fraction)
    heldout: list[Row] = []
    if config.eval_data:
        held = run.load(config.eval_data, Preference)
        heldout = encode_preferences(held.records, encoder, config.max_length, config.truncation, held.accounting)
        run.account(held, "held-out data", config.max_drop_fraction)
    rows = [
        {
            "chosen_ids": pair["prompt_ids"] + pair["chosen_ids"],
            "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"],
        }
        for pair in pairs
    ]

    # Model and trainer.
    coefficient = config.center_rewards_coefficient or None
    args = arguments(RewardConfig, run, len(rows), max_length=None, center_rewards_coefficient=coefficient)
    model = models.load_reward_model(parent, config.model_args, dropout=False, bf16=args.bf16, seed=run.seed)
    trainer = Trainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=encoder.tokenizer)
    lengths = [max(map(len, row.values())) for row in rows] if config.group_by_length else None
    order = StepOrder(len(rows), config.train.global_batch_size, run.seed, lengths)

    def scores(answers: Sequence[Sequence[int]]) -> np.ndarray:
        found = measure_rows(trainer, answers, [len(ids) for ids in answers], Collator(encoder.pad_id), row_scores)
        return found["score"]

    def hold_out() -> dict[str, float]:
        return pair_metrics(heldout, scores) if heldout else {}

    fit(run, trainer, order, hold_out)

    # What it has learned. Without held-out pairs the statistics come from the training's own.
    metrics = trainer.evaluate()
    if heldout:
        metrics |= {f"eval_{key}": value for key, value in probe_metrics(heldout, encoder.stop_ids, scores).items()}
    measured = heldout or pairs
    answers = [row["prompt_ids"] + row[key] for row in measured for key in ("chosen_ids", "rejected_ids")]
    values = scores(answers)
    extra = {"reward_mean": float(values.mean()), "reward_std": float(max(values.std(), 1e-6))}
    weights = runtime.full_state_dict(trainer.accelerator, trainer.model_wrapped)

    def write(path: Path) -> None:
        models.save_model(model, encoder, path, weights)
        check_scores(path, answers[:_RELOADED], values[:_RELOADED], encoder, trainer)

    run.publish("reward_model", write, metrics, extra)


class Collator:
    """Answers padded on the right."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, rows: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
        """-> input_ids and attention_mask, (B, T) long."""
        ids = torch.full((len(rows), max(map(len, rows))), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.as_tensor(row, dtype=torch.long)
            mask[i, : len(row)] = 1
        return {"input_ids": ids, "attention_mask": mask}


def row_scores(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{"score": (B,)} through the whole model's forward pass, which every engine can wrap."""
    return {"score": model(**batch, use_cache=False).logits.squeeze(-1)}


def pair_metrics(pairs: Sequence[Row], scores: Scorer) -> dict[str, float]:
    """Accuracy and margin on pairs, beside what length alone would have said.

    A tie counts half. `score_length_correlation` is Pearson's, over all answers.
    """
    chosen = scores([pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs])
    rejected = scores([pair["prompt_ids"] + pair["rejected_ids"] for pair in pairs])
    lengths = np.array([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs], dtype=float)
    right = _preferred(chosen, rejected)
    low, high = wilson(right.sum(), len(pairs))
    return {
        "accuracy": float(right.mean()),
        "accuracy_low": low,
        "accuracy_high": high,
        "margin": float((chosen - rejected).mean()),
        "loss": float(np.logaddexp(0, rejected - chosen).mean()),
        "length_accuracy": float(_preferred(lengths[:, 0], lengths[:, 1]).mean()),
        "score_length_correlation": _correlation(np.concatenate([chosen, rejected]), lengths.T.reshape(-1)),
    }


def probe_metrics(pairs: Sequence[Row], stop_ids: Sequence[int], scores: Scorer) -> dict[str, float]:
    """How often the better answer scores above a spoilt one: empty, said three times, or broken off half-way."""
    spoilt = {
        "empty": [[stop_ids[0]] for pair in pairs],
        "repeated": [[*pair["chosen_ids"][:-1] * 3, pair["chosen_ids"][-1]] for pair in pairs],
        "broken_off": [pair["chosen_ids"][: max(1, len(pair["chosen_ids"]) // 2)] for pair in pairs],
    }
    chosen = scores([pair["prompt_ids"] + pair["chosen_ids"] for pair in pairs])
    return {
        f"beats_{name}": float(
            _preferred(chosen, scores([p["prompt_ids"] + a for p, a in zip(pairs, answers, strict=True)])).mean()
        )
        for name, answers in spoilt.items()
    }


def check_scores(
    path: Path, answers: Sequence[Sequence[int]], before: np.ndarray, encoder: Encoder, trainer: Trainer
) -> None:
    """The saved model, read back with the scorer that RL uses, gives the scores that were measured."""
    with models.whole_weights():
        model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32).to(trainer.args.device)
    with trainer.compute_loss_context_manager():
        after = score(model, answers, encoder.pad_id).double().numpy()
    scale = max(1.0, float(np.abs(before).max()))
    tolerance = 0.02 if trainer.args.bf16 else _TOLERANCE
    worst = float(np.abs(after - before).max()) / scale
    assert worst <= tolerance, f"scores of the saved reward model differ by {worst:.2g} from those before saving"


def _preferred(better: np.ndarray, worse: np.ndarray) -> np.ndarray:
    return (better > worse) + 0.5 * (better == worse)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    if a.std() == 0 or b.std() == 0:
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
