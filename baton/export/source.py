"""The model that is exported: found by what the command names, and loaded."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from baton.targets import open_target
from handoff.files import read_json
from handoff.gate import LIMITS
from handoff.manifest import MODEL_KINDS
from handoff.parent import Parent

if TYPE_CHECKING:
    from data.encode import Encoder
    from training.model import Model
    from training.precision import PublishDtype


@dataclass(frozen=True)
class Source:
    """A model to export."""

    parent: Parent

    @classmethod
    def open(cls, target: str) -> "Source":
        """Opens what `open_target` takes. Raises UserError and HandoffError as it does."""
        return cls(open_target(target, MODEL_KINDS))

    @property
    def run_dir(self) -> Path | None:
        """The run in which a stage published it; None for a model that no stage has published."""
        return None if self.parent.manifest is None else self.parent.path.parent

    @property
    def plain(self) -> bool:
        """Whether its directory holds whole weights that are not quantised, of a model that reads text alone."""
        config = read_json(self.parent.weights_dir / "config.json", LIMITS["config.json"], infinity=True)
        return self.parent.base is None and not {"quantization_config", "text_config"} & config.keys()

    @cached_property
    def encoder(self) -> "Encoder":
        """Its encoder."""
        from training.model import load_encoder

        return load_encoder(self.parent)

    def load(self, publish: "PublishDtype") -> "Model":
        """The model in float32, with an adapter merged into it and quantised weights turned into plain ones.

        `publish`: the precision in which `Model.write` writes it.
        """
        from training import engines
        from training.config import ModelArguments
        from training.importing import quiet_libraries
        from training.model import Model, Role

        quiet_libraries()
        role: Role = "reward" if self.parent.kind == "reward_model" else "policy"
        keys: dict[str, Any] = {"dropout": False, "bf16": False, "publish": publish}
        model = Model.load(engines.current(), self.parent, role, self.encoder, ModelArguments(), **keys)
        return model.freeze()
