"""The options of the reward function `judge`, which a recipe gives under `args:`."""

import difflib
from collections.abc import Sequence
from typing import Any, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from handoff.files import canonical_hash
from reward.functions import RewardError
from reward.judge_text import RUBRIC

_OURS = frozenset({"model", "messages", "stream", "n"})


class JudgeConfig(BaseModel):
    """The options of the reward function `judge`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base_url: str
    """What comes before `/chat/completions`: `https://api.openai.com/v1`, `http://localhost:8000/v1`, ..."""
    model: str = Field(min_length=1)
    """The judge's name at that endpoint."""
    mode: Literal["rubric", "pairwise"] = "rubric"
    """`rubric`: grade the answer. `pairwise`: is it better than the row's reference (1), as good (0.5) or worse (0)."""
    rubric: str = RUBRIC
    """What counts, in words. When absent, a row's text in a column `rubric`, where the data has one, comes first."""
    lowest: float = 1
    """Worst grade of `mode: rubric`; becomes 0."""
    highest: float = 10
    """Best grade of `mode: rubric`; becomes 1."""
    reference_column: str | None = None
    """Column with a good answer. `pairwise` compares with it (`answer` when absent); `rubric` shows it to the judge
    (none when absent). Rows where it is null get no opinion."""
    api_key_env: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Environment variable, in capitals, that holds the key; null where no key is needed. Never the key itself."""
    request: dict[str, Any] = Field(default_factory=dict)
    """More keys of the request, or other values of `temperature` (0) and `max_tokens` (1024); null leaves a key out."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Questions in flight at once, in each process."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(default=4, ge=0)
    """How often a question is repeated after a rate limit, a server's error, a time-out or a broken connection."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first repetition; doubles each time, up to a minute."""
    cache_dir: str | None = None
    """Directory of answers that were paid for, kept between runs; none when absent."""
    price_per_million_input: float = Field(default=0.0, ge=0)
    """Price of a million input tokens, in any currency, for the count of costs."""
    price_per_million_output: float = Field(default=0.0, ge=0)
    """Price of a million output tokens."""
    max_cost: float | None = Field(default=None, gt=0)
    """Stop with an error once this was spent: of all answers of this model in `cache_dir`, or without one by this
    process. Questions in flight at that moment come on top."""
    on_failure: Literal["none", "error"] = "none"
    """A row without a verdict: `none` gives it no opinion, up to `max_failure_fraction`; `error` stops at the first."""
    max_failure_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of a call's judged rows, rounded up to a whole row, that may end without a verdict."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"`base_url` {self.base_url!r} is no URL ({error})") from error
        if url.userinfo:
            raise ValueError("`base_url` holds a user or password: put the key into a variable, see `api_key_env`")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"`base_url` {self.base_url!r} is not of the form https://host/path")
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            raise ValueError("`base_url` ends where /chat/completions begins: leave that out")
        if not self.lowest < self.highest:
            raise ValueError(f"`lowest` {self.lowest:g} must be below `highest` {self.highest:g}")
        if self.max_cost is not None and self.price_per_million_input + self.price_per_million_output == 0:
            raise ValueError("`max_cost` needs `price_per_million_input` and `price_per_million_output`")
        if ours := _OURS & self.request.keys():
            raise ValueError(f"`request` may not set {', '.join(sorted(ours))}")
        try:
            canonical_hash(self.request)
        except (TypeError, ValueError) as error:
            raise ValueError(f"`request` is not JSON ({error})") from error
        return self

    def body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        """The request that asks for a verdict."""
        options = {"temperature": 0, "max_tokens": 1024, **self.request}
        return {
            "model": self.model,
            "messages": messages,
            **{key: value for key, value in options.items() if value is not None},
        }

    def cost(self, read: float, written: float) -> float:
        """Of input and output tokens, in the currency of the prices."""
        return (read * self.price_per_million_input + written * self.price_per_million_output) / 1e6


def read_options(arguments: dict[str, Any], rows: int) -> tuple[JudgeConfig, dict[str, Sequence[Any]]]:
    """Options and columns, told apart among the keyword arguments: a column is a list, and no option is one.

    Raises RewardError for an option that is unknown, missing or not what it should be, and for a list of wrong length.
    """
    columns: dict[str, Sequence[Any]] = {
        name: value for name, value in arguments.items() if isinstance(value, list | tuple)
    }
    options = {name: value for name, value in arguments.items() if name not in columns}
    for name in sorted(options.keys() - JudgeConfig.model_fields.keys()):
        near = difflib.get_close_matches(name, JudgeConfig.model_fields, n=1)
        hint = f"did you mean `{near[0]}`?" if near else f"it has {', '.join(JudgeConfig.model_fields)}"
        raise RewardError(f"judge has no option `{name}`: {hint}")
    for name, column in columns.items():
        if len(column) != rows:
            raise RewardError(
                f"judge: `{name}` is a list of {len(column)} for {rows} answers, so it is no column of "
                "the data, and no option is a list"
            )
    try:
        return JudgeConfig(**options), columns
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"`{name}`: " for name in first["loc"][:1])
        raise RewardError(f"judge: {place}{first['msg'].removeprefix('Value error, ')}") from error
