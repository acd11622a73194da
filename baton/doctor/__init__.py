"""`baton doctor`: checks a machine before a training on it is started, and says how to mend what is wrong.

packages.py  the versions of Python and of the packages
machine.py   GPUs, limits of the system, and a trial of the launch file's engine
network.py   variables of an earlier job, interfaces, where the processes meet
storage.py   the folder of the runs: its disk, its file system, its clock
recipe.py    the models and the data of a recipe, and what it takes
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from rich.text import Text

from baton.doctor.finding import Finding, Level
from handoff.errors import UserError
from training.engines import engine_of
from training.engines.launch_file import LaunchFile, read_launch_file
from training.recipe import TopLevel, load_recipe
from training.terminal import Screen

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAULT: "bold red"}


def doctor(
    recipe_path: Path | None,
    overrides: Sequence[str],
    launch_path: Path | None,
    machine_rank: int | None,
    main_process_ip: str | None,
) -> int:
    """The command `baton doctor` (see `baton.cli.doctor`). Returns the exit code.

    Raises:
        UserError: the recipe or the launch file has mistakes.
    """
    from baton.doctor.machine import check_gpus, check_limits, tried
    from baton.doctor.network import check_network, check_variables
    from baton.doctor.packages import check_packages
    from baton.doctor.recipe import check_recipe
    from baton.doctor.storage import check_storage

    if launch_path is not None and not launch_path.is_file():
        raise UserError(f"--launch {launch_path}: no such file; the repository's own are in recipes/launch/")
    launch = None if launch_path is None else _on_this_machine(launch_path, machine_rank, main_process_ip)
    recipe = None if recipe_path is None else load_recipe(recipe_path, overrides)
    folder = Path(TopLevel.model_fields["output_root"].default) if recipe is None else recipe.run_dir
    found: list[Finding] = []
    console = Screen()

    def told(check: Callable[[], list[Finding]]) -> None:
        for one in check():
            console.print(Text.assemble((f"{one.level.value:<8}", _STYLES[one.level]), f"{one.subject:<12}{one.words}"))
            found.append(one)

    extra = None if launch is None else engine_of(launch.request).extra
    told(lambda: check_packages(extra))
    told(check_variables)
    told(lambda: check_network(launch))
    told(lambda: check_storage(folder, 1 if launch is None else launch.machines))
    told(lambda: check_limits(1 if launch is None else launch.processes_here))
    met = not any(one.level is Level.FAULT and one.subject in ("environment", "network", "meeting") for one in found)
    trial = tried(launch, reduce=met)
    told(lambda: check_gpus(launch, trial))
    if recipe is not None:
        told(lambda: check_recipe(recipe, launch, trial))
    faults, warnings = (sum(one.level is level for one in found) for level in (Level.FAULT, Level.WARNING))
    if launch is not None and launch.machines > 1:
        console.print(_elsewhere(launch))
    console.print(
        f"{_counted(faults, 'fault')} and {_counted(warnings, 'warning')}"
        + ("" if faults else ": nothing is in the way of a training")
    )
    return 1 if faults else 0


def _on_this_machine(path: Path, machine_rank: int | None, main_process_ip: str | None) -> LaunchFile:
    launch = read_launch_file(path)
    if machine_rank is not None:
        if machine_rank not in range(launch.machines):
            raise UserError(f"--machine-rank {machine_rank}: {path} has num_machines: {launch.machines}")
        launch = replace(launch, machine_rank=machine_rank)
    return launch if main_process_ip is None else replace(launch, address=main_process_ip)


def _elsewhere(launch: LaunchFile) -> str:
    """What can be tried on the other machines only."""
    options = f"--main-process-ip {launch.address} --machine-rank N"
    other = options.replace("-", "_").replace("__", "--")
    return (
        f"This was machine {launch.machine_rank} of {launch.machines}. On each of them, with N from 0:\n"
        f"  baton doctor --launch {launch.path} {options}\n"
        "and then, on all of them at once, an all-reduce between all processes:\n"
        f"  accelerate launch --config_file {launch.path} {other} -m training.engines.trial"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
