"""One entry of a recipe's list of rewards: `reward:`, `monitor:` or `scores:`."""

from collections.abc import Sequence
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class RewardConfig(BaseModel):
    """A reward model, an ensemble of reward models, or a function; and its weight in the sum."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str | None = None
    """A reward-model stage of this recipe, or the directory of a reward model."""
    models: list[str] | None = Field(default=None, min_length=2)
    """An ensemble of reward models. Each is normalised by its own mean and standard deviation before combining."""
    function: str | None = None
    """A function of `reward.functions`, or any callable as `package.module:name`."""
    name: str = Field(default="", min_length=1)
    """Name under which its scores are logged, unique in the list; by default the model's or the function's name."""
    weight: float = 1.0
    """Factor in the sum. A learned reward is normalised first: mean 0, standard deviation 1 on held-out answers. One of
    a model that was trained elsewhere is taken as it is."""
    args: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function."""
    combine: Literal["mean", "min", "mean_minus_std"] = "mean"
    """An ensemble's score: the members' mean, their minimum, or their mean minus `std_coef` standard deviations."""
    std_coef: float = Field(default=1.0, ge=0)
    """Only for `mean_minus_std`: number of standard deviations over the members to subtract from their mean."""
    read: Literal["last", "every"] = "last"
    """Where a model's score is read. `last`: at the answer's last token. `every`: at each token of the answer; the
    answer's score is the mean over its tokens, and each token is rewarded with its own share."""
    reencode: bool = False
    """Set when the model has a different tokenizer or chat template than the policy: answers are encoded again."""

    @model_validator(mode="before")
    @classmethod
    def _default_name(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or "name" in raw:
            return raw
        members = raw.get("models")
        named = [raw.get("model"), *(members if isinstance(members, list) else []), raw.get("function")]
        sources = [source for source in named if isinstance(source, str)]
        return {**raw, "name": "+".join(_short(source) for source in sources) or "reward"}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if [self.model, self.models, self.function].count(None) != 2:
            raise ValueError("a reward needs exactly one of `model: ...`, `models: [...]` and `function: ...`")
        if self.models is not None and len(set(self.models)) != len(self.models):
            raise ValueError("`models` names one model twice; use different members, for example with other seeds")
        given = self.model_fields_set
        if self.function is not None:
            unread = sorted(given & {"reencode", "read", "combine", "std_coef"})
            if unread:
                raise ValueError(f"`{unread[0]}` applies to reward models only, not to functions")
        elif "args" in given:
            raise ValueError("`args` apply to functions only; a reward model takes none")
        if self.models is None and "combine" in given:
            raise ValueError("`combine` is for ensembles: name two reward models or more under `models`")
        if self.combine != "mean_minus_std" and "std_coef" in given:
            raise ValueError("`std_coef` is not read unless combine is mean_minus_std")
        if self.read == "every" and self.reencode:
            raise ValueError(
                "`read: every` rewards the policy's own tokens, but `reencode` produces different tokens; use "
                "`read: last`, or a reward model with the policy's tokenizer"
            )
        return self

    @property
    def references(self) -> list[str]:
        """The reward models that the entry needs; none for a function."""
        if self.models is not None:
            return self.models
        return [] if self.model is None else [self.model]


def check_rewards(*lists: Sequence[RewardConfig]) -> None:
    """Raises ValueError if two entries of a list share a name or two entries for one model differ in `reencode`."""
    encodings: dict[str, bool] = {}
    for entries in lists:
        names = [entry.name for entry in entries]
        if len(set(names)) != len(names):
            raise ValueError(f"two rewards of the same name ({', '.join(names)}): give one a `name:` of its own")
        for entry in entries:
            for ref in entry.references:
                if encodings.setdefault(ref, entry.reencode) != entry.reencode:
                    raise ValueError(f"{ref} is read with `reencode` in one entry and without it in another")


def _short(source: str) -> str:
    """`runs/tiny/reward` -> `reward`, `package.module:shout` -> `shout`."""
    return source.rpartition(":")[2].rpartition("/")[2]
