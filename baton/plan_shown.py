"""The plan of a recipe as text and as JSON."""

from typing import Any

from baton.plan import UTILISATION, Plan, PlannedSection
from baton.plan_fit import Change, mend
from handoff.files import human_bytes
from training.engines.shares import free_disk, furthest, launch_file


def show_plan(plan: Plan, *, fit: bool) -> str:
    """The whole plan; with `fit`, the changes with which everything fits, as overrides."""
    device, request = plan.device, plan.request
    lines = [f"{plan.recipe.path} on {device.name}: {request}, {_size(device.memory)} for each process"]
    for section in plan.sections:
        lines += ["", *_section(section)]
    disk = sum(section.cost.disk for section in plan.sections)
    free = free_disk(plan.recipe.run_dir)
    lines += ["", f"disk for all sections {_size(disk)}, {_size(free)} free" + (": too little" if disk > free else "")]
    if fit:
        lines += ["", *_fit(plan)]
    return "\n".join(lines) + "\n"


def _section(section: PlannedSection) -> list[str]:
    cost, work, device = section.cost, section.work, section.device
    verdict = "fits" if section.fits else "DOES NOT FIT"
    head = f"{section.name:<14}{_size(cost.peak.total):>10} of {_size(device.memory)}: {verdict}"
    lines = [head]
    for one in section.held:
        lines.append(f"  model     {one.model}: {one.parameters:,} parameters ({one.shape.family})")
    parts = {key: value for key, value in cost.peak.parts().items() if value >= 2**19}
    shown = ", ".join(f"{key} {_size(value)}" for key, value in parts.items())
    lines.append(f"  memory    {shown}; largest in: {cost.peak.phase}")
    if section.measured is not None:
        lines.append(f"  measured  {_size(section.measured)}; activations, logits and cache are corrected by it")
    if work.train is not None:
        each = "pairs" if work.train.sequences == 2 else "rows"
        times = f" × {cost.accumulation} accumulated" if cost.accumulation > 1 else ""
        processes = f" × {section.request.processes} processes" if section.request.processes > 1 else ""
        precision = "bfloat16" if section.settings.bf16 else "float32"
        again = ", activations computed again" if section.settings.checkpointing else ""
        lines.append(
            f"  batch     {cost.micro_batch} {each} of up to {work.train.length} tokens{times}{processes}, "
            f"{precision}{again}"
        )
    if cost.tokens is None:
        lines.append("  time      not known: how many rows the data has is not known here; max_steps would say it")
    else:
        seconds = cost.seconds(device, section.request.processes, UTILISATION)
        told = f", {_time(seconds)} at {UTILISATION:.0%} of {device.name}'s speed" if seconds is not None else ""
        lines.append(f"  time      at most {_count(cost.tokens)} tokens, {cost.flops:.1e} FLOP{told}")
    if cost.disk:
        lines.append(f"  disk      {_size(cost.disk)} for {work.states} saved states and what is published")
    if not section.fits:
        lines.append(f"  to mend   {_mend(section)}")
    return lines


def _mend(section: PlannedSection) -> str:
    found = mend(section)
    if found is None:
        more = "more processes, or " if section.request.device == "cuda" else ""
        return f"nothing that one can change fits it into this memory: take {more}a smaller model"
    return f"{found}: {_size(found.section.peak)}"


def _fit(plan: Plan) -> list[str]:
    changes: list[tuple[PlannedSection, Change | None]] = [(section, mend(section)) for section in plan.sections]
    lost = [section.name for section, change in changes if change is None]
    keys = [f"{section.name}.{word}" for section, change in changes if change is not None for word in change.words]
    engines = {c.section.request for _, c in changes if c is not None and c.section.request != plan.request}
    lines = []
    if lost:
        lines.append(f"does not fit whatever is changed: {', '.join(lost)}")
    if engines:
        engine = furthest(engines)
        lines.append(f"launch file: {launch_file(engine)} with {engine.processes} processes")
    if keys:
        lines.append("overrides: " + " ".join(keys))
    return lines or ["fits as it is"]


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values; bytes, and seconds of one process."""
    return {
        "recipe": str(plan.recipe.path),
        "engine": str(plan.request),
        "processes": plan.request.processes,
        "device": plan.device.name,
        "memory": int(plan.device.memory),
        "utilisation": UTILISATION,
        "sections": {section.name: _values(section) for section in plan.sections},
    }


def _values(section: PlannedSection) -> dict[str, Any]:
    cost = section.cost
    change = None if section.fits else mend(section)
    return {
        "stage": section.stage,
        "models": [
            {
                "role": one.model.role,
                "parent": one.model.parent,
                "family": one.shape.family,
                "parameters": one.parameters,
                "trained": one.trained,
            }
            for one in section.held
        ],
        "peak": int(cost.peak.total),
        "measured": None if section.measured is None else int(section.measured),
        "fits": section.fits,
        "phases": {phase.phase: {key: int(value) for key, value in phase.parts().items()} for phase in cost.phases},
        "micro_batch": cost.micro_batch,
        "accumulation": cost.accumulation,
        "bf16": section.settings.bf16,
        "disk": int(cost.disk),
        "tokens": cost.tokens,
        "flops": cost.flops,
        "seconds": cost.seconds(section.device, section.request.processes, UTILISATION),
        "change": None if change is None else {**change.keys, "engine": str(change.section.request)},
    }


def _size(count: float) -> str:
    return human_bytes(int(count))


def _count(tokens: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return f"{tokens:.0f}"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
