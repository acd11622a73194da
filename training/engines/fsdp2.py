"""PyTorch's own sharding (`fully_shard`, FSDP2): shards weights, gradients and optimizer states layer by layer."""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from training.engines import upstream
from training.engines.launch import LaunchError
from training.engines.single import Entry
from training.engines.splitting import Splitting

if TYPE_CHECKING:
    import torch


class Fsdp2(Splitting):
    """Several processes whose parameters are DTensors."""

    sharding = "_fsdp2"

    # ---- choices

    def check_machine(self) -> None:
        """As `Single.check_machine`."""
        super().check_machine()
        # accelerate's default loads the weights on one process only, and breaks the ties between tied weights.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
        if self.request.device == "cpu":
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
            upstream.allow_fsdp_on_cpu()

    def check_pairs_on_adapter(self) -> None:
        """As `Single.check_pairs_on_adapter`: TRL would load the reference from the files of the base alone."""
        raise LaunchError(
            "the parent is an adapter, and under fsdp2 TRL loads the reference without it; publish the parent with "
            "adapter.merge: true, or use a ddp or deepspeed launch file"
        )

    # ---- loops written by hand

    def prepare(self, model: "torch.nn.Module", optimizer: "torch.optim.Optimizer") -> tuple[Any, Any]:
        """As `Single.prepare`."""
        layers = {type(layer).__name__ for layer in upstream.layers(model)}
        self._accelerator.state.fsdp_plugin.transformer_cls_names_to_wrap = sorted(layers)
        return super().prepare(model, optimizer)

    def _backward(self, model: Any, loss: "torch.Tensor", last: bool) -> None:
        model.set_requires_gradient_sync(last)
        loss.backward()

    def _number(self, norm: Any) -> float:
        return float(self._full(norm))

    @contextmanager
    def whole(self, model: Any) -> Iterator[Any]:
        """As `Single.whole`."""
        import torch
        from torch.distributed.fsdp import FSDPModule

        plain = self.unwrapped(model)
        with torch.no_grad(), upstream.own_forward(plain):
            upstream.initialise_fsdp_root(plain)
            parts = [m for m in plain.modules() if isinstance(m, FSDPModule)]
            plain.set_reshard_after_forward(False)
            for part in parts:
                part.unshard()
            try:
                yield plain
            finally:
                again = self._accelerator is None or self._accelerator.state.fsdp_plugin.reshard_after_forward
                for part in parts:
                    part.set_reshard_after_forward(again and part is not plain, recurse=False)
                    part.reshard()

    # ---- models that are not trained

    def freeze(self, model: "torch.nn.Module") -> "torch.nn.Module":
        """As `Single.freeze`."""
        from torch.distributed.fsdp import fully_shard

        self.group()
        self.barrier()
        frozen = model.eval().requires_grad_(False)  # `fully_shard` moves it to the device one unit at a time
        for layer in upstream.layers(frozen):
            fully_shard(layer)
        fully_shard(frozen)
        return frozen

    def _mix(self, mine: Any, theirs: Any, alpha: float) -> None:
        # Both are sharded along the first dimension over the same processes, so their pieces correspond.
        assert mine.placements == theirs.placements
        super()._mix(mine.to_local(), theirs.to_local(), alpha)

    # ---- weights and optimizer

    def weights(self, model: Any) -> list[Entry]:
        """As `Single.weights`."""
        self._reshard(model)
        return super().weights(model)

    def load_weights(self, model: Any, names: Collection[str], read: "Callable[[str], torch.Tensor]") -> None:
        """As `Single.load_weights`."""
        self._reshard(model)
        super().load_weights(model, names, read)

    def _trained_parameters(self, model: Any) -> "dict[str, torch.Tensor]":
        self._reshard(model)
        return super()._trained_parameters(model)

    def _reshard(self, model: Any) -> None:
        """Shards what the last forward pass has left whole: the root module, whose whole parameters are not the ones
        that the optimizer steps, and whose memory is freed at any time."""
        from torch.distributed.fsdp import FSDPModule

        for part in self.unwrapped(model).modules():
            if isinstance(part, FSDPModule):
                part.reshard()

    def _weight(self, name: str, tensor: Any) -> Entry:
        return Entry(name, tensor.dtype, tuple(tensor.shape), lambda: self._full(tensor))

    def _full(self, tensor: Any) -> Any:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def _share_of(self, whole: "torch.Tensor", parameter: Any) -> Any:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor):
            return whole
        mesh = parameter.device_mesh
        # A copy, because a view would keep the whole tensor in memory.
        return distribute_tensor(whole.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None).clone()
