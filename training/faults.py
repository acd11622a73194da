"""Skips optimizer steps whose loss or gradient is not finite, and counts, logs and limits them.

One bad batch is no reason to lose a run; many in a row mean that the model is broken. A skipped step leaves weights and
moments unchanged. The learning rate follows the step number, which counts skipped steps too.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from handoff.errors import GateError

if TYPE_CHECKING:
    from training.run import Run

_SHOWN = 16  # rows shown on the console; metrics.jsonl has all


@dataclass
class Faults:
    """The numbers of skipped steps. They are part of every saved state, so that a resumed run continues the count."""

    total: int = 0
    in_a_row: int = 0

    def metrics(self) -> dict[str, int]:
        """Metrics for metrics.jsonl; empty while no step was skipped."""
        return {"skipped_steps": self.total} if self.total else {}

    def skip(self, run: "Run", step: int, limit: int, found: Mapping[str, float], batch: Mapping[str, Any]) -> None:
        """Records that step `step` is skipped. Every process calls it.

        Args:
            run: the stage's run.
            step: the step's number in metrics.jsonl.
            limit: `train.max_skipped_steps`.
            found: loss and gradient norm; at least one is not finite.
            batch: the rows of the batch, and other values that identify them.

        Raises:
            GateError: more than `limit` in a row.
        """
        self.total += 1
        self.in_a_row += 1
        name, value = next((name, value) for name, value in found.items() if not math.isfinite(value))
        # As text, since JSON has no infinity or NaN.
        numbers = {key: number if math.isfinite(number) else str(number) for key, number in found.items()}
        line = {f"skipped/{key}": entry for key, entry in (numbers | dict(batch)).items()}
        run.log(step, {"skipped_steps": self.total, **line})
        where = ", ".join(f"{key} {_shown(entry)}" for key, entry in batch.items())
        run.console.print(f"  skipped: {name} is {value} at step {step} ({where})")
        if self.in_a_row > limit:
            raise GateError(diverged(run.section.name, name, value, step, self.in_a_row))


def _shown(entry: int | Sequence[int]) -> str:
    if isinstance(entry, int):
        return str(entry)
    return " ".join(map(str, entry[:_SHOWN])) + (" ..." if len(entry) > _SHOWN else "")


def diverged(section: str, name: str, value: float, step: int, in_a_row: int) -> str:
    """The error message when `name` was not finite for too many steps."""
    return (
        f"{section}: {name} is {value} at step {step}, and {in_a_row} steps in a row were skipped "
        "(train.max_skipped_steps): training was stopped and nothing was published; the last saved state is intact. "
        "Usual causes: learning_rate too high or no warmup_steps; max_grad_norm 0; a row without a supervised token; "
        "broken weights in the parent (see the loss on the first line of metrics.jsonl); the rows that metrics.jsonl "
        "lists as skipped"
    )
