"""A model: one network in one role, from the parent it is loaded from to the files it is published in.

Roles: `policy` (trained to speak), `reference` (a frozen policy that the KL is measured to), `critic` (reads values),
`reward` (one score a text). A `Model` knows its role, its precision, its encoder, how its parameters are named on the
disk, and the engine that cuts it up. Nobody else strips a prefix, matches a name or casts a tensor.

Weights are float32 unless a recipe chooses otherwise for those that it trains: AdamW cannot move bfloat16 weights at
the learning rates of alignment, since the step is below their precision. For speed in bfloat16 there is autocast
(`train.bf16`).

A published model is what anyone can load: safetensors, the parent's tokenizer and chat template byte for byte, and a
generation_config.json with the stop ids.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from data.encode import Encoder
from handoff.errors import HandoffError
from handoff.parent import Parent
from handoff.weights import INDEX_NAME, weight_files
from training.architecture import attention, type_of_config, without_dropout
from training.config import ModelArguments, TrainedModelArguments
from training.engines.files import write_tensors
from training.engines.protocol import Engine
from training.engines.single import Entry

Role = Literal["policy", "reference", "critic", "reward"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)
_FILE_BYTES = 5 << 30  # a published model is written in files of about this size
_SINGLE = "model.safetensors"


@dataclass(frozen=True)
class Written:
    """What `Model.write` has done."""

    hashes: dict[str, str]
    """{file: SHA-256} of the weight files, computed while they were written; empty on processes that do not write."""
    changed: float | None
    """Share of the parent's weights that training has changed; None where there is nothing to compare."""


class Model:
    """One network in one role. `module` is the plain transformers model, whole until the engine cuts it up."""

    def __init__(
        self,
        engine: Engine,
        module: PreTrainedModel,
        role: Role,
        encoder: Encoder,
        arguments: ModelArguments,
        parent: Parent | None,
    ) -> None:
        self.engine, self.module, self.role = engine, module, role
        self.encoder, self.arguments, self.parent = encoder, arguments, parent
        self.dtype = module.dtype
        """Precision of the weights as they are trained or read."""
        self._class_name = type(module).__name__  # an engine may change the class

    @classmethod
    def load(
        cls,
        engine: Engine,
        parent: Parent,
        role: Role,
        encoder: Encoder,
        arguments: ModelArguments,
        *,
        dtype: torch.dtype = torch.float32,
        dropout: bool = True,
        bf16: bool = True,
        seed: int = 0,
    ) -> Self:
        """A model from its parent.

        For `policy` and `reference` it is a causal language model; for `reward` it has a head of one output; for
        `critic` it is of the parent's own kind.

        A head that the parent lacks is drawn from N(0, 1 / (H + 1)) (H hidden size) with `seed` by a generator of its
        own, so nothing else decides what it is.

        Args:
            engine: that will train or read it.
            parent: opened and checked.
            role: see the head of this module.
            encoder: the parent's (`load_encoder`).
            arguments: `model_args` of the recipe.
            dtype: of the weights, whatever the parent's are.
            dropout: False sets every dropout to zero, whatever the configuration says.
            bf16: the forward pass will run under bfloat16 autocast where there is a GPU for it.
            seed: of a new head.

        Raises:
            HandoffError: the tokenizer has ids that the model has no embedding for, or transformers has no sequence
                classification for the architecture.
        """
        scored = role == "reward" or (role == "critic" and parent.kind == "reward_model")
        keys: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": attention(arguments, bf16),
            "use_safetensors": True,
        }
        loader: Any = AutoModelForCausalLM
        if scored:
            _check_classification(parent)
            loader, keys = AutoModelForSequenceClassification, keys | {"num_labels": 1}
        with engine.loading():
            module = loader.from_pretrained(parent.model_dir, **keys)
        check_vocabulary(module, parent)
        if scored:
            module.config.pad_token_id = parent.tokenizer.pad_id
            if parent.kind != "reward_model":
                _draw_head(module.get_submodule("score"), seed)
        return cls(engine, module if dropout else without_dropout(module), role, encoder, arguments, parent)

    @classmethod
    def build(
        cls,
        engine: Engine,
        config: PretrainedConfig,
        encoder: Encoder,
        arguments: ModelArguments,
        *,
        bf16: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Self:
        """A causal language model with random weights, drawn from torch's global generator."""
        with engine.loading():
            module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention(arguments, bf16)
            )
        return cls(engine, module, "policy", encoder, arguments, None)

    def reference(self, bf16: bool) -> "Model":
        """A frozen view of what this policy started from: what the KL and DPO's log-ratios are measured to.

        `bf16` as in `load`.
        """
        assert self.parent is not None
        return Model.load(self.engine, self.parent, "reference", self.encoder, self.arguments, dropout=False, bf16=bf16)

    def freeze(self) -> Self:
        """From now on the model is only read, inside `whole`. Every process calls it."""
        self.engine.freeze(self.module)
        return self

    def whole(self, prepared: Any = None) -> AbstractContextManager[PreTrainedModel]:
        """The module with whole parameters, without gradients, for generation and scoring (`Engine.whole`).

        `prepared`: what the engine or a trainer wrapped around the module; not needed for a frozen model.
        """
        return self.engine.whole(self.module if prepared is None else prepared)

    def parameters(self) -> int:
        """How many weights there are, trained or not; a tied one counts once."""
        names = {name for name, _ in self.module.named_parameters()}
        return sum(prod(entry.shape) for entry in self.engine.weights(self.module) if entry.name in names)

    # ---- to disk

    def write(self, path: Path | None, prepared: Any, part: str = "") -> Written:
        """Writes a model that anyone can load. Every process calls it; only the main one writes.

        One tensor at a time is gathered, compared with the parent's, written in float32 and hashed. Afterwards
        transformers reads configuration, names and shapes back, without the weights.

        Args:
            path: an existing directory; None on processes that do not write.
            prepared: what the engine or a trainer wrapped around the module.
            part: name of the module inside `prepared`, where that holds more than one.
        """
        tally = ChangeTally(self.parent, self.dtype)
        groups = self._published(self.engine.weights(prepared), f"{part}." if part else "")
        files = _files([entry for group in groups for entry in group])
        hashes: dict[str, str] = {}
        full: OSError | None = None
        for name, entries in files.items():
            watched = [replace(e, whole=_watched(tally, e)) for e in entries] if path is not None else entries
            try:
                digest = write_tensors(self.engine, (path or Path()) / name, watched)
            except OSError as error:  # the other processes go on to gather the next file
                full = full or error
                continue
            if digest is not None:
                hashes[name] = digest
        if full is not None:
            raise full
        if path is None:
            return Written({}, None)
        if len(files) > 1:
            _write_index(path, files)
        self._write_configuration(path)
        self._check(path)
        return Written(hashes, tally.share())

    def _write_configuration(self, path: Path) -> None:
        config = deepcopy(self.module.config)
        config.dtype, config.architectures = torch.float32, [self._class_name]
        config.save_pretrained(path)
        source = Path(self.encoder.tokenizer.name_or_path)
        copy_tokenizer(source, path)
        generation_config(source, self.encoder).save_pretrained(path)

    def _check(self, path: Path) -> None:
        loader: Any = AutoModelForSequenceClassification if self.role == "reward" else AutoModelForCausalLM
        with self.engine.loading():
            _, found = loader.from_pretrained(path, device_map="meta", output_loading_info=True)
        wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
        assert not wrong, f"{path} does not load as it was saved: {wrong}"

    def _published(self, entries: Sequence[Entry], prefix: str) -> list[list[Entry]]:
        """The entries as transformers publishes them: under its names, in float32, a tied weight once.

        An architecture may hold several published tensors as one (the experts of a layer). They are taken apart layer
        by layer, so each group of entries is gathered at once.
        """
        tied = self.module.all_tied_weights_keys  # {name that is left out: name that is kept}
        plain = {e.name.removeprefix(prefix): e for e in entries if e.name.startswith(prefix)}
        named = {tied.get(name, name): entry for name, entry in plain.items() if tied.get(name) not in plain}
        groups: dict[str, dict[str, Entry]] = {}
        for name, entry in named.items():
            dtype = torch.float32 if entry.dtype.is_floating_point else entry.dtype
            groups.setdefault(_layer(name), {})[name] = replace(entry, name=name, dtype=dtype)
        return [self._converted(group) for group in groups.values()]

    def _converted(self, group: dict[str, Entry]) -> list[Entry]:
        shapes = {name: torch.empty(e.shape, dtype=e.dtype, device="meta") for name, e in group.items()}
        wanted = revert_weight_conversion(self.module, shapes)
        if {name: value.shape for name, value in wanted.items()} == {name: v.shape for name, v in shapes.items()}:
            return list(group.values())
        held: dict[str, torch.Tensor] = {}

        def whole(name: str) -> torch.Tensor:
            if not held:  # every process is here: they write the same entries in the same order
                found = {key: entry.whole().detach().to("cpu", entry.dtype) for key, entry in group.items()}
                held.update(revert_weight_conversion(self.module, found))
            return held.pop(name)

        return [Entry(name, value.dtype, tuple(value.shape), partial(whole, name)) for name, value in wanted.items()]


def trained_dtype(engine: Engine, arguments: TrainedModelArguments) -> torch.dtype:
    """The precision of the weights that are trained.

    Raises:
        LaunchError: bfloat16 under an engine that trains float32 weights of its own all the same.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[arguments.dtype]
    engine.check_trained_dtype(dtype)
    return dtype


def load_encoder(parent: Parent) -> Encoder:
    """The parent's tokenizer and chat template, padding with the token that the hand-off found fit for it."""
    return Encoder.from_pretrained(parent.model_dir, parent.tokenizer.pad_id)


def check_vocabulary(module: PreTrainedModel, parent: Parent) -> None:
    """Raises HandoffError, naming both sizes, when the tokenizer has more ids than the model has embeddings."""
    rows = module.get_input_embeddings().get_parameter("weight").shape[0]
    size = parent.tokenizer.vocab_size
    if size > rows:
        raise HandoffError(f"{parent.path}: the tokenizer has {size} ids, the model only {rows} embeddings")


def _check_classification(parent: Parent) -> None:
    architecture = PretrainedConfig.get_config_dict(parent.model_dir)[0]["model_type"]
    if type_of_config(architecture) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise HandoffError(f"{parent.path}: transformers has no sequence classification for `{architecture}`")


@torch.no_grad()
def _draw_head(head: torch.nn.Module, seed: int) -> None:
    weight = head.get_parameter("weight")  # (1, H)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.copy_(drawn / (weight.shape[1] + 1) ** 0.5)


# ---- files


def copy_tokenizer(source: Path, target: Path) -> None:
    """The tokenizer's files as they are: loading and saving them could change what they are hashed by."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def generation_config(model_dir: Path, encoder: Encoder) -> GenerationConfig:
    """The directory's own generation settings, where it has any, with the ids that the encoder uses and stops at."""
    here = (model_dir / "generation_config.json").is_file()
    config = GenerationConfig.from_pretrained(model_dir) if here else GenerationConfig()
    declared = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    config.eos_token_id = sorted({*encoder.stop_ids, *(i for i in declared if i is not None)})
    config.pad_token_id = encoder.pad_id
    config.bos_token_id = encoder.bos_id
    return config


def _layer(name: str) -> str:
    """The part of a parameter's name up to its layer's number; the whole name outside of layers.

    >>> _layer("model.layers.3.mlp.up_proj.weight"), _layer("lm_head.weight")
    ('model.layers.3', 'lm_head.weight')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])


def _files(entries: Sequence[Entry]) -> dict[str, list[Entry]]:
    """The entries by the file that they go into, in their order."""
    parts: list[list[Entry]] = [[]]
    size = 0
    for entry in entries:
        bytes_ = prod(entry.shape) * entry.dtype.itemsize
        if parts[-1] and size + bytes_ > _FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += bytes_
    if len(parts) == 1:
        return {_SINGLE: parts[0]}
    return {f"model-{i:05d}-of-{len(parts):05d}.safetensors": part for i, part in enumerate(parts, 1)}


def _write_index(path: Path, files: Mapping[str, Sequence[Entry]]) -> None:
    total = sum(prod(e.shape) * e.dtype.itemsize for entries in files.values() for e in entries)
    index = {
        "metadata": {"total_size": total},
        "weight_map": {entry.name: name for name, entries in files.items() for entry in entries},
    }
    (path / INDEX_NAME).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class ChangeTally:
    """Counts which of the parent's weights training has changed, a tensor at a time.

    A head that the parent lacks, and what else it has not under the same name, does not count. Without tied embeddings,
    those of tokens that no row has stay as they are.
    """

    def __init__(self, parent: Parent | None, dtype: torch.dtype) -> None:
        self._dtype = dtype  # the parent was rounded to it, which is no change
        self._changed = self._total = 0
        self._files: dict[str, Path] = {}
        if parent is not None and parent.kind != "tokenizer":
            for path in weight_files(parent.model_dir):
                with safe_open(path, "pt") as file:
                    self._files |= dict.fromkeys(file.keys(), path)

    def see(self, name: str, now: torch.Tensor) -> None:
        """Compares one whole tensor."""
        if name not in self._files:
            return
        with safe_open(self._files[name], "pt") as file:
            before = file.get_tensor(name)
        if before.shape == now.shape:
            now = now.detach().to("cpu", torch.float32)
            self._changed += int((before.to(self._dtype).float() != now).sum())
            self._total += now.numel()

    def share(self) -> float | None:
        """Of the weights that could be compared."""
        return self._changed / self._total if self._total else None


def _watched(tally: ChangeTally, entry: Entry) -> "Callable[[], torch.Tensor]":
    def whole() -> torch.Tensor:
        tensor = entry.whole()
        tally.see(entry.name, tensor)
        return tensor

    return whole


@contextmanager
def several(models: Sequence[Model]) -> Iterator[None]:
    """Inside, all of these frozen models have whole parameters."""
    if not models:
        yield
        return
    with models[0].whole(), several(models[1:]):
        yield
