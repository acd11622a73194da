"""What requests may say. Every field is checked; one that would change the answer and is not known is refused by name.

No torch here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from pydantic_core import from_json

from baton.serve.errors import Refused, wrong
from data.calls import holding, read_calls, read_tools
from data.errors import RowRefused
from data.records import Message

WITHOUT_EFFECT = frozenset(
    {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"}
)
"""Fields of OpenAI's that say nothing about the answer."""
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "min_p": (0,),
    "best_of": (1,),
    "suffix": ("",),
    "min_tokens": (0,),
    "ignore_eos": (False,),
    "skip_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "modalities": (["text"],),
}
"""Fields that are not supported, and the values with which they change nothing."""
_ELSEWHERE = {
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "chat_template": "the template is the model's own, and a request cannot name another",
    "chat_template_kwargs": "the template is the model's own, and a request cannot change it",
}
_MOST_STOPS, _LONGEST_STOP = 16, 256
_SEED = 2**63
_TOP = 20
B = TypeVar("B", bound="Body")


class Body(BaseModel):
    """What all requests have."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    model: str | None = None


class Sampled(Body):
    """What requests for text have."""

    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=1)
    n: int = Field(default=1, ge=1)
    max_tokens: int | None = Field(default=None, ge=0)
    stop: list[str] = Field(default_factory=list)
    seed: int | None = Field(default=None, ge=-_SEED, lt=_SEED)
    stream: bool = False
    stream_options: "StreamOptions | None" = None

    @field_validator("top_k", mode="before")
    @classmethod
    def _all_of_them(cls, value: Any) -> Any:
        return None if value in (0, -1) and not isinstance(value, bool) else value

    @field_validator("stop", mode="before")
    @classmethod
    def _stops(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
            raise ValueError("give a text that is not empty, or a list of them")
        if len(stops) > _MOST_STOPS or max(map(len, stops), default=0) > _LONGEST_STOP:
            raise ValueError(f"at most {_MOST_STOPS} texts of at most {_LONGEST_STOP} characters")
        return stops

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class ResponseFormat(BaseModel):
    """`response_format`."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: "JsonSchema | None" = None


class JsonSchema(BaseModel):
    """`response_format.json_schema`."""

    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)
    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ChatBody(Sampled):
    """A request to /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=_TOP)
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] = Field(default_factory=list, max_length=128)
    tool_choice: Any = None
    parallel_tool_calls: bool = True


class CompletionBody(Sampled):
    """A request to /v1/completions."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=_TOP)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, as texts or ids."""
        return _texts_or_ids(self.prompt, "prompt")


class EmbeddingBody(Body):
    """A request to /v1/embeddings."""

    input: Any
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)

    @property
    def inputs(self) -> list[str | list[int]]:
        """The inputs, as texts or ids."""
        return _texts_or_ids(self.input, "input")


def read(kind: type[B], body: bytes) -> B:
    """The request. Raises Refused, 400, with the first field that is wrong."""
    try:
        found = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"the request is not JSON: {error}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise Refused(400, "the request is not a JSON object", code="invalid_json")
    given = {}
    for key, value in found.items():
        if value is None or key in WITHOUT_EFFECT:
            continue
        if key in NEUTRAL:
            if not any(value == same and isinstance(value, bool) == isinstance(same, bool) for same in NEUTRAL[key]):
                raise wrong(key, f"only {NEUTRAL[key][0]!r} is supported here", "unsupported_value")
        elif key in _ELSEWHERE:
            raise wrong(key, f"it is not supported; {_ELSEWHERE[key]}", "unsupported_parameter")
        else:
            given[key] = value
    try:
        made = kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise wrong(field, "it is not known here, and is refused rather than ignored", "unknown_field") from None
        raise wrong(field, first["msg"].removeprefix("Value error, "), first["type"]) from None
    if isinstance(made, Sampled) and made.stream_options is not None and not made.stream:
        raise wrong("stream_options", "it needs `stream: true`")
    return made


def _texts_or_ids(value: Any, field: str) -> list[str | list[int]]:
    rows = [value] if isinstance(value, str) or (isinstance(value, list) and _are_ids(value)) else value
    if not isinstance(rows, list) or not rows or not all(isinstance(row, str) or _are_ids(row) for row in rows):
        raise wrong(field, "give a text, a list of texts, a list of token ids, or a list of such lists; none empty")
    if not all(rows):
        raise wrong(field, "an empty text has no token to begin with")
    return rows


def _are_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in value)
    )


_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_OF_MESSAGES = {"role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content"}


def read_messages(body: ChatBody) -> list[Message]:
    """The conversation, with its tools in the first turn. Raises Refused."""
    messages = [_message(given, f"messages.{i}") for i, given in enumerate(body.messages)]
    if messages[-1].role == "assistant":
        raise wrong("messages", "the last turn is the assistant's; the model answers a turn of another role")
    if body.tools and body.tool_choice != "none":
        try:
            tools = read_tools(body.tools, "tools")
        except RowRefused as error:
            raise wrong("tools", str(error)) from None
        messages[0] = holding(messages[0], {"tools": tools})
    return messages


def _message(given: Mapping[str, Any], place: str) -> Message:
    held = {key: value for key, value in given.items() if value is not None}
    for key in held:
        if key not in _OF_MESSAGES:
            raise wrong(f"{place}.{key}", "it is not known here, and is refused rather than ignored", "unknown_field")
    role = held.get("role")
    if not isinstance(role, str) or role not in _ROLES:
        raise wrong(f"{place}.role", f"give one of {', '.join(_ROLES)}")
    extra: dict[str, Any] = {}
    for key, roles in (("name", "tool"), ("tool_call_id", "tool"), ("reasoning_content", "assistant")):
        if key in held:
            if role != roles:
                raise wrong(f"{place}.{key}", f"the turn of a {role} has none")
            if not isinstance(held[key], str):
                raise wrong(f"{place}.{key}", "give a text")
            extra[key] = held[key]
    if "tool_calls" in held:
        if role != "assistant":
            raise wrong(f"{place}.tool_calls", f"the turn of a {role} has none")
        try:
            calls = read_calls(held["tool_calls"])
        except RowRefused as error:
            raise wrong(f"{place}.tool_calls", str(error)) from None
        if calls:
            extra["tool_calls"] = calls
    if "content" not in held and "tool_calls" not in extra:
        raise wrong(f"{place}.content", "the turn has no text")
    message = Message(_ROLES[role], _content(held.get("content", ""), f"{place}.content"))  # type: ignore[arg-type]
    return holding(message, extra) if extra else message


def _content(value: Any, place: str) -> str:
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise wrong(place, "give a text, or a list of parts of type text")
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise wrong(f"{place}.{i}", "only parts {type: text, text: ...} are supported; this model reads text alone")
        if part.keys() - {"type", "text"}:
            raise wrong(f"{place}.{i}.{min(part.keys() - {'type', 'text'})}", "it is not known here", "unknown_field")
        texts.append(part["text"])
    return "".join(texts)


def chosen_tools(body: ChatBody) -> tuple[str, Sequence[str]]:
    """How tools may be called, `none`, `auto` or `required`, and the names of those that may be. Raises Refused."""
    names = []
    for i, tool in enumerate(body.tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise wrong(f"tools.{i}", "each is {type: function, function: {name, description, parameters}}")
        if unknown := (tool.keys() - {"type", "function"}) or (
            function.keys() - {"name", "description", "parameters", "strict"}
        ):
            raise wrong(f"tools.{i}.{min(unknown)}", "it is not known here", "unknown_field")
        name, parameters = function.get("name"), function.get("parameters") or {}
        if not isinstance(name, str) or not name or not isinstance(parameters, dict):
            raise wrong(f"tools.{i}.function", "it needs a name, and parameters that are a JSON schema")
        if name in names:
            raise wrong(f"tools.{i}.function.name", f"there are two tools {name}")
        names.append(name)
    choice = body.tool_choice if body.tool_choice is not None else ("auto" if names else "none")
    if choice not in (None, "none", "auto") and not names:
        raise wrong("tool_choice", "there are no tools to choose from")
    if choice in ("none", "auto", "required"):
        return ("none" if not names else choice), names
    if isinstance(choice, dict) and choice.keys() == {"type", "function"} and choice["type"] == "function":
        function = choice["function"]
        if isinstance(function, dict) and function.keys() == {"name"}:
            if function["name"] not in names:
                raise wrong("tool_choice", f"there is no tool {function['name']!r}")
            return "required", [function["name"]]
    raise wrong("tool_choice", "give none, auto, required, or {type: function, function: {name: ...}}")
