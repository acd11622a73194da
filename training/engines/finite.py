"""Makes the gradient of a non-finite loss non-finite, so that all processes skip the same step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def carry_nonfinite(loss: "torch.Tensor") -> "torch.Tensor":
    """Returns the same loss (scalar, part of a graph). If it is not finite, its gradient will not be finite either.

    An infinite loss may have a finite gradient, for example after a clamp or a masked log(0). Under every engine the
    gradient norm covers all processes, so a non-finite norm tells all of them to skip the step.
    """
    import torch

    factor = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
    loss.register_hook(lambda gradient: gradient * factor)
    return loss
