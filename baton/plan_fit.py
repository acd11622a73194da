"""What to change so that a section fits: the micro-batch, then gradient checkpointing, then the engine.

The global batch stays the same, and so does the result, but for rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from baton.plan import PlannedSection
from training.engines.shares import launch_file, sharded
from training.work import Work

_ROOM = 0.9
"""Share of the memory that a change may use, so that a plan which is somewhat too low still fits."""
_ENOUGH = 2048
"""Tokens of a micro-batch below which activations are rather computed again, so that the device has enough to do."""


@dataclass(frozen=True)
class Change:
    """Keys of the section that are changed, and what it then costs."""

    section: PlannedSection
    keys: dict[str, Any] = field(default_factory=dict)
    launch: str = ""
    """The launch file, if the engine is another."""

    @property
    def words(self) -> list[str]:
        """The keys as overrides, relative to the section."""
        return [f"{key}={str(value).lower()}" for key, value in self.keys.items()]

    def __str__(self) -> str:
        return " ".join([*self.words, *([f"with {self.launch}"] if self.launch else [])]) or "nothing to change"


def mend(section: PlannedSection) -> Change | None:
    """The smallest change with which the section fits; an empty one if it fits as it is; None if no change helps."""
    if section.fits:
        return Change(section)
    room = section.device.memory * _ROOM
    for request in (section.request, *sharded(section.request)):
        if request != section.request and (section.settings.muon or section.settings.width != 4):
            continue  # these engines train float32 weights, with AdamW
        small: Change | None = None
        for checkpointing in (False, True) if not section.settings.checkpointing else (True,):
            settings = replace(section.settings, checkpointing=checkpointing)
            for rows in _micro_batches(section):
                now = section.changed(request, settings, rows)
                now, keys = _smaller_passes(now, room)
                if now.peak > room:
                    continue
                if rows != section.cost.micro_batch:
                    keys["train.per_device_train_batch_size"] = rows
                if checkpointing != section.settings.checkpointing:
                    keys["train.gradient_checkpointing"] = True
                launch = "" if request == section.request else launch_file(request)
                found = Change(now, keys, launch)
                if small is None and section.work.train is not None and _tokens(now) < _ENOUGH and rows > 0:
                    small = found
                    break  # gradient checkpointing may allow a larger one
                return found if small is None or _tokens(now) > _tokens(small.section) else small
        if small is not None:
            return small
    return None


def _tokens(section: PlannedSection) -> int:
    assert section.work.train is not None
    return section.cost.micro_batch * section.work.train.sequences * section.work.train.length


def _micro_batches(section: PlannedSection) -> Iterator[int]:
    """The micro-batches up to the present one that divide a process's share of the batch, the largest first."""
    share = max(1, section.work.batch // section.request.processes)
    for rows in range(section.cost.micro_batch, 0, -1):
        if share % rows == 0:
            yield rows


def _smaller_passes(section: PlannedSection, room: float) -> tuple[PlannedSection, dict[str, Any]]:
    """The section with fewer rows in passes without gradients and in sampling, if these are what does not fit."""
    rows = _largest_pass(section.work)
    keys: dict[str, Any] = {}
    while rows > 1 and section.cost.peak.total > room and section.cost.peak.phase in ("forward pass", "sampling"):
        rows //= 2
        work = section.work
        section = section.changed(
            work=replace(
                work,
                measure=None if work.measure is None else replace(work.measure, rows=rows),
                rollout=None if work.rollout is None else replace(work.rollout, rows=rows),
            )
        )
        keys = {work.measure_key: rows}
    return section, keys


def _largest_pass(work: Work) -> int:
    return max((part.rows for part in (work.measure, work.rollout) if part is not None), default=0)
