"""What an export does: opens the model, writes it beside, checks it, and gives it its name."""

import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from baton.export import gguf_file, ollama, onnx_file
from baton.export.card import NAME as CARD
from baton.export.card import card
from baton.export.check import CheckFailed, Expected, Verdict, check_gguf, check_hf
from baton.export.lineage import line_of
from baton.export.place import building, check_target
from baton.export.record import CheckRecord, ExportRecord, write_record
from baton.export.source import Source
from handoff.errors import HandoffError, UserError
from handoff.files import check_free_space, hash_tree, quoted, read_json
from handoff.manifest import KIND_WORDS
from handoff.weights import read_tensors

if TYPE_CHECKING:
    from training.model import Model

_PACKAGES = ("baton-align", "torch", "transformers", "tokenizers", "gguf", "onnx")
_PUBLISHED: dict[str, Any] = {"auto": "auto", "f32": "float32", "f16": "float16", "bf16": "bfloat16"}
SERVE = "serve.sh"
_SPARE = 64 << 20  # bytes, for the small files


@dataclass(frozen=True)
class Form:
    """A form in which models are exported."""

    dtypes: tuple[str, ...]
    """The first one is the default."""
    write: "Callable[[Job], None]"
    check: "Callable[[Job, Expected], Verdict]"
    hold: Callable[[Source], None] = lambda source: None
    """Raises HandoffError if the form cannot hold a model."""
    scores: bool = False
    """Whether it holds reward models."""


class Job:
    """One export while it is made."""

    def __init__(self, source: Source, dtype: str, model: "Model", folder: Path) -> None:
        self.source, self.dtype, self.model, self.folder = source, dtype, model, folder
        self.notes: list[str] = []
        self.composes = False

    @property
    def name(self) -> str:
        """What the model is called: the run and the stage."""
        run = self.source.run_dir
        return self.source.parent.name if run is None else f"{run.name}-{self.source.parent.name}"

    @property
    def file(self) -> Path:
        """The GGUF file."""
        return self.folder / f"{self.name}-{self.dtype}.gguf"


def _write_hf(job: Job) -> None:
    job.model.write(job.folder, job.model.module)


def _write_vllm(job: Job) -> None:
    """The same directory, with the command that serves it."""
    _write_hf(job)
    path = job.folder / SERVE
    path.write_text(
        f'#!/bin/sh\nexec vllm serve "$(dirname "$0")" --served-model-name {shlex.quote(job.name)} "$@"\n', "utf-8"
    )
    path.chmod(0o755)


def _write_gguf(job: Job) -> None:
    """From the published files, or from the merged model if these are not whole."""
    parent = job.source.parent
    origin = {"baton.stage": parent.name, "baton.fingerprint": parent.fingerprint}
    keys: dict[str, Any] = {"name": job.name, "origin": origin}
    if job.source.plain:
        written = gguf_file.write_gguf(parent.model_dir, job.file, job.dtype, job.source.encoder, **keys)
    else:
        with TemporaryDirectory(dir=job.folder, prefix=".merged-") as merged:
            job.model.write(Path(merged), job.model.module)
            written = gguf_file.write_gguf(Path(merged), job.file, job.dtype, job.source.encoder, **keys)
    job.composes = written.vocabulary.composes
    if job.composes:
        job.notes.append(
            "the tokenizer composes characters (NFC), llama.cpp does not: give it texts whose characters are composed"
        )
    if written.kept:
        job.notes.append(f"{len(written.kept)} matrices whose rows cannot be quantised are f16")


def _write_ollama(job: Job) -> None:
    _write_gguf(job)
    generation = job.source.parent.model_dir / "generation_config.json"
    settings = read_json(generation) if generation.is_file() else {}
    text = ollama.modelfile(job.file.name, job.source.encoder, settings)
    (job.folder / "Modelfile").write_text(text, encoding="utf-8")


def _hold_ollama(source: Source) -> None:
    _hold_gguf(source)
    ollama.learn(source.encoder)


def _check_ollama(job: Job, expected: Expected) -> Verdict:
    verdict = check_gguf(job.file, expected, job.dtype, composes=job.composes)
    verdict.said.append(
        f"Ollama's template gives the text of the chat template in {ollama.CHATS} of {ollama.CHATS} chats"
    )
    return verdict


def _hold_gguf(source: Source) -> None:
    gguf_file.check_holdable(source.parent.weights_dir, source.encoder, str(source.parent.path))


FORMS: Mapping[str, Form] = {
    "hf": Form(
        ("auto", "f32", "f16", "bf16"),
        _write_hf,
        lambda job, expected: check_hf(job.folder, expected, job.dtype),
        scores=True,
    ),
    "gguf": Form(
        ("f16", "f32", "bf16", "q8_0", "q4_0"),
        _write_gguf,
        lambda job, expected: check_gguf(job.file, expected, job.dtype, composes=job.composes),
        _hold_gguf,
    ),
    "vllm": Form(
        ("auto", "f32", "f16", "bf16"),
        _write_vllm,
        lambda job, expected: check_hf(job.folder, expected, job.dtype),
    ),
    "onnx": Form(
        ("f32",),
        lambda job: onnx_file.write_onnx(job.model, job.folder),
        lambda job, expected: onnx_file.check_onnx(job.model, job.folder, expected),
        lambda source: onnx_file.need_onnx(),
    ),
    "ollama": Form(("f16", "f32", "bf16", "q8_0", "q4_0"), _write_ollama, _check_ollama, _hold_ollama),
}
"""{--to: form}."""


def export(
    target: str, to: str, dtype: str | None, out: Path | None, say: Callable[[str], None], *, check: bool = True
) -> Path:
    """As `export_source`, of `RUN[:stage]`, or a model's folder or file."""
    _form(to, dtype)  # a mistake there is said before a model is read
    return export_source(Source.open(target), to, dtype, out, say, check=check)


def export_source(
    source: Source, to: str, dtype: str | None, out: Path | None, say: Callable[[str], None], *, check: bool = True
) -> Path:
    """Exports a model. Returns the folder.

    Args:
        source: the model, opened.
        to: one of `FORMS`.
        dtype: the precision; None: the form's default.
        out: the folder; by default one in the run, or beside.
        say: prints a line.
        check: compare the export with the model; it gets its name only if it answers alike.

    Raises:
        UserError: an unknown form or precision, or a model that the form cannot hold.
        HandoffError: the export cannot be written.
        CheckFailed: the export answers otherwise than the model.
    """
    form, dtype = _form(to, dtype)
    parent = source.parent
    if parent.kind == "reward_model" and not form.scores:
        raise HandoffError(f"{parent.path} is {KIND_WORDS[parent.kind]}, which {to} cannot hold; export it to hf")
    form.hold(source)
    folder = out or default_folder(source, to, dtype)
    check_target(folder)
    _check_space(source, folder, dtype)
    model = source.load(_PUBLISHED.get(dtype, "auto"))
    expected = Expected.of(model) if check and parent.kind == "causal_lm" else None
    with building(folder) as written:
        job = Job(source, dtype, model, written)
        form.write(job)
        verdict = None
        if expected is not None:
            try:
                verdict = form.check(job, expected)
            except CheckFailed as error:
                raise CheckFailed(f"{quoted(folder)}: the export failed its check and was removed: {error}") from error
        said = [] if verdict is None else [f"By {verdict.by}.", *verdict.said]
        names = sorted(path.name for path in written.iterdir())
        text = card(parent, job.name, to, dtype, names, said, job.notes)
        (written / CARD).write_text(text, encoding="utf-8")
        write_record(written, _record(job, to, verdict))
    for line in job.notes:
        say(f"  note: {line}")
    if verdict is None:
        say("  not checked")
    else:
        for line in (f"checked by {verdict.by}", *verdict.said):
            say(f"  {line}")
    return folder


def _form(to: str, dtype: str | None) -> tuple[Form, str]:
    if to not in FORMS:
        raise UserError(f"--to {quoted(to)}: there are {', '.join(FORMS)}")
    form = FORMS[to]
    chosen = dtype or form.dtypes[0]
    if chosen not in form.dtypes:
        raise UserError(f"--dtype {quoted(chosen)}: {to} has {', '.join(form.dtypes)}")
    return form, chosen


def default_folder(source: Source, to: str, dtype: str) -> Path:
    """Where an export goes if no folder is named: <run>/exports/<stage>-<form>-<precision>."""
    name = f"{source.parent.name.replace('/', '--')}-{to}" + ("" if dtype == "auto" else f"-{dtype}")
    return Path(name) if source.run_dir is None else source.run_dir / "exports" / name


def _check_space(source: Source, folder: Path, dtype: str) -> None:
    bits = {"q8_0": 9, "q4_0": 6, "f16": 16, "bf16": 16}.get(dtype, 32)
    values = sum(prod(info.shape) for info in read_tensors(source.parent.weights_dir).values())
    need = values * bits // 8 + _SPARE
    if not source.plain:
        need += 4 * values  # the merged weights
    check_free_space(folder, need, f"the export of {source.parent.name}")


def _record(job: Job, to: str, verdict: Verdict | None) -> ExportRecord:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    files = hash_tree(job.folder)
    return ExportRecord(
        form=to,
        dtype=job.dtype,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        source=job.source.parent.name,
        fingerprint=job.source.parent.fingerprint,
        lineage=[line.ancestor for line in line_of(job.source.parent)],
        check=None if verdict is None else CheckRecord(by=verdict.by, said=verdict.said, numbers=verdict.numbers),
        notes=job.notes,
        versions=versions,
        files=files,
    )
