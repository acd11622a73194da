"""A fault campaign: injects kills, full disks, damaged files and double starts into a small pipeline at random, and
checks that every stage still ends with the undisturbed result.

    python -m benchmarks.faults --trials N --seed S [--json FILE]
    python -m benchmarks.faults --seed S --only TRIAL        repeats the choices of one trial

A trial takes one section with its published parents, starts it, disturbs it (benchmarks/faults_kinds.py) and restarts
it until it ends. It survives if every promise of docs/reliability.md holds, and if its published files, metrics (except
times), samples and saved states are bit for bit those of an undisturbed run. A trial's choices depend only on seed and
trial; the moment at which a random time hits the other process depends on the machine.

It needs Linux. The full disk is a tmpfs that only root can mount; without root these trials are left out.

It prints trials, faults survived, repeated steps and bytes of damage. The exit code is 1 if a trial failed.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.faults_kinds import KINDS, can_mount
from benchmarks.faults_setup import Scene, differences, prepare
from benchmarks.faults_trial import Broken, Trial, check
from handoff.files import hash_tree
from handoff.verify import verify_run


@dataclass
class Tally:
    """The counts of one kind of fault."""

    trials: int = 0
    survived: int = 0
    hit: int = 0
    """Trials in which the fault hit the moment at which it aims; only for kinds that aim."""
    aimed: int = 0
    steps_lost: int = 0
    bytes_damaged: int = 0


@dataclass
class Campaign:
    """What --json writes."""

    trials: int
    seed: int
    failures: int = 0
    survived: int = 0
    steps_lost: int = 0
    """Repeated steps."""
    bytes_damaged: int = 0
    """Bytes that the faults altered, cut off or deleted."""
    bytes_of_damage: int = 0
    """Damage at the end: bytes of published files that differ from an undisturbed run."""
    seconds: float = 0.0
    by_fault: dict[str, Tally] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    failed: list[dict[str, object]] = field(default_factory=list)


def kinds_of(seed: int, names: Sequence[str]) -> list[str]:
    """One round: each kind as often as its share, in an order that depends on the seed."""
    round_ = [name for name in names for _ in range(KINDS[name].share)]
    random.Random(f"{seed}").shuffle(round_)
    return round_


def campaign(trials: Sequence[int], seed: int, folder: Path) -> Campaign:
    """Runs the trials with these numbers in `folder`, printing a line for each."""
    result = Campaign(len(trials), seed)
    started = time.monotonic()
    if not can_mount(folder):
        result.left_out.append("full disk")
        print("full disk: left out, this process may not mount a tmpfs")
    scene = prepare(folder)
    print(f"the pipeline, undisturbed: {sum(scene.seconds.values()):.0f} s", flush=True)
    round_ = kinds_of(seed, [name for name in KINDS if name not in result.left_out])
    for number in trials:
        name = round_[number % len(round_)]
        _one(result, scene, number, name)
    result.seconds = round(time.monotonic() - started, 1)
    return result


def _one(result: Campaign, scene: Scene, number: int, name: str) -> None:
    rng = random.Random(f"{result.seed}/{number}")
    kind = KINDS[name]
    root = scene.folder / f"trial-{number}"
    (root / "runs").mkdir(parents=True)
    t = Trial(scene, root, rng, rng.choice(kind.sections))
    began = time.monotonic()
    why = ""
    try:
        kind.disturb(t)
        for section in t.sections:
            found = differences(t.run / section, scene.reference / section, same_states=t.same_states)
            check(not found, f"{section}: {'; '.join(found)}")
        problems = verify_run(t.run)
        check(not problems, f"verify: {problems}")
    except (Broken, TimeoutError) as error:
        why = str(error)
    except Exception:  # a fault of the campaign itself, or an unexpected state of a folder
        why = traceback.format_exc()
    tally = result.by_fault.setdefault(name, Tally())
    for counted in (result, tally):
        counted.survived += not why
        counted.steps_lost += t.lost_steps
        counted.bytes_damaged += t.damage
    tally.trials += 1
    tally.aimed += t.hit is not None
    tally.hit += bool(t.hit)
    if why:
        result.failures += 1
        result.bytes_of_damage += sum(_damage(t.run / part, scene.reference / part) for part in t.sections)
        again = f"python -m benchmarks.faults --seed {result.seed} --only {number}"
        result.failed.append({"trial": number, "fault": name, "section": t.section, "why": why, "again": again})
    hit = {None: "", True: "hit", False: "missed"}[t.hit]
    outcome = "survived" if not why else f"FAILED: {why}"
    print(f"{number:>4}  {name:<22}{t.section:<10}{hit:<7}{time.monotonic() - began:>6.1f} s  {outcome}", flush=True)
    if why:
        print(t.said()[-3000:], flush=True)
    shutil.rmtree(root)


def _damage(stage: Path, reference: Path) -> int:
    """Bytes of published files that are missing or differ."""
    ours, theirs = hash_tree(stage / "model"), hash_tree(reference / "model")
    wrong = [name for name, digest in theirs.items() if ours.get(name) != digest]
    return sum((reference / "model" / name).stat().st_size for name in wrong)


def report(result: Campaign) -> None:
    """The table."""
    print(f"\n{'fault':<24}{'trials':>7}{'survived':>10}{'aimed: hit':>13}{'steps again':>13}{'bytes damaged':>15}")
    for name, tally in sorted(result.by_fault.items()):
        aimed = f"{tally.hit} of {tally.aimed}" if tally.aimed else ""
        print(
            f"{name:<24}{tally.trials:>7}{tally.survived:>10}{aimed:>13}{tally.steps_lost:>13}{tally.bytes_damaged:>15,}"
        )
    print(
        f"\n{result.trials} trials, {result.survived} survived, {result.failures} failed; {result.steps_lost} steps "
        f"done again; {result.bytes_damaged:,} bytes damaged, {result.bytes_of_damage:,} bytes of damage left; "
        f"seed {result.seed}, {result.seconds:.0f} s"
    )
    for failure in result.failed:
        print(f"\ntrial {failure['trial']}: {failure['fault']}, {failure['section']}: {failure['why']}")
        print(f"  again: {failure['again']}")


def main(trials: Sequence[int], seed: int, path: Path | None) -> int:
    """Returns the exit code."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # one thread gives the same result under any load
    with tempfile.TemporaryDirectory(prefix="baton-faults-") as name:
        result = campaign(trials, seed, Path(name))
    report(result)
    if path is not None:
        path.write_text(json.dumps(asdict(result), indent=2) + "\n", encoding="utf-8")
    return 1 if result.failures else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="TRIAL", help="this one alone")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    options = parser.parse_args()
    chosen = range(options.trials) if options.only is None else [options.only]
    sys.exit(main(chosen, options.seed, options.json))
