"""Mirrors metrics.jsonl to experiment trackers: Weights & Biases, TensorBoard, MLflow, Trackio.

Each tracker has a process of its own (`python -m training.trackers`), which may be slow, hang or die without delaying a
step. It reads metrics.jsonl and records which lines it has sent (`<stage>/trackers/<tracker>/sent.jsonl`).

    destinations.py  where the lines of a tracker go, as the environment says
    mirror.py        the stage's side: starts the processes, and says what became of them
    sending.py       the process's side: reads the lines and records what was sent
    sinks.py         one class for each tracker: how a line is written there

No torch here.
"""

from collections.abc import Sequence
from importlib.util import find_spec

from training.config import Tracker
from training.recipe import Recipe, RecipeError

PACKAGES: dict[Tracker, tuple[str, str]] = {
    "wandb": ("wandb", "baton-align[wandb]"),
    "tensorboard": ("tensorboard", "baton-align[track]"),
    "mlflow": ("mlflow", "baton-align[track]"),
    "trackio": ("trackio", "trackio"),
}
"""{tracker: (the package that it needs, what `pip install` is given for it)}."""


def check_trackers(recipe: Recipe, names: Sequence[str]) -> None:
    """Checks that the package of every tracker that these sections name is installed. Raises RecipeError."""
    for section in (recipe.sections[name] for name in names):
        train = section.config.training()
        for tracker in () if train is None else train.report_to:
            package, wanted = PACKAGES[tracker]
            spec = find_spec(package)
            if spec is None or spec.origin is None:  # without an origin: a folder of that name, such as wandb's own
                places = [place for key, place in section.provenance.items() if key.startswith("train.report_to")]
                raise RecipeError(
                    f"{places[0]}: {section.name}.train.report_to: {tracker} is not installed: pip install '{wanted}'"
                )
