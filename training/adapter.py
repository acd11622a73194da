"""A LoRA adapter that is trained: puts it on a network with peft, and says what its files hold and what a merge gives.

The layers are changed in place, so that the network stays a plain transformers model. Inside, a parameter has another
name than outside: `q_proj.weight` is `q_proj.base_layer.weight`, and beside it are `q_proj.lora_A.default.weight` and
`q_proj.lora_B.default.weight`.

If the parent is itself an adapter, it has been merged into the weights in memory or, if those are quantised, stands
beside them, frozen. What is published has both: W + B₁A₁ + B₂A₂ is W + [B₁ B₂] [A₁; A₂], one adapter on the parent's
base. So every published adapter is complete: it needs its base and nothing else, and loads with plain peft.
"""

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.functional import cast_adapter_dtype
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from data.sampling import uniform
from handoff.adapter import stored_name
from handoff.errors import HandoffError
from rollout.halves import seeming_float32
from rollout.quantised import QuantisedLinear
from training.config import DORA_OVER_QUANTISED, AdapterConfig
from training.engines.single import Entry
from training.frozen_adapter import ADAPTER, PARENT, activate
from training.linear import HEAD, ends_with, inner_layers, inside, is_transposed, linear_layers, matrix
from training.quantised_weights import dequantise, dequantised_entry
from training.recipe import RecipeError
from training.recipe_text import did_you_mean
from training.stored_adapter import StoredAdapter, merged

_EXPERTS = {"gate_proj", "up_proj", "down_proj", "gate"}
_COPY = f".modules_to_save.{ADAPTER}."


def plain_name(name: str) -> str:
    """The name that a parameter of the base, or a trained copy of it, has without the adapter.

    >>> plain_name("model.layers.0.mlp.up_proj.base_layer.weight"), plain_name("score.original_module.weight")
    ('model.layers.0.mlp.up_proj.weight', 'score.weight')
    """
    return name.replace(".base_layer.", ".").replace(".original_module.", ".").replace(_COPY, ".")


class Adapter:
    """The adapter on one network."""

    def __init__(
        self,
        module: PreTrainedModel,
        config: AdapterConfig,
        seed: int,
        below: StoredAdapter | None = None,
        role: str = "policy",
    ) -> None:
        """Puts the adapter on the network; from then on it alone is trained.

        Its values depend on `seed` only. A network without values gets an adapter with values all the same.

        Args:
            module: the base's network, with `below` merged into it or beside its quantised weights.
            config: the recipe's `adapter:`.
            seed: seed of the initial values.
            below: the parent's adapter, which the published adapter will contain.
            role: the model's role. The head of a reward model is trained as a whole.

        Raises:
            RecipeError: a key names no layer, or one that cannot be adapted.
            HandoffError: the adapter and `below` are not one adapter.
        """
        self.config, self._below, self._module = config, below, module
        linear = linear_layers(module)
        self._saved = _saved(module, config, head=role == "reward")
        names = [name for name in _targets(module, config) if not inside(name, self._saved)]
        if config.use_dora and any(isinstance(linear[name], QuantisedLinear) for name in names):
            raise RecipeError(DORA_OVER_QUANTISED)
        dequantise(module, self._saved)
        self._transposed = {name for name in names if is_transposed(linear[name])}
        self._beside = PARENT in vars(module).get("peft_config", {})  # whether `below` stands beside the weights
        if below is not None and not config.merge and not (below.plain and not config.use_dora):
            raise HandoffError(
                "adapter: the parent is an adapter too, and with DoRA the two cannot be published as one; set "
                "adapter.merge: true, which publishes the whole model"
            )
        self._shapes = {name: matrix(linear[name]) for name in names}
        peft_config = self._peft_config(names, self._saved)
        peft_config.fan_in_fan_out = any(isinstance(linear[name], Conv1D) for name in names)
        precise = seeming_float32(module, names, values=config.use_dora)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), precise:
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # that of the parent's adapter
            torch.manual_seed(int(uniform(1, seed, "adapter", role)[0] * 2**32))
            inject_adapter_in_model(peft_config, module, ADAPTER)
        cast_adapter_dtype(module, ADAPTER)
        for parameter in module.parameters():
            if parameter.requires_grad:  # peft leaves copies of whole modules as they are
                parameter.data = parameter.data.float()
        activate(module)
        self._layers: dict[str, Any] = {name: module.get_submodule(name) for name in names}
        missed = [name for name, layer in self._layers.items() if not isinstance(layer, LoraLayer)]
        if missed:
            raise RecipeError(
                f"adapter.target_modules: peft cannot adapt {missed[0]} of {type(module).__name__}; leave it out"
            )
        self._ranks = self._published_ranks()

    def _peft_config(self, names: Sequence[str], saved: Sequence[str]) -> LoraConfig:
        config = self.config
        return LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # fractions are fine
            lora_dropout=config.lora_dropout,
            target_modules=list(names),
            modules_to_save=list(saved) or None,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            rank_pattern=dict(config.rank_pattern),
            alpha_pattern=dict(config.alpha_pattern),
            init_lora_weights=config.init_lora_weights,
            fan_in_fan_out=bool(self._transposed),
        )

    # ---- in memory

    @contextmanager
    def off(self) -> Iterator[None]:
        """Inside, the network computes as its parent: as if it had not the adapter that is trained."""
        parts = [part for part in self._module.modules() if isinstance(part, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        beside = [part for part in parts if isinstance(part, LoraLayer) and PARENT in part.lora_A]
        active = [part._active_adapter for part in beside]
        try:
            for part in parts:
                part._disable_adapters = part not in beside
            for part in beside:
                part._active_adapter = [PARENT]
            yield
        finally:
            for part in parts:
                part._disable_adapters = False
            for part, names in zip(beside, active, strict=True):
                part._active_adapter = names

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name without the adapter, weight with the adapter merged) of a network whose weights are whole."""
        entries = {
            name: Entry(name, value.dtype, tuple(value.shape), value.detach)
            for name, value in self._module.named_parameters()
        }
        for name, entry in self.whole(entries).items():
            yield name, entry.whole()

    def own(self) -> dict[str, torch.Tensor]:
        """The adapter's matrices, by their names in the network; copies of modules are not among them."""
        return {
            name: value.detach().clone()
            for name, value in self._module.named_parameters()
            if value.requires_grad and _COPY not in name
        }

    # ---- published

    def whole(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The model's entries with the adapter merged in float32, by their names without it.

        `entries`: those of the network, by their names in it.
        """
        found: dict[str, Entry] = {}
        beside = self._below if self._beside else None
        own = tuple(f"{name}.lora_" for name in [*self._layers, *(beside.layers if beside else ())])
        for name, entry in entries.items():
            if name.startswith(own):
                continue
            plain = plain_name(name)
            if inside(plain, self._saved) and _COPY not in name:
                continue  # the frozen original of a module that is trained as a whole
            layer = plain.removesuffix(".weight")
            entry = dequantised_entry(self._module, name, entry)
            if beside is not None and beside.order(layer) and layer != plain:
                entry = replace(entry, whole=partial(_applied, beside, plain, entry))
            if layer in self._layers and layer != plain:
                entry = self._merged(layer, entry, entries)
            found[plain] = replace(entry, name=plain)
        return found

    def _parts(self, layer: str, entries: Mapping[str, Entry]) -> tuple[Entry, Entry, Entry | None, float]:
        """A, B, DoRA's lengths and the scaling of a layer."""
        a, b = entries[f"{layer}.lora_A.{ADAPTER}.weight"], entries[f"{layer}.lora_B.{ADAPTER}.weight"]
        lengths = entries.get(f"{layer}.lora_magnitude_vector.{ADAPTER}.weight")
        return a, b, lengths, float(self._layers[layer].scaling[ADAPTER])

    def _merged(self, layer: str, base: Entry, entries: Mapping[str, Entry]) -> Entry:
        a, b, lengths, scaling = self._parts(layer, entries)

        def whole() -> torch.Tensor:
            weight, first, second = (part.whole().detach() for part in (base, a, b))
            size = None if lengths is None else lengths.whole().detach()
            return merged(weight, first, second, scaling, size, transposed=layer in self._transposed)

        return replace(base, dtype=torch.float32, whole=whole)

    def stored(self, entries: Mapping[str, Entry]) -> list[Entry]:
        """The tensors of the adapter's file, float32. `entries` as for `whole`."""
        whole = self.whole(entries)
        saved = self._saved_modules()
        found: list[Entry] = []
        for name in self._ranks:
            for part, entry in self._stored_layer(name, entries):
                found.append(replace(entry, name=stored_name(f"{name}.{part}"), dtype=torch.float32))
        for name, entry in whole.items():
            if inside(name, saved):
                found.append(replace(entry, name=stored_name(name), dtype=torch.float32))
        return found

    def _stored_layer(self, layer: str, entries: Mapping[str, Entry]) -> Iterator[tuple[str, Entry]]:
        below = self._below
        if below is None:
            a, b, lengths, _ = self._parts(layer, entries)
            yield "lora_A.weight", a
            yield "lora_B.weight", b
            if lengths is not None:
                yield "lora_magnitude_vector", lengths
            return
        new = self._parts(layer, entries) if layer in self._layers else None
        under = below.pair(layer) if below.order(layer) else None

        def both(number: int) -> torch.Tensor:
            """A or B of both adapters; B with the scaling, so that that of the published adapter is 1."""
            parts: list[torch.Tensor] = []
            if under is not None:
                parts.append(under[1] * under[2] if number else under[0])
            if new is not None:
                own = (new[1] if number else new[0]).whole().detach().to("cpu", torch.float32)
                parts.append(own * new[3] if number else own)
            return torch.cat(parts, dim=number)

        r, (out, inner) = self._ranks[layer], self._matrix(layer)
        for part, number, shape in (("lora_A.weight", 0, (r, inner)), ("lora_B.weight", 1, (out, r))):
            yield part, Entry(part, torch.float32, shape, partial(both, number))

    def _matrix(self, layer: str) -> tuple[int, int]:
        """(out, in) of a layer."""
        if self._below is not None and self._below.order(layer):
            return self._below.matrix(layer)
        return self._shapes[layer]

    def _saved_modules(self) -> list[str]:
        """Modules of which the published adapter has the whole weights."""
        below = () if self._below is None else (name.rpartition(".")[0] for name in self._below.saved)
        return list(dict.fromkeys([*self._saved, *below]))

    def _published_ranks(self) -> dict[str, int]:
        """{layer: rank of its published update}, in the network's order."""
        saved = self._saved_modules()
        under = [] if self._below is None else self._below.layers
        ranks = {}
        for name in self._module.state_dict():
            layer = plain_name(name).removesuffix(".weight")
            if (layer in self._layers or layer in under) and not inside(layer, saved):
                own = int(self._layers[layer].r[ADAPTER]) if layer in self._layers else 0
                ranks[layer] = own + (0 if self._below is None else self._below.order(layer))
        return ranks

    def settings(self, base: str, *, scored: bool) -> dict[str, Any]:
        """The content of adapter_config.json. `base`: directory or hub id; `scored`: whether the model is a scorer."""
        ranks = self._ranks
        config = self._peft_config(list(ranks), self._saved_modules())
        if self._below is not None:
            config.r = max(ranks.values(), default=1)
            config.rank_pattern = {re.escape(name): r for name, r in ranks.items() if r != config.r}
            config.alpha_pattern = dict(config.rank_pattern)
            config.lora_alpha, config.use_rslora = config.r, False
        content = config.to_dict() | {  # type: ignore[no-untyped-call]  # upstream has no types
            "target_modules": _shortened(ranks, self._module),
            "base_model_name_or_path": base,
            "task_type": "SEQ_CLS" if scored else "CAUSAL_LM",
            "inference_mode": True,
        }
        return {key: sorted(value) if isinstance(value, set) else value for key, value in content.items()}


def _applied(adapter: StoredAdapter, name: str, entry: Entry) -> torch.Tensor:
    return adapter.apply(name, entry.whole())


def _targets(module: PreTrainedModel, config: AdapterConfig) -> list[str]:
    """Names of the layers to adapt, in the network's order."""
    linear = list(inner_layers(module))
    # Where experts are held as one tensor, peft takes these names for theirs (Qwen2-MoE, DeepSeek-V3).
    experts = any(ends_with(name, "gate_up_proj") for name, _ in module.named_parameters())
    found = [name for name in linear if not (experts and name.rpartition(".")[2] in _EXPERTS)]
    if config.target_modules != "all-linear":
        found = _chosen("target_modules", config.target_modules, linear, module)
    if config.exclude_modules is not None:
        left_out = set(_chosen("exclude_modules", config.exclude_modules, linear, module))
        found = [name for name in found if name not in left_out]
    if config.layers_to_transform is not None:
        numbers = {name: _number(name, config.layers_pattern) for name in found}
        unknown = set(config.layers_to_transform) - set(numbers.values())
        if unknown:
            raise RecipeError(f"adapter.layers_to_transform: the network has no layer {min(unknown)}")
        found = [name for name in found if numbers[name] in config.layers_to_transform]
    if not found:
        raise RecipeError("adapter: no layer is left to adapt; change target_modules or exclude_modules")
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(re.match(rf"(.*\.)?({pattern})$", name) for name in found):
                raise RecipeError(f"adapter.{key}: no adapted layer's name ends with {pattern}")
    return found


def _chosen(key: str, wanted: str | list[str], linear: Sequence[str], module: PreTrainedModel) -> list[str]:
    """The linear layers that a key of the recipe names."""
    if isinstance(wanted, str):
        try:
            found = [name for name in linear if re.fullmatch(wanted, name)]
        except re.error as error:
            raise RecipeError(f"adapter.{key}: {wanted} is no regular expression: {error}") from error
        if not found:
            raise RecipeError(f"adapter.{key}: the regular expression {wanted} fits no linear layer's whole name")
        return found
    for end in wanted:
        if not any(ends_with(name, end) for name in linear):
            ends = {name.rpartition(".")[2] for name in linear}
            raise RecipeError(
                f"adapter.{key}: no linear layer's name ends with {end}"
                + (
                    "; embeddings, head and out_proj of Mamba cannot be adapted, only trained whole (modules_to_save)"
                    if any(ends_with(name, end) for name, _ in module.named_modules())
                    else did_you_mean(end, ends) or f"; there are {', '.join(sorted(ends))}"
                )
            )
    return [name for name in linear if any(ends_with(name, end) for end in wanted)]


def _saved(module: PreTrainedModel, config: AdapterConfig, *, head: bool) -> list[str]:
    """Names of the modules that are trained as a whole. `head`: the head of scores is one of them.

    Raises:
        RecipeError: a key names no module, or one whose weights another module shares.
    """
    names = [name for name, _ in module.named_modules() if name]
    found = [HEAD] if head else []
    tied = module.all_tied_weights_keys
    shared = {*tied, *tied.values()}
    for end in config.modules_to_save:
        matching = [name for name in names if ends_with(name, end)]
        if not matching:
            ends = {name.rpartition(".")[2] for name in names}
            raise RecipeError(f"adapter.modules_to_save: no module's name ends with {end}{did_you_mean(end, ends)}")
        for name in matching:
            if any(inside(parameter, [name]) for parameter in shared):
                raise RecipeError(
                    f"adapter.modules_to_save: {name} shares its weights with another module, and a copy of one of "
                    "them would not be tied; leave it out, or train all weights"
                )
        found += matching
    return [name for name in dict.fromkeys(found) if not inside(name, [other for other in found if other != name])]


def _number(name: str, pattern: str | None) -> int | None:
    """The number of the layer of the network that a linear layer is in."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if part.isdigit() and pattern in (None, before):
            return int(part)
    return None


def _shortened(layers: Iterable[str], module: PreTrainedModel) -> list[str]:
    """The shortest ends of names that mean exactly these layers, for other programs; whole names if there are none."""
    chosen = set(layers)
    ends = {name.rpartition(".")[2] for name in chosen}
    names = (plain_name(f"{name}.").removesuffix(".") for name, _ in module.named_modules())
    meant = {name for name in names if name.rpartition(".")[2] in ends}
    return sorted(ends if meant == chosen else chosen)
