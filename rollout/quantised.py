"""Linear layers whose frozen weights are stored in four or eight bits, as the rest of the code sees them.

The layers themselves are in `rollout.bnb_layers`, which needs bitsandbytes; this module does not.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn


class QuantisedLinear(nn.Module):
    """A linear layer that computes with the weights that its stored numbers stand for, in any pass alike: activations
    are never quantised. So adding an update to `dequantised` gives the layer with that update."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None
    transposed = False
    """Whether the model's files have the weight as (in, out), as GPT-2's do."""

    @abstractmethod
    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight (out, in)."""


def plain_weight(linear: nn.Module) -> Tensor:
    """The weight (out, in) of a linear layer, quantised or not."""
    return linear.dequantised() if isinstance(linear, QuantisedLinear) else linear.get_parameter("weight")
