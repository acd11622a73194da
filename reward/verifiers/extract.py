"""A verifier that takes the answer out of a completion by a regular expression, as evaluation harnesses do."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import regex

from data.records import Message
from reward.functions import RewardError
from reward.verifiers.golds import Unreadable, golds, warn_unreadable
from reward.verifiers.text import PATTERN_SECONDS

log = logging.getLogger(__name__)


def regex_extract(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    pattern: str,
    take: Literal["first", "last"] = "last",
    ignore: Sequence[str] = (),
    column: str | None = None,
    **columns: Any,
) -> list[float | None]:
    """1 where what a regular expression finds in the completion is the gold answer, else 0; None where the row has no
    gold answer. Case does not count.

    It computes what lm-evaluation-harness does with its filter `regex` and its metric `exact_match`. `math_equal` and
    `numeric_match` understand more ways to write an answer.

    Args:
        pattern: in Python's syntax. What it finds is its first group that is not empty, or without groups the whole.
        take: of several finds, the first or the last.
        ignore: patterns whose finds are taken off both answers before they are compared.
        column: holds the gold answer; default: `answer` or `ground_truth`.

    Raises:
        RewardError: the column is missing, or `pattern`, `take` or one of `ignore` is invalid.

    >>> regex_extract([], ["#### 1,200.", "#### 12", "12"], pattern="#### ([0-9,.]+)", ignore=[",", r"\\.$"],
    ...               answer=["1200", "13", "12"])
    [1.0, 0.0, 0.0]
    """
    if take not in ("first", "last"):
        raise RewardError(f"`regex_extract`: `take: {take}` is neither `first` nor `last`")
    wanted, off = _compiled("pattern", pattern), [_compiled("ignore", one) for one in ignore]
    unreadable: Unreadable = {}
    rights = golds("regex_extract", len(completions), columns, column, unreadable)
    warn_unreadable("regex_extract", prompts, unreadable)
    out: list[float | None] = []
    late = 0
    for text, right in zip(completions, rights, strict=True):
        if right is None:
            out.append(None)
            continue
        try:
            found = wanted.findall(text, timeout=PATTERN_SECONDS)
        except TimeoutError:
            late += 1
            found = []
        one = found[0 if take == "first" else -1] if found else None
        if isinstance(one, tuple):
            one = next((part for part in one if part), None)
        out.append(float(one is not None and _bare(one.strip(), off) == _bare(right, off)))
    if late:
        log.warning(
            "regex_extract: on %d of %d completions the pattern took over %g s; they score 0",
            late,
            len(out),
            PATTERN_SECONDS,
        )
    return out


def regex_extract_unreadable(rows: int, columns: Mapping[str, Any], column: str | None = None, **_: Any) -> Unreadable:
    """The rows whose gold answer is neither text nor a number. Raises RewardError: the column is missing."""
    unreadable: Unreadable = {}
    golds("regex_extract", rows, columns, column, unreadable)
    return unreadable


def _bare(text: str, off: Sequence[Any]) -> str:
    for one in off:
        text = one.sub("", text)
    return text.lower()


def _compiled(key: str, pattern: str) -> Any:
    try:
        return regex.compile(pattern)
    except (regex.error, TypeError) as error:
        raise RewardError(f"`regex_extract`: `{key}: {pattern}` is not a regular expression: {error}") from error
