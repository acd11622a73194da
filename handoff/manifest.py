"""The manifest of a stage, `stage.json`: its kind, its inputs, and the hash of every file that it published.

Its presence is the commit marker: a stage directory without it is unfinished. There are two fingerprints. `Inputs`
identifies what a stage depends on, and shows why a stage is stale. `Manifest.fingerprint` identifies what the stage
produced, and makes its children stale when it changes. A stage that runs again and produces the same bytes keeps its
fingerprint, so its children stay up to date.
"""

import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from handoff.errors import HandoffError
from handoff.files import canonical_hash, read_json

FORMAT_VERSION = 1
Kind = Literal["tokenizer", "causal_lm", "reward_model", "evaluation", "dataset"]
MODEL_KINDS: frozenset[Kind] = frozenset({"causal_lm", "reward_model"})
"""Kinds with weights."""
SCORERS: frozenset[Kind] = frozenset({"reward_model"})
"""Kinds that score answers."""
KIND_WORDS: dict[Kind, str] = {
    "tokenizer": "a tokenizer",
    "causal_lm": "a language model",
    "reward_model": "a reward model",
    "evaluation": "an evaluation",
    "dataset": "a data set",
}
"""The kinds in messages."""
Metric = float | int | str | None


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


def kinds_in_words(kinds: Collection[Kind]) -> str:
    """`a language model or a tokenizer`."""
    return " or ".join(KIND_WORDS[kind] for kind in sorted(kinds))


class ParentRecord(_Record):
    """A parent as it was when the stage began."""

    path: str
    """Relative to the run directory for a stage of the same run, so that a run can be moved; absolute otherwise."""
    fingerprint: str
    name: str
    """Section name, directory name, or hub id."""
    files: dict[str, str] = Field(default_factory=dict)
    """{path relative to the parent's directory: SHA-256} of its files at that time."""


class QuantizationRecord(_Record):
    """How the frozen weights of linear layers are quantised; with bitsandbytes."""

    method: Literal["nf4", "int8"]
    double_quant: bool
    """Whether the scales of `nf4` are quantised, too."""
    skipped: list[str] = Field(default_factory=list)
    """Ends of the names of linear layers that are not quantised."""


class AdapterRecord(_Record):
    """What an adapter needs besides its own files."""

    base: ParentRecord
    """The whole model whose weights the adapter changes, as it was before it was quantised."""
    stack: list[str]
    """The stages or adapters whose training it holds, the oldest first; the last one is the stage itself."""
    quantization: QuantizationRecord | None = None
    """How the base was quantised while the adapter was trained; None: not, or its files are quantised themselves."""


class TokenizerRecord(_Record):
    """The tokenizer and its bos, eos, stop and pad ids."""

    fingerprint: str
    """Canonical hash of tokenizer.json."""
    template_fingerprint: str
    """Canonical hash of the chat template and of the ids below."""
    vocab_size: int
    """Highest token id plus one; the model has at least as many embedding rows."""
    bos_id: int | None
    eos_id: int
    pad_id: int
    """Equal to `eos_id` where the vocabulary has no other token for it."""
    stop_ids: list[int]
    """Every token that ends an answer, in ascending order."""


class EngineRecord(_Record):
    """The engine that actually ran, which may differ from the launch file."""

    name: str
    zero_stage: int | None = None
    processes: int = 1
    device: str = "cpu"
    threads: int | None = None
    """Threads of one operation on a CPU, in the main process. Another number adds numbers in another order."""

    @property
    def label(self) -> str:
        """Its name for a person: "deepspeed ZeRO-3"."""
        return f"{self.name} ZeRO-{self.zero_stage}" if self.zero_stage else self.name

    @property
    def words(self) -> str:
        """With the number of processes: "deepspeed ZeRO-3 on 2 processes"."""
        return f"{self.label} on {self.processes} process{'es' if self.processes > 1 else ''}"


class Inputs(_Record):
    """Everything that a stage's result depends on. While the inputs are equal, a finished stage is up to date and an
    unfinished one can resume."""

    recipe: dict[str, Any]
    """The resolved section."""
    parents: dict[str, str]
    """{parent's name: fingerprint}."""
    data: dict[str, str]
    """{label of a source: fingerprint}."""
    code: str
    """Hash of the source files that the stage runs."""
    functions: dict[str, str] = Field(default_factory=dict)
    """{reward function of the user, `package.module:name`: hash of its source files}."""
    seed: int
    demands: dict[str, Any] = Field(default_factory=dict)
    """Thresholds that the result must reach to be published. They do not change the result; see `continues`."""

    @property
    def fingerprint(self) -> str:
        return canonical_hash(self.model_dump(mode="json"))

    def continues(self, old: "Inputs") -> bool:
        """Whether a stage that began with `old` can resume with these inputs: only the demands may differ."""
        return old.model_copy(update={"demands": self.demands}).fingerprint == self.fingerprint

    def differences(self, old: "Inputs") -> list[str]:
        """The changes since `old`, worded for a user; empty if there are none."""
        before, now = {**old.recipe, **old.demands}, {**self.recipe, **self.demands}
        found = [f"recipe: {change}" for change in _changes("", before, now)]
        found += [f"parent {change}" for change in _named(old.parents, self.parents, ": retrained")]
        data = _named(_once(old.data), _once(self.data), " changed")
        if _sources(before) != _sources(now):
            # The recipe's changes have said it. Only the bytes of files can have changed besides.
            data = [change for change in data if change.startswith("file:") and change.endswith(" changed")]
        found += [f"data: {change}" for change in data]
        if old.code != self.code:
            found.append(f"code of stages/{self.recipe.get('stage') or '…'} changed")
        found += [f"reward function {change}" for change in _named(old.functions, self.functions, " changed")]
        if old.seed != self.seed:
            found.append(f"seed {old.seed} → {self.seed}")
        return found

    def changed(self, old: "Inputs") -> list[str]:
        """What is not as in `old`, in a word each: recipe, parents, data, code, functions, seed."""
        names = {name: "recipe" if name == "demands" else name for name in type(self).model_fields}
        return list(dict.fromkeys(word for name, word in names.items() if getattr(self, name) != getattr(old, name)))


_ABSENT = "absent"
_CALLED = ("source", "kind", "path", "name", "function", "model")
"""Keys of an entry of a recipe's list by which a reader knows it."""


def _changes(key: str, old: Any, new: Any) -> list[str]:
    """What has changed at a key of the recipe and below it, in sentences."""
    if old == new:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        names = sorted(old.keys() | new.keys())
        inner = [(f"{key}.{name}" if key else name, old.get(name, _ABSENT), new.get(name, _ABSENT)) for name in names]
        return [change for name, one, other in inner for change in _changes(name, one, other)]
    if isinstance(new, dict) and old in (None, _ABSENT):
        return _changes(key, {}, new)
    if isinstance(old, dict) and new in (None, _ABSENT):
        return _changes(key, old, {})
    if _has_entries(old) or _has_entries(new):
        return _entry_changes(key, old if _has_entries(old) else [], new if _has_entries(new) else [])
    return [f"{key} {_value(old)} → {_value(new)}"]


def _has_entries(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(entry, dict) for entry in value)


def _entry_changes(key: str, old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """The changes of a list of entries, each of which is found again by what it is called."""
    gone = list(old)
    left = []
    for place, entry in enumerate(new):
        if entry in gone:
            gone.remove(entry)
        else:
            left.append((place, entry))
    if not gone and not left:
        return [f"the entries of {key} are in another order"]
    found = []
    for place, entry in left:
        before = next((one for one in gone if _called(one) == _called(entry)), None)
        if before is None:
            found.append(f"{key}.{place} is new: {_called(entry)}")
        else:
            gone.remove(before)
            found += _changes(f"{key}.{place}", before, entry)
    return [*found, *(f"{key} no longer has {_called(entry)}" for entry in gone)]


def _called(entry: dict[str, Any]) -> str:
    return " ".join(dict.fromkeys(str(entry[key]) for key in _CALLED if entry.get(key)))


def _value(value: Any) -> str:
    """A value as it is written in a recipe."""
    if isinstance(value, list):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_value(item)}' for key, item in value.items())}}}"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _sources(recipe: dict[str, Any]) -> list[Any]:
    """The data sources that a section names."""
    lists = (value for value in recipe.values() if _has_entries(value))
    return [entry for entries in lists for entry in entries if "source" in entry]


def _once(data: dict[str, str]) -> dict[str, str]:
    """Without the sources that read the same bytes as an earlier one: `file:rows.jsonl#2`."""
    return {name: digest for name, digest in data.items() if "#" not in name or data[name.partition("#")[0]] != digest}


def _named(old: dict[str, str], new: dict[str, str], changed: str) -> list[str]:
    """In words: the names that are new, that are gone, and whose hash is another one."""
    words = []
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            words.append(f"{name} is new")
        elif name not in new:
            words.append(f"{name} is no longer used")
        elif old[name] != new[name]:
            words.append(f"{name}{changed}")
    return words


class Manifest(_Record):
    """What `stage.json` holds."""

    format_version: Literal[1] = 1
    name: str
    """Section of the recipe."""
    stage: str
    """The stage package that made it, e.g. "sft"."""
    kind: Kind
    begun: str = ""
    """When the stage was started first, UTC, ISO 8601: the time that chat templates have seen, also after a resume."""
    created: str
    """UTC, ISO 8601."""
    parents: dict[str, ParentRecord] = Field(default_factory=dict)
    """{role: parent}."""
    inputs: Inputs
    recipe: dict[str, Any]
    """The resolved section, as it was used."""
    data: dict[str, Any] = Field(default_factory=dict)
    """Fingerprints and accounting of the rows."""
    tokenizer: TokenizerRecord | None = None
    adapter: AdapterRecord | None = None
    """If the model is published as an adapter."""
    seed: int
    engine: EngineRecord
    versions: dict[str, str] = Field(default_factory=dict)
    """{package: version}."""
    metrics: dict[str, Metric] = Field(default_factory=dict)
    extra: dict[str, Any] = Field(default_factory=dict)
    """Values that children need besides the weights, e.g. a reward model's reward_mean and reward_std."""
    files: dict[str, str]
    """{path relative to the stage directory: SHA-256} of everything published."""

    @field_validator("metrics")
    @classmethod
    def _finite(cls, metrics: dict[str, Metric]) -> dict[str, Metric]:
        # JSON has no NaN; parsers in other languages would reject the whole file.
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in metrics.items()
        }

    @field_validator("files")
    @classmethod
    def _inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            if not name or "\0" in name or name.startswith("/") or {".", "..", ""} & set(name.split("/")):
                raise ValueError(f"{name!r} is no file inside the stage's folder")
        return files

    @property
    def fingerprint(self) -> str:
        """Identifies the result by kind, bytes, encoding, `extra` and an adapter's base, without time, place or
        parents."""
        tokenizer = None if self.tokenizer is None else self.tokenizer.model_dump(mode="json")
        below: list[Any] = [] if self.adapter is None else [self.adapter.base.fingerprint]
        if self.adapter is not None and self.adapter.quantization is not None:
            below.append(self.adapter.quantization.model_dump(mode="json"))
        return canonical_hash([self.kind, self.files, tokenizer, self.extra, *below])


def sealed(manifest: Manifest) -> dict[str, Any]:
    """The content of stage.json: the manifest and its hash."""
    content = manifest.model_dump(mode="json")
    return {**content, "sha256": canonical_hash(content)}


def read_manifest(path: Path) -> Manifest | None:
    """The manifest at `path` (a stage.json), or None if there is none.

    Raises:
        HandoffError: it cannot be read, or was altered after it was written.
    """
    if not path.exists():
        return None
    content = read_json(path)
    version = content.get("format_version") if isinstance(content, dict) else None
    if version != FORMAT_VERSION:
        raise HandoffError(
            f"{path}: format_version is {version}, but this Baton reads {FORMAT_VERSION}; "
            "use the Baton that wrote it, or run the stage again"
        )
    digest = content.pop("sha256", None)
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise HandoffError(f"{path}: {where}: {first['msg']}; the file is damaged, run the stage again") from error
    if digest != canonical_hash(content):
        raise HandoffError(
            f"{path} was altered: its content does not match its hash; restore it, or run the stage again"
        )
    return manifest
