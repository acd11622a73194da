"""The stages that exist, found by looking: a sub-package of `stages` with a `config.py` is a stage.

A stage's `config.py` has

- `DECLARATION`: what the runner, replay, the report and chat have to know about it (`training/declaration.py`);
- `class Config(StageConfig)`: what a section of a recipe may hold;
- `parents(config) -> {role: reference}`: what the section needs, e.g. `{"parent": config.parent}`;
- optionally `soft_parents(config) -> [reference]`: what it comes after if that is run as well, but does not need;
- optionally `models(config) -> [HeldModel]`: the models that the section has in memory while it runs.

No torch here, and none in any `config.py`.
"""

import importlib
import importlib.util
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from training.config import StageConfig
from training.declaration import Declaration, HeldModel


class Registry:
    """The stages of one package; any but `stages` itself is for tests."""

    def __init__(self, package: str = "stages") -> None:
        self.package = package

    @cached_property
    def names(self) -> list[str]:
        """Names of the stage packages, sorted. Nothing is imported for it."""
        spec = importlib.util.find_spec(self.package)
        assert spec is not None and spec.submodule_search_locations is not None, f"{self.package} is not a package"
        return sorted(file.parent.name for place in spec.submodule_search_locations for file in _configs(Path(place)))

    def config_class(self, stage: str) -> type[StageConfig]:
        """The model of a section of this stage."""
        result: type[StageConfig] = self._module(stage).Config
        return result

    def config_classes(self) -> dict[str, type[StageConfig]]:
        """Those of all stages."""
        return {stage: self.config_class(stage) for stage in self.names}

    def parents(self, stage: str, config: StageConfig) -> dict[str, str]:
        """What a section needs, by role."""
        result: dict[str, str] = self._module(stage).parents(config)
        return result

    def soft_parents(self, stage: str, config: StageConfig) -> list[str]:
        """What a section only comes after. Few stages have such parents, so `soft_parents` is optional in config.py."""
        module = self._module(stage)
        return list(module.soft_parents(config)) if "soft_parents" in vars(module) else []

    def declaration(self, stage: str) -> Declaration:
        """What a stage declares. A stage of another installation is unknown here: only its name is known."""
        if stage not in self.names:
            return Declaration(stage)
        result: Declaration = self._module(stage).DECLARATION
        return result

    def declarations(self) -> dict[str, Declaration]:
        """Those of all stages, by stage."""
        return {stage: self.declaration(stage) for stage in self.names}

    def models(self, stage: str, config: StageConfig) -> list[HeldModel]:
        """The models that a section has in memory; a stage without models has no such function in its config.py."""
        module = self._module(stage)
        return list(module.models(config)) if "models" in vars(module) else []

    def _module(self, stage: str) -> Any:
        return importlib.import_module(f"{self.package}.{stage}.config")


def _configs(package: Path) -> Iterable[Path]:
    return package.glob("*/config.py")
