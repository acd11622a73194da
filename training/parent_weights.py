"""Reads a parent's weights one layer at a time, under the names and in the form that the model has in memory, and
compares them with those that training has made."""

from collections.abc import Mapping
from contextlib import ExitStack
from copy import deepcopy
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers import PreTrainedModel

from handoff.errors import HandoffError
from handoff.parent import Parent
from handoff.weights import weight_files
from rollout.halves import HALVES, computes_in
from training.adapter import plain_name
from training.engines import upstream
from training.stored_adapter import StoredAdapter


class ParentWeights:
    """The weights of a parent whose files are opened only while a layer is read.

    One layer at a time is in memory: the one that was read last. So read the parameters in the model's order.
    """

    def __init__(self, parent: Parent, skeleton: PreTrainedModel, *, adapted: bool = True) -> None:
        """`skeleton`: the parent's model on torch's meta device; it stays there. `adapted`: merge the parent's adapter
        into what is read of its base."""
        self._parent, self._skeleton = parent, skeleton
        self._conversions = upstream.weight_conversions(skeleton)
        self._places = _places(parent)
        self._groups: dict[str, list[str]] = {}  # {layer: its tensors in the files}
        for stored, name in upstream.names_in_memory(skeleton, self._conversions, self._places).items():
            self._groups.setdefault(layer_of(name), []).append(stored)
        self._adapter = StoredAdapter.of(parent, skeleton) if adapted else None
        self.own: dict[str, torch.Tensor] = {}
        """Tensors that the model has instead of the parent's, such as a new head or an adapter."""
        self._layer: str | None = None
        self._held: Mapping[str, torch.Tensor] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """One whole tensor, in the skeleton's precision, by its name with or without a new adapter.

        Raises:
            HandoffError: the parent has no such tensor.
        """
        if name in self.own:
            return self.own[name]
        name = plain_name(name)
        if name in self.own:
            return self.own[name]
        if self._adapter is not None and name in self._adapter.saved:
            return self._adapter.tensor(name).to(self._skeleton.dtype)
        tied = self._skeleton.all_tied_weights_keys
        aliases = {name, tied.get(name), *(left_out for left_out, kept in tied.items() if kept == name)} - {None}
        for alias in sorted(aliases, key=lambda alias: alias != name):
            assert alias is not None
            found = self._read(layer_of(alias))
            if alias in found:
                return found[alias] if self._adapter is None else self._adapter.apply(alias, found[alias])
        raise HandoffError(f"{self._parent.path}: the weight files have no weights for {name}")

    def read_into(self, module: PreTrainedModel, part: str) -> None:
        """Reads parameters and buffers of a submodule that is whole, the one named `part`."""
        kept = module.state_dict().keys()
        found = module.get_submodule(part)
        with torch.no_grad():
            for name, tensor in [*found.named_parameters(part), *found.named_buffers(part)]:
                if name in kept:
                    tensor.copy_(self(name))

    def _read(self, layer: str) -> Mapping[str, torch.Tensor]:
        if layer != self._layer:
            self._held = {}  # frees the layer before
            stored = self._groups.get(layer, [])
            with ExitStack() as files:
                opened = {
                    path: files.enter_context(safe_open(path, "pt")) for path in {self._places[n] for n in stored}
                }
                pieces = {name: opened[self._places[name]].get_slice(name) for name in stored}
                self._held = upstream.converted(self._skeleton, self._conversions, pieces)
            self._layer = layer
        return self._held


class ChangeTally:
    """Counts how many of the parent's weights training has changed, one tensor at a time.

    Tensors that the parent does not have under the same name, such as a new head, do not count. Without tied
    embeddings, the embeddings of tokens that occur in no row stay unchanged.
    """

    def __init__(self, parent: Parent | None, dtype: torch.dtype, below: StoredAdapter | None = None) -> None:
        """`below`: the parent's adapter."""
        self._dtype = dtype  # loading rounded the parent's weights to this type, which does not count as a change
        self._changed = self._total = self._published = 0
        self._rounds = False
        self._files = {} if parent is None or parent.kind == "tokenizer" else _places(parent)
        self._adapter = below

    def see(self, name: str, now: torch.Tensor, published: torch.dtype) -> None:
        """Compares one whole tensor, which is published in that precision."""
        if name not in self._files:
            return
        with safe_open(self._files[name], "pt") as file:
            before = file.get_tensor(name)
        if before.shape == now.shape and before.element_size() > 1:  # one byte: a quantised weight without its scale
            now = now.detach().to("cpu", torch.float32)
            if self._adapter is not None:
                before = self._adapter.apply(name, before.to(self._dtype))
            self._changed += int((before.to(self._dtype).float() != now).sum())
            self._published += int((before.float() != now.to(published)).sum())
            self._rounds |= published in HALVES
            self._total += now.numel()

    def shares(self) -> tuple[float | None, float | None]:
        """The changed share of the weights that could be compared (None: there were none), and the share that differs
        from the parent's as published (None: nothing was rounded)."""
        if not self._total:
            return None, None
        return self._changed / self._total, self._published / self._total if self._rounds else None


def _places(parent: Parent) -> dict[str, Path]:
    """{tensor: its file} of the parent's weights."""
    places: dict[str, Path] = {}
    for path in weight_files(parent.weights_dir):
        with safe_open(path, "pt") as file:
            places |= dict.fromkeys(file.keys(), path)
    return places


def layer_of(name: str) -> str:
    """The part of a parameter's name up to its layer's number; the whole name if it belongs to no layer.

    >>> layer_of("model.layers.3.mlp.up_proj.weight"), layer_of("lm_head.weight")
    ('model.layers.3', 'lm_head.weight')
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return name if number is None else ".".join(parts[: number + 1])


def without_values(skeleton: PreTrainedModel, loader: Any) -> PreTrainedModel:
    """A copy of a model on the meta device whose parameters have memory, but no values yet.

    The system gives memory its pages when they are first written, so a process takes only what it keeps of the model.
    """
    module = deepcopy(skeleton)
    new: dict[torch.Tensor, torch.nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if parameter not in new:
            new[parameter] = torch.nn.Parameter(_untouched(parameter), parameter.requires_grad)
        _replace(module, name, new[parameter])
    for name, buffer in _buffers(skeleton, loader).items():
        _replace(module, name, buffer)
    return module


def _buffers(model: PreTrainedModel, loader: Any) -> dict[str, torch.Tensor]:
    """A model's buffers as its class makes them, in the precision in which the model computes."""
    with init_empty_weights(include_buffers=False):
        twin = loader.from_config(model.config, dtype=computes_in(model))
    return dict(twin.named_buffers())


def restore_buffers(module: PreTrainedModel, loader: Any) -> None:
    """Gives a model that was loaded in half precision the buffers of a float32 one."""
    stored = module.state_dict().keys()
    for name, buffer in _buffers(module, loader).items():
        own = module.get_buffer(name)
        if buffer.is_floating_point():
            _replace(module, name, own.float() if name in stored else buffer)


def _untouched(like: torch.Tensor) -> torch.Tensor:
    """Zeros in memory of their own, which goes back to the system with the tensor. The allocator would keep it."""
    size = like.numel() * like.element_size()
    return torch.frombuffer(mmap(-1, size, flags=MAP_PRIVATE | MAP_ANONYMOUS), dtype=like.dtype).view(like.shape)


def _replace(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def check_complete(parent: Parent, missing: set[str], drawn: str | None) -> None:
    """Raises HandoffError for weights that the files lack; transformers would draw them. `drawn`: their prefix here."""
    lacking = sorted(name for name in missing if drawn is None or not name.startswith(drawn))
    if lacking:
        shown = ", ".join(lacking[:3]) + (f" and {len(lacking) - 3} more" if len(lacking) > 3 else "")
        raise HandoffError(
            f"{parent.path}: the weight files lack {shown}, which {parent.weights_dir / 'config.json'} asks for; "
            "copy the model again, with all of its files"
        )


@torch.no_grad()
def draw_head(head: torch.nn.Module, seed: int) -> torch.Tensor:
    """Draws the head's weights. Returns a copy of them."""
    weight = head.get_parameter("weight")  # (1, H)
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed))
    weight.copy_(drawn / (weight.shape[1] + 1) ** 0.5)
    return weight.detach().clone()
