"""`baton doctor`: checks a machine before a training on it is started, and says how to mend what is wrong.

packages.py  the versions of Python and of the packages
machine.py   GPUs, limits of the system, and a trial of the launch file's engine
network.py   variables of an earlier job, interfaces, where the processes meet
storage.py   the folder of the runs: its disk, its file system, its clock
recipe.py    the models and the data of a recipe, and what it takes
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.text import Text

from baton.doctor.finding import Finding, Level
from training.engines import engine_of
from training.engines.launch_file import LaunchFile, read_launch_file
from training.engines.machines import Place, place_of
from training.recipe import TopLevel, load_recipe
from training.terminal import Screen

_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.FAULT: "bold red"}


def doctor(
    recipe_path: Path | None,
    overrides: Sequence[str],
    launch_path: Path | None,
    **options: Any,
) -> int:
    """The command `baton doctor` (see `baton.cli.doctor`). Returns the exit code. `options`: as for `place_of`.

    Raises:
        UserError: the recipe or the launch file has mistakes.
    """
    from baton.doctor.machine import check_gpus, check_limits, tried
    from baton.doctor.network import check_network, check_variables
    from baton.doctor.packages import check_packages
    from baton.doctor.recipe import check_recipe
    from baton.doctor.storage import check_storage

    place = place_of(launch_path, **options)
    launch = None if launch_path is None else _placed(read_launch_file(launch_path), place)
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
    if place is not None and launch is not None:
        console.print(_elsewhere(place, launch))
    console.print(
        f"{_counted(faults, 'fault')} and {_counted(warnings, 'warning')}"
        + ("" if faults else ": nothing is in the way of a training")
    )
    return 1 if faults else 0


def _placed(launch: LaunchFile, place: Place | None) -> LaunchFile:
    """What the file says for this machine's place among several."""
    if place is None:
        return launch
    request = launch.request
    if launch.machines != place.machines:
        request = replace(request, processes=request.processes * place.machines)
    return replace(
        launch,
        request=request,
        machines=place.machines,
        machine_rank=place.number,
        address=place.address,
        port=place.port,
    )


def _elsewhere(place: Place, launch: LaunchFile) -> str:
    """What can be tried on the other machines only."""
    given = shlex.join(place.arguments(launch.path)).replace(f"--machine_rank {place.number}", "--machine_rank N")
    return (
        f"This was machine {place.number} of {place.machines}. On each of them, with N from 0:\n"
        f"  baton doctor --launch {launch.path} --num-machines {place.machines} --machine-rank N "
        f"--main-process-ip {place.address} --main-process-port {place.port}\n"
        "and then, on all of them at once, an all-reduce between all processes:\n"
        f"  accelerate launch --config_file {launch.path} {given} -m training.engines.trial"
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
