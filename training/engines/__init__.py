"""How the processes of a run train one model: one file an engine, behind one protocol (`protocol.Engine`).

    launch.py      which engine the launch file asks for
    protocol.py    what an engine does
    processes.py   collectives between the processes
    exchange.py    tensors and trajectories from every process to every process
    detect.py      which engine has really come up
    finite.py      losses that are not finite
    single.py      one process; the others build on it
    splitting.py   what the engines that cut parameters up have in common
    ddp.py         data parallel: every process has the whole model
    deepspeed.py   DeepSpeed ZeRO, stages 1 to 3
    fsdp2.py       PyTorch's own sharding
    files.py       tensors, optimizer states and random numbers on the disk
    upstream.py    every private name of another library that Baton uses

Only this package knows accelerate, DeepSpeed, FSDP, ranks and devices. A test searches the rest of the tree.
"""

import os

from training.engines.launch import REHEARSAL, leave_to_recipe, requested, world_size
from training.engines.protocol import Engine


def start() -> Engine:
    """Makes this process ready for the engine that the launch file asks for. The first call of a program that trains.

    It comes before torch is imported: it sets variables that torch, accelerate and DeepSpeed read when they load.

    Raises:
        LaunchError: this machine lacks the GPUs, the compiler or a package; or the launch file sets what the recipe
            sets (precision, accumulation, clipping, compilation).
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") == REHEARSAL:
        # Processes that share cores must not spin while they wait for one another.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    elif world_size() == 1 and "LOCAL_RANK" not in os.environ:
        # One process uses one GPU; transformers would split its batches over all that it sees.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    leave_to_recipe()
    engine = current()
    engine.check_machine()
    return engine


def current() -> Engine:
    """The engine of this process, for code that only reads: nothing is checked and nothing in the environment is set.

    Raises:
        LaunchError: the launch file asks for an engine that Baton does not have.
    """
    request = requested()
    if request.name == "deepspeed":
        from training.engines.deepspeed import DeepSpeed

        return DeepSpeed(request)
    if request.name == "fsdp2":
        from training.engines.fsdp2 import Fsdp2

        return Fsdp2(request)
    if request.name == "ddp":
        from training.engines.ddp import Ddp

        return Ddp(request)
    from training.engines.single import Single

    return Single(request)
