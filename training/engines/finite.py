"""A loss that is not finite shows in its gradient, so that all processes skip the same step."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def carry_nonfinite(loss: "torch.Tensor") -> "torch.Tensor":
    """The same loss (scalar, part of a graph); where it is not finite, its gradient is not finite either.

    The gradient of an infinite loss may be finite: that of a clamp or of log(0) behind a mask is. The norm of the
    gradients is that of all processes, so all of them see that the step must be skipped, under every engine.
    """
    import torch

    factor = torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)
    loss.register_hook(lambda gradient: gradient * factor)
    return loss
