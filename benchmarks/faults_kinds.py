"""The faults of the campaign. Each is a function of a `Trial`: it starts a section, disturbs it, and raises `Broken` if
a promise of docs/reliability.md does not hold. Afterwards the campaign compares the result with an undisturbed run.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks import faults_wandb
from benchmarks.faults_hostile import HOSTILE
from benchmarks.faults_setup import IDLE, PARENTS, SECTIONS, Child, Patience
from benchmarks.faults_trial import Broken, Trial, check
from handoff.manifest import read_manifest

TRAINED = tuple(name for name in SECTIONS if name != "tokenizer")
_DISK = 192  # MiB, size of the disk that fills up


# ---- kills


def kill(t: Trial) -> None:
    """SIGKILL at random times, up to three times."""
    t.prepare()
    for _ in range(t.rng.choice((1, 1, 2, 3))):
        child = t.start()
        t.somewhere(child)
        t.kill(child)
    t.finish()


def _kill_during(t: Trial, child: Child, moment: Callable[[], bool]) -> None:
    """SIGKILL during a short moment, or right after it; `hit` says whether it hit the moment."""
    t.until(child, moment)
    time.sleep(t.rng.uniform(0, 0.01))
    t.kill(child)
    t.hit = moment()
    t.finish()


def kill_while_saving(t: Trial) -> None:
    """SIGKILL while a state is being written."""
    t.prepare()

    def saving() -> bool:
        with suppress(FileNotFoundError):
            return any(
                any(os.scandir(folder)) for folder in os.scandir(t.stage / "state") if folder.name.startswith(".tmp-")
            )
        return False

    child = t.start()
    for _ in range(t.rng.randrange(3)):
        t.until(child, saving)
        t.until(child, lambda: not saving())
    _kill_during(t, child, saving)


def kill_while_publishing(t: Trial) -> None:
    """SIGKILL while the result is written and moved into place; every other time over an earlier publication."""
    t.prepare()

    def publishing() -> bool:
        names = {path.name for path in t.stage.glob(".*")} if t.stage.exists() else set()
        return any(".model" in name or ".stage" in name for name in names)

    if t.rng.random() < 0.5:
        t.finish()
    _kill_during(t, t.start(), publishing)


def kill_the_pipeline(t: Trial) -> None:
    """SIGKILL of `baton run` and, every other time, of every process that it started."""
    t.scene.copy(t.disk, "sft")
    t.sections = ["sft", "reward"]
    command = [sys.executable, "-m", "baton", "run", str(t.scene.recipe), f"output_root={t.disk}", "--to", "reward"]

    def start() -> "subprocess.Popen[bytes]":
        with (t.root / "baton.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    whole = 10 + t.scene.seconds["sft"] + t.scene.seconds["reward"]
    runner = start()
    time.sleep(t.rng.uniform(0, whole))
    everything = t.rng.random() < 0.5
    (os.killpg if everything else os.kill)(runner.pid, signal.SIGKILL)
    t.same_states = everything  # a stage whose runner died stops itself (baton/worker.py)
    runner.wait()
    attempts = 0
    while (code := _ended(start())) == 2 and "in use by" in (t.root / "baton.log").read_text()[-1000:]:
        attempts += 1
        check(attempts < 60, "the stage of the killed runner never released its folder")
    check(code == 0, f"baton run ended with {code}: {(t.root / 'baton.log').read_text()[-1000:]}")


def _ended(runner: "subprocess.Popen[bytes]") -> int:
    """Waits for the exit code of `baton run`. Its stages are other processes, so it may wait for long itself."""
    stages = Patience(runner.pid, idle=2 * IDLE)
    while runner.poll() is None:
        time.sleep(0.01)
        if stages.hung():
            runner.kill()
            raise Broken("baton run hung")
    return runner.returncode


# ---- the disk


def full_disk(t: Trial) -> None:
    """The disk is full for a while. No state is lost, and the stage ends, or asks for space and then continues."""
    t.same_states = False
    filler = t.disk / "filler"
    with _small_disk(t.disk):
        t.prepare()
        child = t.start()
        if t.rng.random() < 0.75:
            t.until(child, lambda: bool(t.states()))
        else:
            t.somewhere(child)
        newest = t.newest_state()
        _fill(filler, t.rng.choice((0, 0, 4 << 10, 300 << 10, 1 << 20)))
        if t.rng.random() < 0.5:
            t.pause(0.3)
            check(t.newest_state() >= newest, f"the state of step {newest} was lost")
            filler.unlink()
        code = child.wait()
        t.hit = any(words in t.said() for words in ("no room", "disk is full", "could not save"))
        check(t.newest_state() >= newest, f"the state of step {newest} was lost")
        check(code in (0, 2), f"on a full disk it ended with {code}")
        check(
            code == 0 or "full" in t.said() or "free" in t.said(),
            f"the message does not say that the disk is full: {t.said()[-500:]}",
        )
        filler.unlink(missing_ok=True)
        if code:
            t.finish()
        shutil.copytree(t.run, t.root / "kept")
    (t.root / "kept").rename(t.run)


@contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mounts a tmpfs on the folder inside the context."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_DISK}m", "baton-faults", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs there."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "baton-faults", str(folder)]
    try:
        if subprocess.run(command, capture_output=True).returncode:
            return False
    except FileNotFoundError:
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def _fill(path: Path, left: int) -> None:
    """Writes a file that leaves `left` bytes free on its disk."""
    room = shutil.disk_usage(path.parent).free - left
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while room > 0:
            room -= file.write(bytes(min(room, 1 << 20)))


# ---- damage


def damaged_state(t: Trial) -> None:
    """A part of the newest state, or of every state, is damaged: the state is skipped by name, or the start refused."""
    t.prepare()
    child = t.start()
    wanted = t.rng.choice((1, 2, 2))
    t.until(child, lambda: len(t.states()) >= wanted)
    t.kill(child)
    states = t.states()
    broken = states if t.rng.random() < 0.4 else states[:1]
    parts = [t.rng.choice(sorted(path for path in state.rglob("*") if path.is_file())) for state in broken]
    restores = [t.flip_or_cut(part) for part in parts]
    t.hit = True
    if len(broken) == len(states):
        t.refused(*(str(part) for part in parts))
        for restore in restores:
            restore()
        t.finish()
    else:
        t.finish()
        check(f"state {states[0].name} is skipped" in t.said(), "it does not say that a state was skipped")
        check(str(parts[0]) in t.said(), f"it does not name {parts[0]}")


def damaged_journal(t: Trial) -> None:
    """metrics.jsonl or samples.jsonl is damaged between two starts: it is named, and nothing else is lost."""
    t.prepare()
    child = t.start()
    t.until(child, lambda: bool(t.states()))
    t.kill(child)
    seals = json.loads((t.states()[0] / "state.json").read_bytes())["extra"]["journals"]
    path = t.stage / t.rng.choice([name for name, seal in seals.items() if seal["bytes"]])
    after = path.read_bytes()[seals[path.name]["bytes"] :]
    os.truncate(path, seals[path.name]["bytes"])  # damage after what the state knows cannot be told from a torn line
    t.flip_or_cut(path)
    if path.exists():
        with path.open("ab") as file:
            file.write(after)
    t.hit = True
    t.finish()
    check(f"{path} " in t.said() and "the training" in t.said(), f"it does not name {path}")
    shutil.copyfile(t.scene.reference / t.section / path.name, path)  # what was lost; everything else is compared


def changed_threads(t: Trial) -> None:
    """A section resumes with another number of threads: it says so and ends."""
    t.prepare()
    child = t.start()
    t.until(child, lambda: bool(t.states()))
    t.kill(child)
    before = json.loads((t.states()[0] / "state.json").read_bytes())["extra"]["engine"]["threads"]
    t.options(OMP_NUM_THREADS=str(before + 1))
    t.finish()
    t.hit = True
    check(f"saved with {before} threads, goes on with {before + 1}" in t.said(), "it does not name the threads")
    t.sections = []  # in its last bits the result may differ


def damaged_parent(t: Trial) -> None:
    """A published file of a parent is damaged: the child names it and refuses to start until it is restored."""
    t.prepare()
    if t.rng.random() < 0.5:
        child = t.start()
        t.somewhere(child)
        t.kill(child)
    parent = t.run / t.rng.choice(PARENTS[t.section])
    manifest = read_manifest(parent / "stage.json")
    assert manifest is not None
    name = t.rng.choice(sorted(manifest.files))
    restore = t.flip_or_cut(parent / name)
    t.hit = True
    t.refused(str(parent), name)
    restore()
    t.finish()


def hostile_parent(t: Trial) -> None:
    """The parent is a hostile directory: it is refused by name, and none of its programs has run."""
    t.prepare()
    folder, mark = t.root / "hostile", t.root / "mark"
    name = t.rng.choice(sorted(HOSTILE))
    shutil.copytree(t.run / PARENTS[t.section][0] / "model", folder)
    HOSTILE[name](folder, mark)
    t.options(f"{t.section}.parent={folder}")
    t.hit = True
    t.refused(str(folder))
    check(not mark.exists(), f"{name}: its program has run")
    t.options()
    t.finish()


# ---- two at once, and signals


def second_copy(t: Trial) -> None:
    """A second start of a running command: refused with the owner's pid and host."""
    t.prepare()
    child = t.start()
    lock = t.stage / ".lock"
    t.until(child, lambda: lock.exists() and lock.stat().st_size > 0)
    t.pause(0.15)
    log = t.root / "second.log"
    code = t.start(log).wait()
    t.hit = child.running
    if child.running:
        printed = log.read_text(encoding="utf-8")
        check(code == 2, f"a second copy ended with {code}")
        check(f"process {child.pid} on {socket.gethostname()}" in printed, f"the owner is not named: {printed[-500:]}")
    check(child.wait() == 0, "the first copy was disturbed by the second")


def stale_lock(t: Trial) -> None:
    """The owner of the lock was killed, and another living process now has its pid."""
    t.prepare()
    child = t.start()
    lock = t.stage / ".lock"
    t.until(child, lambda: lock.exists() and lock.stat().st_size > 0)
    t.pause()
    t.kill(child)
    if lock.read_bytes():
        t.hit = True
        lock.write_text(json.dumps({**json.loads(lock.read_bytes()), "pid": os.getpid()}), encoding="utf-8")
    t.finish()


def preempted(t: Trial) -> None:
    """SIGTERM or SIGINT: the step is finished and saved. Every third time a second signal follows and does no harm."""
    t.prepare()
    t.same_states = False
    signum = t.rng.choice((signal.SIGTERM, signal.SIGTERM, signal.SIGINT))
    child = t.start()
    t.somewhere(child)
    child.send(signum)
    twice = t.rng.random() < 0.3
    if twice:
        time.sleep(t.rng.uniform(0, 0.05))
        child.send(signum)
    code = child.wait()
    check(code in (0, 128 + signum, -signum), f"after signal {signum} it ended with {code}")
    t.hit = code != 0 and t.last_step() > 0
    lost = max(0, t.last_step() - t.newest_state())
    check(twice or code == 0 or lost == 0, f"stopped by a signal after step {t.last_step()}, and {lost} are lost")
    t.lost_steps += lost if code else 0
    t.finish()


def save_now(t: Trial) -> None:
    """SIGUSR1: a state is saved, and the run continues."""
    t.prepare()
    t.same_states = False
    child = t.start()
    if t.until(child, lambda: t.last_step() > 0):
        child.send(signal.SIGUSR1)
        t.hit = True
    code = child.wait()
    check(code == 0, f"after SIGUSR1 it ended with {code}")


# ---- the tracker


def tracker_fails(t: Trial) -> None:
    """wandb is missing, raises, hangs or dies, and the stage is not affected; or it works, and after a kill it has
    every line once."""
    t.prepare()
    package = t.root / "package" / "wandb"
    package.mkdir(parents=True)
    shutil.copy(faults_wandb.__file__, package / "__init__.py")
    works = t.rng.random() < 0.4
    mode = "" if works else t.rng.choice(faults_wandb.MODES)
    path = os.pathsep.join([str(package.parent), *sys.path])
    t.options(f"{t.section}.train.report_to=wandb", FAKE_WANDB=mode, PYTHONPATH=path, WANDB_API_KEY="x" * 40)
    if t.rng.random() < 0.6:
        child = t.start()
        t.somewhere(child)
        t.kill(child)
    t.finish()
    t.hit = True
    run_id = json.loads((t.stage / "started.json").read_bytes())["run_id"]
    server = package / f"server-{run_id}.jsonl"
    try:
        if works:
            _await_all(server, [json.loads(line)["step"] for line in (t.stage / "metrics.jsonl").open("rb")])
    finally:
        for mark in package.glob("pid-*"):
            with suppress(ProcessLookupError):
                os.kill(int(mark.name.removeprefix("pid-")), signal.SIGKILL)


def _await_all(server: Path, steps: list[int]) -> None:
    deadline = time.monotonic() + 20
    while True:
        lines = [json.loads(line) for line in server.open("rb")] if server.exists() else []
        if [line["step"] for line in lines] == steps:
            break
        arrived = [line["step"] for line in lines]
        check(time.monotonic() < deadline, f"steps {arrived} came to the tracker instead of {steps}")
        time.sleep(0.05)


@dataclass(frozen=True)
class Kind:
    """A kind of fault: its function, the sections that it may disturb, and its number of trials in a round."""

    disturb: Callable[[Trial], None]
    sections: tuple[str, ...] = TRAINED
    share: int = 1


KINDS = {
    "kill": Kind(kill, tuple(SECTIONS), 4),
    "kill while saving": Kind(kill_while_saving, share=3),
    "kill while publishing": Kind(kill_while_publishing, tuple(SECTIONS), 2),
    "kill the pipeline": Kind(kill_the_pipeline, ("reward",)),
    "full disk": Kind(full_disk, share=2),
    "damaged state": Kind(damaged_state, share=2),
    "damaged journal": Kind(damaged_journal),
    "changed threads": Kind(changed_threads),
    "damaged parent": Kind(damaged_parent),
    "hostile parent": Kind(hostile_parent, ("sft", "reward", "dpo", "ppo", "grpo")),
    "second copy": Kind(second_copy),
    "stale lock": Kind(stale_lock),
    "preempted": Kind(preempted),
    "save now": Kind(save_now),
    "tracker": Kind(tracker_fails),
}
