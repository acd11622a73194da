"""Computes what a stage's result depends on. The runner compares it with the record in a published stage. No torch."""

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

from data.config import StageSource
from data.fingerprint import fingerprints
from handoff.errors import HandoffError
from handoff.files import canonical_hash, sha256_file
from handoff.manifest import MODEL_KINDS, Inputs
from handoff.parent import known_hashes, open_dataset, open_parent
from handoff.stage import StageDir
from training.recipe import DATA_ROLE, Recipe, Section

_ROOT = Path(__file__).resolve().parent.parent
_NAMED = re.compile(r"[a-z_]+(\.[a-z_]+)+:\w+")
# Keys that decide only what is kept or shown, how a step is divided into micro-batches, and how a stage stops and
# resumes. They change what is learned in the last bits at most, so a state can be resumed on other hardware.
_WITHOUT_EFFECT = {
    "report_to",
    "save_total_limit",
    "resume",
    "grace_seconds",
    "max_skipped_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "rollout_micro_batch_size",
}
# Keys of a section that decide only whether its result is published.
_DEMANDS = {"gate"}


def stage_inputs(recipe: Recipe, name: str) -> Inputs:
    """The inputs of section `name`.

    Raises:
        HandoffError: a parent has not been published, or is no checkpoint.
        DataError: a data source does not exist.
    """
    section = recipe.sections[name]
    parents = {ref: _parent_fingerprint(recipe, ref, role, name) for role, ref in section.parents.items()}
    for model in present_soft_parents(recipe, section):
        parents[model] = _parent_fingerprint(recipe, model, "model", name)
    keys = _without(section.config.model_dump(mode="json"))
    return Inputs(
        recipe={**{key: value for key, value in keys.items() if key not in _DEMANDS}, "stage": section.stage},
        parents=parents,
        # The rows of another stage are among the parents.
        data=fingerprints(
            [source for source in section.config.sources() if not isinstance(source, StageSource)],
            recipe.data_root,
            known_hashes(recipe.run_dir).sha256,
        ),
        code=code_fingerprint(section.stage),
        seed=recipe.seed,
        demands={key: value for key, value in keys.items() if key in _DEMANDS},
    )


def present_soft_parents(recipe: Recipe, section: Section) -> list[str]:
    """The soft parents of `section` that exist, in the recipe's order: published sections, and checkpoints outside
    the recipe."""
    return [
        ref
        for ref in dict.fromkeys(section.soft_parents)
        if ref not in recipe.sections or StageDir(recipe.run_dir / ref).manifest() is not None
    ]


@cache
def code_fingerprint(stage: str) -> str:
    """Hash of the code that computes the result: all of the repository's files that the stage imports, directly or
    indirectly."""
    return canonical_hash({str(file.relative_to(_ROOT)): sha256_file(file) for file in code_files(stage)})


def code_files(stage: str) -> list[Path]:
    """The repository's files that the stage imports, directly or indirectly, sorted.

    Imports inside functions count, and so do strings of the form `module:name`, which name reward functions. Of a
    package inside a package all files count, because the sandbox starts some of its files as programs.
    """
    waiting = sorted((_ROOT / "stages" / stage).rglob("*.py"))
    found = set(waiting)
    while waiting:
        new = set(_imported(waiting.pop())) - found
        found |= new
        waiting += new
    return sorted(found)


@cache
def _imported(file: Path) -> list[Path]:
    """The repository's files that a file imports: modules, and the packages that contain them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # `from package import module` and `from module import name` look alike.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAMED.fullmatch(node.value):
            names.add(node.value.partition(":")[0])
    files: list[Path] = []
    for name in names:
        parts = name.split(".")
        for length in range(1, len(parts) + 1):
            path = _ROOT.joinpath(*parts[:length])
            files += [place for place in (path.with_suffix(".py"), path / "__init__.py") if place.is_file()]
            if length == 2 and (path / "__init__.py").is_file():
                files += sorted(path.rglob("*.py"))
    return files


def _parent_fingerprint(recipe: Recipe, ref: str, role: str, reader: str) -> str:
    if ref in recipe.sections:
        manifest = StageDir(recipe.run_dir / ref).manifest()
        if manifest is None:
            raise HandoffError(
                f"{recipe.run_dir / ref}: not published yet; make it with `baton run {recipe.path} --to {ref}`"
            )
        return manifest.fingerprint
    if role.startswith(DATA_ROLE):
        return open_dataset(ref, recipe.run_dir, reader, verify=False).manifest.fingerprint
    kinds: set[str] = {"tokenizer", *MODEL_KINDS}
    return open_parent(ref, recipe.run_dir, kinds, verify=False).fingerprint


def _without(value: dict[str, Any]) -> dict[str, Any]:
    kept = {key: item for key, item in value.items() if key not in _WITHOUT_EFFECT}
    return {key: _without(item) if isinstance(item, dict) else item for key, item in kept.items()}
