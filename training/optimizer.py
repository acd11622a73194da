"""AdamW for the weights of a stage; and Muon for a transformer's hidden matrices with AdamW for everything else, in one
`torch.optim.Optimizer`.

Muon orthogonalises the momentum of a weight matrix before each step (Keller Jordan 2024,
https://kellerjordan.github.io/posts/muon/; `torch.optim.Muon`). It suits hidden matrices only: embeddings, the output
head, norms and biases use AdamW. Trainer, scheduler, accelerate and the saved state each expect a single optimizer, so
both share one list of parameter groups and one state.

An orthogonalised step is scaled by √max(1, out / in). `torch.optim.Muon` takes both sizes from the shape (out, in) of
`nn.Linear`. GPT-2's `Conv1D` stores its matrices as (in, out), so their learning rate corrects the scale (`_groups`).
"""

from collections.abc import Iterable
from math import sqrt
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer
from transformers.pytorch_utils import Conv1D

from training.config import MuonTrainConfig, OptimizerConfig
from training.rounding import StochasticAdamW


def decayed_names(module: nn.Module) -> set[str]:
    """Names of the parameters with weight decay, by the Trainer's rule: all but norms and biases."""
    return set(Trainer.get_decay_parameter_names(None, module))  # type: ignore[arg-type]  # it reads the module alone


def hidden_matrices(model: PreTrainedModel) -> list[str]:
    """Names of the weight matrices of linear layers, without embeddings and the output head."""
    outside = {id(model.get_input_embeddings().weight)}
    head = model.get_output_embeddings()
    if head is not None:
        outside.add(id(head.weight))
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.ndim == 2 and id(parameter) not in outside | embeddings
    ]


def decay_groups(
    named: Iterable[tuple[str, nn.Parameter]], decayed: set[str], weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of an optimizer: the parameters in `decayed`, and those without weight decay. Frozen ones are left out."""
    trained = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in trained if name in decayed], "weight_decay": weight_decay},
        {"params": [p for name, p in trained if name not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def in_bfloat16(module: nn.Module) -> bool:
    """Whether the weights that are trained are held in bfloat16 alone."""
    return any(parameter.requires_grad and parameter.dtype == torch.bfloat16 for parameter in module.parameters())


def adamw(groups: list[dict[str, Any]], config: OptimizerConfig, seed: int, *, half: bool) -> torch.optim.Optimizer:
    """AdamW, in one kernel for all parameters; for bfloat16 ones (`half`), with stochastic rounding by `seed`."""
    betas = (config.adam_beta1, config.adam_beta2)
    if half:
        return StochasticAdamW(groups, seed, config.learning_rate, betas, config.adam_epsilon)
    return torch.optim.AdamW(groups, config.learning_rate, betas, config.adam_epsilon, fused=True)


class MuonAdamW(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer. The scheduler scales each group's own peak learning rate by the same factor."""

    def __init__(
        self,
        matrices: list[nn.Parameter] | list[dict[str, Any]],
        others: list[dict[str, Any]],
        config: MuonTrainConfig,
    ) -> None:
        """`matrices`: parameters or groups of parameters for Muon; `others`: groups for AdamW."""
        self._muon = torch.optim.Muon(
            matrices,
            lr=config.muon_learning_rate,
            momentum=config.muon_momentum,
            weight_decay=config.weight_decay,
        )
        self._adamw = torch.optim.AdamW(
            others,
            lr=config.learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            eps=config.adam_epsilon,
        )
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {})
        self._link()

    def _link(self) -> None:
        # Other code reads, changes and saves this object's groups and state, so both parts must use the same ones.
        split = len(self._muon.param_groups)
        self._muon.param_groups, self._adamw.param_groups = self.param_groups[:split], self.param_groups[split:]
        self._muon.state = self._adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores both parts. `Optimizer.load_state_dict` replaces groups and state, so they are linked again."""
        super().load_state_dict(state_dict)
        self._link()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # closures are not supported
        """One step of both optimizers; closures are not supported."""
        assert closure is None
        self._muon.step()
        self._adamw.step()


def muon_adamw(model: PreTrainedModel, decayed: set[str], config: MuonTrainConfig) -> MuonAdamW:
    """The optimizer for `model`; `decayed` names the AdamW parameters with weight decay. Muon decays all of its own."""
    matrices = set(hidden_matrices(model))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    others = decay_groups([(name, p) for name, p in named if name not in matrices], decayed, config.weight_decay)
    transposed = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}
    groups = _groups([p for name, p in named if name in matrices], transposed, config)
    return MuonAdamW(groups, others, config)


def _groups(matrices: list[nn.Parameter], transposed: set[int], config: MuonTrainConfig) -> list[dict[str, Any]]:
    """Groups for `torch.optim.Muon`, one for each correction of the learning rate, the group without correction first.

    Weight decay is multiplied by the learning rate, so it is divided by the correction. `transposed`: ids of the
    matrices that are stored as (in, out).
    """
    by_correction: dict[float, list[nn.Parameter]] = {1.0: []}
    for matrix in matrices:
        correction = 1.0
        if id(matrix) in transposed:
            inputs, outputs = matrix.shape
            correction = sqrt(max(1, outputs / inputs)) / sqrt(max(1, inputs / outputs))
        by_correction.setdefault(correction, []).append(matrix)
    return [
        {"params": params, "lr": config.muon_learning_rate * c, "weight_decay": config.weight_decay / c}
        for c, params in by_correction.items()
        if params
    ]
