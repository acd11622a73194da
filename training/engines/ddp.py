"""Data parallel: every process has the whole model, and gradients are summed once a step (PyTorch's DDP)."""

from typing import TYPE_CHECKING, Any

from training.engines.single import Single

if TYPE_CHECKING:
    import torch


class Ddp(Single):
    """Several processes under `DistributedDataParallel`."""

    def prepare(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> tuple[Any, Any]:
        """As `Single.prepare`."""
        wrapped, optimizer = super().prepare(model, optimizer)
        # Gradients are not summed over processes until the last `backward` of a step.
        wrapped.require_backward_grad_sync = False
        return wrapped, optimizer

    def _backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        if not last:
            loss.backward()
            return
        with self._accelerator.trigger_sync_in_backward(model):
            loss.backward()

    def unwrapped(self, model: Any) -> Any:
        """As `Single.unwrapped`."""
        from torch.nn.parallel import DistributedDataParallel

        plain = super().unwrapped(model)
        return plain.module if isinstance(plain, DistributedDataParallel) else plain
