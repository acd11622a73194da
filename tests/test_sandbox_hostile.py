"""Hostile programs: each is contained and scores 0, and the trainer (this process) is unharmed.

They run with every layer that works here, with those available to root in a usual container, and with those that need
no privileges (Landlock and seccomp, under the trainer's own user). Forgeries also run without any layer.
"""

import math
import os
import platform
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from reward.sandbox.confine import LAYERS, Limits
from reward.sandbox.pool import Job, Outcome, Sandbox
from reward.sandbox.seccomp import numbers
from tests.sandbox_forgery import CHEATS, FORGERY, TESTS
from tests.sandbox_hostile import HARM, LEAKS, NETWORK

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the layers are those of Linux")
LIMITS = Limits(cpu_seconds=1, wall_milliseconds=3000, memory_mb=256, disk_mb=8)


def descendants() -> set[int]:
    """Processes of a sandbox's server: all have its command line, which names its folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = path.read_bytes()
        except OSError:
            continue
        if b"reward.sandbox.server" in text and os.fsencode(tempfile.gettempdir()) in text:
            found.add(int(path.parent.name))
    return found


def left_behind() -> dict[str, object]:
    """What a program might leave on the machine."""
    shared = Path("/proc/sysvipc")
    return {
        "temporary": {path.name for path in Path(tempfile.gettempdir()).iterdir()},
        "shared memory": {p.name for p in Path("/dev/shm").glob("*canary*")},
        "System V": {kind: len((shared / kind).read_text().splitlines()) for kind in ("shm", "msg")},
        "written": [
            p
            for p in ("/", "/tmp", "/var/tmp", "/dev/shm", "/etc", "/usr/lib", str(Path(os.__file__).parent))
            if Path(p, "baton-canary-written").exists()
        ],
        "library": Path(os.__file__).stat().st_mode,
    }


def own_state() -> dict[str, object]:
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "limits": [
            resource.getrlimit(kind) for kind in (resource.RLIMIT_CPU, resource.RLIMIT_AS, resource.RLIMIT_NPROC)
        ],
        "signals": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD)],
        "user": os.getresuid(),
        "descriptors": len(list(Path("/proc/self/fd").iterdir())),
        "children": Path(f"/proc/self/task/{os.getpid()}/children").read_text(),
    }


@pytest.fixture(scope="module", autouse=True)
def temporary():
    """A separate folder for temporary files, since other sandboxes may run on this machine."""
    folder = tempfile.mkdtemp(prefix="hostile-")
    Path(folder).chmod(0o711)
    before, tempfile.tempdir = tempfile.tempdir, folder
    yield
    tempfile.tempdir = before
    Path(folder).rmdir()


@dataclass
class Target:
    """The targets of the programs: a secret file that anyone may read and write, and open sockets."""

    folder: Path
    doors: list[socket.socket]
    port: int

    @property
    def secret(self) -> Path:
        return self.folder / "secret"

    @property
    def door(self) -> str:
        return str(self.folder / "door")

    def untouched(self) -> bool:
        status = self.secret.stat()
        names = sorted(path.name for path in self.folder.iterdir())
        kept = self.secret.read_text() == "SECRET" and status.st_mode & 0o777 == 0o666 and status.st_gid == os.getgid()
        return kept and status.st_mtime > 1e9 and status.st_nlink == 1 and names == ["door", "doord", "secret"]

    def entered(self) -> list[str]:
        """The sockets that received something."""
        out = []
        for door in self.doors:
            door.setblocking(False)
            try:
                door.recv(9) if door.type == socket.SOCK_DGRAM else door.accept()
            except BlockingIOError:
                continue
            out.append(str(door))
        return out


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setenv("BATON_CANARY", "SECRET")
    folder = Path(tempfile.mkdtemp(prefix="canary-"))
    folder.chmod(0o777)
    (folder / "secret").write_text("SECRET")
    (folder / "secret").chmod(0o666)
    tcp = socket.create_server(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    places = [
        (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", port)),
        (socket.AF_UNIX, socket.SOCK_STREAM, f"{folder}/door"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "\0baton-canary"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, f"{folder}/doord"),
    ]
    doors = [tcp]
    for family, kind, place in places:
        door = socket.socket(family, kind)
        door.bind(place)
        if kind == socket.SOCK_STREAM:
            door.listen()
        doors.append(door)
    for path in (folder / "door", folder / "doord"):
        path.chmod(0o777)
    yield Target(folder, doors, port)
    for door in doors:
        door.close()
    shutil.rmtree(folder)


MODES = {
    "every layer": LAYERS,
    "as root in a container": ("identity", "landlock", "seccomp"),
    "without privileges": ("landlock", "seccomp"),
}


@pytest.fixture(scope="module", params=MODES.values(), ids=MODES.keys())
def sandbox(request, temporary):
    before, processes = left_behind(), descendants()
    with Sandbox(layers=request.param) as sandbox:
        open_to = [what for what, layers in sandbox.protections().items() if not layers]
        if open_to:
            # These would succeed here, so they do not run.
            pytest.skip(f"{', '.join(open_to)} not protected: {sandbox.missing()}")
        yield sandbox
    assert descendants() <= processes
    assert left_behind() == before


def run(sandbox: Sandbox, jobs: dict[str, tuple[str, str]]) -> dict[str, Outcome]:
    """Runs all of them, 8 at once; afterwards this process is unchanged."""
    before, memory, started = own_state(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    made = [Job([program], tests, stop_at_first=False) for program, tests in jobs.values()]
    outcomes = dict(zip(jobs, sandbox.map(made, LIMITS), strict=True))
    assert own_state() == before
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 << 10
    for name, outcome in outcomes.items():
        assert outcome.seconds < 3.5 and outcome.memory_mb < 300, (name, outcome)
    print(f"{len(jobs)} programs in {time.monotonic() - started:.1f} s")
    # Only the server remains, at the latest when the kernel has removed their namespaces.
    server = sandbox._server._process.pid
    until = time.monotonic() + 10
    while (alive := {p for p in descendants() if _parent(p) == server}) and time.monotonic() < until:
        time.sleep(0.05)
    assert alive == set()
    return outcomes


def _parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def passing(outcomes: dict[str, Outcome]) -> dict[str, Outcome]:
    return {name: outcome for name, outcome in outcomes.items() if outcome.passed or outcome.share > 0}


def test_a_right_answer_passes_in_every_mode(sandbox):
    outcomes = run(sandbox, {"right": ("def f(n): return 2 * n + 1", TESTS)})
    assert outcomes["right"].all_passed


def test_forged_verdicts_score_zero(sandbox):
    assert passing(run(sandbox, {name: (program, TESTS) for name, program in FORGERY.items()})) == {}
    assert passing(run(sandbox, CHEATS)) == {}


def test_programs_cannot_read_or_reach_outside(sandbox, target, root):
    machine = numbers(platform.machine())
    top = 450
    arguments = {
        "pid": os.getpid(),
        "secret": str(target.secret),
        "repository": str(root),
        "forbidden": [number for number in range(top) if number not in machine.values()],
    }
    outcomes = run(sandbox, {name: (program, tests.format(**arguments)) for name, (program, tests) in LEAKS.items()})
    assert {name: o.why for name, o in outcomes.items() if o.passed} == {}
    assert target.untouched()


def test_programs_cannot_reach_the_network(sandbox, target):
    tests = f"assert f({target.port}, {target.door!r})"
    assert passing(run(sandbox, {name: (program, tests) for name, program in NETWORK.items()})) == {}
    assert target.entered() == []


@pytest.mark.slow
def test_harmful_programs_are_contained(sandbox, target):
    place = f"PLACE, SECRET = {str(target.folder)!r}, {str(target.secret)!r}\n"
    free = shutil.disk_usage(tempfile.gettempdir()).free
    outcomes = run(sandbox, {name: (place + program, TESTS) for name, program in HARM.items()})
    assert passing(outcomes) == {}
    assert target.untouched()
    assert free - shutil.disk_usage(tempfile.gettempdir()).free < 200 << 20


@pytest.mark.slow
def test_without_any_layer_the_verdict_still_holds_and_nothing_is_left():
    """As on a platform without layers: programs can do what their user can, but do not pass, and none survives."""
    before, processes = left_behind(), descendants()
    harmless = (
        "a daemon",
        "sleeps",
        "loops",
        "ignores signals",
        "10 GB list",
        "output without end",
        "a full disk",
        "folders too deep to remove",
        "a folder without permissions",
        "threads that never end",
        "a crash",
    )
    with Sandbox(layers=()) as sandbox:
        assert sandbox.protections() == {"network": (), "filesystem": (), "processes": ()}
        assert passing(run(sandbox, {name: (program, TESTS) for name, program in FORGERY.items()})) == {}
        assert passing(run(sandbox, CHEATS)) == {}
        assert passing(run(sandbox, {name: (HARM[name], TESTS) for name in harmless})) == {}
    assert descendants() <= processes
    assert left_behind() == before


def test_the_forgeries_work_without_the_sandbox():
    """Each forgery passes if program and tests share an interpreter."""
    for program, tests in CHEATS.values():
        exec(program + "\n" + tests, {"__name__": "program", "math": math})


def test_the_leaks_work_without_layers(target, root):
    """Without layers these programs succeed.

    Two groups are left out: those that would do harm, and those that fail even then, since all programs run without
    capabilities and in an empty environment.
    """
    arguments = {"pid": os.getpid(), "secret": str(target.secret), "repository": str(root)}
    harmful = ("ptrace", "process_vm", "limits", "signal", "privileges", "system calls", "chroot", "hard link")
    harmless = ("environment", "memory", "in its place")
    leaks = {name: leak for name, leak in LEAKS.items() if not any(word in name for word in harmful + harmless)}
    assert len(leaks) >= 9
    reach = f"assert f({target.port}, {target.door!r})"
    with Sandbox(layers=()) as sandbox:
        read = run(sandbox, {name: (program, tests.format(**arguments)) for name, (program, tests) in leaks.items()})
        run(sandbox, {name: (program, reach) for name, program in NETWORK.items()})
    assert {name: outcome.why for name, outcome in read.items() if not outcome.all_passed} == {}
    assert len(target.entered()) == len(target.doors)


def test_there_are_many():
    assert len(FORGERY) + len(CHEATS) + len(LEAKS) + len(NETWORK) + len(HARM) >= 140
