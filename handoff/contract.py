"""The contract: checks of models and rows at every hand-off. Each violation has its own message with the fix.

The checks run before a stage publishes (`check_model`, `check_rows`), before the weights of a published model
(`check_published`) or of a foreign checkpoint (`check_foreign`) are loaded, and where two models read the same tokens
(`check_same_encoding`). All that concern a model begin at the gate (handoff/gate.py).
"""

import gzip
import json
from pathlib import Path
from typing import Any, Protocol

from handoff.adapter import read_adapter
from handoff.encoding import declared_pad_id, generation_stop_ids, read_tokenizer, template_text, token_text
from handoff.errors import HandoffError
from handoff.files import list_files, quoted, read_json, write_json
from handoff.gate import check_directory, is_adapter, loaded_files
from handoff.manifest import Kind, TokenizerRecord
from handoff.weights import embedding_shape

PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".msgpack", ".h5"}
"""Suffixes of files that can run code when loaded, or that Baton does not read."""
ROW_FILES = (".jsonl", ".jsonl.gz", ".parquet")
"""Suffixes of the files that hold published rows."""
_ARCHITECTURES: tuple[tuple[str, Kind], ...] = (
    ("ForSequenceClassification", "reward_model"),
    ("ForCausalLM", "causal_lm"),
    ("LMHeadModel", "causal_lm"),
    ("ForConditionalGeneration", "causal_lm"),
)


def check_model(model_dir: Path, kind: Kind) -> TokenizerRecord:
    """Checks a model that a stage is about to publish, and returns its tokenizer's record.

    Raises:
        HandoffError: what `check_files` refuses; a tensor is empty; there are more token ids than embedding rows; or an
            adapter is not one that can be merged.
    """
    check_directory(model_dir)
    tokenizer = check_files(model_dir, kind)
    if is_adapter(model_dir):
        read_adapter(model_dir)
    elif kind != "tokenizer":
        _check_weights(model_dir, tokenizer)
    return tokenizer


def check_files(model_dir: Path, kind: Kind) -> TokenizerRecord:
    """As `check_model`, without the weights.

    Raises:
        HandoffError: the files include a pickle or code; the tokenizer is missing; or generation_config.json lacks stop
            ids.
    """
    for name in list_files(model_dir):
        if Path(name).suffix in PICKLES or Path(name).suffix == ".py":
            raise HandoffError(
                f"{quoted(model_dir / name)}: a published model must not contain pickles or code; save safetensors only"
            )
    tokenizer = read_tokenizer(model_dir)
    if kind == "causal_lm":
        stops = generation_stop_ids(model_dir)
        if not stops:
            raise HandoffError(
                f"{model_dir}: generation_config.json has no eos_token_id, so generation would never stop; "
                f"write the stop ids {tokenizer.stop_ids} into it"
            )
        if tokenizer.eos_id not in stops:
            raise HandoffError(
                f"{model_dir}: generation_config.json stops at {stops}, but not at the tokenizer's eos, "
                f"{tokenizer.eos_id}; add it to eos_token_id"
            )
    return tokenizer


def check_published(model_dir: Path, kind: Kind, recorded: TokenizerRecord) -> None:
    """Checks a model before it is loaded that, by its manifest, a stage has published.

    Raises:
        HandoffError: as `check_model`; or it is of another kind or has another encoding than its manifest says.
    """
    found = check_model(model_dir, kind)
    if kind != "tokenizer" and kind_of(model_dir) != kind:
        raise HandoffError(
            f"{model_dir}: stage.json says {kind}, config.json {kind_of(model_dir)}; the folder was not published as "
            "it is: run the stage again, or take stage.json away and name the folder as a checkpoint"
        )
    if found != recorded:
        raise HandoffError(
            f"{model_dir}: stage.json has another encoding than the files: {recorded.model_dump()} and "
            f"{found.model_dump()}; run the stage again"
        )


def check_rows(data_dir: Path) -> None:
    """Checks the rows that a stage is about to publish.

    Raises:
        HandoffError: there is no file, or a file has another kind, is empty, or has a line that is not a JSON object.
    """
    names = list_files(data_dir)
    if not names:
        raise HandoffError(f"{data_dir}: the stage wrote no rows; a data set has at least one file")
    for name in names:
        path = data_dir / name
        if not name.endswith(ROW_FILES) or "/" in name or name.startswith("."):
            raise HandoffError(f"{path}: published rows are files {', '.join(ROW_FILES)} in data/ itself")
        if name.endswith(".parquet"):
            with path.open("rb") as file:
                if file.read(4) != b"PAR1":
                    raise HandoffError(f"{path} is no parquet file")
            continue
        number = 0
        with gzip.open(path) if name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not _is_object(line):
                    raise HandoffError(f"{path}, line {number}: each line of published rows is one JSON object")
        if not number:
            raise HandoffError(f"{path} has no rows; a stage that made none publishes nothing")


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def write_pad_token(model_dir: Path, tokenizer: TokenizerRecord) -> None:
    """Writes the record's pad token into the tokenizer's files, if the parent's files name no pad token or name eos."""
    if declared_pad_id(model_dir) == tokenizer.pad_id:
        return
    text = token_text(model_dir, tokenizer.pad_id)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = model_dir / name
        if path.is_file():
            write_json(path, {**read_json(path), "pad_token": text})


def check_foreign(model_dir: Path) -> tuple[Kind, TokenizerRecord]:
    """Checks a foreign checkpoint, and returns its kind and tokenizer record.

    Raises:
        HandoffError: the gate refuses a file; it is not a checkpoint, has only pickles, needs remote code, or breaks
            the contract.
    """
    check_directory(model_dir)
    has_weights = any(name.endswith(".safetensors") for name in loaded_files(model_dir))
    if not has_weights:
        pickles = sorted(quoted(path.name) for path in model_dir.iterdir() if path.suffix in PICKLES)
        if pickles:
            raise HandoffError(
                f"{model_dir} has its weights only as pickles ({', '.join(pickles[:3])}), which can run code "
                "when loaded; if you trust it, convert it: from_pretrained(DIR).save_pretrained(NEW_DIR) writes "
                "safetensors"
            )
        if not (model_dir / "config.json").is_file() and (model_dir / "tokenizer.json").is_file():
            return "tokenizer", read_tokenizer(model_dir, choose_pad=True)
    if not (model_dir / "config.json").is_file():
        raise HandoffError(f"{model_dir} is not a checkpoint: it has neither stage.json nor config.json")
    if not has_weights:
        raise HandoffError(f"{model_dir} has a config.json but no weights (*.safetensors)")
    kind = kind_of(model_dir)
    tokenizer = read_tokenizer(model_dir, choose_pad=True)
    _check_weights(model_dir, tokenizer)
    return kind, tokenizer


def check_foreign_adapter(path: Path, base_dir: Path, base_kind: Kind) -> tuple[Kind, TokenizerRecord, Path]:
    """Checks a foreign adapter whose base has been checked.

    Returns its kind, the record of its tokenizer, and the directory with the tokenizer: the adapter's own if it has
    one, since it may have been trained with another template or with new tokens, and the base's otherwise.

    Raises:
        HandoffError: the gate refuses a file, it is not an adapter that can be merged, or it breaks the contract.
    """
    check_directory(path)
    kind, where = adapter_parts(path, base_dir, base_kind)
    tokenizer = read_tokenizer(where, choose_pad=True)
    rows, _ = embedding_shape(base_dir)
    if tokenizer.vocab_size > rows:
        raise HandoffError(
            f"{path}: its tokenizer has {tokenizer.vocab_size} ids, the base {base_dir} only {rows} embeddings; name a "
            "base with as many (resize_token_embeddings), or remove the adapter's tokenizer files"
        )
    return kind, tokenizer, where


def adapter_parts(path: Path, base_dir: Path, base_kind: Kind) -> tuple[Kind, Path]:
    """The kind of a foreign adapter on a base, and the directory with its tokenizer. Raises HandoffError."""
    scored = any(name.startswith("score.") for name in read_adapter(path).saved)
    return "reward_model" if scored else base_kind, path if (path / "tokenizer.json").is_file() else base_dir


class Encoded(Protocol):
    """The attributes of a model that `check_same_encoding` reads; `handoff.parent.Parent` has them."""

    @property
    def name(self) -> str:
        """The model's name for messages."""

    @property
    def path(self) -> Path:
        """The model's directory."""

    @property
    def model_dir(self) -> Path:
        """The directory of the model's tokenizer."""

    @property
    def chat_template(self) -> str | None:
        """The name of its chat template, if the recipe chooses one."""

    @property
    def tokenizer(self) -> TokenizerRecord:
        """The record of the model's tokenizer."""


def check_same_encoding(a: Encoded, b: Encoded, why: str) -> None:
    """Raises HandoffError if `a` and `b` read the same text as different ids.

    Pads and stop ids may differ: masks say what is padding, and a stop id ends what a model writes, not what it reads.

    Args:
        a, b: the models.
        why: reason or fix, for the message.
    """
    first, second = a.tokenizer, b.tokenizer
    if first.fingerprint != second.fingerprint:
        raise HandoffError(
            f"{a.name} ({a.path}) and {b.name} ({b.path}) have different tokenizers "
            f"({first.vocab_size} and {second.vocab_size} ids): {why}"
        )
    if first.template_fingerprint == second.template_fingerprint:
        return
    ids = [
        f"{name} {mine} and {theirs}"
        for name, mine, theirs in (("bos", first.bos_id, second.bos_id), ("eos", first.eos_id, second.eos_id))
        if mine != theirs
    ]
    if ids or template_text(a.model_dir, a.chat_template) != template_text(b.model_dir, b.chat_template):
        raise HandoffError(
            f"{a.name} ({a.path}) and {b.name} ({b.path}) share the tokenizer but differ in "
            + (f"special ids ({'; '.join(ids)}): " if ids else "their chat templates: ")
            + why
        )


def _check_weights(model_dir: Path, tokenizer: TokenizerRecord) -> None:
    config = _config(model_dir)
    rows, _ = embedding_shape(model_dir)
    if tokenizer.vocab_size > rows:
        raise HandoffError(
            f"{model_dir}: the tokenizer has {tokenizer.vocab_size} ids but the model only {rows} embeddings; "
            "use the tokenizer that the model was trained with, or resize the model (resize_token_embeddings)"
        )
    stated = config.get("vocab_size", config.get("text_config", {}).get("vocab_size"))
    if stated is not None and stated != rows:
        raise HandoffError(f"{model_dir}: config.json says vocab_size {stated}, the weights have {rows} embeddings")
    beyond = [stop for stop in tokenizer.stop_ids if stop >= rows]
    if beyond:
        raise HandoffError(f"{model_dir}: stop ids {beyond} are beyond the model's {rows} embeddings")


def _config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    if not path.is_file():
        raise HandoffError(f"{model_dir} has no config.json")
    config: dict[str, Any] = read_json(path, infinity=True)
    return config


def kind_of(model_dir: Path) -> Kind:
    """The kind of model that config.json says. Raises HandoffError."""
    architectures = _config(model_dir).get("architectures") or []
    for name in architectures:
        for ending, kind in _ARCHITECTURES:
            if name.endswith(ending):
                return kind
    raise HandoffError(
        f"{model_dir}: architectures in config.json is {quoted(architectures)}; "
        "a parent is a causal language model or a sequence classifier (reward model)"
    )
