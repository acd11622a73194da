"""Held-out measurements per row, independent of how rows are put into batches and of the number of processes.

Legend: B rows, T tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import torch

from data.config import SourceConfig
from data.encode import Encoder
from data.records import Chat, Preference
from data.rows import Questions
from handoff.parent import Parent
from handoff.window import model_window
from rollout.engine import generate
from rollout.sampling import SamplingSpec

if TYPE_CHECKING:
    from training.run import Run
    from training.trainer import StageTrainer

_SHOWN = 8


@torch.no_grad()
def measure_rows(
    trainer: "StageTrainer",
    rows: Sequence[Any],
    lengths: "Sequence[int] | np.ndarray",
    collate: Callable[[list[Any]], dict[str, Any]],
    measure: Callable[[Any, dict[str, Any]], dict[str, torch.Tensor]],
) -> dict[str, np.ndarray]:
    """Measurements of the current model for each row, in the order of `rows`, the same on every process.

    Args:
        trainer: its wrapped model is measured, in evaluation mode and with the precision of training.
        rows: rows that `collate` accepts; at least one.
        lengths: tokens of each row; rows of similar length share a batch.
        collate: rows -> batch.
        measure: (model, batch) -> {name: (B,) tensor}.

    Returns:
        {name: (number of rows,) array}.
    """
    model = trainer.model_wrapped
    was_training = model.training
    model.eval()
    size = trainer.args.per_device_eval_batch_size
    by_length = np.argsort(-np.asarray(lengths, dtype=np.int64), kind="stable").tolist()
    batches = [by_length[start : start + size] for start in range(0, len(rows), size)]
    # Every process makes the same number of passes, since collectives need all; a surplus pass is not counted.
    engine = trainer.run.engine
    mine: list[tuple[list[int], dict[str, list[float]]]] = []
    try:
        for place, counts in engine.passes(len(batches)):
            batch = batches[place]
            inputs = trainer._prepare_inputs(collate([rows[i] for i in batch]))
            with trainer.compute_loss_context_manager():
                values = measure(model, inputs)
            if counts:
                mine.append((batch, {name: value.double().tolist() for name, value in values.items()}))
    finally:
        model.train(was_training)
    measured = [part for parts in engine.of_all(mine) for part in parts]
    result = {name: np.zeros(len(rows)) for name in measured[0][1]}
    for batch, columns in measured:
        for name, column in columns.items():
            result[name][batch] = column
    return result


def token_losses(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sums over each row's labels, each (B,): `nats`, `correct` (labels that were the likeliest token) and `tokens`.

    The model has TRL's fused head (`trl.trainer.utils.add_fused_lm_head`), so no logits of size (B, T, V) are made.
    """
    out = model(**batch, fused_lm_head=True)
    labelled = batch["labels"][:, 1:] != -100
    return {
        "nats": -out.log_probs.sum(-1),
        "correct": (out.is_top1 & labelled).sum(-1),
        "tokens": labelled.sum(-1),
    }


class TextWindows(Sequence[tuple[np.ndarray, int]]):
    """Windows over texts that score each token once, for bits per byte: those of lm-evaluation-harness.

    The windows of a text score `width` tokens each, and the last one the rest. A text's first token is predicted from
    the prefix token (`Encoder.prefix_id`), another window's first token from the token before it. The last window has
    more context: it is filled up to `width`. The tokens that end documents are not scored.
    """

    def __init__(self, documents: Sequence[Sequence[int]] | Sequence[np.ndarray], encoder: Encoder, width: int) -> None:
        """`documents`: ids as `Encoder.documents` returns them. `width`: the most tokens that the model reads at once
        (lm-evaluation-harness: `max_length`)."""
        self._texts = [document[encoder.text_part] for document in documents]
        self._prefix, self._width = encoder.prefix_id, width
        self._places = [  # text, and the range of its tokens that a window scores
            (i, start, min(start + width, len(text)))
            for i, text in enumerate(self._texts)
            for start in range(0, len(text), width)
        ]
        self.lengths = np.array([min(end, width) for _, _, end in self._places], dtype=np.int64)
        """Tokens that the model reads, (N,)."""
        self.texts = np.array([i for i, _, _ in self._places], dtype=np.int64)
        """Index of the text that each is a part of, (N,)."""

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> tuple[np.ndarray, int]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[np.ndarray, int]]: ...
    def __getitem__(self, index: int | slice) -> tuple[np.ndarray, int] | list[tuple[np.ndarray, int]]:
        """A window's tokens, of which the model reads all but the last, and how many at the end are scored."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number, start, end = self._places[index]
        text, first = self._texts[number], end - self._width - 1
        before = [self._prefix] if first < 0 else []
        return np.array([*before, *text[max(0, first) : end]], dtype=np.int64), end - start

    @staticmethod
    def collate(windows: Sequence[tuple[np.ndarray, int]]) -> dict[str, torch.Tensor]:
        """-> input_ids and shift_labels (B, T): the next tokens, -100 where they are not scored.

        Padding on the right needs no mask in a causal model.
        """
        width = max(len(tokens) for tokens, _ in windows) - 1
        ids = torch.zeros((len(windows), width), dtype=torch.long)
        labels = torch.full((len(windows), width), -100)
        for i, (tokens, count) in enumerate(windows):
            ids[i, : len(tokens) - 1] = torch.from_numpy(tokens[:-1])
            labels[i, len(tokens) - 1 - count : len(tokens) - 1] = torch.from_numpy(tokens[len(tokens) - count :])
        return {"input_ids": ids, "shift_labels": labels}


def window_nats(model: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Sum over each window's scored tokens, `nats` (B,). `model` and the reason for its head as in `token_losses`."""
    return {"nats": -model(**batch, fused_lm_head=True).log_probs.sum(-1)}


def questions(
    run: "Run",
    sources: Sequence[SourceConfig],
    want: type[Chat] | type[Preference],
    encoder: Encoder,
    count: int,
    parent: Parent,
    max_new_tokens: int,
) -> list[tuple[list[int], str]]:
    """Prompts for `greedy_answers`: (ids, text to show) of the questions in the first `count` held-out records.

    Questions after which an answer does not fit the parent's window are left out, which is said.
    """
    if not count:
        return []
    asked = [(ids, text) for ids, text in run.rows(sources, Questions(want), encoder, label=None)[:count] if ids]
    found = model_window(parent.weights_dir)
    if found is None:
        return asked
    fitting = [(ids, text) for ids, text in asked if len(ids) + max_new_tokens <= found.tokens]
    if len(fitting) < len(asked):
        run.console.print(
            f"  {len(asked) - len(fitting)} of {len(asked)} held-out questions are not answered: with max_new_tokens "
            f"{max_new_tokens} they exceed the window of {parent.name}, {found.tokens} tokens",
        )
    return fitting


def greedy_answers(
    run: "Run",
    trainer: "StageTrainer",
    encoder: Encoder,
    prompts: Sequence[tuple[Sequence[int], str]],
    max_new_tokens: int,
) -> dict[str, float]:
    """Generates greedy answers to prompts (ids, text to show), shared among the processes. The first few answers are
    written to samples.jsonl.

    Returns:
        `stop_rate`, the share of answers that ended with a stop token, and `answer_tokens`, the mean length of all;
        empty without prompts.
    """
    if not prompts:
        return {}
    spec = SamplingSpec.of(encoder, max_new_tokens, temperature=0.0)
    mine = run.engine.share(len(prompts))
    with run.engine.whole(trainer.model_wrapped) as model:
        done = generate(
            model,
            [prompts[i][0] for i in mine],
            spec,
            [("greedy", i) for i in mine],
            run.seed,
            batch_size=trainer.args.per_device_eval_batch_size,
        )
    answers = run.engine.join(zip(mine, done, strict=True))
    run.samples(
        trainer.state.global_step,
        [
            {"prompt": text, "completion": encoder.decode(answers[i].ids), "score": None, "source": "held-out data"}
            for i, (_, text) in enumerate(prompts[:_SHOWN])
        ],
    )
    return {
        "stop_rate": float(np.mean([answer.end == "stop" for answer in answers])),
        "answer_tokens": float(np.mean([len(answer.ids) for answer in answers])),
    }


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a share (Wilson 1927, J. Am. Stat. Assoc. 22)."""
    z = 1.96
    share = successes / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)
