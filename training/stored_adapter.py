"""The adapter of a parent: merged into the weights of its base while they are loaded, or beside weights that stay
quantised or in half precision."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from handoff.adapter import AdapterFiles, read_adapter, stored_name
from handoff.errors import HandoffError
from handoff.files import quoted
from handoff.parent import Parent
from training.frozen_adapter import PARENT, hold
from training.linear import HEAD, is_transposed, linear_layers, matrix


def merged(
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    lengths: torch.Tensor | None = None,
    *,
    transposed: bool = False,
) -> torch.Tensor:
    """A layer's weight with its update, float32: W + scaling · B A (Hu et al. 2021, eq. 3).

    With `lengths`, DoRA's (Liu et al. 2024, eq. 5): each row of that has the given length.

    Args:
        weight: (out, in), or (in, out) if `transposed`.
        a, b: (r, in) and (out, r).
        lengths: (out,).
    """
    update = scaling * (b.float() @ a.float())  # (out, in)
    whole = (weight.T if transposed else weight).float() + update
    if lengths is not None:
        whole = whole * (lengths.float() / torch.linalg.norm(whole, dim=1))[:, None]
    return (whole.T if transposed else whole).contiguous()


def can_stand_beside(parent: Parent) -> bool:
    """Whether the parent is an adapter that is a sum of products of two matrices, with at most a head of its own."""
    if parent.adapter_dir is None:
        return False
    files = read_adapter(parent.adapter_dir)
    return not files.settings.use_dora and set(files.saved) <= {f"{HEAD}.weight"}


class StoredAdapter:
    """The adapter of a parent."""

    def __init__(self, files: AdapterFiles, module: PreTrainedModel, base: str) -> None:
        """`module`: the base's network, perhaps without values. `base`: its name for messages.

        Raises:
            HandoffError: the adapter was made for another network.
        """
        self._files = files
        self.layers = list(files.layers)
        self.saved = set(files.saved)
        """Names of the parameters that it has as a whole."""
        linear = linear_layers(module)
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters(remove_duplicate=False)}
        self._transposed = {name for name in self.layers if name in linear and is_transposed(linear[name])}
        for name in self.layers:
            found = matrix(linear[name]) if name in linear else None
            self._check(name, self.matrix(name), found, base)
        tied = module.all_tied_weights_keys
        for name, info in files.saved.items():
            self._check(name, info.shape, shapes.get(name), base)
            if name in tied or name in tied.values():
                raise HandoffError(
                    f"{files.weights}: it has {quoted(name)}, which the base {base} shares with another module; "
                    "merge it into its base with peft (merge_and_unload), and name the merged model"
                )

    @classmethod
    def of(cls, parent: Parent, module: PreTrainedModel) -> "StoredAdapter | None":
        """The parent's adapter; None if the parent is a whole model."""
        if parent.adapter_dir is None:
            return None
        assert parent.base is not None
        return cls(read_adapter(parent.adapter_dir), module, parent.base.name)

    def _check(self, name: str, wanted: tuple[int, ...], found: tuple[int, ...] | None, base: str) -> None:
        if wanted != found:
            what = "has no such layer" if found is None else f"has the shape {list(found)} there"
            raise HandoffError(
                f"{self._files.weights}: {quoted(name)} is for weights of shape {list(wanted)}, and the base {base} "
                f"{what}: it is not the base of this adapter"
            )

    @property
    def plain(self) -> bool:
        """Whether it adds a product of two matrices to weights and nothing else (no DoRA)."""
        return not self._files.settings.use_dora

    def tensor(self, name: str) -> torch.Tensor:
        """A parameter that it has as a whole, or a part of a layer."""
        tensor: torch.Tensor = self._opened.get_tensor(stored_name(name)).clone()
        return tensor

    @cached_property
    def _opened(self) -> Any:
        """The file, mapped into memory. To open it for each of its tensors takes longer than to read them."""
        return safe_open(self._files.weights, "pt")

    def pair(self, layer: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(A, B, scaling) of a layer."""
        a, b = self.tensor(f"{layer}.lora_A.weight"), self.tensor(f"{layer}.lora_B.weight")
        return a, b, self._files.settings.scaling(layer, a.shape[0])

    def order(self, layer: str) -> int:
        """The rank of a layer's update; 0 if the layer has none."""
        parts = self._files.layers.get(layer)
        return 0 if parts is None else parts["lora_A.weight"].shape[0]

    def matrix(self, layer: str) -> tuple[int, int]:
        """(out, in) of a layer that it changes."""
        parts = self._files.layers[layer]
        return parts["lora_B.weight"].shape[0], parts["lora_A.weight"].shape[1]

    def changes(self, name: str) -> bool:
        """Whether the parameter differs from the base's."""
        return name in self.saved or name.removesuffix(".weight") in self._files.layers

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The base's parameter with the adapter merged into it, in the parameter's own precision."""
        if name in self.saved:
            return self.tensor(name).to(weight.dtype)
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self._files.layers:
            return weight
        a, b, scaling = self.pair(layer)
        lengths = None if self.plain else self.tensor(f"{layer}.lora_magnitude_vector").to(weight.device)
        a, b = a.to(weight.device), b.to(weight.device)
        return merged(weight, a, b, scaling, lengths, transposed=layer in self._transposed).to(weight.dtype)

    @torch.no_grad()
    def merge_into(self, module: PreTrainedModel) -> None:
        """Merges it into a network that has its base's values."""
        parameters: Mapping[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
        for name in [*(f"{layer}.weight" for layer in self.layers), *self.saved]:
            parameters[name].copy_(self.apply(name, parameters[name]))

    def hold(self, module: PreTrainedModel) -> None:
        """Puts it beside the weights of a network that has its base's quantised or half-precision weights, frozen.

        Raises:
            HandoffError: it is no sum of weights and a product of two matrices.
        """
        if not self.plain:
            raise HandoffError(
                f"{self._files.path}: an adapter with DoRA cannot stand beside a quantised base; merge it into "
                "its base (adapter.merge: true, or merge_and_unload of peft), and name the merged model"
            )
        with torch.no_grad():
            for name in self.saved:
                parameter = module.get_parameter(name)
                parameter.copy_(self.tensor(name))
        pairs = {layer: self.pair(layer) for layer in self.layers}
        hold(module, {layer: (a.float(), b.float() * scaling) for layer, (a, b, scaling) in pairs.items()}, PARENT)
