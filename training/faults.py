"""Optimizer steps that are skipped, since their loss or their gradient is not finite: counted, logged, limited.

A batch may be broken, and one is no reason to lose a run; many in a row are a model that has broken. What is skipped
leaves weights and moments as they were. The learning rate follows the number of the step, skipped or not.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from handoff.errors import GateError

if TYPE_CHECKING:
    from training.run import Run

_SHOWN = 16  # rows on the console; metrics.jsonl has all


@dataclass
class Faults:
    """How many steps were skipped. Part of every saved state, so that a resumed run counts on."""

    total: int = 0
    in_a_row: int = 0

    def metrics(self) -> dict[str, int]:
        """For the lines of metrics.jsonl, once there is something to say."""
        return {"skipped_steps": self.total} if self.total else {}

    def skip(
        self, run: "Run", step: int, limit: int, found: Mapping[str, float], batch: Mapping[str, int | Sequence[int]]
    ) -> None:
        """Takes note that step `step` is skipped. Every process calls it.

        Args:
            run: of the stage.
            step: the number of the line in metrics.jsonl.
            limit: `train.max_skipped_steps`.
            found: loss and gradient norm, of which one at least is not finite.
            batch: which rows it was, and what else tells where they are.

        Raises:
            GateError: more than `limit` in a row.
        """
        self.total += 1
        self.in_a_row += 1
        name, value = next((name, value) for name, value in found.items() if not math.isfinite(value))
        # As text, since JSON knows no such number.
        numbers = {key: number if math.isfinite(number) else str(number) for key, number in found.items()}
        line = {f"skipped/{key}": entry for key, entry in (numbers | dict(batch)).items()}
        run.log(step, {"skipped_steps": self.total, **line})
        where = ", ".join(f"{key} {_shown(entry)}" for key, entry in batch.items())
        run.console.print(f"  skipped: {name} is {value} at step {step} ({where})", markup=False, soft_wrap=True)
        if self.in_a_row > limit:
            raise GateError(diverged(run.section.name, name, value, step, self.in_a_row))


def _shown(entry: int | Sequence[int]) -> str:
    if isinstance(entry, int):
        return str(entry)
    return " ".join(map(str, entry[:_SHOWN])) + (" ..." if len(entry) > _SHOWN else "")


def diverged(section: str, name: str, value: float, step: int, in_a_row: int) -> str:
    """What to say when `name` has been not finite for so long."""
    return (
        f"{section}: {name} is {value} at step {step}, and {in_a_row} steps in a row were skipped "
        "(train.max_skipped_steps): training was stopped and nothing was published; the last saved state is intact. "
        "Usual causes: learning_rate too high or no warmup_steps; max_grad_norm 0; a row without a supervised token; "
        "broken weights in the parent (its own loss on the first line of metrics.jsonl tells); the rows that are "
        "named there as skipped"
    )
