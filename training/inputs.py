"""Computes what a stage's result depends on. The runner compares it with the record in a published stage. No torch."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data.config import StageSource
from data.errors import DataError
from data.fingerprint import fingerprints
from handoff.errors import HandoffError
from handoff.files import canonical_hash, hash_tree
from handoff.manifest import MODEL_KINDS, Inputs, Kind
from handoff.parent import known_hashes, open_dataset, open_parent
from handoff.stage import StageDir
from reward.config import RewardConfig
from reward.functions import FUNCTIONS
from training.closure import code_fingerprint, function_fingerprint
from training.recipe import DATA_ROLE, Recipe, Section

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
    keys = effective(section.config)
    return Inputs(
        recipe={**{key: value for key, value in keys.items() if key not in _DEMANDS}, "stage": section.stage},
        parents=parents,
        # The rows of another stage are among the parents.
        data=fingerprints(
            [source for source in section.config.sources() if not isinstance(source, StageSource)],
            recipe.data_root,
            known_hashes(recipe.run_dir).sha256,
        )
        | {f"folder:{folder}": _folder_hash(folder) for folder in section.config.folders()},
        code=code_fingerprint(section.stage),
        functions={function: function_fingerprint(function) for function in sorted(_own_functions(section.config))},
        seed=recipe.seed,
        demands={key: value for key, value in keys.items() if key in _DEMANDS},
    )


def present_soft_parents(recipe: Recipe, section: Section) -> list[str]:
    """The soft parents of `section` that exist, in the recipe's order: published sections, and checkpoints outside
    the recipe."""
    return [
        ref
        for ref in dict.fromkeys(section.soft_parents.values())
        if ref not in recipe.sections or StageDir(recipe.run_dir / ref).manifest() is not None
    ]


def effective(config: BaseModel) -> dict[str, Any]:
    """The keys and values of a section, or of a part of it, on which the result depends, as plain values.

    Left out are the keys that a class lists under `without_effect`: they decide only what is kept or shown, how a step
    is divided into micro-batches, and how a stage stops and resumes. They change what is learned in the last bits at
    most, so a state can be resumed with other values of them. With dropout, other micro-batches drop other values, as
    another number of processes does: that is an equally good draw of the same training, and no reason to repeat it.
    """
    left_out = without_effect(type(config))
    keys = {name: _plain(value) for name, value in config if name not in left_out}
    if isinstance(config, RewardConfig) and config.function == "judge":
        from reward.judge_config import JudgeConfig

        unread = without_effect(JudgeConfig)
        keys["args"] = {name: value for name, value in keys["args"].items() if name not in unread}
    return keys


def without_effect(model: type[BaseModel]) -> set[str]:
    """The keys of a configuration class on which the result does not depend, inherited ones included."""
    return {key for owner in model.__mro__ for key in vars(owner).get("without_effect", ())}


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return effective(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _own_functions(value: Any) -> Iterator[str]:
    """The reward functions below a value of the recipe that are not Baton's own: `package.module:name`."""
    if isinstance(value, RewardConfig) and value.function is not None and value.function not in FUNCTIONS:
        yield value.function
    elif isinstance(value, BaseModel):
        for _, item in value:
            yield from _own_functions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _own_functions(item)


def _folder_hash(folder: str) -> str:
    """Hash of the names and bytes of all files below a folder. Raises DataError if there is no such folder."""
    if not Path(folder).is_dir():
        raise DataError(f"{folder}: no such folder")
    return canonical_hash(hash_tree(Path(folder)))


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
    kinds: set[Kind] = {"tokenizer", *MODEL_KINDS}
    return open_parent(ref, recipe.run_dir, kinds, verify=False).fingerprint
