"""Our side of the reinforcement-learning benchmarks: the real stage, which pauses between two iterations.

    python -m benchmarks.rl_ours RECIPE SECTION      (started by benchmarks/turns.py, not by hand)

`Run.log` is called once per iteration; here it also waits for the next turn. The rest is the unchanged stage.
"""

import sys
from pathlib import Path
from typing import Any

from benchmarks.turns import Turns
from training import engines
from training import run as frame
from training.recipe import load_recipe


class SteppedRun(frame.Run):
    """A `Run` whose `log` waits for the next turn."""

    turns: Turns

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        super().log(step, metrics)
        self.turns.done(metrics)


def main() -> None:
    """Runs the section until the other end closes."""
    recipe = load_recipe(Path(sys.argv[1]))
    name = sys.argv[2]
    engines.start()
    # Imported before memory is counted, as the peer imports its own.
    import datasets  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401

    import stages.ppo.train  # noqa: F401

    SteppedRun.turns = Turns()
    frame.run_section(recipe, name, make=SteppedRun)


if __name__ == "__main__":
    main()
