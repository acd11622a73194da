"""Further models on the frozen weights of a policy that trains an adapter: a critic or a reward model whose base is the
policy's needs no second copy of it, only matrices of its own.

The policy's network holds its base with the adapter of its parent merged in. A reward model that is an adapter on the
same base is, seen from there, its own adapter minus that of the policy's parent: W + B₂A₂ = (W + B₁A₁) + [B₂ −B₁]
[A₂; A₁]. Where the reward model was trained on top of that parent, the parent's part is left out on both sides.
"""

from copy import deepcopy

import torch
from torch import nn
from transformers import PreTrainedModel

from data.encode import Encoder
from handoff.parent import Parent
from training.config import AdapterConfig
from training.frozen_adapter import Pairs, hold
from training.linear import HEAD
from training.model import Model, Role
from training.stored_adapter import StoredAdapter

_BESIDE = "beside"  # peft's name for the adapter that leads from the policy's parent to another model


def twin(module: PreTrainedModel) -> PreTrainedModel:
    """A second network with the very same parameters, and modules, buffers and configuration of its own."""
    return deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def difference(policy: Parent, other: Parent, plain: PreTrainedModel) -> Pairs | None:
    """What has to be added to the weights of the policy's parent to get those of `other`, a parent on the same base.

    None if the two do not share a base, or differ in more than sums of products of matrices and a head.

    Args:
        plain: the policy's network without its new adapter.
    """
    if policy.fingerprint == other.fingerprint:
        return {}
    if (policy.base or policy).fingerprint != (other.base or other).fingerprint:
        return None
    first, second = StoredAdapter.of(policy, plain), StoredAdapter.of(other, _with_head(plain))
    for adapter, allowed in ((first, set[str]()), (second, {f"{HEAD}.weight"})):
        if adapter is not None and not (adapter.plain and adapter.saved <= allowed):
            return None
    return {
        layer: _without_common(_product(first, layer), _product(second, layer))
        for layer in dict.fromkeys([*(second.layers if second else ()), *(first.layers if first else ())])
    }


def _product(adapter: StoredAdapter | None, layer: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    if adapter is None or not adapter.order(layer):
        return None
    a, b, scaling = adapter.pair(layer)
    return a.float(), b.float() * scaling


def _without_common(
    first: tuple[torch.Tensor, torch.Tensor] | None, second: tuple[torch.Tensor, torch.Tensor] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The second product minus the first."""
    if first is None:
        assert second is not None
        return second
    if second is None:
        return first[0], -first[1]
    size = first[0].shape[0]
    if torch.equal(second[0][:size], first[0]) and torch.equal(second[1][:, :size], first[1]):
        return second[0][size:], second[1][:, size:]
    return torch.cat([second[0], first[0]]), torch.cat([second[1], -first[1]], dim=1)


def _with_head(plain: PreTrainedModel) -> PreTrainedModel:
    """A twin with a head for scores, which has no values yet."""
    module = twin(plain)
    module.add_module(HEAD, nn.Linear(plain.config.get_text_config().hidden_size, 1, bias=False))
    return module


class SharedBase:
    """The frozen weights of a policy, for other models. Make it before the policy gets its adapter."""

    def __init__(self, policy: Model) -> None:
        assert policy.parent is not None and policy.adapter is None and not policy.engine.splits
        self._plain, self._policy = twin(policy.module), policy

    def model(
        self,
        parent: Parent,
        role: Role,
        encoder: Encoder,
        *,
        adapter: AdapterConfig | None = None,
        seed: int = 0,
    ) -> Model | None:
        """A model of `parent` on these weights; None if its weights differ from them in other ways than an adapter's,
        or are quantised in another way.

        Args:
            parent: the policy's parent, or a reward model.
            role: `reward`, or `critic`.
            encoder: the parent's encoder.
            adapter: the recipe's `adapter:`, if the model is trained.
            seed: as for `Model.load`.
        """
        policy = self._policy
        assert policy.parent is not None
        scored = parent.kind == "reward_model"
        quantization = parent.quantization or (policy.quantization if adapter is not None else None)
        if quantization != policy.quantization:
            return None
        pairs = difference(policy.parent, parent, self._plain)
        if pairs is None or (scored and parent.adapter_dir is None):
            return None
        module = twin(self._plain)
        if scored:
            module = _with_head(self._plain)
            stored = StoredAdapter.of(parent, module)
            assert stored is not None
            head = module.get_submodule(HEAD).get_parameter("weight")
            with torch.no_grad():
                head.copy_(stored.tensor(f"{HEAD}.weight"))
        model = Model(policy.engine, module, role, encoder, policy.arguments, parent)
        if adapter is not None:
            model.adapt(adapter, seed)
        hold(module, {layer: pair for layer, pair in pairs.items() if pair[0].shape[0]}, _BESIDE)
        return model
