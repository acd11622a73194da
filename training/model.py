"""Loads, freezes and publishes a model: one network in one role.

Roles: `policy` (generates text), `reference` (a frozen policy to which the KL is measured), `critic` (estimates
values), `reward` (one score for each text). A `Model` has its role, its precision, its encoder, and the engine that
may shard it. Only this module, and those of this package that it uses, convert parameter names and cast tensors for
publishing.

Weights are float32 unless a recipe sets another type for the weights that it trains: at the learning rates of
alignment, AdamW's steps are below the precision of bfloat16 weights. For speed, `train.bf16` turns on autocast.

Other programs can load a published model: it consists of safetensors, the parent's tokenizer and chat template byte for
byte, and a generation_config.json with the stop ids.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from data.encode import Encoder
from handoff.errors import HandoffError
from handoff.gate import ADAPTER_WEIGHTS, named_errors
from handoff.manifest import AdapterRecord, QuantizationRecord
from handoff.parent import Parent, is_hub_id
from reward.learned import read_by_mask
from rollout.halves import HALVES, can_keep_halves, computes_in, keep_halves
from training.adapter import Adapter
from training.architecture import (
    LOCAL,
    add_in_order,
    attention,
    dequantised,
    name_experts,
    network,
    parent_config,
    parent_network,
    without_dropout,
)
from training.config import AdapterConfig, ModelArguments
from training.engines.protocol import Engine
from training.engines.single import Entry
from training.model_files import in_words, warn, write_configuration
from training.parent_weights import (
    ChangeTally,
    ParentWeights,
    check_complete,
    draw_head,
    restore_buffers,
    without_values,
)
from training.precision import PublishDtype, Published, precision
from training.publishing import (
    Written,
    adapter_alone,
    adapter_differences,
    model_files,
    whole_model,
    write_adapter_settings,
    write_weights,
)
from training.quantised_loading import Quantised, adopt_stored, quantised_twin
from training.quantised_weights import dequantise, dequantised_entry
from training.stored_adapter import StoredAdapter, can_stand_beside

Role = Literal["policy", "reference", "critic", "reward"]


class Model:
    """One network in one role. `module` is the plain transformers model.

    Under an engine that shards, a loaded model has no values until it is prepared or frozen (`fill`).
    """

    def __init__(
        self,
        engine: Engine,
        module: PreTrainedModel,
        role: Role,
        encoder: Encoder,
        arguments: ModelArguments,
        parent: Parent | None,
        later: ParentWeights | None = None,
        below: StoredAdapter | None = None,
        quantization: QuantizationRecord | None = None,
        publish: PublishDtype = "auto",
    ) -> None:
        """`later`: the weights that `fill` will read, if the module has none yet. `below`: the parent's adapter, merged
        or beside the weights. `quantization`: how these were quantised. `publish`: the recipe's `publish_dtype`."""
        self.engine, self.module, self.role = engine, module, role
        self.encoder, self.arguments, self.parent = encoder, arguments, parent
        self._later, self._below, self.quantization = later, below, quantization
        self._published_in = Published(publish, parent)
        self.adapter: Adapter | None = None
        """What is trained instead of the module's own weights."""
        self.dtype = computes_in(module)
        """Precision of the weights that are trained, and of what the others compute without autocast."""
        self._class_name = type(module).__name__  # an engine may change the class
        if role == "reward":
            read_by_mask(module)
        add_in_order(module.config, engine.device)
        name_experts(module.config)

    @classmethod
    def load(
        cls,
        engine: Engine,
        parent: Parent,
        role: Role,
        encoder: Encoder,
        arguments: ModelArguments,
        *,
        dtype: torch.dtype | None = torch.float32,
        dropout: bool = True,
        bf16: bool = True,
        seed: int = 0,
        adapter: AdapterConfig | None = None,
        quantization: QuantizationRecord | None = None,
        frozen: bool = False,
        publish: PublishDtype = "auto",
    ) -> Self:
        """Loads a model from its parent. If that is an adapter, it is merged into its base's weights, unless those stay
        quantised or in half precision.

        An adapter that was trained over quantised weights belongs to these, so its base is quantised again in the same
        way, whoever loads it. If all weights are to be trained, they are then turned back into plain ones.

        For `policy` and `reference` it is a causal language model; for `reward` it has a head with one output; for
        `critic` it is of the same kind as the parent.

        If the parent has no head, a new one is drawn from N(0, 1 / (H + 1)) (H hidden size). It uses its own random
        generator, so it depends only on `seed`.

        Args:
            engine: the engine that will train or use the model.
            parent: the opened and checked parent.
            role: see the docstring of this module.
            encoder: the parent's encoder (`load_encoder`).
            arguments: `model_args` of the recipe.
            dtype: type of the weights, whatever the parent's type is; None: the parent's, that of an adapter's base.
            dropout: False sets every dropout of the network to zero, whatever the configuration says.
            bf16: whether the forward pass will run under bfloat16 autocast if there is a GPU for it.
            seed: seed of a new head, and of a new adapter.
            adapter: the recipe's `adapter:`; what is loaded is then frozen, and a new adapter is trained.
            quantization: how the recipe says that the frozen weights are quantised.
            frozen: the weights will not be trained. They compute as float32 ones, whatever their type is.
            publish: the recipe's `publish_dtype`.

        Raises:
            RecipeError: `adapter` names no layer, or one that cannot be adapted; or `quantization` does not suit the
                architecture.
            HandoffError: the tokenizer has ids that the model has no embedding for, transformers does not have the
                architecture or refuses its files, or its weights are quantised in a way that cannot be undone.
            LaunchError: the engine cannot hold quantised weights.
        """
        scored = role == "reward" or (role == "critic" and parent.kind == "reward_model")
        config = parent_config(parent)
        kind = parent_network(parent, config, scored=scored)
        has_head = (parent.base or parent).kind == "reward_model"
        if has_head and config.num_labels != 1:
            raise HandoffError(
                f"{parent.path}: it gives {config.num_labels} scores for a text; a reward model gives one"
            )
        quantised = Quantised.of(parent, config, quantization, trained=not frozen and adapter is None)
        if quantised.held:
            engine.check_quantised(str(parent.path))
        plain = {} if quantised.stored else dequantised(parent, config)
        plainly = can_keep_halves(config) and not quantised.held
        stands = not engine.splits and can_stand_beside(parent)
        if dtype is None:
            dtype = precision(parent, beside=stands) if plainly else torch.float32
        kept = dtype in HALVES and (frozen or adapter is not None) and plainly
        keys: dict[str, Any] = plain | {
            "dtype": dtype,
            "config": config,
            "attn_implementation": attention(arguments, bf16, kind),
            "experts_implementation": None,
            "use_safetensors": True,
            **LOCAL,
        }
        loader: Any = AutoModelForCausalLM
        if scored:
            loader, config.num_labels = AutoModelForSequenceClassification, 1
        if engine.splits and plain:
            raise HandoffError(
                f"{parent.path}: its weights are quantised, and an engine that shards reads plain ones alone; load "
                "and save it once with transformers (`dequantize=True`), and name that directory"
            )
        if engine.splits or quantised.record is not None:
            keys["device_map"] = "meta"
        elif quantised.stored:
            keys["device_map"] = {"": engine.device}
        with engine.loading(), named_errors(parent.weights_dir):
            module, found = loader.from_pretrained(parent.weights_dir, output_loading_info=True, **keys)
        new_head = scored and parent.kind != "reward_model"
        check_complete(parent, set(found["missing_keys"]), "score." if scored and not has_head else None)
        if plain:  # what is published has plain weights under their plain names
            vars(module).pop("_weight_conversions")
        if type(module.config) is not type(config):
            warn(
                f"{parent.path}: of this model, only the part that reads and writes text is loaded, trained and "
                "published; its other parts and their processor's files are left out"
            )
        check_vocabulary(module, parent)
        if kept:
            keep_halves(module)
        below = StoredAdapter.of(parent, module)
        later: ParentWeights | None = None
        if quantised.stored:
            adopt_stored(module, dtype)
        elif quantised.record is not None:
            whole = [name.rpartition(".")[0] for name in (() if below is None else below.saved)]
            missing = "score." if scored and not has_head else None
            with engine.loading(), named_errors(parent.weights_dir):
                precise = loader.from_pretrained(parent.weights_dir, **keys | {"dtype": torch.float32})
                source = ParentWeights(parent, precise, adapted=False)
                module = quantised_twin(module, source, loader, quantised.record, whole, engine.device, missing)
            engine.release_memory()  # that of the float32 layers
        beside = (kept and stands) or (quantised.held and (frozen or adapter is not None))
        if quantised.held and not beside:
            dequantise(module)
            module.requires_grad_(True)
        if engine.splits:
            later = ParentWeights(parent, module)
            with engine.loading():
                module = without_values(module, loader)
            if scored and not new_head:
                later.read_into(module, "score")
        elif kept:
            with engine.loading():
                restore_buffers(module, loader)
        if below is not None and not engine.splits:
            (below.hold if beside else below.merge_into)(module)
        if scored:
            module.config.pad_token_id = parent.tokenizer.pad_id
        if new_head:
            head = draw_head(module.get_submodule("score"), seed)
            if later is not None:
                later.own["score.weight"] = head
        module = module if dropout else without_dropout(module)
        record = quantised.record if beside else None
        model = cls(engine, module, role, encoder, arguments, parent, later, below, record, publish)
        return model if adapter is None else model.adapt(adapter, seed)

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
        publish: PublishDtype = "auto",
    ) -> Self:
        """A causal language model with random weights, drawn from torch's global generator."""
        kind = network(config, scored=False)
        assert kind is not None, "`model_config` makes configurations of causal language models"
        with engine.loading():
            module = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=attention(arguments, bf16, kind)
            )
        return cls(engine, module, "policy", encoder, arguments, None, publish=publish)

    def adapt(self, config: AdapterConfig, seed: int) -> Self:
        """Freezes the module and puts a new adapter on it. Raises as `load`."""
        self.engine.check_adapter(dora=config.use_dora)
        self.adapter = Adapter(self.module, config, seed, self._below, self.role)
        if self._later is not None:
            self._later.own |= self.adapter.own()
        return self

    def reference(self, bf16: bool, *, moves: bool = False) -> "Model | WithoutAdapter":
        """The reference for the KL: this policy's parent, loaded once more; the caller freezes it.

        Of a policy that trains an adapter, it is the policy itself without it.

        Args:
            bf16: as in `load`.
            moves: its weights will be moved towards the policy's, in steps that half precision would lose.
        """
        assert self.parent is not None
        if self.adapter is not None:
            return WithoutAdapter(self)
        keys: dict[str, Any] = {"dropout": False, "bf16": bf16, "dtype": None, "frozen": True}
        if moves:
            keys["dtype"] = torch.float32
        elif self.dtype in HALVES:  # its numbers are rounded as the policy's
            keys |= {"dtype": self.dtype, "frozen": False}
        return Model.load(self.engine, self.parent, "reference", self.encoder, self.arguments, **keys)

    def freeze(self) -> Self:
        """Freezes the model; from then on it computes only inside `whole`. Every process calls it."""
        self.engine.freeze(self.module)
        self.fill(self.module)
        return self

    def fill(self, prepared: Any, part: str = "", of: str = "") -> None:
        """Reads the parent's weights into a model that `load` left without them. Every process calls it.

        Under an engine that shards, `load` returns a model without values, so that no process has to hold the whole
        model. Each process reads one layer at a time here, and keeps its share. Call it as soon as the model is
        prepared.

        Args:
            prepared: what the engine or a trainer wrapped around the module.
            part: name of the module inside `prepared`, if that has more than one.
            of: name of the submodule of this model that stands there; empty for the whole model.

        Raises:
            HandoffError: the parent's files lack a tensor.
        """
        if self._later is None:
            return
        read, prefix, inner = self._later, f"{part}." if part else "", f"{of}." if of else ""
        names = {entry.name for entry in self.engine.weights(prepared) if entry.name.startswith(prefix)}
        self.engine.load_weights(prepared, names, lambda name: read(inner + name.removeprefix(prefix)))
        self._later = None

    def whole(self, prepared: Any = None) -> AbstractContextManager[PreTrainedModel]:
        """The module with whole parameters, without gradients, for generation and scoring (`Engine.whole`).

        `prepared`: what the engine or a trainer wrapped around the module; not needed for a frozen model.
        """
        return self.engine.whole(self.module if prepared is None else prepared)

    def parameters(self) -> int:
        """The number of weights, trained or not; a tied weight counts once."""
        names = {name for name, _ in self.module.named_parameters()}
        entries = [entry for entry in self.engine.weights(self.module) if entry.name in names]
        return sum(prod(dequantised_entry(self.module, entry.name, entry).shape) for entry in entries)

    # ---- to disk

    def write(self, path: Path | None, prepared: Any, part: str = "") -> Written:
        """Writes a model that other programs can load. Every process calls it; only the main process writes.

        Each tensor in turn is gathered, compared with the parent's, rounded, written and hashed. Afterwards
        transformers reads back the configuration, names and shapes, without the weights, as a check.

        Args:
            path: an existing directory; None on processes that do not write.
            prepared: what the engine or a trainer wrapped around the module.
            part: name of the module inside `prepared`, if that has more than one.
        """
        entries, prefix = self.engine.weights(prepared), f"{part}." if part else ""
        if self.adapter is not None and not self.adapter.config.merge:
            stored = self._stored(entries, prefix)
            hashes = write_weights(self.engine, path, {ADAPTER_WEIGHTS: stored})
            if path is not None:
                self._write_configuration(path)
                self._check_adapter(path, stored)
            return Written(hashes)
        tally = ChangeTally(self.parent, self.dtype, self._below)
        files = model_files([entry for group in self._published(entries, prefix) for entry in group])
        hashes = write_weights(self.engine, path, files, tally)
        if path is None:
            return Written({})
        self._write_configuration(path)
        self._check(path)
        return Written(hashes, *tally.shares())

    def rehearse(self, path: Path) -> None:
        """Writes what `write` will write besides the weights, and loads it with the names and shapes of the weights.

        Called on one process before training, so that what could not be published is known before it is trained.

        Args:
            path: an existing, empty directory.

        Raises:
            HandoffError: a file cannot be saved, or the names do not load; the message names the parent's file.
        """
        source = self.encoder.tokenizer.name_or_path
        groups = self._published(self.engine.weights(self.module), "")
        tensors = {e.name: torch.empty(e.shape, dtype=e.dtype, device="meta") for group in groups for e in group}
        self._write_configuration(path)
        try:
            config = AutoConfig.from_pretrained(path, **LOCAL)
            kind: Any = network(config, scored=self.role == "reward")
            assert kind is not None, f"transformers has no such model for {type(config).__name__}"
            with self.engine.loading():
                _, found = kind.from_pretrained(
                    None, config=config, state_dict=tensors, device_map="meta", output_loading_info=True, **LOCAL
                )
        except Exception as error:  # each class raises its own errors
            raise HandoffError(f"{source}: its model cannot be published: {in_words(error)}") from error
        wrong = _not_loaded(found)
        if wrong:
            raise HandoffError(f"{source}: the weights do not load under the names that they are saved by: {wrong}")
        if self.adapter is not None and not self.adapter.config.merge:
            self._check_adapter(path, self._stored(self.engine.weights(self.module), ""))

    def published_bytes(self) -> int:
        """Bytes of the weights that `write` writes."""
        entries = self.engine.weights(self.module)
        if self.adapter is not None and not self.adapter.config.merge:
            written = self._stored(entries, "")
        else:
            written = [entry for group in self._published(entries, "") for entry in group]
        return sum(prod(entry.shape) * entry.dtype.itemsize for entry in written)

    def adapter_record(self, name: str) -> AdapterRecord | None:
        """The manifest's record of what an adapter needs besides its files; None if the whole model is published.

        `name`: the stage's section.
        """
        if self.adapter is None or self.adapter.config.merge:
            return None
        assert self.parent is not None
        base = self.parent.base or self.parent
        return AdapterRecord(base=base.record(), stack=[*self.parent.stack, name], quantization=self.quantization)

    def _published(self, entries: Sequence[Entry], prefix: str) -> list[list[Entry]]:
        """The whole model's entries as they are published (`whole_model`)."""
        return [self._published_in.of(group) for group in whole_model(self.module, entries, prefix, self.adapter)]

    def _stored(self, entries: Sequence[Entry], prefix: str) -> list[Entry]:
        """The entries of the adapter's file, which is float32 unless the recipe says otherwise."""
        assert self.adapter is not None
        found = adapter_alone(self.adapter, entries, prefix)
        return found if self._published_in.asked is None else self._published_in.of(found)

    def _write_configuration(self, path: Path) -> None:
        template = None if self.parent is None else self.parent.chat_template
        dtype = self._published_in.main
        write_configuration(path, self.module.config, dtype, self._class_name, self.encoder, template)
        if self.adapter is not None and not self.adapter.config.merge:
            assert self.parent is not None
            base = self.parent.base or self.parent
            where = base.name if is_hub_id(base) else str(base.model_dir.absolute())
            write_adapter_settings(path, self.adapter.settings(where, scored=self.role == "reward"))

    def _check_adapter(self, path: Path, stored: Sequence[Entry]) -> None:
        """Asserts that peft finds the tensors in what was written, and looks for no others."""
        loader: Any = AutoModelForSequenceClassification if self.role == "reward" else AutoModelForCausalLM
        with self.engine.loading(), init_empty_weights():
            base = loader.from_config(AutoConfig.from_pretrained(path, **LOCAL))
        wrong = adapter_differences(path, {entry.name: entry.shape for entry in stored}, base)
        assert not wrong, f"peft does not load the adapter in {path} as it was saved: {wrong[:3]}"

    def _check(self, path: Path) -> None:
        loader: Any = AutoModelForSequenceClassification if self.role == "reward" else AutoModelForCausalLM
        with self.engine.loading():
            _, found = loader.from_pretrained(path, device_map="meta", output_loading_info=True, **LOCAL)
        wrong = _not_loaded(found)
        assert not wrong, f"{path} does not load as it was saved: {wrong}"


class WithoutAdapter:
    """A policy without its adapter, which is its parent. It has no weights of its own."""

    def __init__(self, policy: Model) -> None:
        self._policy = policy

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The policy's module, without the adapter. Enter it inside the context in which the policy is whole."""
        assert self._policy.adapter is not None
        with self._policy.adapter.off():
            yield self._policy.module


def _not_loaded(found: Mapping[str, Any]) -> dict[str, list[str]]:
    """{what is wrong: names}, from the information that transformers gives about loading; empty if all is well."""
    return {key: sorted(map(str, names))[:3] for key, names in found.items() if names}


def load_encoder(parent: Parent) -> Encoder:
    """The parent's tokenizer and chat template, with the end and pad tokens and stop ids of its tokenizer record."""
    return Encoder.from_pretrained(parent.model_dir, parent.tokenizer, parent.chat_template)


def check_vocabulary(module: PreTrainedModel, parent: Parent) -> None:
    """Raises HandoffError, naming both sizes, when the tokenizer has more ids than the model has embeddings."""
    rows = module.get_input_embeddings().get_parameter("weight").shape[0]
    size = parent.tokenizer.vocab_size
    if size > rows:
        raise HandoffError(f"{parent.path}: the tokenizer has {size} ids, the model only {rows} embeddings")


@contextmanager
def several(models: Sequence[Model]) -> Iterator[None]:
    """Inside, all of these frozen models have whole parameters and can compute."""
    if not models:
        yield
        return
    with models[0].whole(), several(models[1:]):
        yield
