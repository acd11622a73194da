"""The server: a small process that keeps modules loaded and forks jobs, so that a job costs only three forks.

It starts with a socket to the trainer, moves into its namespaces, reports which layers work on this system, and forks a
supervisor for each job. A supervisor forks the job's two processes, waits until the tests' process ends or the time is
over, kills the rest and reports how the job ended. When the trainer ends for any reason, the socket and the pipes
close, and all these processes end too.
"""

import contextlib
import functools
import gc
import importlib
import json
import os
import platform
import select
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final, NamedTuple

from reward.sandbox import confine, folder, landlock, root, seccomp
from reward.sandbox.confine import Limits
from reward.sandbox.examine import Examiner
from reward.sandbox.program import Program
from reward.sandbox.remote import Link
from reward.sandbox.values import Gone, read_message, write_message

# Loaded once here, so that programs import them at no cost.
_PRELOADED: Final = """
bisect cmath collections contextlib copy dataclasses datetime decimal enum fractions functools hashlib heapq itertools
math operator random re statistics string time typing
"""
_DISK_CHECK_MS: Final = 100
_MOST_FILES: Final = 4096
_MORE_TASKS: Final = 512
_READY: Final = ["ready"]


class Server:
    """The process from which jobs are forked."""

    def __init__(self, control: socket.socket, requested: Iterable[str], base: Path) -> None:
        """Enters the layers that hold for all jobs. `base`: an empty folder of the host."""
        self._control = control
        self._base = base
        self._linux = sys.platform == "linux"
        self._tasks = confine.tasks_of_this_user() + _MORE_TASKS if self._linux else None
        self.missing: dict[str, str] = {}
        self._layers = frozenset(self._enter(list(requested)))
        if "namespaces" not in self._layers:
            base.chmod(0o711)  # jobs under other user ids have their folders in it

    @property
    def layers(self) -> list[str]:
        return [layer for layer in confine.LAYERS if layer in self._layers]

    def _enter(self, requested: list[str]) -> Iterable[str]:
        """Tries each layer in a child process; yields those that work. Namespaces are then entered for good."""
        privileged = os.geteuid() == 0
        for layer in (layer for layer in confine.LAYERS if layer in requested):
            why = _failure(functools.partial(self._try, layer, privileged))
            if why:
                self.missing[layer] = why
                continue
            if layer == "seccomp":
                seccomp.numbers(platform.machine())  # read once, here
            if layer == "namespaces":
                privileged = confine.enter_namespaces(confine.load_libc(), str(self._base))
            yield layer

    def _try(self, layer: str, privileged: bool) -> None:
        if layer == "identity":
            if not privileged:
                raise OSError("not root")
            confine.take_identity(confine.owner_ids(os.getpid())[0])
            Path(os.__file__).read_bytes()  # a Python installed below /root cannot be read by another user
            return
        if not self._linux:
            raise OSError(f"not on {platform.system()}")
        libc = confine.load_libc()
        if layer == "namespaces":
            confine.enter_namespaces(libc, str(self._base))
            confine.enter_job_namespaces(libc)
            root.scratch(libc, 1, os.geteuid())
            return
        confine.drop_privileges(libc)
        if layer == "landlock":
            landlock.restrict(libc, root.readable(), root.DEVICES, str(Path.cwd()))
        else:
            seccomp.install(libc)

    def serve(self) -> None:
        """Serves jobs until the trainer closes its end of the socket."""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps the supervisors
        while True:
            raw, descriptors, _, _ = socket.recv_fds(self._control, Limits.FORMAT.size, 2)
            if not raw:
                break
            job, verdict = descriptors
            _fork(functools.partial(self._supervise, Limits.unpack(raw), job, verdict))
            os.close(job)
            os.close(verdict)
        while True:
            try:
                os.wait()
            except ChildProcessError:
                break
        if "namespaces" not in self._layers:
            folder.remove(self._base)

    def _supervise(self, limits: Limits, job: int, verdict: int) -> None:
        self._control.close()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        owners = confine.owner_ids(os.getpid())
        libc = confine.load_libc()
        if self._linux:
            confine.die_with_parent(libc)
        if "namespaces" in self._layers:
            place = Path(root.SCRATCH)
            confine.enter_job_namespaces(libc)
            root.scratch(libc, limits.disk_mb, owners[0] if "identity" in self._layers else os.geteuid())
        else:
            place = Path(tempfile.mkdtemp(dir=self._base))
            if self._linux:
                confine.adopt_orphans(libc)
            if "identity" in self._layers:
                os.chown(place, owners[0], owners[0])
        try:
            _Supervisor(self._layers, limits, owners, self._tasks, place).run(job, verdict)
        finally:
            if "namespaces" not in self._layers:
                folder.remove(place)


class _End(NamedTuple):
    """How a process ended: its wait status, and what it used."""

    status: int
    cpu_seconds: float
    memory_mb: float

    def over_cpu(self, limit: int) -> bool:
        """It reached its limit of CPU time. The kernel counts whole ticks for that limit, so the time that it reports
        afterwards may be less; the signal is certain. A process that survives the signal is killed a second later."""
        return (os.WIFSIGNALED(self.status) and os.WTERMSIG(self.status) == signal.SIGXCPU) or self.cpu_seconds >= limit


class _Supervisor:
    """Runs one job: starts its two processes, waits for their end, and reports it."""

    def __init__(
        self, layers: frozenset[str], limits: Limits, owners: tuple[int, int], tasks: int | None, place: Path
    ) -> None:
        self._layers = layers
        self._limits = limits
        self._owners = owners
        self._tasks = tasks
        self._place = place

    def run(self, job: int, verdict: int) -> None:
        started = time.monotonic()
        theirs, ours = socket.socketpair()
        alive, lives = os.pipe()
        # The tests' process comes first and so is init of the process id namespace: nothing inside can signal it, and
        # everything inside ends with it.
        tests = _fork(lambda: self._tests_process(ours.fileno(), job, verdict, lives))
        program = _fork(lambda: self._program_process(theirs.fileno()))
        theirs.close()
        ours.close()
        os.close(job)
        os.close(lives)
        why = self._wait(alive, verdict, started)
        used = self._end([tests, program])
        if why == "ended" and any(end.over_cpu(self._limits.cpu_seconds) for end in used.values()):
            why = "cpu"
        spent, memory = used[program].cpu_seconds, used[program].memory_mb
        report = {"end": why, "seconds": time.monotonic() - started, "cpu_seconds": spent, "memory_mb": memory}
        os.write(verdict, json.dumps(report).encode() + b"\n")

    def _tests_process(self, channel: int, job: int, verdict: int, lives: int) -> None:
        _keep_only(channel, job, verdict, lives)
        os.setsid()
        try:
            self._confine(self._owners[1])
            ready = read_message(channel) == _READY
        except (Exception, Gone) as error:
            os.write(verdict, json.dumps({"broken": repr(error)}).encode() + b"\n")
            return
        assert ready
        Examiner(Link(channel), verdict, read_message(job)).run()

    def _program_process(self, channel: int) -> None:
        _keep_only(channel)
        os.setsid()
        self._confine(self._owners[0])
        write_message(channel, _READY)
        Program(channel).run()

    def _confine(self, user: int) -> None:
        confine.confine(self._layers, self._limits, user, self._tasks, str(self._place))

    def _wait(self, alive: int, verdict: int, started: float) -> str:
        """Waits until the tests' process ends, time is over, the trainer stops reading, or the folder is too full."""
        poll = select.poll()
        poll.register(alive, select.POLLIN)
        poll.register(verdict, 0)  # an error event means that the reader closed the pipe
        own_disk = "namespaces" in self._layers
        while (left := self._limits.wall_milliseconds - (time.monotonic() - started) * 1000) > 0:
            events = poll.poll(left if own_disk else min(left, _DISK_CHECK_MS))
            if events:
                return "ended" if events[0][0] == alive else "abandoned"
            if not own_disk and folder.exceeds(self._place, self._limits.disk_mb << 20, _MOST_FILES):
                return "disk"
        return "wall"

    def _end(self, children: list[int]) -> dict[int, _End]:
        """Kills and reaps all processes of the job; returns how each of the two ended."""
        used: dict[int, _End] = {}
        unit = 1 << 10 if sys.platform == "linux" else 1 << 20  # ru_maxrss is in KiB there and in bytes on macOS
        while True:
            for pid in (child for child in children if child not in used):
                _kill(pid)
            if "namespaces" not in self._layers:
                for pid in _children_here():
                    _kill(pid)
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return used
            if pid in children:
                used[pid] = _End(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit)
            elif pid == 0:
                time.sleep(0.001)


def _children_here() -> list[int]:
    """Children of this process, with adopted orphans, as Linux lists them; empty on other systems."""
    listing = Path(f"/proc/self/task/{os.getpid()}/children")
    return [int(pid) for pid in listing.read_text().split()] if listing.exists() else []


def _kill(pid: int) -> None:
    """Kills the process, and its group if it leads one."""
    for end in (os.killpg, os.kill):
        try:
            end(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # already ended, or a zombie (macOS)
            continue


def _keep_only(*descriptors: int) -> None:
    """Closes all other descriptors; standard input, output and error go to /dev/null."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nowhere, standard)
    last = 2
    for descriptor in (*sorted(descriptors), os.sysconf("SC_OPEN_MAX")):
        os.closerange(last + 1, descriptor)
        last = descriptor


def _fork(work: Callable[[], Any]) -> int:
    """Runs `work` in a child process, which then exits. Returns the child's process id."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def _failure(work: Callable[[], Any]) -> str:
    """Tries `work` in a child process; returns why it fails, or an empty string."""
    reading, writing = os.pipe()

    def attempt() -> None:
        try:
            work()
        except OSError as error:
            os.write(writing, str(error).encode())

    pid = _fork(attempt)
    os.close(writing)
    with os.fdopen(reading, encoding="utf-8") as pipe:
        why = pipe.read()
    status = os.waitpid(pid, 0)[1]
    return why or ("" if status == 0 else f"ended with status {status}")


def main() -> None:
    """`sys.argv`: the descriptor of the socket, the layers to try (separated by commas), an empty folder."""
    _, descriptor, requested, base = sys.argv
    # Slurm signals every process of a job before its end. The trainer then finishes its step and still needs scores.
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    for name in _PRELOADED.split():
        importlib.import_module(name)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # /proc may be read-only
            Path("/proc/self/oom_score_adj").write_text(
                "1000"
            )  # if memory runs out, the kernel kills this, not the trainer
    control = socket.socket(fileno=int(descriptor))
    server = Server(control, requested.split(","), Path(base))
    control.sendall(json.dumps({"layers": server.layers, "missing": server.missing}).encode() + b"\n")
    gc.collect()
    gc.freeze()  # so that garbage collection in a child does not copy shared pages
    server.serve()
