"""The machines on which one command runs together, and what `accelerate launch` is told about them. No torch here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.engines.launch import LaunchError
from training.engines.launch_file import check_launch_file


@dataclass(frozen=True)
class Place:
    """This machine's place among those that run one command together."""

    machines: int
    """How many there are."""
    number: int
    """Of this one, from 0. The first one decides which stages run."""
    address: str
    """Name or address of the first one."""
    port: int
    """Of the first one, for the processes of a stage. The runners meet on the next port."""

    def arguments(self, launch: Path) -> list[str]:
        """The options of `accelerate launch` that put it in this place.

        Raises:
            LaunchError: the launch file has mistakes, or is for another number of machines.
        """
        keys = check_launch_file(launch)
        processes, given = keys.get("num_processes", 1), keys.get("num_machines", 1)
        if keys["distributed_type"] == "NO":
            raise LaunchError(
                f"{launch}: distributed_type: NO starts one process, and {self.machines} machines were asked for; use "
                "a launch file of another type"
            )
        if given in (0, 1):
            processes *= self.machines
        elif given != self.machines:
            raise LaunchError(f"{launch}: num_machines: {given}, and the command says {self.machines}")
        found = ["--num_machines", str(self.machines), "--num_processes", str(processes)]
        found += ["--machine_rank", str(self.number)]
        found += ["--main_process_ip", self.address, "--main_process_port", str(self.port)]
        if keys["distributed_type"] == "DEEPSPEED":
            found += ["--deepspeed_multinode_launcher", "standard"]  # else it would log in to the others
        return found


def place_of(launch: Path | None, **options: Any) -> Place | None:
    """This machine's place: from the command's options, else from the launch file; None if there is one machine alone.

    Args:
        launch: an accelerate configuration.
        options: num_machines, machine_rank, main_process_ip and main_process_port, as in a launch file; None where the
            command does not give one.

    Raises:
        LaunchError: something is missing or impossible.
    """
    given = {key: value for key, value in options.items() if value is not None}
    if launch is None:
        if given.get("num_machines", 1) > 1:
            raise LaunchError("--num-machines needs --launch, a file that says what runs on each of them")
        return None
    keys = check_launch_file(launch) | given
    machines, number = keys.get("num_machines", 1), keys.get("machine_rank", 0)
    if machines <= 1:
        if machines == 1 < check_launch_file(launch).get("num_machines", 1):
            raise LaunchError(f"{launch}: is for several machines, and the command says one")
        if given.get("machine_rank", 0):
            raise LaunchError(f"--machine-rank {number}: {launch} is for one machine; add --num-machines")
        return None
    if not 0 <= number < machines:
        raise LaunchError(f"--machine-rank {number}: with {machines} machines it is a number from 0 to {machines - 1}")
    if not keys.get("main_process_ip"):
        raise LaunchError("--main-process-ip is missing: name or address of the machine with rank 0")
    port = keys.get("main_process_port") or 29500
    if not 1024 <= port <= 65534:
        raise LaunchError(f"--main-process-port {port}: choose one from 1024 to 65534; the next one is used, too")
    return Place(machines, number, keys["main_process_ip"], port)
