"""`baton rehearse`: every stage of a recipe once, in about a minute on a CPU, before its real run is paid for.

The stages are run as `baton run` runs them, from the same recipe, with values laid over it: what each stage declares
for a rehearsal (`StageConfig.rehearsal`), tiny models in place of those that the recipe starts from
(`training/shrink.py`), and a run folder of its own, which is removed at the end.
"""

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from baton.runner import run_pipeline
from handoff.errors import UserError
from handoff.files import check_writable
from handoff.parent import outline
from handoff.verify import verify_run
from training.config import REHEARSED_HELD_OUT, REHEARSED_ROWS, StageConfig
from training.engines.shares import planned
from training.recipe import DATA_ROLE, Recipe, Section, leaves, load_recipe
from training.terminal import Screen

_MODELS = "models"


def rehearse(path: Path, overrides: Sequence[str], to: Sequence[str], launch: Path | None, *, keep: bool) -> int:
    """The command `baton rehearse` (see `baton.cli.rehearse`). Returns the exit code: 2 if a stage fails.

    Raises:
        UserError: a mistake in the recipe, its data or the launch file, or a parent that is not there.
    """
    begun = time.monotonic()
    recipe = load_recipe(path, overrides)
    names = recipe.order(to or None)
    processes = planned(launch, "cpu").processes
    console = Screen()
    with _folder(recipe, keep=keep) as folder:
        console.print(f"rehearsal in {folder}{'' if keep else ', which is removed at the end'}")
        words, models = [f"output_root={json.dumps(str(folder))}"], Models(recipe, folder / _MODELS)
        for name in names:
            section = recipe.sections[name]
            changed = section.config.rehearsal(processes)
            console.print(f"  {name}: {' '.join(f'{key}={_shown(value)}' for key, value in changed.items())}")
            changed |= models.named(section)
            words += [f"{name}.{key}={json.dumps(value)}" for key, value in changed.items()]
        for line in models.made.values():
            console.print(f"  {line}")
        rehearsed = load_recipe(path, (*overrides, *words))
        code = run_pipeline(rehearsed, names, (), launch, dry_run=False, kept=keep)
        if code:
            if not keep:
                Screen(stderr=True).print("`--keep` leaves the rehearsal's folder, with its logs and models")
            return code if code > 128 else 2
        problems = verify_run(rehearsed.run_dir)
        if problems:
            raise UserError("\n".join(f"{problem.stage}/{problem.file}: {problem.message}" for problem in problems))
        took = time.monotonic() - begun
    for line in [*_checked(names, took), *_not_checked(recipe, names, launch, stood_in=bool(models.made))]:
        console.print(line)
    if keep:
        console.print(f"kept: {rehearsed.run_dir}")
    return 0


@contextmanager
def _folder(recipe: Recipe, *, keep: bool) -> Iterator[Path]:
    """A new folder in the recipe's output_root; it is removed in the end, unless it is kept."""
    check_writable(recipe.output_root)
    recipe.output_root.mkdir(parents=True, exist_ok=True)
    prefix = f"rehearsal-{recipe.name}-"
    if keep:
        yield Path(tempfile.mkdtemp(prefix=prefix, dir=recipe.output_root))
        return
    with tempfile.TemporaryDirectory(prefix=prefix, dir=recipe.output_root) as name:
        yield Path(name)


class Models:
    """Tiny models in place of those from outside of the recipe that its sections start from, one for each."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self._recipe = recipe
        self._folder = folder
        self._directories: dict[str, str | None] = {}
        self.made: dict[str, str] = {}
        """{reference: what it is replaced by, in words}"""

    def named(self, section: Section) -> dict[str, Any]:
        """{key: the tiny model's directory} for every key of a section that names a model from outside.

        Raises:
            HandoffError: the model is not there, cannot be fetched, or no tiny one of its architecture can be made.
        """
        roles = section.references.items()
        refs = {ref for role, ref in roles if not role.startswith(DATA_ROLE)}
        tiny = {ref: self._directory(ref) for ref in sorted(refs - self._recipe.sections.keys())}
        found = {}
        for path in leaves(section.resolved):
            value: Any = section.resolved
            for part in path:
                value = value[part]
            named = value if isinstance(value, list) else [value]
            if any(isinstance(one, str) and tiny.get(one) for one in named):
                new = [tiny.get(one) or one for one in named]
                found[".".join(map(str, path))] = new if isinstance(value, list) else new[0]
        return found

    def _directory(self, ref: str) -> str | None:
        """The directory of a tiny model like `ref`; None if that is a tokenizer, which is used as it is."""
        if ref not in self._directories:
            seen = outline(ref, self._recipe.run_dir)
            self._directories[ref] = None
            if seen.kind != "tokenizer":
                from training.shrink import write_tiny

                place = self._folder / str(len(self._directories))
                place.parent.mkdir(exist_ok=True)
                made = write_tiny(seen, place)
                self._directories[ref] = str(place)
                inner = made.get_text_config()
                whole = ", whole instead of an adapter" if seen.adapted else ""
                self.made[ref] = (
                    f"{ref}: a {made.model_type} of {inner.num_hidden_layers} layers of width {inner.hidden_size} with "
                    f"random weights{whole}; tokenizer, chat template and generation settings are its own"
                )
        return self._directories[ref]


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) or value is None else str(value).lower()


def _checked(names: Sequence[str], took: float) -> list[str]:
    return [
        f"rehearsed in {took:.0f} s: {', '.join(names)}",
        f"  checked: the rows of every source are read and encoded (the first {REHEARSED_ROWS} of training data, "
        f"{REHEARSED_HELD_OUT} of others);",
        "  every reward function runs; every section trains, evaluates, saves a state and publishes; what it publishes",
        "  is read by the sections that start from it; every file is as it was published",
    ]


def _not_checked(recipe: Recipe, names: Sequence[str], launch: Path | None, *, stood_in: bool) -> list[str]:
    """What a rehearsal says nothing about."""
    configs: list[StageConfig] = [recipe.sections[name].config for name in names]
    told = [f"memory, disk and time: `baton plan {recipe.path}` says them, with --gpu and --launch"]
    if stood_in or any(config.network() for config in configs):
        told.append("what the real weights are and learn: rewards, scores and losses of random weights mean nothing")
    told.append("the rows after the first ones, and the values printed above, which were laid over the recipe's own")
    told.append("what happens on GPUs alone: bfloat16, attention kernels, compilation, vLLM")
    if launch is None:
        told.append("several processes: --launch recipes/launch/cpu2_zero3.yaml, or another cpu2 file, rehearses them")
    return ["  not checked:", *(f"    - {line}" for line in told)]
