"""Engines: how the processes of a run train one model. Each engine has one file, and all share `protocol.Engine`.

    launch.py      which engine the launch file asks for
    launch_file.py what a launch file says, and whether it has mistakes
    machines.py    the machines that run one command together
    elastic.py     processes that a launcher starts again
    protocol.py    the interface of an engine
    meeting.py     waits without a collective for a process that works alone
    processes.py   collectives between the processes
    exchange.py    gathers tensors and trajectories of all processes on every process
    detect.py      which engine has actually started
    lost.py        errors of collectives that lost their other processes
    finite.py      losses that are not finite
    single.py      one process; the other engines extend it
    splitting.py   the common base of the engines that shard parameters
    ddp.py         data parallel: every process has the whole model
    deepspeed.py   DeepSpeed ZeRO, stages 1 to 3
    fsdp2.py       PyTorch's own sharding
    trial.py       tries out what the processes need on a machine, and an all-reduce between them
    files.py       tensors, optimizer states and random numbers on disk
    upstream.py    every private name of another library that Baton uses

Only this package uses accelerate, DeepSpeed, FSDP, ranks and devices; a test checks the rest of the tree.
"""

import os
import sys

from training.engines.launch import REHEARSAL, Request, leave_to_recipe, requested, world_size
from training.engines.protocol import Engine
from training.threads import settle


def start() -> Engine:
    """Prepares this process for the engine that the launch file asks for. A program that trains calls this first.

    Call it before torch is imported: it sets variables that torch, accelerate and DeepSpeed read when they load.

    Raises:
        LaunchError: this machine lacks the GPUs, the compiler or a package; or the launch file has a setting that
            belongs in the recipe (precision, accumulation, clipping, compilation).
    """
    settle()
    if world_size() == 1 and "LOCAL_RANK" not in os.environ and os.environ.get("CUDA_VISIBLE_DEVICES") != REHEARSAL:
        # One process uses one GPU; otherwise transformers would split its batches over all visible ones.
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    leave_to_recipe()
    engine = current()
    engine.check_machine()
    for path in engine.left_behind():
        path.unlink(missing_ok=True)
        print(f"removed {path}, left by a build that was killed", file=sys.stderr)
    return engine


def current() -> Engine:
    """The engine of this process, for code that only reads. Checks nothing and sets no environment variable.

    Raises:
        LaunchError: the launch file asks for an engine that Baton does not have.
    """
    return engine_of(requested())


def engine_of(request: Request) -> Engine:
    """The engine of a request. Checks nothing."""
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
