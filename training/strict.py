"""The class of every part of a recipe. No torch here."""

from collections.abc import Mapping
from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Strict(BaseModel):
    """Unknown keys and wrong types are errors; values are never converted silently from another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    refused: ClassVar[Mapping[str, str]] = {}
    """Keys that users may expect but that are left out on purpose, with the reason and the alternative."""
    without_effect: ClassVar[frozenset[str]] = frozenset()
    """The keys of this class on which the result does not depend (`training.inputs`); it depends on all others."""
