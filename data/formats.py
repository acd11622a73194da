"""Converts a row's columns to a conversation, a pair or a document, for every common published format.

Each reader takes the columns that it knows; data/columns.py says what becomes of the others. They are passed on to
prompts, where reward functions read them. A missing column or an empty cell (`null`) is an error at once, because it
means that the format was misunderstood. A row that is merely unsuitable (two answers to different prompts) is refused
with a reason and counted.
"""

import re
import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

from data.calls import held, with_tools
from data.columns import SYSTEM, Columns, lost
from data.config import Format
from data.errors import DataError, RowRefused
from data.files import Row
from data.records import Message, Origin, Role

EXPECTED: Final[dict[Format, str]] = {
    "text": "`text`",
    "prompt_completion": "`prompt` and `completion` (or `response`); `prompt` alone where only prompts are wanted",
    "alpaca": "`instruction` and `output` (or `response`), optionally `input` and `history`",
    "messages": "`messages`: a list of {role, content}",
    "sharegpt": "`conversations`: a list of {from, value}",
    "preference": "`chosen` and `rejected`; where they are bare answers, also `prompt`, `question`, `instruction` or "
    "`conversations`",
    "hh_rlhf": "`chosen` and `rejected`: transcripts that begin with `Human:`",
    "gsm8k": "`question` and `answer`, the final answer after `####`",
    "svamp": "`Body`, `Question` and `Answer`, a number",
    "multiple_choice": "`choices` (or `endings`), `question` (or `query`, `ctx`) and the right choice in `answer`, "
    "`answerKey`, `gold` or `label`",
}
"""The columns of each format, for error messages."""

# The instruction header inside the prompts of Alpaca and Dolly data. The chat template replaces it.
_HEADER = re.compile(
    r"\ABelow is an instruction that describes a task.*?\n\n### Instruction:\n(?P<instruction>.*?)"
    r"(?:\n\n### Input:\n(?P<input>.*?))?\n\n### Response:\s*\Z",
    re.DOTALL,
)
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_START = re.compile(r"\s*Human:")

HEADER_REMOVED = "prompts whose instruction header was taken off"
TRANSCRIPT_SPLIT = "prompts that were transcripts (`Human:`, `Assistant:`) and were split into turns"
EQUAL_SCORES = "pairs whose two scores are equal"


@dataclass(frozen=True, slots=True)
class Told:
    """What is known of a row besides its text."""

    columns: dict[str, Any] = field(default_factory=dict)
    """Columns that the reader did not use."""
    unread: tuple[str, ...] = ()
    """What of the row was not read, for the accounting: ``column `id` ``, ``key `name` of turns``."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Document:
    text: str
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns in order; the last may be of any role."""

    messages: tuple[Message, ...]
    found: dict[str, Any] = field(default_factory=dict)
    """Values that the reader derived for checkers, e.g. the final answer."""
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Pair:
    """Turns up to the answer, and two answers."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    told: Told = Told()


@dataclass(frozen=True, slots=True)
class Choice:
    """A question, and answers of which the one at the index `right` is right."""

    question: str
    choices: tuple[str, ...]
    right: int
    told: Told = Told()


Parsed: TypeAlias = Document | Conversation | Pair | Choice


def detect(row: Row, wants_text: bool, origin: Origin) -> Format:
    """The format of a file, detected from its first row.

    Raises:
        DataError: no format fits; names the row's columns and those that each format expects.
    """
    if isinstance(row, str):
        return "text"
    names = set(row)
    if wants_text and "text" in names:
        return "text"
    if {"chosen", "rejected"} <= names:
        bare = not names & {"prompt", "question", "instruction", "conversations", "messages"}
        return "hh_rlhf" if bare and isinstance(row["chosen"], str) else "preference"
    if "messages" in names:
        return "messages"
    if "conversations" in names:
        return "sharegpt"
    if "instruction" in names and names & {"output", "response"}:
        return "alpaca"
    if names & set(CHOICES) and names & set(QUESTIONS):
        return "multiple_choice"
    if {"question", "answer"} <= names:
        return "gsm8k"
    if {"Body", "Question", "Answer"} <= names:
        return "svamp"
    if "prompt" in names:
        return "prompt_completion"
    if "text" in names:
        return "text"
    known = "\n".join(f"  {name}: {columns}" for name, columns in EXPECTED.items())
    raise DataError(
        f"{origin}: columns {', '.join(row) or '(none)'} are of no known format. Rename them to fit one of:\n{known}"
    )


def parse(row: Row, format: Format, origin: Origin, needs_answer: bool, ignore: frozenset[str] = frozenset()) -> Parsed:
    """Parses one row.

    Args:
        needs_answer: a prompt without a column for its answer is an error, and other columns go nowhere.
        ignore: columns and keys of turns to leave out.

    Raises:
        DataError: a column is missing, null or of the wrong type.
        RowRefused: the row cannot be used.
    """
    if isinstance(row, str):
        if format != "text":
            raise DataError(f"{origin}: a string; format {format} expects an object with {EXPECTED[format]}")
        return Document(row)
    columns = Columns(row, origin, format, EXPECTED[format], needs_answer, ignore)
    parsed = _READERS[format](columns)
    if isinstance(parsed, Conversation):
        parsed = replace(parsed, messages=with_tools(parsed.messages, columns.tools()))
    elif isinstance(parsed, Pair):
        parsed = replace(parsed, prompt=with_tools(parsed.prompt, columns.tools()))
    if isinstance(parsed, (Conversation, Pair)):
        columns.check_rest(judged=isinstance(parsed, Pair) or any(m.role == "assistant" for m in parsed.messages))
    unread = [f"key `{key}` of turns" for key in sorted(columns.turn_keys)]
    if needs_answer:
        unread += [f"column `{name}`" for name in columns.unread()]
    return replace(parsed, told=Told(columns.rest(), tuple(unread), tuple(dict.fromkeys(columns.notes))))


def _text(row: Columns) -> Document:
    row.check_shares()
    return Document(row.text("text"))


def _prompt_completion(row: Columns) -> Conversation:
    prompt = _prompt(row, "prompt")
    answers = [name for name in ("completion", "response") if name in row.values and name not in row.ignore]
    if not answers and not row.needs_answer:
        return Conversation(prompt)
    answer = row.get("completion", "response")
    if not isinstance(answer, str):
        return Conversation(prompt + row.turns(answer, "completion"))
    _refuse_repeated(row, answer)
    return Conversation((*prompt, Message("assistant", answer.strip() if _is_transcript(row, "prompt") else answer)))


def _alpaca(row: Columns) -> Conversation:
    question = (*_before(row), Message("user", _instruction(row)))
    return Conversation((*question, Message("assistant", row.text("output", "response"))))


def _messages(row: Columns) -> Conversation:
    return Conversation(_with_system(row, row.turns(row.get("messages"), "messages")))


def _sharegpt(row: Columns) -> Conversation:
    return Conversation(_with_system(row, row.turns(row.get("conversations"), "conversations")))


def _preference(row: Columns) -> Pair:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    _check_scores(row)
    if isinstance(chosen, list) and isinstance(rejected, list):
        good, bad = row.turns(chosen, "chosen"), row.turns(rejected, "rejected")
        if good and good[0].role != "assistant":
            # Both are whole conversations. A column with their common beginning adds nothing.
            pair = _fork(_with_system(row, good), _with_system(row, bad))
            _use_repeated_prompt(row, pair)
            return pair
        prompt = _pair_prompt(row)
        return _fork(prompt + good, prompt + bad)
    if all(isinstance(value, str) and _TRANSCRIPT_START.match(value) for value in (chosen, rejected)):
        pair = _hh_rlhf(row)
        _use_repeated_prompt(row, pair)
        return pair
    prompt = _pair_prompt(row)
    good_text, bad_text = _answer(chosen, row, "chosen"), _answer(rejected, row, "rejected")
    _refuse_repeated(row, good_text, bad_text)
    if _is_transcript(row, "prompt"):
        good_text, bad_text = good_text.strip(), bad_text.strip()
    return Pair(prompt, good_text, bad_text)


def _pair_prompt(row: Columns) -> tuple[Message, ...]:
    if row.has("conversations"):
        return _with_system(row, row.turns(row.get("conversations"), "conversations"))
    if row.has("instruction"):
        return (*_before(row), Message("user", _instruction(row)))
    if row.has("question"):
        return (*_before(row), Message("user", row.text("question")))
    return _prompt(row, "prompt")


def _check_scores(row: Columns) -> None:
    """Raises RowRefused where the row's own scores say that the rejected answer is the better one."""
    margin = [("margin is negative", row.values["margin"], 0)] if row.has("margin") else []
    for good, bad in (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score")):
        if row.has(good) and row.has(bad):
            margin.append((f"{bad} is above {good}", row.values[good], row.values[bad]))
    for reason, better, worse in margin:
        if not all(isinstance(value, (int, float)) for value in (better, worse)):
            continue
        if better < worse:
            raise RowRefused(reason, "exchange chosen and rejected, or set `ignore` to these columns in the source")
        if better == worse:
            row.notes.append(EQUAL_SCORES)


def _use_repeated_prompt(row: Columns, pair: Pair) -> None:
    """Counts a column as used if it repeats the prompt of whole conversations, or a user's turn of it."""
    asked = [m.content.strip() for m in pair.prompt if m.role == "user"]
    for name in ("prompt", "question", "instruction", "messages", "conversations"):
        value = row.values.get(name)
        if isinstance(value, list):
            repeated = _spoken(row.turns(value, name))[: len(pair.prompt)] == _spoken(pair.prompt)
        elif isinstance(value, str) and _is_transcript(row, name):
            repeated = _spoken(_transcript(value, row.origin, name)[:-1]) == _spoken(pair.prompt)
        else:
            repeated = isinstance(value, str) and value.strip() in asked
        if repeated:
            row.used.add(name)


def _spoken(turns: Iterable[Message]) -> list[tuple[Role, str]]:
    return [(turn.role, turn.content.strip()) for turn in turns]


def _answer(value: Any, row: Columns, name: str) -> str:
    """An answer given as text or as one turn."""
    if isinstance(value, str):
        return value
    turn = row.turn(value, name)
    if turn.role != "assistant":
        raise RowRefused("chosen or rejected is not a turn of the assistant")
    return _trained(turn)


def _fork(good: tuple[Message, ...], bad: tuple[Message, ...]) -> Pair:
    """A pair from two whole conversations that differ only in their last answer."""
    answered = good and bad and good[-1].role == bad[-1].role == "assistant"
    told = ([(m.role, m.content, m.extra) for m in turns[:-1]] for turns in (good, bad))
    if not answered or next(told) != next(told):
        raise RowRefused("chosen and rejected do not answer the same prompt")
    return Pair(good[:-1], _trained(good[-1]), _trained(bad[-1]))


def _trained(turn: Message) -> str:
    """The text of a pair's answer."""
    if not turn.trained:
        raise RowRefused("a turn that is not to be trained on is an answer of a pair")
    if turn.extra:
        raise lost(next(iter(held(turn))))
    return turn.content


def _hh_rlhf(row: Columns) -> Pair:
    good, bad = (_transcript(row.text(name), row.origin, name) for name in ("chosen", "rejected"))
    return _fork(_with_system(row, good), _with_system(row, bad))


def _transcript(text: str, origin: Origin, name: str) -> tuple[Message, ...]:
    before, *parts = _TRANSCRIPT_TURN.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise DataError(
            f"{origin}: `{name}` does not begin with `Human:`; format hh_rlhf expects {EXPECTED['hh_rlhf']}; bare "
            "answers need a `prompt` column beside them"
        )
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[parts[i]], parts[i + 1].strip()) for i in range(0, len(parts), 2))


def _is_transcript(row: Columns, name: str) -> bool:
    """Whether a prompt is a transcript that ends where the assistant speaks next."""
    value = row.values.get(name)
    return isinstance(value, str) and bool(_TRANSCRIPT_START.match(value)) and value.rstrip().endswith("\n\nAssistant:")


_GROUPED = re.compile(r"[^\w(\[{]*[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])[^,]*")
"""One number with separators between its thousands, perhaps with a sign or currency before it and a unit behind it."""


def _gsm8k(row: Columns) -> Conversation:
    question, answer = row.text("question"), row.text("answer")
    solution, mark, final = answer.rpartition("####")
    final = final.strip()
    if not mark or not solution.strip() or not final or "\n" in final:
        raise RowRefused("no final answer after ####", "give plain answers in the columns `prompt` and `completion`")
    # Checkers compare numbers; in `(3, 4)` or `1,2` a comma does not group digits.
    found = {"answer": final.replace(",", "") if _GROUPED.fullmatch(final) else final}
    return Conversation((*_before(row), Message("user", question), Message("assistant", answer)), found)


def _svamp(row: Columns) -> Conversation:
    body, question, answer = row.text("Body").strip(), row.text("Question").strip(), row.get("Answer")
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, bool) or not isinstance(answer, int | float | str):
        raise DataError(f"{row.origin}: `Answer` is {type(answer).__name__}; expected a number")
    said = str(answer).strip()
    # Some bodies end without a full stop.
    asked = f"{body}{'' if not body or body[-1] in '.,?!;:' else '.'} {question}"
    return Conversation((Message("user", asked.strip()), Message("assistant", said)), {"answer": said})


CHOICES: Final = ("choices", "endings")
"""Columns that hold answers to choose from."""
QUESTIONS: Final = ("question", "query", "question_stem", "ctx")
"""Columns that hold the question which the choices answer."""


def _multiple_choice(row: Columns) -> Choice:
    """The forms of MMLU (an index), ARC and OpenBookQA (letters beside texts) and HellaSwag (endings)."""
    question = row.text(*QUESTIONS)
    choices: Any = row.get(*CHOICES)
    labels: Any = None
    if isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    texts = isinstance(choices, list) and all(isinstance(choice, str) for choice in choices)
    if not texts or not isinstance(labels, list | None) or (labels is not None and len(labels) != len(choices)):
        raise DataError(
            f'{row.origin}: the choices are no list of texts; expected are ["...", ...], or {{text: [...], label: '
            "[...]}} of equal lengths"
        )
    if len(set(choices)) < 2 or not all(choice.strip() for choice in choices):
        raise RowRefused("fewer than two different choices, or an empty one")
    return Choice(question, tuple(choices), _right(row, labels, len(choices)))


def _right(row: Columns, labels: list[Any] | None, choices: int) -> int:
    """The index of the right choice, which the row gives as an index, or as one of its labels."""
    value = row.get("answer", "answerKey", "gold", "label")
    if labels is not None and value in labels:
        return labels.index(value)
    if labels is None and isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if labels is None and isinstance(value, str) and len(value) == 1:
        value = string.ascii_uppercase.find(value.upper())
    if labels is None and isinstance(value, int) and not isinstance(value, bool) and 0 <= value < choices:
        return value
    raise RowRefused("no right choice", "give its index from 0, its letter, or its label")


_READERS: Final[dict[Format, Callable[[Columns], Parsed]]] = {
    "text": _text,
    "prompt_completion": _prompt_completion,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "preference": _preference,
    "hh_rlhf": _hh_rlhf,
    "gsm8k": _gsm8k,
    "svamp": _svamp,
    "multiple_choice": _multiple_choice,
}


def _system(row: Columns) -> tuple[Message, ...]:
    """The system message, if it has its own column."""
    for name in SYSTEM:
        if row.says(name):
            return (Message("system", row.text(name)),)
        row.used.add(name)
    return ()


def _with_system(row: Columns, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns after the system message of its own column, which may be repeated in them."""
    system = _system(row)
    if system and turns and turns[0].role == "system" and turns[0].content.strip():
        if turns[0].content.strip() != system[0].content.strip():
            raise RowRefused("two system messages", "the turns have another one than the column; remove one of them")
        return turns
    return system + (turns[1:] if system and turns and turns[0].role == "system" else turns)


def _before(row: Columns) -> tuple[Message, ...]:
    """The system message and the earlier turns of a row whose columns hold one question."""
    if not row.says("history"):
        row.used.add("history")
        return _system(row)
    history = row.get("history")
    if isinstance(history, list) and all(isinstance(turn, dict) for turn in history):
        return _with_system(row, row.turns(history, "history"))
    turns: list[Message] = []
    for i, pair in enumerate(history if isinstance(history, list) else [history]):
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise DataError(
                f"{row.origin}: `history[{i}]` is not [question, answer]; `history` is a list of such pairs of texts"
            )
        turns += [Message("user", pair[0]), Message("assistant", pair[1])]
    return _system(row) + tuple(turns)


def _instruction(row: Columns) -> str:
    instruction = row.text("instruction")
    context = row.text("input") if row.has("input") else ""
    row.used.add("input")
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _prompt(row: Columns, name: str) -> tuple[Message, ...]:
    """A prompt given as text or as turns, after the system message and the earlier turns of other columns."""
    value = row.get(name)
    if not isinstance(value, str):
        return _with_system(row, row.turns(value, name))
    if _is_transcript(row, name):
        row.notes.append(TRANSCRIPT_SPLIT)
        return _with_system(row, _transcript(value, row.origin, name)[:-1])
    header = _HEADER.match(value)
    if header is None:
        return (*_before(row), Message("user", value))
    row.notes.append(HEADER_REMOVED)
    parts = [part for part in (header["instruction"], header["input"]) if part]
    return (*_before(row), Message("user", "\n\n".join(parts)))


def _refuse_repeated(row: Columns, *answers: str) -> None:
    """Raises RowRefused if every answer begins with the whole prompt: a model would be trained to repeat it."""
    prompt = row.values.get("prompt")
    if isinstance(prompt, str) and len(prompt.split()) > 2 and all(answer.startswith(prompt) for answer in answers):
        raise RowRefused("answers begin with the prompt", "take the prompt off the answers")
