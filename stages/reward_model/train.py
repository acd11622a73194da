"""Reward modelling with TRL's RewardTrainer, and a report card of the trained model.

    python -m stages.reward_model recipes/tiny.yaml
    accelerate launch --config_file recipes/launch/ddp.yaml -m stages.reward_model recipes/tiny.yaml

The score is read at the last token of prompt and answer, which is the stop token. The trained model is measured on
held-out pairs, and the result is written to card.json beside the manifest (card.py describes it). A model that does not
reach the recipe's `gate:` is not published. The manifest holds the mean and standard deviation of the scores, by which
RL normalises them.
"""

from collections.abc import Callable, Sequence
from typing import Any, overload

import numpy as np
import torch
from trl import RewardConfig, RewardTrainer

from data.overlap import MOST_SHARED, MOST_SHARED_BY_GATE
from data.rows import Pairs
from handoff.contract import check_same_encoding
from handoff.files import write_json
from handoff.parent import Parent
from handoff.refused import Verdict
from reward.learned import score, statistics
from rollout.positions import check_positions
from stages.reward_model.card import Row, agreement, make_card, pair_metrics, spoilt_answers
from stages.reward_model.config import Config
from stages.reward_model.schema import Ensemble
from training.limits import within_window
from training.measure import measure_rows
from training.model import Model, load_encoder
from training.precision import trained_dtype
from training.run import Run
from training.trainer import StageTrainer, StepOrder, arguments, fit

CARD = "card.json"
ADVICE = (
    f"{CARD} there has the whole card. A policy would learn the model's mistakes. What helps: more or cleaner pairs; "
    "against length, pairs whose better answer is the shorter one; against a probe, pairs with such answers as the "
    "worse ones. "
)
_COMPARED = 32
# The two forward passes use batches of different shapes, so float32 results differ in their last bits.
_TOLERANCE = 1e-4
_ALIKE = 0.9
Scorer = Callable[[Sequence[Sequence[int]]], np.ndarray]


class Trainer(StageTrainer, RewardTrainer):
    """TRL's trainer with the behaviour that all stages share."""


def train(run: Run) -> None:
    """Runs the stage."""
    config: Config = run.config
    parent = run.parent()
    encoder = load_encoder(parent)
    others = {ref: open_member(run, ref, parent) for ref in config.ensemble_with}

    # Data: pairs of whole conversations.
    longest = within_window(run, [parent, *others.values()], "max_length", config.max_length)
    kind = Pairs(longest, config.truncation)
    rows = run.rows(config.data, kind, encoder, max_drop_fraction=config.max_drop_fraction)
    heldout: list[Row] = []
    if config.eval_data:
        # A gate that is passed on training pairs would let every model pass.
        most = MOST_SHARED_BY_GATE if "gate" in config.model_fields_set else MOST_SHARED
        drop = config.max_drop_fraction
        held = run.rows(config.eval_data, kind, encoder, "held-out data", drop, apart_from=rows, most_shared=most)
        heldout = list(held)

    # Model and trainer. Members of an ensemble see the same data, each in its own order.
    if config.seed is not None:
        run.seed = config.seed
    coefficient = config.center_rewards_coefficient or None
    args = arguments(RewardConfig, run, len(rows), max_length=None, center_rewards_coefficient=coefficient)
    dtype = trained_dtype(run.engine, config.model_args, config.adapter)
    model = Model.load(
        run.engine,
        parent,
        "reward",
        encoder,
        config.model_args,
        dtype=dtype,
        dropout=False,
        bf16=bool(args.bf16),
        seed=run.seed,
        adapter=config.adapter,
        quantization=config.frozen_weights(),
        publish=config.publish_dtype,
    )
    check_positions(model.module, max([int(rows.lengths.max()), *map(kind.length, heldout)]))
    run.rehearse("reward_model", model)
    trainer = Trainer(
        model=model.module,
        args=args,
        train_dataset=rows.dataset(whole),
        processing_class=encoder.tokenizer,
    )
    lengths = rows.lengths if config.group_by_length else None
    order = StepOrder(len(rows), config.train.global_batch_size, run.seed, lengths)

    def scores(answers: Sequence[Sequence[int]]) -> np.ndarray:
        lengths = np.fromiter(map(len, answers), dtype=np.int64, count=len(answers))
        found = measure_rows(trainer, answers, lengths, Collator(encoder.pad_id), row_scores)
        return found["score"]

    def hold_out() -> dict[str, float]:
        if not heldout:
            return {}
        chosen, rejected = np.split(scores(BothAnswers(heldout)), 2)
        return pair_metrics(chosen, rejected, answer_lengths(heldout))

    fit(run, trainer, model, order, hold_out)

    # Measure the model. Without held-out pairs the statistics come from the training pairs, and there is no card.
    metrics = trainer.evaluate()
    answers = BothAnswers(heldout or rows)
    values = scores(answers)
    extra = {"reward_mean": float(values.mean()), "reward_std": float(max(values.std(), 1e-6))}
    verdicts: list[Verdict] = []
    if heldout:
        normalised = (values - extra["reward_mean"]) / extra["reward_std"]
        chosen, rejected = np.split(values, 2)
        card = make_card(
            chosen,
            rejected,
            answer_lengths(heldout),
            probe_scores(heldout, encoder.stop_ids[0], scores),
            config.gate,
            measure_ensemble(run, config, normalised, answers, others),
        )
        metrics |= {"eval_ece": card.ece, "eval_over_length": card.over_length}
        metrics |= {f"eval_beats_{p.name}": p.share.value for p in card.probes if p.share is not None}
        if run.is_main:
            write_json(run.dir.made(CARD), card.model_dump(mode="json"))
        for finding in card.findings:
            run.console.print(f"  note: {run.section.name} {finding}")
        run.engine.barrier()
        verdicts = [Verdict(metric="the report card", passed=False, said=reason) for reason in card.gate]
    check_scores(model, answers[:_COMPARED], values[:_COMPARED], trainer)
    write = lambda path: model.write(path, trainer.model_wrapped)  # noqa: E731
    files = [CARD] if heldout else []
    run.publish(
        "reward_model",
        write,
        metrics,
        extra,
        files=files,
        step=trainer.state.global_step,
        adapter=model.adapter_record(run.section.name),
        verdicts=verdicts,
        advice=ADVICE,
    )


class Collator:
    """Pads answers on the right."""

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
    """{"score": (B,)}, from the model's own `forward`, so that it works under every engine's wrapper."""
    return {"score": model(**batch, use_cache=False).logits.squeeze(-1)}


def whole(pair: Row) -> Row:
    """Prompt and answer concatenated, as TRL's trainer expects them."""
    return {key: pair["prompt_ids"] + pair[key] for key in ("chosen_ids", "rejected_ids")}


class BothAnswers(Sequence[list[int]]):
    """Prompt and answer of every pair: first all chosen ones, then all rejected ones."""

    def __init__(self, pairs: Sequence[Row]) -> None:
        self._pairs = pairs

    def __len__(self) -> int:
        return 2 * len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[int]]: ...
    def __getitem__(self, index: int | slice) -> list[int] | list[list[int]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        rejected, place = divmod(index, len(self._pairs))
        pair = whole(self._pairs[place])
        ids: list[int] = pair["rejected_ids" if rejected else "chosen_ids"]
        return ids


def answer_lengths(pairs: Sequence[Row]) -> np.ndarray:
    """Tokens of the chosen and of the rejected answers, (N, 2)."""
    return np.array([[len(pair["chosen_ids"]), len(pair["rejected_ids"])] for pair in pairs], dtype=float)


def probe_scores(pairs: Sequence[Row], stop_id: int, scores: Scorer) -> dict[str, np.ndarray]:
    """For each probe, the scores (N,) of the spoilt answers; NaN where a pair has none."""
    found = {}
    for name, answers in spoilt_answers(pairs, stop_id).items():
        there = [i for i, answer in enumerate(answers) if answer is not None]
        found[name] = np.full(len(pairs), np.nan)
        if there:
            found[name][there] = scores([pairs[i]["prompt_ids"] + (answers[i] or []) for i in there])
    return found


def open_member(run: Run, ref: str, parent: Parent) -> Parent:
    """Opens a reward model to compare with, before training starts. Raises HandoffError if it is not comparable."""
    member = run.parent(f"ensemble:{ref}")
    check_same_encoding(parent, member, "they are compared on the same tokens; leave it out of `ensemble_with`")
    return member


def measure_ensemble(
    run: Run, config: Config, normalised: np.ndarray, answers: Sequence[Sequence[int]], others: dict[str, Parent]
) -> Ensemble | None:
    """Agreement of this model with others. Each process scores its share of the answers with every other model.

    Args:
        normalised: this model's scores of `answers`, chosen ones first, (2 N,).
    """
    if not others:
        return None
    members = {run.section.name: normalised}
    mine = run.engine.share(len(answers))
    for ref, parent in others.items():
        encoder = load_encoder(parent)
        keys: dict[str, Any] = {"dtype": None, "dropout": False, "bf16": False, "frozen": True}
        member = Model.load(run.engine, parent, "reward", encoder, config.model_args, **keys)
        with member.freeze().whole() as module:
            raw = score(module, [answers[i] for i in mine], parent.tokenizer.pad_id).tolist()
        found = np.array(run.engine.join(zip(mine, raw, strict=True)))
        mean, std = statistics(parent) or (found.mean(), found.std())
        members[ref] = (found - mean) / std
    pairs = len(answers) // 2
    return agreement({name: (values[:pairs], values[pairs:]) for name, values in members.items()})


def check_scores(model: Model, answers: Sequence[Sequence[int]], measured: np.ndarray, trainer: Trainer) -> None:
    """Asserts that the scorer which RL uses gives the same scores as the forward pass of training.

    Under autocast the `measured` scores are rounded at every product. A real model's can then be off by a tenth and
    more, since a score is the small sum of a head's large terms. So the scorer is compared with the model's own forward
    pass, both without autocast; and where the weights themselves are rounded, by the correlation of the two.
    """
    rounded = model.dtype == torch.bfloat16
    with model.whole(trainer.model_wrapped) as module:
        after = score(module, answers, model.encoder.pad_id).double().numpy()
        before = measured
        if trainer.args.bf16 or rounded:
            batch = {key: value.to(module.device) for key, value in Collator(model.encoder.pad_id)(answers).items()}
            before = row_scores(module, batch)["score"].double().cpu().numpy()
    worst = float(np.abs(after - before).max()) / max(1.0, float(np.abs(before).max()))
    alike = rounded and np.corrcoef(after, before)[0, 1] > _ALIKE
    assert worst <= _TOLERANCE or alike, (
        f"the scores that RL would compute differ by {worst:.2g} from those of training"
    )
