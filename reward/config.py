"""One entry of a recipe's `reward:` list."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardConfig(BaseModel):
    """Either a learned model or a function, and its weight in the sum."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    """A reward-model stage of this recipe, or a directory with one."""
    function: str | None = None
    """A function of `reward.functions`, or any callable as `package.module:name`."""
    weight: float = 1.0
    """Factor in the sum. A learned reward is normalised before: mean 0, deviation 1 on held-out answers."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    reencode: bool = False
    """The model has another tokenizer or chat template than the policy: answers are encoded again for it."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.model is None) == (self.function is None):
            raise ValueError("a reward is either `model: ...` or `function: ...`")
        if self.model is not None and self.args:
            raise ValueError("`args` are for functions; a model takes none")
        if self.function is not None and self.reencode:
            raise ValueError("`reencode` is for models; functions read text")
        return self

    @property
    def name(self) -> str:
        """Under which its scores are logged."""
        return str(self.model or self.function).rpartition(":")[2].rpartition("/")[2]
