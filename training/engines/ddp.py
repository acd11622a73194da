"""Data parallel: every process has the whole model, and gradients are summed once a step (PyTorch's DDP)."""

from typing import TYPE_CHECKING, Any

from training.engines.single import Single

if TYPE_CHECKING:
    import torch


class Ddp(Single):
    """Several processes under `DistributedDataParallel`.

    DDP adds gradients up in buckets of several parameters, and forms new buckets after the first backward pass. gloo
    adds the numbers of three processes or more in an order that depends on their place in the bucket, so a resumed run
    would differ from an undisturbed one in its last bits. There, gradients are added in the order of the processes.
    """

    def adopt(self, trainer: Any) -> None:
        """As `Single.adopt`."""
        super().adopt(trainer)
        self._add_in_order(trainer.model_wrapped)

    def _add_in_order(self, wrapped: Any) -> None:
        import torch
        import torch.distributed as dist

        def mean(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:  # type: ignore[name-defined]  # not in the stubs
            mine = bucket.buffer()
            parts = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, mine)
            total = parts[0]
            for part in parts[1:]:
                total += part
            done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
            done.set_result(total / len(parts))
            return done

        if self.request.device == "cpu" and self.request.processes > 2:
            wrapped.register_comm_hook(None, mean)

    def prepare(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> tuple[Any, Any]:
        """As `Single.prepare`."""
        wrapped, optimizer = super().prepare(model, optimizer)
        # Gradients are not summed over processes until the last `backward` of a step.
        wrapped.require_backward_grad_sync = False
        self._add_in_order(wrapped)
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
