"""What a model says to the probes, and how two models differ in it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from data.encode import Encoder


@dataclass(frozen=True)
class Answers:
    """A model's answers. One entry in `best` and `log_probs` for each token of the rows that follows another one."""

    best: list[int]
    """The likeliest token there."""
    log_probs: list[float]
    """Of the token that is there."""
    answer: list[int]
    """The greedy answer to the question, without the token that ended it."""
    ended: bool
    """Whether it ended by itself; False if no question was asked."""


@dataclass(frozen=True)
class Difference:
    """How far one model's answers are from another's."""

    positions: int
    agreement: float
    """Share of the positions with the same likeliest token."""
    largest: float
    """Largest difference of a log-probability, in nats."""
    mean: float
    """Mean absolute difference."""
    loss: float
    """By how much the mean log-probability is lower, in nats per token."""

    def told(self) -> str:
        """In a sentence."""
        return (
            f"over {self.positions} positions the same likeliest token in {100 * self.agreement:.1f} %, |Δ log p| "
            f"{self.mean:.1e} on average and {self.largest:.1e} at most, loss {self.loss:+.4f} nats per token"
        )


def answers_of(
    module: "PreTrainedModel",
    encoder: "Encoder",
    rows: Sequence[Sequence[int]],
    question: Sequence[int],
    longest: int,
) -> Answers:
    """A transformers model's answers. `longest`: tokens of the greedy answer."""
    import torch

    from rollout.engine import generate
    from rollout.sampling import SamplingSpec

    best: list[int] = []
    log_probs: list[float] = []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([row], device=module.device)
            found = module(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)  # (T, V)
            best += found.argmax(-1).tolist()
            log_probs += found.gather(1, ids[0, 1:, None])[:, 0].tolist()
    if not question:
        return Answers(best, log_probs, [], ended=False)
    spec = SamplingSpec.of(encoder, longest, temperature=0.0)
    (said,) = generate(module, [question], spec, [("export",)], 0)
    ended = said.end == "stop"
    return Answers(best, log_probs, said.ids[:-1] if ended else said.ids, ended)


def difference(before: Answers, after: Answers) -> Difference:
    """How far `after` is from `before`, to the same rows."""
    gaps = [now - then for then, now in zip(before.log_probs, after.log_probs, strict=True)]
    same = sum(one == other for one, other in zip(before.best, after.best, strict=True))
    return Difference(
        positions=len(gaps),
        agreement=same / len(gaps),
        largest=max(abs(gap) for gap in gaps),
        mean=sum(abs(gap) for gap in gaps) / len(gaps),
        loss=(0.0 - sum(gaps)) / len(gaps),
    )
