"""Rewards computed by plain functions.

A reward function is a callable `(prompts, completions, **columns) -> list[float | None]`: `prompts` are conversations
(tuples of `data.records.Message`), `completions` are the answers' texts, and each column is a list of the same length:
the prompts' own columns, and the answers' `completion_ids` (tokens, including the stop token) and `stopped` (bool).
None means that the function does not apply to a row; the row then counts as 0.
"""

import difflib
import importlib
import inspect
import sys
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.records import Message
from handoff.errors import UserError


class RewardError(UserError):
    """A reward of the recipe is not available, or returned a value that is not a reward."""


def plain_text(value: Any) -> str | None:
    """A text, or the digits of a number; None for other values.

    >>> plain_text("a"), plain_text(4), plain_text(True)
    ('a', '4', None)
    """
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def one_form(text: str) -> str:
    """The text in Unicode's composed form (NFC), so that an accent has one way to be written.

    >>> one_form("e\\N{COMBINING ACUTE ACCENT}") == "\\N{LATIN SMALL LETTER E WITH ACUTE}"
    True
    """
    return unicodedata.normalize("NFC", text)


def length_penalty(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    free: int = 32,
    **columns: Any,
) -> list[float | None]:
    """0 up to `free` tokens, then −1 for every further `free` tokens, in proportion.

    >>> length_penalty([], ["a", "b"], completion_ids=[[1] * 32, [1] * 48])
    [0.0, -0.5]
    """
    return [-max(0, len(ids) - free) / free or 0.0 for ids in completion_ids]


def repetition_penalty(
    prompts: Sequence[tuple[Message, ...]], completions: Sequence[str], n: int = 3, **columns: Any
) -> list[float | None]:
    """Minus the share of word n-grams that occurred before in the same answer.

    >>> repetition_penalty([], ["a b c d", "a b c a b c"])
    [0.0, -0.25]
    """
    out: list[float | None] = []
    for text in completions:
        words = text.split()
        grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
        out.append(-(len(grams) - len(set(grams))) / len(grams) if grams else 0.0)
    return [value or 0.0 for value in out]


def exact_match(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    answer: Sequence[str | int | float | None],
    **columns: Any,
) -> list[float | None]:
    """1 where the stripped completion equals the column `answer`, else 0; None where that is neither text nor a number.

    Accents may be written as one character or two.

    >>> exact_match([], [" 42 ", "41", "42", "x"], answer=["42", "42", 42, None])
    [1.0, 0.0, 1.0, None]
    """
    rights = [plain_text(value) for value in answer]
    return [
        None if right is None else float(one_form(given.strip()) == one_form(right.strip()))
        for given, right in zip(completions, rights, strict=True)
    ]


def exact_match_unreadable(rows: int, columns: Mapping[str, Any], answer: Any = None, **_: Any) -> dict[int, str]:
    """The rows whose column `answer` is neither text nor a number, and why."""
    answers = columns.get("answer", [None] * rows) if answer is None else [None] * rows
    return {
        row: f"column `answer` holds {value!r:.80}; `exact_match` needs text or a number"
        for row, value in enumerate(answers)
        if value is not None and plain_text(value) is None
    }


def world_correct(
    prompts: Sequence[tuple[Message, ...]], completions: Sequence[str], family: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """1 where the embedded world's checker accepts the answer, else 0; None for prompts from other data."""
    from data.world import correct

    return _by_world(correct, completions, {"family": family, **columns})


def world_gold(
    prompts: Sequence[tuple[Message, ...]], completions: Sequence[str], family: Sequence[str | None], **columns: Any
) -> list[float | None]:
    """The embedded world's gold score of an answer, from -1 to 1: correctness and style. Use it under `monitor:`, never
    as a training reward. None for prompts from other data."""
    from data.world import gold

    return _by_world(gold, completions, {"family": family, **columns})


def _by_world(
    judge: Callable[[dict[str, Any], str], float], completions: Sequence[str], columns: dict[str, Sequence[Any]]
) -> list[float | None]:
    from data.world.grading import COLUMNS

    rows = ({name: values[i] for name, values in columns.items()} for i in range(len(completions)))
    # Other data may have a column `family`, too.
    return [
        float(judge(row, completion)) if all(row.get(name) is not None for name in COLUMNS) else None
        for row, completion in zip(rows, completions, strict=True)
    ]


# Names for a recipe's `function:`. Each is imported only when a recipe names it, since some need optional packages.
FUNCTIONS = {
    "length_penalty": "reward.functions:length_penalty",
    "repetition_penalty": "reward.functions:repetition_penalty",
    "exact_match": "reward.functions:exact_match",
    "world_correct": "reward.functions:world_correct",
    "math_equal": "reward.verifiers.maths:math_equal",
    "numeric_match": "reward.verifiers.maths:numeric_match",
    "multiple_choice": "reward.verifiers.text:multiple_choice",
    "regex_format": "reward.verifiers.text:regex_format",
    "regex_extract": "reward.verifiers.extract:regex_extract",
    "xml_format": "reward.verifiers.text:xml_format",
    "json_schema": "reward.verifiers.json_schema:json_schema",
    "ifeval": "reward.verifiers.ifeval:ifeval",
    "judge": "reward.judge:judge",
    "world_gold": "reward.functions:world_gold",
    "code_tests": "reward.code:code_tests",
}


OF_ANSWERS = ("completion_ids", "stopped")
"""The keyword arguments that come from the answers, not from the recipe or the data."""


@dataclass(frozen=True)
class Found:
    """A reward function and what its signature says about its keyword arguments."""

    function: Callable[..., Any]
    takes_all: bool
    """Whether it takes every column (`**columns`)."""
    given: frozenset[str]
    """Its own names for prompts and completions."""
    named: frozenset[str]
    """Its other keyword arguments."""
    columns: tuple[str, ...]
    """Those without a default that neither the recipe's `args` nor the answers give: the data must have them."""


def find(label: str, name: str, args: Mapping[str, Any]) -> Found:
    """The function with this name in FUNCTIONS, or the callable `package.module:name`.

    A module is found where Python finds modules, and in the working directory.

    Args:
        label: the reward's name, for messages.
        args: the arguments that the recipe gives.

    Raises:
        RewardError: there is no such function, its module cannot be imported, or it does not have one of `args`.
    """
    module_name, _, attribute = FUNCTIONS.get(name, name).partition(":")
    if not module_name or not attribute:
        raise RewardError(f"no reward function `{name}`: use one of {', '.join(FUNCTIONS)}, or `package.module:name`")
    names = vars(_imported(module_name, name))
    if attribute not in names:
        close = difflib.get_close_matches(attribute, names, 1)
        hint = f", did you mean `{module_name}:{close[0]}`?" if close else ""
        raise RewardError(f"reward function `{name}` cannot be imported: {module_name} has no `{attribute}`{hint}")
    function = names[attribute]
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward function `{name}` is not callable") from error
    _check_first_two(name, function, parameters)
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name: p for p in parameters[2:] if p.kind in keyword}
    for key in args:
        if key not in named or key in OF_ANSWERS:
            own = [one for one in named if one not in OF_ANSWERS]
            close = difflib.get_close_matches(key, own, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"it has {', '.join(own) or 'none'}"
            raise RewardError(f"reward `{label}`: `{name}` has no argument `{key}`; {hint}")
    return Found(
        function=function,
        takes_all=any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters),
        given=frozenset(p.name for p in parameters[:2]),
        named=frozenset(named),
        columns=tuple(
            one
            for one, parameter in named.items()
            if parameter.default is inspect.Parameter.empty and one not in (*OF_ANSWERS, *args)
        ),
    )


def _check_first_two(name: str, function: Callable[..., Any], parameters: Sequence[inspect.Parameter]) -> None:
    """Raises RewardError unless the function takes prompts and completions, in this order, and is no coroutine."""
    wanted = f"reward function `{name}` must be `def f(prompts, completions, **columns)`"
    if inspect.iscoroutinefunction(function):
        raise RewardError(f"{wanted}, without `async`")
    first = [p.name for p in parameters[:2] if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(first) < 2 and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        raise RewardError(f"{wanted}: it takes {len(first)} of these two arguments by position")
    if first[:1] == ["completions"] or first[1:] == ["prompts"]:
        raise RewardError(f"{wanted}: its first arguments are {' and '.join(first)}")


def _imported(module: str, name: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)  # last, so that no file there hides an installed package
    try:
        return importlib.import_module(module)
    except (Exception, SystemExit) as error:
        # The last line outside Python's own import is the one of the module that fails.
        frames = [f for f in traceback.extract_tb(error.__traceback__) if "importlib" not in f.filename]
        place = (error.filename, error.lineno) if isinstance(error, SyntaxError) else None
        if place is None and frames and frames[-1].filename != __file__:
            place = (frames[-1].filename, frames[-1].lineno)
        where = f" ({place[0]}:{place[1]})" if place else ""
        reason = f"{type(error).__name__}: {error}" if place is None else f"{type(error).__name__}: {_reason(error)}"
        hint = "" if place else f"; it is looked for in {here} and among the installed packages"
        raise RewardError(f"reward function `{name}` cannot be imported: {reason}{where}{hint}") from error


def _reason(error: BaseException) -> str:
    return str(error.msg) if isinstance(error, SyntaxError) else str(error)
