"""Tries out, before a training, what its processes need on a machine, and an all-reduce between them.

    python -m training.engines.trial '{"request": ..., "processes": 2}'     (started by `baton doctor`, not by hand)
    accelerate launch --config_file FILE -m training.engines.trial          (at the same time on every machine)

The first form reports on this machine as JSON. The second tries an all-reduce between all processes of all machines.
"""

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from handoff.errors import UserError
from training.engines import engine_of, start
from training.engines.launch import LaunchError, Request, check_environment, say_error, world_size
from training.engines.lost import peers_lost, reason_of
from training.engines.protocol import Engine
from training.threads import settle

SECONDS = 5.0
"""How long the processes of one machine have for the all-reduce."""
_SECONDS_APART = 60.0
"""The same for several machines, on which somebody starts the command one after the other."""


@dataclass
class Report:
    """What was found on this machine. It travels as JSON."""

    cuda: str | None = None
    """The CUDA version for which torch was built; None: it was built without CUDA."""
    gpus: list[dict[str, Any]] = field(default_factory=list)
    """Of each GPU that torch can use: name, memory in bytes, and whether it has bfloat16."""
    left_behind: list[str] = field(default_factory=list)
    """Files of killed processes that would hold a start up."""
    fault: str | None = None
    """Why the engine cannot run here."""
    reduced: float | None = None
    """Seconds that the all-reduce took; None: it was not tried, or failed."""
    reduce_fault: str | None = None
    """Why it failed."""


def report(request: Request | None, processes: int, address: str) -> Report:
    """Tries everything on this machine.

    Args:
        request: the engine of the launch file; None: only the GPUs are looked at.
        processes: how many processes the all-reduce has; below 2 it is not tried.
        address: where they meet on this machine.
    """
    found = Report()
    if request is not None:
        engine = engine_of(request)
        found.left_behind = list(map(str, engine.left_behind()))
        try:
            engine.check_machine()
        except LaunchError as error:
            found.fault = str(error)
        if found.fault is None and processes > 1:
            found.reduced, found.reduce_fault = all_reduce(request, processes, address, SECONDS)
    _look_at_gpus(found)  # last: CUDA cannot be used in a process that forks afterwards
    return found


def _look_at_gpus(found: Report) -> None:
    import torch

    found.cuda = torch.version.cuda
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(number)
            bf16 = properties.major >= 8 or torch.version.hip is not None
            found.gpus.append({"name": properties.name, "memory": properties.total_memory, "bf16": bf16})


def all_reduce(request: Request, processes: int, address: str, seconds: float) -> tuple[float | None, str | None]:
    """An all-reduce between new processes of this machine. Returns (seconds that it took, why it failed).

    Args:
        request: says on which devices they run.
        processes: how many.
        address: where they meet on this machine.
        seconds: a process that has not finished after this time counts as lost.
    """
    import torch.distributed  # noqa: F401  # once, for all that are forked

    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    place = f"{address}:{port}"
    context = multiprocessing.get_context("fork")
    children: dict[Connection, Any] = {}
    for number in range(processes):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_child, args=(request, number, processes, address, port, seconds, theirs))
        child.start()
        theirs.close()
        children[mine] = child
    numbers = {pipe: number for number, pipe in enumerate(children)}
    faults: dict[int, str] = {}
    took = 0.0
    end = time.monotonic() + seconds + 1
    waiting = set(children)
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, end - time.monotonic()))):
        for pipe in ready:
            assert isinstance(pipe, Connection)
            waiting.remove(pipe)
            try:
                answer = pipe.recv()
            except EOFError:
                answer = "ended without an answer"
            if isinstance(answer, float):
                took = max(took, answer)
            else:
                faults[numbers[pipe]] = answer
    late = sorted(numbers[pipe] for pipe in waiting)
    for child in children.values():
        if child.is_alive() and late:
            child.kill()
        child.join()
    if late:
        which = ", ".join(map(str, late))
        return None, f"process {which} of {processes} did not get through it at {place} within {seconds:.0f} s"
    if faults:
        number, why = min(faults.items())
        return None, f"process {number} of {processes} at {place}: {why}"
    return took, None


def _child(
    request: Request, number: int, processes: int, address: str, port: int, seconds: float, answer: Connection
) -> None:
    """One process: takes part, and answers with the seconds that the all-reduce took, or why it failed."""
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    engine = engine_of(Request(request.name, request.zero_stage, processes, request.device))
    engine.wait_at_most(seconds)
    try:
        begun = time.monotonic()
        _take_part(engine)
        answer.send(time.monotonic() - begun)
        engine.shutdown()
    except Exception as error:  # whatever a library raises is what the user has to know
        answer.send(reason_of(error))
    os._exit(0)  # nothing of the process that forked this one is to be cleaned up here


def _take_part(engine: Engine) -> list[str]:
    """An all-reduce, checked. Returns the names of the machines."""
    hosts = engine.of_all(socket.gethostname())
    (found,) = engine.largest(float(engine.data_rank))
    assert found == engine.data_world - 1, f"the all-reduce gave {found}, not {engine.data_world - 1}"
    return hosts


def main(arguments: list[str]) -> None:
    """Tries an all-reduce between the processes of a launch, or reports on this machine."""
    settle()
    if arguments:
        asked: Mapping[str, Any] = json.loads(arguments[0])
        request = None if asked["request"] is None else Request(**asked["request"])
        os.environ["LOCAL_WORLD_SIZE"] = str(asked["processes"])
        print(json.dumps(asdict(report(request, asked["trial"], asked["address"]))))
        return
    try:
        check_environment()
        if world_size() == 1:
            raise LaunchError(
                "this is one process; start it with `accelerate launch --config_file FILE -m training.engines.trial`"
            )
        engine = start()
        engine.wait_at_most(_SECONDS_APART)
        begun = time.monotonic()
        hosts = _take_part(engine)
        if engine.is_main:
            took = time.monotonic() - begun
            machines = ", ".join(f"{hosts.count(host)} on {host}" for host in dict.fromkeys(hosts))
            print(f"an all-reduce of {len(hosts)} processes ({machines}) worked, in {took:.1f} s")
        engine.shutdown()
    except UserError as error:
        say_error(str(error))
        sys.exit(2)
    except Exception as error:
        if (lost := peers_lost(error)) is None:
            raise
        print(lost, file=sys.stderr, flush=True)
        sys.exit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
