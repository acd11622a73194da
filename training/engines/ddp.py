"""Data parallel: every process has the whole model, and gradients are summed once a step (PyTorch's DDP)."""

from typing import TYPE_CHECKING, Any

from training.engines.single import Single

if TYPE_CHECKING:
    import torch

    from training.config import TrainConfig


class Ddp(Single):
    """Several processes under `DistributedDataParallel`.

    DDP adds gradients up in buckets of several parameters, and forms new buckets after the first backward pass. gloo
    adds the numbers of three processes or more in an order that depends on their place in the bucket, so a resumed run
    would differ from an undisturbed one in its last bits. There, each parameter gets a bucket of its own.
    """

    @property
    def _bucket_mb(self) -> int | None:
        return 0 if self.request.device == "cpu" and self.request.processes > 2 else None

    def training_arguments(self, train: "TrainConfig") -> dict[str, Any]:
        """As `Single.training_arguments`."""
        return super().training_arguments(train) | {"ddp_bucket_cap_mb": self._bucket_mb}

    def _handlers(self) -> list[Any]:
        from accelerate import DistributedDataParallelKwargs

        buckets = self._bucket_mb
        return [] if buckets is None else [DistributedDataParallelKwargs(bucket_cap_mb=buckets)]

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
