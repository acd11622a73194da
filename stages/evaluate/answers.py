"""answers.arrow: every answer of an evaluation, beside results.json. `read` opens it, and needs no torch.

A row is one answer of one model to one item of a task. Rows are in the order of tasks, models, items, and of one item
the greedy answer before the sampled ones. Columns that a task has no use for are null.

    task             name of the task
    item             number of the item in the task, from 0; the same for every model, so rows can be compared by
                     (task, item, kind, sample)
    model            name of the model; of an explicit reward of a `preferences` task, the score's name
    kind             greedy, sample, choices, document, pair
    sample           number of the sampled answer to the item, from 0; 0 for all other kinds
    origin           `file:row` of the item, as the recipe names the file; null for documents
    group            the item's value of the column `group_by`
    prompt           messages {role, content}: what was asked, in the task's form. With `form: text`, one message of
                     the user with the whole text. Of a document, its beginning
    answer           greedy, sample: the text. choices: the text of the model's choice. pair: the preferred answer, null
                     where both are equal
    reference        the right or good answer of the row: column `answer`, else `reference`; the text of the right
                     choice; the chosen answer of a pair
    scores           {metric as in results.json: value or null} of this answer
    stopped          greedy, sample: whether the answer ended by itself
    tokens           greedy, sample: number of tokens of the answer, with its stop token; document: of the text
    options          choices: the texts to choose from; pair: the chosen and the rejected answer
    log_likelihoods  choices: of each choice, nats; pair: of the chosen and the rejected answer (of an explicit reward:
                     their scores); document: one value; greedy, sample: one value, under the distribution sampled from
    choice, right    choices: index of the model's choice (by log-likelihood) and of the right one
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.records import Message
from handoff.files import fsync_path

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "answers.arrow"
_BATCH = 1000


@dataclass(frozen=True)
class Answer:
    """A row of the file; the fields are its columns."""

    task: str
    item: int
    model: str
    kind: str
    sample: int = 0
    origin: str | None = None
    group: str | None = None
    prompt: Sequence[Message] = ()
    answer: str | None = None
    reference: str | None = None
    scores: dict[str, float | None] = field(default_factory=dict)
    stopped: bool | None = None
    tokens: int | None = None
    options: Sequence[str] | None = None
    log_likelihoods: Sequence[float] | None = None
    choice: int | None = None
    right: int | None = None


def schema() -> "pa.Schema":
    """The columns with their types."""
    import pyarrow as pa

    message = pa.struct([("role", pa.string()), ("content", pa.string())])
    return pa.schema(
        [
            pa.field("task", pa.string(), nullable=False),
            pa.field("item", pa.int32(), nullable=False),
            pa.field("model", pa.string(), nullable=False),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("sample", pa.int32(), nullable=False),
            ("origin", pa.string()),
            ("group", pa.string()),
            ("prompt", pa.list_(message)),
            ("answer", pa.string()),
            ("reference", pa.string()),
            ("scores", pa.map_(pa.string(), pa.float64())),
            ("stopped", pa.bool_()),
            ("tokens", pa.int32()),
            ("options", pa.list_(pa.string())),
            ("log_likelihoods", pa.list_(pa.float64())),
            ("choice", pa.int32()),
            ("right", pa.int32()),
        ]
    )


def write(path: Path, answers: Iterable[Answer]) -> None:
    """Writes the file. A crash leaves no half of it under its name."""
    import pyarrow as pa

    columns = schema()
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with pa.ipc.new_file(temporary, columns) as file:
            rows: list[dict[str, Any]] = []
            for answer in answers:
                rows.append(_row(answer))
                if len(rows) == _BATCH:
                    file.write_batch(pa.RecordBatch.from_pylist(rows, schema=columns))
                    rows = []
            if rows:
                file.write_batch(pa.RecordBatch.from_pylist(rows, schema=columns))
        fsync_path(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def read(path: Path) -> "pa.Table":
    """The whole table, memory-mapped. `path`: the file, or the directory of an evaluation."""
    import pyarrow as pa

    with pa.memory_map(str(path / FILE if path.is_dir() else path)) as source:
        return pa.ipc.open_file(source).read_all()


def _row(answer: Answer) -> dict[str, Any]:
    row = dict(vars(answer))
    row["prompt"] = [{"role": m.role, "content": _clean(m.content)} for m in answer.prompt]
    row["scores"] = list(answer.scores.items())
    for name in ("answer", "reference"):
        row[name] = None if row[name] is None else _clean(row[name])
    row["options"] = None if answer.options is None else [_clean(text) for text in answer.options]
    return row


def _clean(text: str) -> str:
    """The text with halves of surrogate pairs, which UTF-8 cannot hold, replaced."""
    return text.encode("utf-8", "replace").decode("utf-8")
