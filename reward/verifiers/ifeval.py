"""Verifiable instruction following: IFEval (Zhou et al. 2023, arXiv:2311.07911)."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from data.records import Message
from reward.functions import RewardError, one_form
from reward.golds_check import by_calling
from reward.verifiers.golds import rlvr_constraint, row_error
from reward.verifiers.ifeval_checks import INSTRUCTIONS
from reward.verifiers.ifeval_rlvr import as_instruction

Check = Callable[[str], bool]


def ifeval(
    prompts: Sequence[tuple[Message, ...]],
    completions: Sequence[str],
    instruction_id_list: Sequence[Sequence[str] | None] | None = None,
    kwargs: Sequence[Sequence[dict[str, Any]] | None] | None = None,
    ground_truth: Sequence[Any] | None = None,
    mode: Literal["strict", "loose"] = "strict",
    credit: Literal["all", "fraction"] = "all",
    **columns: Any,
) -> list[float | None]:
    """1 where the completion follows all instructions of its row, else 0; None for rows without instructions.

    The columns are those of the published data, or the `ground_truth` of the RLVR mixture where that is a constraint.

    Args:
        instruction_id_list: for each row, the instructions' ids, such as `punctuation:no_comma`.
        kwargs: for each row, one dict of arguments per instruction; null arguments are ignored.
        ground_truth: for each row, an RLVR constraint; rows with any other value score None.
        mode: `loose` also accepts an answer that follows the instructions once its first line, its last line or its
            asterisks are removed, in any combination (the paper's section 2.2).
        credit: `fraction` gives the share of instructions followed, instead of 1 or 0.

    Raises:
        RewardError: missing columns, an unknown instruction, or a missing, unknown or invalid argument; names the row.

    >>> ids, arguments = ["punctuation:no_comma", "detectable_format:title"], [{}, {}]
    >>> ifeval([], ["<<Ode>> O sea!", "<<Ode>> O, sea"], instruction_id_list=[ids] * 2, kwargs=[arguments] * 2)
    [1.0, 0.0]
    >>> ifeval([], ["<<Ode>> O, sea"], instruction_id_list=[ids], kwargs=[arguments], credit="fraction")
    [0.5]
    """
    if mode not in ("strict", "loose") or credit not in ("all", "fraction"):
        raise RewardError(
            f"`ifeval`: `mode: {mode}`, `credit: {credit}`; `mode` must be strict or loose, `credit` all or fraction"
        )
    if ground_truth is None and (instruction_id_list is None or kwargs is None):
        raise RewardError(
            "`ifeval` needs the columns `instruction_id_list` and `kwargs`, or RLVR constraints in `ground_truth`; the "
            f"prompts have {', '.join(f'`{name}`' for name in sorted(columns)) or 'no columns'}"
        )
    out: list[float | None] = []
    for row, text in enumerate(completions):
        try:
            checks = _checks(
                None if instruction_id_list is None else instruction_id_list[row],
                None if kwargs is None else kwargs[row],
                None if ground_truth is None else ground_truth[row],
            )
        except ValueError as error:
            raise row_error("ifeval", prompts, row, str(error)) from error
        if not checks:
            out.append(None)
            continue
        text = one_form(text)
        tried = variants(text) if mode == "loose" else [text]
        followed = [any(one.strip() and check(one) for one in tried) for check in checks]
        out.append(float(all(followed)) if credit == "all" else sum(followed) / len(followed))
    return out


def ifeval_unreadable(rows: int, columns: Mapping[str, Any], **args: Any) -> dict[int, str]:
    """The rows whose instructions cannot be used, and why."""
    return by_calling(ifeval, rows, columns, **args)


def variants(text: str) -> list[str]:
    """The eight variants of the loose mode: with and without first line, last line and asterisks.

    >>> variants("Sure:\\n*hi*\\nBye")[:4]
    ['Sure:\\n*hi*\\nBye', '*hi*\\nBye', 'Sure:\\n*hi*', '*hi*']
    """
    lines = text.split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    whole = ["\n".join(part).strip() for part in cut]
    return whole + [one.replace("*", "") for one in whole]


def _checks(ids: Sequence[str] | None, kwargs: Sequence[dict[str, Any]] | None, truth: Any) -> list[Check]:
    """The checks of one row; none when it has no instructions. Raises ValueError."""
    constraint = rlvr_constraint(truth)
    if ids is None and constraint is not None:
        instruction, given = as_instruction(constraint)
        return [check_of(instruction, given)]
    if ids is None:
        return []
    if kwargs is None or len(kwargs) != len(ids):
        raise ValueError(
            f"{len(ids)} instructions but {'no' if kwargs is None else len(kwargs)} `kwargs`; give one for each"
        )
    return [check_of(one, given) for one, given in zip(ids, kwargs, strict=True)]


def check_of(instruction: str, kwargs: dict[str, Any] | None) -> Check:
    """The check of one instruction with its arguments.

    Raises:
        ValueError: an unknown instruction, or a missing, unknown or invalid argument.

    >>> check_of("length_constraints:number_words", {"relation": "at least", "num_words": 2})("two words")
    True
    """
    if instruction not in INSTRUCTIONS:
        close = difflib.get_close_matches(str(instruction), INSTRUCTIONS, 1)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(INSTRUCTIONS)}"
        raise ValueError(f"unknown instruction `{instruction}`; {hint}")
    kind = INSTRUCTIONS[instruction]
    # The data set on the hub gives every instruction all arguments, with null for those that do not apply.
    given = {name: value for name, value in (kwargs or {}).items() if value is not None}
    arguments = {}
    for name, read in {**kind.needs, **{k: v for k, v in kind.may_have.items() if k in given}}.items():
        if name not in given:
            raise ValueError(
                f"`{instruction}` needs `{name}` in its kwargs; they have {', '.join(kwargs or ()) or 'none'}"
            )
        value = given.pop(name)
        try:
            arguments[name] = read(value)
        except ValueError as error:
            raise ValueError(f"`{name}` of `{instruction}` is {value!r}; expected {error}") from error
    if given:
        raise ValueError(f"`{instruction}` takes no `{next(iter(given))}`")
    return lambda text: kind.check(text, **arguments)
