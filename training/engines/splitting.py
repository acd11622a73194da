"""The common base of the engines that shard parameters among the processes (DeepSpeed, FSDP2)."""

import os
from typing import TYPE_CHECKING

from training.engines.launch import LaunchError
from training.engines.single import Single

if TYPE_CHECKING:
    import torch


class Splitting(Single):
    """An engine whose processes hold only pieces of parameters between forward passes."""

    splits = True

    def check_machine(self) -> None:
        """As `Single.check_machine`."""
        os.environ.pop("ACCELERATE_USE_CPU", None)  # if set, accelerate would use plain DDP
        super().check_machine()

    def check_trained_dtype(self, dtype: "torch.dtype") -> None:
        """Raises LaunchError for bfloat16 weights, because the engine would still train its own float32 weights."""
        import torch

        if dtype != torch.float32:
            raise LaunchError(
                f"model_args.dtype: bfloat16 has no effect under {self.request.name}, which trains float32 weights; "
                "leave it out, and set train.bf16 for bfloat16's speed"
            )

    def check_optimizer(self, key: str, name: str) -> None:
        """Raises LaunchError for Muon, which needs whole matrices."""
        if name == "muon":
            raise LaunchError(
                f"{key}: muon steps whole matrices, and {self.request.name} cuts them into pieces; "
                "use a ddp launch file, or optim: adamw"
            )

    def check_adapter(self, *, dora: bool) -> None:
        """Raises LaunchError for DoRA, which measures whole matrices in every step."""
        if dora:
            raise LaunchError(
                f"adapter.use_dora: DoRA measures whole matrices, and {self.request.name} cuts them into pieces; "
                "use a ddp launch file, or LoRA"
            )

    def check_quantised(self, place: str) -> None:
        """Raises LaunchError: a quantised weight is no matrix of which each process could keep some rows."""
        raise LaunchError(
            f"{place}: its frozen weights are quantised, and {self.request.name} cannot share those out among "
            "processes; use a ddp launch file, under which each process has all of them, or leave `quantization` out"
        )
