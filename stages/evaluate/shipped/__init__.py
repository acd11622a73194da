"""Tasks that are shipped: for each, the values of a task's keys that a recipe does not write (docs/tasks.md)."""

from stages.evaluate.shipped import choices, code, instructions, maths, pairs, text
from stages.evaluate.shipped.declaration import Shipped

SHIPPED: dict[str, Shipped] = {
    **maths.TASKS,
    **choices.TASKS,
    **instructions.TASKS,
    **code.TASKS,
    **pairs.TASKS,
    **text.TASKS,
}
"""By name: `task: gsm8k`."""
