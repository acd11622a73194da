"""What a recipe needs of the machine: the models and the data that it names, memory and disk."""

from collections.abc import Callable

from baton.doctor.finding import Finding, fault, ok
from baton.plan import plan_on
from baton.runner import check_data
from handoff.errors import UserError
from handoff.files import human_bytes
from training.devices import Device, found_gpu, this_cpu
from training.engines.launch_file import LaunchFile
from training.engines.shares import free_disk, planned
from training.engines.trial import Report
from training.recipe import Recipe
from training.references import check_models
from training.trackers import check_trackers

_MODELS, _DATA, _TRACKERS, _PLAN = "models", "data", "trackers", "plan"


def check_recipe(recipe: Recipe, launch: LaunchFile | None, trial: Report) -> list[Finding]:
    """Checks what every section of the recipe needs. Models of the hub are not downloaded."""
    names = recipe.order()
    found = [
        _tried(_MODELS, lambda: check_models(recipe, names, fetch=False), "those that the recipe names are here"),
        _tried(_DATA, lambda: check_data(recipe, names), "what the recipe names is here"),
        _tried(_TRACKERS, lambda: check_trackers(recipe, names), "those that the recipe names are installed"),
    ]
    request = planned(None, "cuda" if trial.gpus else "cpu") if launch is None else launch.request
    if request.device == "cuda" and not trial.gpus:
        return found  # a fault that has been named
    device = _device(trial) if request.device == "cuda" else this_cpu(1 if launch is None else launch.processes_here)
    try:
        plan = plan_on(recipe, request, device)
    except UserError as error:
        return [*found, fault(_PLAN, str(error))]
    large = [section for section in plan.sections if not section.fits]
    for section in large:
        words = f"{section.name} takes {human_bytes(int(section.peak))} in a process, and {device.name} has "
        words += f"{human_bytes(int(device.memory))} for it: `baton plan {recipe.path} --fit` says what to change"
        found.append(fault(_PLAN, words))
    need, free = int(sum(section.cost.disk for section in plan.sections)), free_disk(recipe.run_dir)
    if need > free:
        found.append(
            fault(_PLAN, f"the recipe takes {human_bytes(need)} on the disk, and {human_bytes(free)} are free: free "
                  "some space, or set an output_root on another disk")
        )  # fmt: skip
    elif not large:
        found.append(ok(_PLAN, f"every section fits into memory; {human_bytes(need)} of disk are needed"))
    return found


def _device(trial: Report) -> Device:
    """The GPU with the least memory."""
    least = min(trial.gpus, key=lambda gpu: int(gpu["memory"]))
    return found_gpu(least["name"], int(least["memory"]), bf16=bool(least["bf16"]))


def _tried(subject: str, check: Callable[[], None], words: str) -> Finding:
    try:
        check()
    except UserError as error:
        return fault(subject, str(error))
    return ok(subject, words)
