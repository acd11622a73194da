"""Detects which engine has actually wrapped a model; it may differ from the one that the launch file asks for."""

from typing import Any, cast

from training.engines.launch import Request


def running(model: Any, processes: int, device: Any, *, deepspeed: bool) -> Request:
    """The engine that wrapped `model`.

    Args:
        model: the model that the engine returned.
        processes, device: the number of processes and the device type, from accelerate.
        deepspeed: whether to check for DeepSpeed, whose import takes seconds.
    """
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor
    from torch.nn.parallel import DistributedDataParallel

    if isinstance(model, torch._dynamo.OptimizedModule):
        model = model._orig_mod
    if isinstance(model, DistributedDataParallel):
        return Request("ddp", None, processes, device)
    if isinstance(model, FSDPModule):
        whole = [p for p in cast(torch.nn.Module, model).parameters() if not isinstance(p, DTensor)]
        assert not whole, "FSDP left parameters whole"
        return Request("fsdp2", None, processes, device)
    if deepspeed:
        from deepspeed import DeepSpeedEngine

        if isinstance(model, DeepSpeedEngine):
            return Request("deepspeed", model.zero_optimization_stage(), processes, device)
    return Request("single", None, processes, device)
