"""The options of the reward function `judge`, given in a recipe under `args:`."""

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import httpx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from handoff.files import canonical_hash
from reward.functions import RewardError
from reward.judge_text import RUBRIC

_OURS = frozenset({"model", "messages", "stream", "n"})


class JudgeConfig(BaseModel):
    """The options of the reward function `judge`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "api_key_env",
            "concurrency",
            "timeout",
            "retries",
            "backoff",
            "cache_dir",
            "price_per_million_input",
            "price_per_million_output",
            "max_cost",
        }
    )
    """The options on which a verdict does not depend."""

    base_url: str
    """The URL before `/chat/completions`: `https://api.openai.com/v1`, `http://localhost:8000/v1`, ..."""
    model: str = Field(min_length=1)
    """The judge model's name at that endpoint."""
    mode: Literal["rubric", "pairwise"] = "rubric"
    """`rubric`: grades the answer. `pairwise`: compares it with the row's reference: better 1, as good 0.5, worse 0."""
    rubric: str = RUBRIC
    """The criteria, in words. When absent, a built-in text. A row's own text in a column `rubric` takes precedence."""
    lowest: float = 1
    """Worst grade of `mode: rubric`; becomes score 0."""
    highest: float = 10
    """Best grade of `mode: rubric`; becomes score 1."""
    reference_column: str | None = None
    """Column with a good answer. `pairwise` compares with it (default: `answer`); `rubric` shows it to the judge
    (default: none). Rows where it is null score None."""
    api_key_env: str | None = Field(default="OPENAI_API_KEY", pattern=r"^[A-Z_][A-Z0-9_]*$")
    """Name, in capitals, of the environment variable that holds the key (never the key itself); null for no key."""
    request: dict[str, Any] = Field(default_factory=dict)
    """Further keys of the request, or new values of `temperature` (0) and `max_tokens` (1024); null omits a key."""
    concurrency: int = Field(default=8, ge=1, le=256)
    """Questions in flight at once, in each process."""
    timeout: float = Field(default=60.0, gt=0)
    """Seconds for one attempt."""
    retries: int = Field(default=4, ge=0)
    """Number of retries after a rate limit, a server error, a time-out or a broken connection."""
    backoff: float = Field(default=1.0, ge=0)
    """Seconds before the first retry; doubles each time, up to a minute."""
    cache_dir: str | None = None
    """Directory that keeps paid answers between runs; without it, none are kept."""
    price_per_million_input: float = Field(default=0.0, ge=0)
    """Price of a million input tokens, in any currency, used to count the cost."""
    price_per_million_output: float = Field(default=0.0, ge=0)
    """Price of a million output tokens."""
    max_cost: float | None = Field(default=None, gt=0)
    """Stop with an error once this much was spent on all of this model's answers in `cache_dir`; without `cache_dir`,
    by this process. Questions in flight at that moment add to the cost."""
    on_failure: Literal["none", "error"] = "none"
    """For a row without a verdict: `none` scores it None, up to `max_failure_fraction`; `error` stops at the first."""
    max_failure_fraction: float = Field(default=0.2, ge=0, le=1)
    """Share of a call's judged rows, rounded up to a whole row, that may end without a verdict."""

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        try:
            url = httpx.URL(self.base_url)
        except httpx.InvalidURL as error:
            raise ValueError(f"`base_url` {self.base_url!r} is not a URL ({error})") from error
        if url.userinfo:
            raise ValueError("`base_url` contains a user or password: use the variable named by `api_key_env` instead")
        if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
            raise ValueError(f"`base_url` {self.base_url!r} is not of the form https://host/path")
        if self.base_url.rstrip("/").endswith("/chat/completions"):
            raise ValueError("`base_url` must not include /chat/completions: remove it")
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
        """The cost of input and output tokens, in the currency of the prices."""
        return (read * self.price_per_million_input + written * self.price_per_million_output) / 1e6


def read_options(arguments: dict[str, Any], rows: int) -> tuple[JudgeConfig, dict[str, Sequence[Any]]]:
    """Separates options from columns among the keyword arguments: columns are lists, and no option is a list.

    Raises RewardError for an unknown, missing or invalid option, and for a list of the wrong length.
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
                f"judge: `{name}` is a list of {len(column)} for {rows} answers; a column of the data has one value "
                "per answer, and no option is a list"
            )
    try:
        return JudgeConfig(**options), columns
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"`{name}`: " for name in first["loc"][:1])
        raise RewardError(f"judge: {place}{first['msg'].removeprefix('Value error, ')}") from error
