"""The model card: README.md beside the weights, with metadata that the hub reads.

It says what the model is, from what it was made (with hashes), with which data and recipe, how it was evaluated, what
limits the trust in that, and how it is used.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from baton.export.evaluations import Measured, folder_of, measured
from baton.export.lineage import Line, line_of
from handoff.errors import HandoffError
from handoff.manifest import KIND_WORDS, SCORERS
from handoff.parent import Parent, is_hub_id

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

NAME = "README.md"
_LIBRARY = {"hf": "transformers", "vllm": "transformers", "gguf": "gguf", "ollama": "gguf", "onnx": "onnx"}
_NOT_RECORDED = "no licence is recorded"


def card(
    parent: Parent, name: str, form: str, dtype: str, files: Sequence[str], checked: Sequence[str], notes: Sequence[str]
) -> str:
    """The text of README.md.

    Args:
        parent: the exported model.
        name: what the export is called.
        form: hf, gguf, ollama, onnx or vllm.
        dtype: its precision.
        files: names of the export's files.
        checked: what the check has found, in sentences; empty if there was none.
        notes: what a reader of the export should know.

    Raises:
        HandoffError: the metadata do not pass the hub's own class.
    """
    lines = line_of(parent)
    numbers = measured(parent)
    metadata = _metadata(parent, name, form, lines, numbers)
    stage = "" if parent.manifest is None else f" by the stage `{parent.manifest.stage}`"
    made = "" if parent.manifest is None else f", published on {parent.manifest.created[:10]}"
    parts = [
        f"# {name}",
        f"{KIND_WORDS[parent.kind].capitalize()}, made{stage} of Baton{made}. Form: {form}, precision: {dtype}. "
        f"Fingerprint: `{parent.fingerprint}`.",
        _section("Lineage", _lineage(lines)),
        _section("Data", _data(lines)),
        _section("Evaluation", _evaluation(numbers)),
        _section("Limitations", _limitations(parent, notes)),
        _section(
            "Checked", "\n".join(f"- {line}" for line in checked) or "This export was not compared with its model."
        ),
        _section("How to use it", _use(form, name, files, parent)),
        _section("Recipe", _recipe(lines)),
    ]
    text = f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    _validate(text)
    return text


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}"


def _metadata(
    parent: Parent, name: str, form: str, lines: Sequence[Line], numbers: Sequence[Measured]
) -> "ModelCardData":
    from huggingface_hub import EvalResult, ModelCardData

    bases = [line.ancestor.name for line in lines[:-1] if _hub_name(line.ancestor.name)]
    if is_hub_id(parent):
        bases.append(parent.name)
    sets = [entry["name"] for _, _, entry in _sources(lines) if entry["source"] == "hub"]
    results = [
        EvalResult(
            task_type=_task(parent),
            dataset_type=one.task,
            dataset_name=one.task,
            metric_type=one.metric,
            metric_value=one.value,
        )
        for one in numbers
    ]
    licence = _licence("model", bases[-1]) if bases else None
    return ModelCardData(
        library_name=_LIBRARY[form],
        pipeline_tag=_task(parent),
        tags=["baton", *(["gguf"] if _LIBRARY[form] == "gguf" else [])],
        base_model=list(dict.fromkeys(bases)) or None,
        datasets=list(dict.fromkeys(sets)) or None,
        license=licence,
        model_name=name if results else None,
        eval_results=results or None,
    )


def _task(parent: Parent) -> str:
    """The hub's name of what the model does."""
    return "text-classification" if parent.kind in SCORERS else "text-generation"


def _hub_name(name: str) -> bool:
    return name.count("/") == 1


def _sources(lines: Sequence[Line]) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """(stage, key of its section, data source) of all stages."""
    for line in lines:
        for key, value in ({} if line.manifest is None else line.manifest.recipe).items():
            for entry in value if isinstance(value, list) else ():
                if isinstance(entry, dict) and "source" in entry:
                    yield line.ancestor.name, key, entry


def _licence(kind: str, name: str) -> str | None:
    """The licence of a model or data set of the hub by its card, if that was fetched with it."""
    from huggingface_hub import RepoCard, try_to_load_from_cache

    path = try_to_load_from_cache(name, NAME, repo_type=kind)
    if not isinstance(path, str):
        return None
    found = RepoCard.load(path, ignore_metadata_errors=True).data.get("license")
    return found if isinstance(found, str) else None


def _lineage(lines: Sequence[Line]) -> str:
    names = {line.ancestor.fingerprint: line.ancestor.name for line in lines}
    rows = ["| made | by | from | fingerprint |", "| --- | --- | --- | --- |"]
    for line in lines:
        one = line.ancestor
        sources = ", ".join(names.get(parent, parent[:12]) for parent in one.parents.values())
        rows.append(f"| {_cell(one.name)} | {one.stage or 'others'} | {_cell(sources)} | `{one.fingerprint}` |")
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _data(lines: Sequence[Line]) -> str:
    rows = ["| stage | data | rows | licence |", "| --- | --- | --- | --- |"]
    for stage, key, entry in _sources(lines):
        what, licence = _source(entry)
        held = "" if key == "data" else f" ({key})"
        rows.append(f"| {stage} | {_cell(what)}{held} | {entry.get('size', '')} | {licence} |")
    if len(rows) == 2:
        return "The data are not recorded: no stage of Baton made this model."
    return "\n".join(rows)


def _source(entry: Mapping[str, Any]) -> tuple[str, str]:
    """(what a data source is, its licence)."""
    kind = entry["source"]
    if kind == "world":
        return f"the embedded world: {entry.get('kind')}, generated", "that of Baton (Apache-2.0)"
    if kind == "hub":
        return f"{entry.get('name')} of the hub", _licence("dataset", str(entry.get("name"))) or _NOT_RECORDED
    if kind == "file":
        return f"file {Path(str(entry.get('path'))).name}", _NOT_RECORDED
    return f"{kind} {entry.get('name', '')}".strip(), "that of the rows from which it was made"


def _evaluation(numbers: Sequence[Measured]) -> str:
    if not numbers:
        return "No evaluation of its run has measured this model."
    rows = [
        "With 95 % intervals.",
        "",
        "| task | metric | value | interval | items |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in numbers:
        interval = f"[{one.low:.4g}, {one.high:.4g}]"
        rows.append(f"| {_cell(one.task)} | {_cell(one.metric)} | {one.value:.4g} | {interval} | {one.items} |")
    return "\n".join(rows)


def _limitations(parent: Parent, notes: Sequence[str]) -> str:
    """The notes, and the warnings of the run's report."""
    found = list(notes)
    run = folder_of(parent)
    if run is not None:
        from baton.report.alerts import warnings
        from baton.report.collect import read_run

        found += warnings(read_run(run))
    found.append(
        "It was evaluated on nothing but what stands above; whoever uses it measures it on their own task first."
    )
    return "\n".join(f"- {' '.join(line.split())}" for line in found)


def _use(form: str, name: str, files: Sequence[str], parent: Parent) -> str:
    if parent.kind == "reward_model":
        return _code("python", "AutoModelForSequenceClassification.from_pretrained(FOLDER)  # one score for a text")
    if form in ("gguf", "ollama"):
        file = next(one for one in files if one.endswith(".gguf"))
        lines = [f"llama-cli -m {file} -cnv", f"llama-server -m {file}"]
        if form == "ollama":
            lines.append(f"ollama create {name.lower()} -f Modelfile && ollama run {name.lower()}")
        return _code("sh", *lines)
    if form == "onnx":
        return _code(
            "python",
            "session = onnxruntime.InferenceSession('model.onnx')",
            "logits = session.run(None, {'input_ids': ids, 'attention_mask': mask})[0]  # (B, T), int64",
        )
    code = _code(
        "python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER)",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        'chat = [{"role": "user", "content": "Hello!"}]',
        'keys = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}',
        "inputs = tokenizer.apply_chat_template(chat, **keys)",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))",
    )
    return f"{code}\n\n{_code('sh', 'vllm serve FOLDER')}\n\nFor llama.cpp, export it with `--to gguf`."


def _code(language: str, *lines: str) -> str:
    return "\n".join([f"```{language}", *lines, "```"])


def _recipe(lines: Sequence[Line]) -> str:
    sections = {line.ancestor.name: line.manifest.recipe for line in lines if line.manifest is not None}
    if not sections:
        return "No stage of Baton made this model."
    text = yaml.safe_dump({"stages": sections}, sort_keys=False, allow_unicode=True)
    return f"<details><summary>every value of every stage</summary>\n\n```yaml\n{text}```\n\n</details>"


def _validate(text: str) -> None:
    """Lets huggingface_hub read the card, as the hub does."""
    from huggingface_hub import ModelCard

    try:
        ModelCard(text)
    except (ValueError, TypeError) as error:
        raise HandoffError(f"the model card's metadata are refused: {error}") from error
