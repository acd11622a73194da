"""/v1/chat/completions."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from baton.serve import replies
from baton.serve.errors import wrong
from baton.serve.fields import ChatBody, chosen_tools, read_messages
from baton.serve.generation import Generation
from baton.serve.grammar import GrammarError, Grammars
from baton.serve.served import Served, Worker
from baton.serve.tools import CallForm, CallReader, has_special, read_form
from data.calls import read_tools
from data.errors import DataError
from data.streaming import Form
from rollout.live import Constraint, Token


@dataclass(frozen=True)
class Prepared:
    """A request as the model gets it."""

    ids: list[int]
    room: int
    constraint: Callable[[], Constraint] | None
    form: CallForm | None
    """How the model writes calls; None if it may make none."""


def prepare(served: Served, body: ChatBody) -> Prepared:
    """Reads the conversation and what restricts its answer. Raises Refused."""
    choice, names = chosen_tools(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise wrong("top_logprobs", "it needs `logprobs: true`")
    if body.max_tokens == 0:
        raise wrong("max_tokens", "give at least 1")
    limits = (body.max_tokens, body.max_completion_tokens)
    if None not in limits and limits[0] != limits[1]:
        raise wrong("max_completion_tokens", f"it is {limits[1]}, and max_tokens is {limits[0]}; give one of them")
    body.max_tokens = body.max_tokens or body.max_completion_tokens
    messages = read_messages(body)
    form = None
    if choice != "none":
        form = read_form(served)
        if form is None:
            raise wrong("tools", "the model's chat template renders no tools with calls that could be read back")
    try:
        ids = served.prompt(messages)
    except DataError as error:
        raise wrong("messages", str(error)) from None
    constraint = None
    wanted = body.response_format
    if wanted is not None and wanted.type != "text":
        if wanted.type == "json_schema" and wanted.json_schema is None:
            raise wrong("response_format.json_schema", "it is missing")
        if choice == "required":
            raise wrong("response_format", "an answer that must call a tool has no other form")
        schema: Any = {"type": "object"} if wanted.json_schema is None else wanted.json_schema.schema_
        try:
            if choice == "none":
                constraint = Grammars.of(served).json(schema)
            else:
                assert form is not None
                constraint = Grammars.of(served).calls_or_json(form, read_tools(body.tools, "tools"), schema)
        except GrammarError as error:
            raise wrong("response_format.json_schema.schema", str(error)) from None
    elif choice == "required" or (choice == "auto" and any(t["function"].get("strict") for t in body.tools)):
        assert form is not None
        tools = [t for t in read_tools(body.tools, "tools") if t["function"]["name"] in names]
        many = body.parallel_tool_calls and choice == "auto"
        try:
            constraint = Grammars.of(served).calls(form, tools, text=choice == "auto", many=many)
        except GrammarError as error:
            raise wrong("tools", str(error)) from None
    return Prepared(ids, body.max_tokens or served.limits.max_tokens, constraint, form)


def start(served: Served, worker: Worker, body: ChatBody, made: Prepared) -> Generation:
    """Asks for the answers. Raises Refused."""
    form: Form = "tokens" if made.form is not None and has_special(made.form, served) else "answer"
    return Generation(
        served,
        worker,
        body,
        [made.ids],
        room=made.room,
        field_name="messages",
        said=lambda: served.streamed(body.stop, form),
        top=(body.top_logprobs or 0) if body.logprobs else None,
        constraint=made.constraint,
    )


class _Answer:
    """One choice, with its calls."""

    def __init__(self, served: Served, body: ChatBody, made: Prepared) -> None:
        self.reader = (
            None if made.form is None else CallReader(made.form, served, body.tools, many=body.parallel_tool_calls)
        )
        self.text = ""
        self.tokens: list[Token] = []
        self.calls: list[dict[str, Any]] = []
        self.finish: str | None = None

    def add(self, text: str, end: str | None) -> str:
        """Takes text; returns what of it is the answer's content."""
        if self.reader is not None:
            text = self.reader.add(text)
            if end is not None:
                text += self.reader.finish()
                self.calls = self.reader.calls
        self.text += text
        if end is not None:
            self.finish = "tool_calls" if self.calls and end == "stop" else end
        return text


async def whole(served: Served, body: ChatBody, made: Prepared, generation: Generation) -> dict[str, Any]:
    """The reply at once."""
    answers = [_Answer(served, body, made) for _ in generation.choices]
    async for piece in generation.pieces():
        answers[piece.index].tokens += piece.tokens
        answers[piece.index].add(piece.text, piece.end)
    choices = []
    for i, answer in enumerate(answers):
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.calls:
            message |= {"content": answer.text.strip() or None, "tool_calls": answer.calls}
        logprobs = replies.chat_logprobs(served, answer.tokens) if body.logprobs else None
        choices.append({"index": i, "message": message, "logprobs": logprobs, "finish_reason": answer.finish})
    return {
        **replies.head(served, "chat.completion", "chatcmpl"),
        "choices": choices,
        "usage": replies.usage(generation.prompt_tokens, generation.completion_tokens),
    }


async def chunks(
    served: Served, body: ChatBody, made: Prepared, generation: Generation
) -> AsyncIterator[dict[str, Any]]:
    """The reply in parts."""
    head = replies.head(served, "chat.completion.chunk", "chatcmpl")
    if body.include_usage:
        head["usage"] = None

    def chunk(index: int, delta: dict[str, Any], logprobs: Any = None, finish: str | None = None) -> dict[str, Any]:
        return {
            **head,
            "choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}],
        }

    answers = [_Answer(served, body, made) for _ in generation.choices]
    for i in range(len(answers)):
        yield chunk(i, {"role": "assistant", "content": ""})
    async for piece in generation.pieces():
        answer = answers[piece.index]
        text = answer.add(piece.text, piece.end)
        logprobs = replies.chat_logprobs(served, piece.tokens) if body.logprobs else None
        if text or logprobs is not None:
            yield chunk(piece.index, {"content": text}, logprobs)
        for number, call in enumerate(answer.calls):
            yield chunk(piece.index, {"tool_calls": [{"index": number, **call}]})
        if piece.end is not None:
            yield chunk(piece.index, {}, None, answer.finish)
    if body.include_usage:
        found = replies.usage(generation.prompt_tokens, generation.completion_tokens)
        yield {**head, "choices": [], "usage": found}
