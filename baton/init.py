"""`baton init`: a recipe for a model and data, with a reason beside every value.

The sections are those that the stages declare for a method (`Declaration.methods`); each stage writes its own
(`training/starter.py`). The model's size comes from its config.json, the data's format from the readers in data/.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from baton.plan import model_directory, model_shape
from data.accounting import Accounting
from data.config import FileSource, HubSource
from data.errors import DataError, RowRefused
from data.formats import Choice, Conversation, Document, Pair, Parsed, detect, parse
from data.load import read
from data.records import Message, Prompt
from data.sources import read_rows
from handoff.errors import UserError
from handoff.gguf import is_gguf
from handoff.window import model_window
from training.declaration import Declaration
from training.recipe import load_recipe
from training.registry import Registry
from training.starter import FoundData, Given, RowKind, written

_LOOKED_AT = 1000
"""Rows of each source that are looked at."""
_LEAST_HELD_OUT = 60
"""Rows below which none are held out."""
_CHECKS: tuple[tuple[frozenset[str], str], ...] = (
    (frozenset({"instruction_id_list", "kwargs"}), "{function: ifeval}"),
    (frozenset({"test_list"}), "{function: code_tests}"),
    (frozenset({"tests"}), "{function: code_tests}"),
    (frozenset({"test", "entry_point"}), "{function: code_tests}"),
    (frozenset({"schema"}), "{function: json_schema}"),
    (frozenset({"ground_truth"}), "{function: math_equal}"),
)
"""Columns, and the reward that reads them. A column `answer` is looked into."""


def methods() -> list[str]:
    """The methods that the stages know, those with the fewest sections first."""
    found = Counter(method for one in Registry().declarations().values() for method in one.methods)
    return sorted(found, key=lambda method: (found[method], method))


def init(model: str, data: Sequence[str], method: str | None, output: Path | None) -> Path:
    """Writes a recipe, and returns its file.

    Raises:
        UserError: the model or the data cannot be read, the method cannot be trained on such data, or the file exists.
    """
    shape, window = model_shape(model), None
    if not is_gguf(model) and (found := model_window(model_directory(model))) is not None:
        window = found.tokens
    sources = [_look(name) for name in data]
    if method is None:
        method = _default(sources)
    elif method not in methods():
        raise UserError(f"--method {method}: there are {', '.join(methods())}")
    name = re.sub(r"[^a-z0-9.]+", "-", f"{Path(model).name.removesuffix('.gguf')}-{method}".lower()).strip("-.")
    name = name if name[0].isalpha() else f"m-{name}"
    path = output or Path(f"{name}.yaml")
    given = Given(model, shape.parameters, window, sources, model, (model,), method=method)
    sections = _sections(given)
    head = [
        f"# Purpose:  {method} of {model}, on {', '.join(data)}. Written by `baton init`; change what you like.",
        f"# Hardware: {shape.parameters / 1e9:.2g} B parameters; `baton plan {path} --gpu NAME --fit` says which.",
        f"# Command:  baton rehearse {path} && baton run {path}",
        "# Expected: not measured; the held-out metrics of each section say what it brought.",
    ]
    text = "\n".join([*head, f"name: {name}", "seed: 42", "stages:", *sections]) + "\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise UserError(f"{path}: is there already, and is not overwritten; name another file with -o") from error
    load_recipe(path)
    return path


def _sections(given: Given) -> list[str]:
    """The lines of all sections of the method.

    Raises:
        UserError: a section that the method is about cannot be written for this data.
    """
    registry = Registry()
    chosen = {stage: one for stage, one in registry.declarations().items() if given.method in one.methods}
    order = sorted(chosen, key=lambda stage: _rank(chosen[stage]))
    trained = [stage for stage in order if chosen[stage].answers != "no"]
    lines: list[str] = []
    for stage in order:
        declared = chosen[stage]
        name = declared.methods[given.method]
        keys = registry.starter(stage, given)
        if not keys:
            if stage == trained[-1] or declared.publishes == "reward_model":  # a kind that the method is about
                raise UserError(_misfit(given))
            continue
        lines += [*([""] if lines else []), *written(name, stage, keys)]
        if declared.publishes == "causal_lm":
            given = replace(given, parent=name, policies=(*given.policies, name))
        elif declared.publishes == "reward_model":  # the kind
            given = replace(given, scorer=name)
    return lines


def _rank(declared: Declaration) -> int:
    """Where a stage stands in a method: tuning, reward model, aligning, evaluation."""
    if declared.answers != "no":
        return 0 if declared.answers == "tuned" else 2
    return 3 if declared.publishes == "evaluation" else 1


def _misfit(given: Given) -> str:
    held = ", ".join(f"{one.entry}: {one.kind}" for one in given.data)
    return (
        f"--method {given.method}: these data have no rows for it ({held}). Instruction tuning needs conversations "
        "with answers; dpo and rlhf pairs, `chosen` and `rejected`; grpo prompts that a function can check: columns "
        "answer, ground_truth, tests, instruction_id_list or schema (docs/rewards.md). With a reward function of your "
        "own, write the section as in docs/own_data.md"
    )


def _default(sources: Sequence[FoundData]) -> str:
    """The method for such data: the one with the fewest sections that learns most from it."""
    wanted = "pairs" if any(one.kind == "pairs" for one in sources) else "conversations"
    if any(one.reward is not None for one in sources):
        wanted = "prompts"
    for method in methods():
        aligned = [one for one in Registry().declarations().values() if method in one.methods and one.answers != "no"]
        if any(one.learns == wanted for one in aligned):
            return method
    raise AssertionError(f"no method learns from {wanted}")


def _look(name: str) -> FoundData:
    """What a file, folder, glob or hub data set holds, by its first rows.

    Raises:
        UserError: there is no such data, or no row of it can be used.
    """
    source = _source(name)
    rows: list[Parsed] = []
    refused: Counter[str] = Counter()
    format, count = None, 0
    for row, origin in islice(read_rows(source, None, Counter()), _LOOKED_AT):
        count += 1
        format = format or detect(row, False, origin)
        try:
            rows.append(parse(row, format, origin, needs_answer=False))
        except RowRefused as refusal:
            refused[refusal.reason] += 1
    if not rows:
        raise UserError(f"{name}: no row can be used: {', '.join(refused)}")
    entry = source.model_dump(exclude_defaults=True, exclude={"source", "limit"})
    written_entry = f"source: {source.source}, " + ", ".join(f"{k}: {json.dumps(v)}" for k, v in entry.items())
    kind, prompt, answer = _kind(name, rows)
    found = FoundData(
        entry=written_entry,
        kind=kind,
        rows=None if count == _LOOKED_AT else count,
        prompt=prompt,
        answer=answer,
        reward=_check(rows),
    )
    if found.rows is not None and found.rows < _LEAST_HELD_OUT:
        return found
    found = replace(found, holdout=0.2 if found.rows is not None else 0.02)
    return found if _can_hold_out(source, found.holdout) else replace(found, holdout=0.0)


def _source(name: str) -> FileSource | HubSource:
    if Path(name).exists() or any(sign in name for sign in "*?["):
        return FileSource(source="file", path=name)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name) and not Path(name).suffix:
        return HubSource(source="hub", name=name, limit=_LOOKED_AT)
    raise UserError(f"{name}: no such file or folder, and no data set of the hub (organisation/name)")


def _kind(name: str, rows: Sequence[Parsed]) -> tuple[RowKind, int, int]:
    """What the rows are, and the characters of the longest prompt and answer."""
    prompts, answers, kinds = [0], [0], Counter[RowKind]()
    for row in rows:
        if isinstance(row, Document):
            raise UserError(f"{name}: holds documents, for pretraining; `baton init` writes recipes that tune a model "
                            "(docs/stages/pretrain.md has a section for documents)")  # fmt: skip
        if isinstance(row, Choice):
            raise UserError(f"{name}: holds questions with answers to choose from, which models are evaluated on "
                            "(docs/stages/evaluate.md, `kind: choices`)")  # fmt: skip
        if isinstance(row, Pair):
            kinds["pairs"] += 1
            prompts.append(_length(row.prompt))
            answers.append(max(len(row.chosen), len(row.rejected)))
            continue
        answered = bool(row.messages) and row.messages[-1].role == "assistant"
        kinds["conversations" if answered else "prompts"] += 1
        prompts.append(_length(row.messages[:-1] if answered else row.messages))
        answers.append(len(row.messages[-1].content) if answered else 0)
    return kinds.most_common(1)[0][0], max(prompts), max(answers)


def _length(messages: Sequence[Message]) -> int:
    return sum(len(message.content) for message in messages)


def _check(rows: Sequence[Parsed]) -> str | None:
    """The reward that can check answers to these prompts, by the rows' columns."""
    columns: dict[str, Any] = {}
    for row in rows:
        if isinstance(row, Conversation):
            columns |= row.told.columns | row.found
    for needed, check in _CHECKS:
        if needed <= columns.keys():
            return check
    if "answer" not in columns:
        return None
    numeric = re.fullmatch(r"\s*[-+$]?[\d.,/]+%?\s*", str(columns["answer"])) is not None
    return "{function: math_equal}" if numeric else "{function: exact_match}"


def _can_hold_out(source: FileSource | HubSource, share: float) -> bool:
    """Whether each held-out part has a row."""
    splits: tuple[Literal["validation", "test"], ...] = ("validation", "test")
    for split in splits:
        part = source.model_copy(update={"holdout": share, "split": split})
        try:
            next(iter(read([part], Prompt, None, 42, Accounting())))
        except (DataError, StopIteration):
            return False
    return True
