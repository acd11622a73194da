"""The trainer's side of the sandbox: runs several jobs at once and returns outcomes, and tests the protections.

with Sandbox() as sandbox:
    sandbox.require(["network", "filesystem"])
    outcomes = sandbox.map([Job(program=["def f(n): return n + 1"], tests="assert f(1) == 2")], Limits())
"""

import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from reward.functions import RewardError
from reward.sandbox.confine import LAYERS, Limits
from reward.sandbox.values import LARGEST, Gone, write_message

PROTECTS: Final[dict[str, tuple[str, ...]]] = {
    "network": ("namespaces", "seccomp"),
    "filesystem": ("namespaces", "landlock"),
    "processes": ("namespaces", "identity", "seccomp"),
}
"""Which layers give which protection. `filesystem`: no access to outside files; `processes`: no signals to others."""

_START = (
    "import sys; here = sys.argv.pop(1); sys.path.insert(0, here); from reward.sandbox.server import main; "
    "sys.path.remove(here); main()"
)
_START_SECONDS = 60
_GRACE_SECONDS = 30
_LONGEST_VERDICT = 1 << 20
_BYTES_OF_A_TEST = 10  # of the verdict, for each character of the tests: two lines for `assert a`

_PROBE = """
import os, socket, encodings.idna, colorsys  # the last two are not preloaded: this shows that the library can be read
def connects(port):
    try: socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError: return False
    return True
def read(path):
    try: return open(path).read()
    except OSError: return ""
def write(path):
    try: open(path, "a").write("reached")
    except OSError: pass
def signals(pid):
    try: os.kill(pid, 0)
    except OSError: return False
    return True
"""


@dataclass(frozen=True)
class Job:
    """A program and the tests that it must pass."""

    program: Sequence[str]
    """Alternative texts of the program; the first that compiles is used."""
    tests: str
    """Python statements with asserts."""
    setup: str = ""
    """Statements before the tests. Its classes and imports also run in the program's process, before the program."""
    given: str = ""
    """The text that the program completes; the tests may use its helpers."""
    entry_point: str = ""
    """The function under test, if `given` contains its beginning."""
    stop_at_first: bool = True
    """Whether the first failure ends the job."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job."""

    units: int
    """Number of units: statements with asserts in the tests."""
    passed: frozenset[int]
    """The units that held each time they were reached."""
    finished: bool
    """The tests ran to their end."""
    why: str
    """The first failure, in words; empty if there was none."""
    fault: str
    """A fault of the tests themselves, whatever the program; empty if there is none."""
    not_sent: bool
    """The first failure is a value that cannot be sent to the program: a fault of the tests, or made by the program."""
    seconds: float
    cpu_seconds: float
    """CPU time of the program's process."""
    memory_mb: float
    """Peak memory of the program's process."""

    @property
    def all_passed(self) -> bool:
        return self.finished and len(self.passed) == self.units

    @property
    def share(self) -> float:
        """The share of units that passed. Tests that did not run to their end count as one more, failed, unit."""
        return len(self.passed) / (self.units if self.finished else self.units + 1) if self.units else 0.0


class _ServerDied(Exception):
    pass


@dataclass
class _Verdict:
    """The lines received through a job's pipe."""

    lines: list[dict[str, Any]] = field(default_factory=list)

    def first(self, key: str, default: Any) -> Any:
        return next((line[key] for line in self.lines if key in line), default)

    def outcome(self) -> Outcome:
        failed = {line["failed"] for line in self.lines if "failed" in line}
        passed = {line["passed"] for line in self.lines if "passed" in line}
        end = self.first("end", "")
        words = {"cpu": "CPU time is over", "wall": "time is over", "disk": "the folder is too full"}
        return Outcome(
            units=self.first("units", 0),
            passed=frozenset(passed - failed),
            finished=self.first("done", False) and end == "ended",
            why=words.get(end) or self.first("why", ""),
            fault=self.first("fault", ""),
            not_sent=self.first("not_sent", False),
            seconds=self.first("seconds", 0.0),
            cpu_seconds=self.first("cpu_seconds", 0.0),
            memory_mb=self.first("memory_mb", 0.0),
        )


class _Server:
    """The server process, from which jobs are forked, and the socket to it."""

    def __init__(self, layers: Iterable[str]) -> None:
        base = Path(tempfile.mkdtemp(prefix="baton-sandbox-"))
        self._control, theirs = socket.socketpair()
        with theirs:
            here = str(Path(__file__).resolve().parents[2])
            arguments = [here, str(theirs.fileno()), ",".join(layers), str(base)]
            self._process = subprocess.Popen(
                [sys.executable, "-S", "-s", "-P", "-B", "-c", _START, *arguments],
                env={"PYTHONHASHSEED": "0"},  # a fixed order of sets, so that scores can be repeated
                cwd="/",
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._lock = threading.Lock()
        try:
            hello = self._read_hello()
        except BaseException:
            self.stop()
            shutil.rmtree(base, ignore_errors=True)  # empty, or removed by the server
            raise
        self.layers: tuple[str, ...] = tuple(hello["layers"])
        self.missing: dict[str, str] = hello["missing"]
        if "namespaces" in self.layers:
            base.rmdir()  # the server has mounted its root in its own namespace; else it uses and removes the folder

    def _read_hello(self) -> dict[str, Any]:
        self._control.settimeout(_START_SECONDS)
        line = b""
        while not line.endswith(b"\n"):
            part = self._control.recv(65536)
            if not part:
                assert self._process.stderr is not None
                printed = self._process.stderr.read().decode(errors="replace").strip().splitlines()
                raise RewardError(f"the code sandbox does not start: {printed[-1] if printed else 'no message'}")
            line += part
        self._control.settimeout(None)
        hello: dict[str, Any] = json.loads(line)
        return hello

    def run(self, job: Job, limits: Limits) -> _Verdict:
        """Runs one job. Raises _ServerDied, or RewardError when the tests are too large."""
        theirs_job, job_end = os.pipe()
        verdict_end, theirs_verdict = os.pipe()
        try:
            try:
                with self._lock:
                    socket.send_fds(self._control, [limits.pack()], [theirs_job, theirs_verdict])
            except OSError as error:
                raise _ServerDied from error
            finally:
                os.close(theirs_job)
                os.close(theirs_verdict)
            try:
                write_message(job_end, asdict(job))
            except ValueError as error:
                if len(json.dumps(asdict(replace(job, program=())))) > LARGEST:
                    raise RewardError(f"the tests are too large for the sandbox: {error}") from error
                return _Verdict([{"why": f"the program is too large: {error}"}])
            except Gone:
                pass  # the verdict says why the other side no longer reads
            return self._read_verdict(verdict_end, limits, _LONGEST_VERDICT + _BYTES_OF_A_TEST * len(job.tests))
        finally:
            os.close(job_end)
            os.close(verdict_end)

    def _read_verdict(self, pipe: int, limits: Limits, longest: int) -> _Verdict:
        """Reads lines up to the supervisor's, which is always the last. `longest`: bytes of all lines."""
        deadline = time.monotonic() + limits.wall_milliseconds / 1000 + _GRACE_SECONDS
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        verdict, rest, size = _Verdict(), b"", 0
        while True:
            if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _ServerDied
            part = os.read(pipe, 65536)
            size += len(part)
            if not part or size > longest:
                raise _ServerDied
            *lines, rest = (rest + part).split(b"\n")
            verdict.lines += [json.loads(line) for line in lines]
            if lines and "end" in verdict.lines[-1]:
                return verdict

    def stop(self) -> None:
        self._control.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stderr is not None
        self._process.stderr.close()


class Sandbox:
    """A pool of threads, each of which waits for one job at a time; the jobs are processes."""

    def __init__(self, workers: int = 8, layers: Iterable[str] = LAYERS) -> None:
        """Starts the server, and tests the protections with a program of its own.

        Args:
            workers: number of jobs that run at once.
            layers: which of `confine.LAYERS` to use; layers that do not work on this system are left out.

        Raises:
            RewardError: the sandbox does not start on this system.
        """
        if sys.platform == "win32":
            raise RewardError("the code sandbox needs Linux or macOS; run the stage there, or leave out `code_tests`")
        self.workers = workers
        self._requested = tuple(layers)
        self._lock = threading.Lock()
        self._server = _Server(self._requested)
        self._finalizer = weakref.finalize(self, self._server.stop)
        try:
            self._held = self._probe()
        except BaseException:
            self.close()
            raise

    def protections(self) -> dict[str, tuple[str, ...]]:
        """For each key of PROTECTS, the active layers that give it; empty where the test program got through."""
        active = self._server.layers
        return {
            what: tuple(layer for layer in by if layer in active) if self._held[what] else ()
            for what, by in PROTECTS.items()
        }

    def missing(self) -> dict[str, str]:
        """The layers that do not work on this system, and why."""
        return dict(self._server.missing)

    def require(self, what: Iterable[str]) -> None:
        """Raises RewardError when one of these protections is unknown or not available."""
        protections = self.protections()
        for name in what:
            if name not in protections:
                raise RewardError(f"`require` names {name!r}; the sandbox protects {', '.join(protections)}")
            if not protections[name]:
                reasons = "; ".join(f"{layer}: {why}" for layer, why in self._server.missing.items()) or "none is used"
                raise RewardError(
                    f"code_tests: programs cannot be kept from the {name} on this machine ({reasons}). Run on Linux "
                    f"5.13 or newer, in a container that allows Landlock and seccomp, or remove {name} from `require` "
                    "if the machine holds nothing of value"
                )

    def run(self, job: Job, limits: Limits | None = None) -> Outcome:
        """Runs one job in this thread. Raises RewardError if the sandbox fails, never because of the program."""
        for _ in range(2):
            server = self._server
            try:
                verdict = server.run(job, limits or Limits())
            except _ServerDied:
                self._renew(server)
                continue
            if broken := verdict.first("broken", ""):
                raise RewardError(f"a process of the code sandbox cannot be confined: {broken}")
            return verdict.outcome()
        raise RewardError("the code sandbox's server died twice on one job; is the machine out of memory?")

    def map(self, jobs: Sequence[Job], limits: Limits | None = None) -> list[Outcome]:
        """Runs all jobs, `workers` at once; outcomes in the jobs' order. Raises RewardError as `run` does."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="sandbox")
        try:
            return list(pool.map(lambda job: self.run(job, limits), jobs))
        finally:
            pool.shutdown(cancel_futures=True)

    def close(self) -> None:
        """Ends the server and every job."""
        self._finalizer()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _renew(self, dead: _Server) -> None:
        with self._lock:
            if self._server is dead:
                self._finalizer()
                self._server = _Server(self._requested)
                self._finalizer = weakref.finalize(self, self._server.stop)

    def _probe(self) -> dict[str, bool]:
        """Which protections hold against a program that attacks them. The kernel may accept a layer without effect."""
        with socket.create_server(("127.0.0.1", 0)) as listener, tempfile.NamedTemporaryFile("w+") as outside:
            outside.write("secret")
            outside.flush()
            Path(outside.name).chmod(0o666)
            tests = (
                f"assert not connects({listener.getsockname()[1]})\n"
                f"assert 'secret' not in read({outside.name!r})\n"
                f"assert not signals({os.getpid()})\n"
                f"write({outside.name!r})\n"
            )
            outcome = self.run(Job([_PROBE], tests, stop_at_first=False))
            untouched = Path(outside.name).read_text() == "secret"
        if not outcome.finished:
            raise RewardError(f"the code sandbox does not work here: {outcome.why or outcome.fault}")
        held = {what: unit in outcome.passed for unit, what in enumerate(PROTECTS)}
        return {**held, "filesystem": held["filesystem"] and untouched}
