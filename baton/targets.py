"""Which model a command is about: a section of a run, the folder of a model, a .gguf file, or a model of the hub.

No torch here.
"""

from collections.abc import Collection, Sequence
from pathlib import Path

from baton.runs import run_dir_of
from handoff.errors import UserError
from handoff.gate import ADAPTER_CONFIG
from handoff.gguf import is_gguf
from handoff.manifest import Kind, Manifest
from handoff.parent import Parent, open_parent
from handoff.stage import StageDir
from training.recipe import load_recipe
from training.recipe_text import did_you_mean
from training.registry import Registry

_LANGUAGE_MODELS: tuple[Kind, ...] = ("causal_lm",)


def open_target(target: str, kinds: Collection[Kind] = _LANGUAGE_MODELS) -> Parent:
    """Opens `RUN`, `RUN:SECTION`, a model's folder or file, or an id of the hub. RUN is a recipe or a run's folder.

    `kinds`: those of which the model may be.

    Raises:
        UserError, HandoffError: as `open_models`.
    """
    run, colon, name = target.rpartition(":")
    if colon and not Path(target).exists():
        return open_models(Path(run), [name], kinds)[0]
    path = Path(target)
    if path.exists() or target.count("/") != 1 or path.suffix in (".yaml", ".yml", ".gguf"):
        return open_models(path, [], kinds)[0]
    return open_parent(target, Path("runs"), kinds)


def open_models(target: Path, names: Sequence[str], kinds: Collection[Kind] = _LANGUAGE_MODELS) -> list[Parent]:
    """The models to talk to. `target` is a recipe, the folder of a run, or the folder of one model.

    Without names: the newest aligned model of the run, or the newest instruction-tuned one.

    Raises:
        UserError: the target does not exist, or the run has no model to chat with or no section of that name.
        HandoffError: a model is missing, unfinished, altered, or of another kind.
    """
    if is_gguf(target) or (target.is_dir() and _is_model(target)):
        if names:
            raise UserError(f"{target} is one model; --model and --compare need a recipe or the folder of a run")
        return [open_parent(str(target.resolve()), Path("runs"), kinds)]
    run_dir = run_dir_of(target)
    for name in names:
        _check_section(name, target, run_dir)
    return [open_parent(name, run_dir, kinds) for name in names or [default_model(run_dir)]]


def _check_section(name: str, target: Path, run_dir: Path) -> None:
    """Raises UserError, with the sections that there are, if `name` is none of them and neither a path nor a hub id."""
    if "/" in name or (run_dir / name).is_dir() or Path(name).exists():
        return
    if target.is_file():
        load_recipe(target).section(name)
        return
    known = sorted(folder.name for folder in run_dir.iterdir() if _is_model(folder))
    hint = did_you_mean(name, known) or f"; there are {', '.join(known) or 'none'}"
    raise UserError(f"{run_dir}: no section {name}{hint}")


def _is_model(folder: Path) -> bool:
    return any((folder / name).exists() for name in ("config.json", ADAPTER_CONFIG, "stage.json", "started.json"))


def default_model(run_dir: Path) -> str:
    """The section whose model is the newest of the most aligned kind. Raises UserError when there is none."""
    registry = Registry()
    found: list[tuple[bool, str, str]] = []
    for folder in run_dir.iterdir():
        manifest: Manifest | None = StageDir(folder).manifest()
        if manifest is not None and manifest.kind == "causal_lm":
            answers = registry.declaration(manifest.stage).answers
            if answers != "no":
                found.append((answers == "aligned", manifest.created, manifest.name))
    if not found:
        tuning = " or ".join(stage for stage, known in registry.declarations().items() if known.answers == "tuned")
        raise UserError(
            f"{run_dir}: no model has been taught to answer yet; make one with `baton run <recipe> --to {tuning}`"
        )
    return max(found)[2]
