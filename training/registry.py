"""Finds the existing stages: every sub-package of `stages` with a `config.py` is a stage.

A stage's `config.py` has

- `DECLARATION`: what the runner, replay, the report and chat need to know about it (`training/declaration.py`);
- `class Config(StageConfig)`: the keys that a recipe's section of this stage may have;
- `parents(config) -> {role: reference}`: the parents that the section needs, e.g. `{"parent": config.parent}`;
- optionally `soft_parents(config) -> {role: reference}`: parents that run before the section, but are not needed;
- optionally `models(config) -> [HeldModel]`: the models that the section has in memory while it runs;
- optionally, in `starter.py` beside it, `section(given) -> [Line]`: the section that `baton init` writes
  (`training/starter.py`), if the declaration names methods;
- optionally `work(config) -> Work`: how much the section computes at once, for `baton plan` (`training/work.py`).

Neither this module nor any `config.py` imports torch.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from training.config import StageConfig
from training.declaration import Declaration, HeldModel
from training.starter import Given, Line
from training.work import Work


class Registry:
    """The stages of one package. Only tests use a package other than `stages`."""

    def __init__(self, package: str = "stages") -> None:
        self.package = package

    @cached_property
    def names(self) -> list[str]:
        """Names of the stage packages, sorted. Imports none of them."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None, f"{self.package} is not a package"
        return sorted(file.parent.name for place in spec.submodule_search_locations for file in _configs(Path(place)))

    def config_class(self, stage: str) -> type[StageConfig]:
        """The configuration class (pydantic) for sections of this stage."""
        result: type[StageConfig] = self._module(stage).Config
        return result

    def config_classes(self) -> dict[str, type[StageConfig]]:
        """The configuration classes of all stages, by stage."""
        return {stage: self.config_class(stage) for stage in self.names}

    def parents(self, stage: str, config: StageConfig) -> dict[str, str]:
        """The parents that a section needs: {role: reference}."""
        result: dict[str, str] = self._module(stage).parents(config)
        return result

    def soft_parents(self, stage: str, config: StageConfig) -> dict[str, str]:
        """{role: reference} of parents that run before a section, but that it does not need; none if config.py defines
        no `soft_parents`."""
        module = self._module(stage)
        return dict(module.soft_parents(config)) if "soft_parents" in vars(module) else {}

    def declaration(self, stage: str) -> Declaration:
        """A stage's declaration. A stage that is not installed here gets one with only its name."""
        if stage not in self.names:
            return Declaration(stage)
        result: Declaration = self._module(stage).DECLARATION
        return result

    def declarations(self) -> dict[str, Declaration]:
        """The declarations of all stages, by stage."""
        return {stage: self.declaration(stage) for stage in self.names}

    def models(self, stage: str, config: StageConfig) -> list[HeldModel]:
        """The models that a section has in memory; none if config.py defines no `models`."""
        module = self._module(stage)
        return list(module.models(config)) if "models" in vars(module) else []

    def work(self, stage: str, config: StageConfig) -> Work:
        """How much a section computes; nothing if config.py defines no `work`."""
        module = self._module(stage)
        result: Work = module.work(config) if "work" in vars(module) else Work()
        return result

    def starter(self, stage: str, given: Given) -> list[Line]:
        """The section of a stage that `baton init` writes; empty if the stage cannot be used with what is given."""
        module = importlib.import_module(f"{self.package}.{stage}.starter")
        return list(module.section(given))

    def _module(self, stage: str) -> Any:
        return importlib.import_module(f"{self.package}.{stage}.config")


def _configs(package: Path) -> Iterable[Path]:
    return package.glob("*/config.py")
