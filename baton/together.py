"""`baton run` on several machines: all run the same command, and the first one tells the others which stage to start.

The first machine decides what is up to date, locks the run and runs the stages that need one process. Each other
machine starts its part of a stage when it is told to, says how that ended, and ends when the first one does. The
processes of a stage find each other as under any `accelerate launch` on several machines.

The runners exchange lines of JSON over TCP, on the port after that of the stages' processes:

    to the first   {"machine": 1, "command": "5f.."}  the first line: who speaks, and a digest of its command
                   {"ended": 0}                       its part of the stage has ended, with this exit code
                   {"left": 143}                      it ends now, between two stages
    to the others  {"stage": "sft"}, {"signal": 15}   to start, and to send to the stage that runs
                   {"end": 0}, {"refused": "words"}   to end, with this exit code
"""

import hashlib
import json
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from baton.supervisor import Running, Start, Supervisor
from handoff.errors import GateError, UserError
from training.engines.launch import LaunchError
from training.engines.machines import Place
from training.recipe import Recipe
from training.terminal import Screen

MEET = 600.0
"""Seconds in which the machines have to find each other."""
PATIENCE = 60.0
"""Seconds that a part of a stage has to notice by itself that another part has failed."""
_SAYS = 15.0  # seconds after which a machine says for whom it waits
_LONGEST = 1 << 16  # bytes of a line
_PROBES = ((socket.TCP_KEEPIDLE, 30), (socket.TCP_KEEPINTVL, 10), (socket.TCP_KEEPCNT, 3))


def digest(recipe: Recipe, launch: Path) -> str:
    """A hash of what has to be equal on all machines: the recipe's values and the launch file."""
    values = {name: section.resolved for name, section in recipe.sections.items()}
    text = json.dumps([recipe.name, recipe.seed, values, launch.read_text(encoding="utf-8")], default=str)
    return hashlib.sha256(text.encode()).hexdigest()


class Line:
    """A connection that carries lines of JSON."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _PROBES:  # a machine that goes down closes nothing
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connection = connection
        self._file = connection.makefile("rb")

    def send(self, **message: Any) -> None:
        """Sends a message. Who has gone away is noticed by the reader."""
        with suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """The messages that come in, until the other side is gone or says something that is none."""
        with suppress(OSError, ValueError):
            while (line := self._file.readline(_LONGEST)).endswith(b"\n"):
                message = json.loads(line)
                if not isinstance(message, dict):
                    return
                yield message

    def close(self) -> None:
        """Ends the connection."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._file.close()
        self._connection.close()


class Others:
    """The other machines, as the first one sees them. A context manager that waits for them, and in the end tells them
    to end, too."""

    def __init__(self, place: Place, command: str, console: Screen) -> None:
        self._place = place
        self._command = command
        self._console = console
        self._lines: dict[int, Line] = {}
        self._changed = threading.Condition()
        self._ended: dict[int, int] = {}  # {machine: exit code of its part of the stage}
        self._left: dict[int, int] = {}  # {machine: exit code of its command}
        self._failed: tuple[int, int] | None = None  # the first machine whose part failed while ours was running
        self._running: Running | None = None
        self.code = 0
        """The exit code with which the others end, if nothing is raised."""

    def __enter__(self) -> "Others":
        try:
            server = socket.create_server(("", self._place.port + 1))
        except OSError as error:
            raise LaunchError(
                f"--main-process-port {self._place.port}: port {self._place.port + 1}, on which the machines meet, "
                f"cannot be used ({error.strerror}); choose another one on all machines"
            ) from error
        try:
            with server:
                self._meet(server)
        except BaseException as error:
            self._end(_code_of(error))
            raise
        for number, line in self._lines.items():
            threading.Thread(target=self._listen, args=(number, line), daemon=True).start()
        return self

    def _meet(self, server: socket.socket) -> None:
        begun, said = time.monotonic(), False
        while missing := sorted(set(range(1, self._place.machines)) - self._lines.keys()):
            names = f"machine{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            waited = time.monotonic() - begun
            if waited > MEET:
                raise LaunchError(
                    f"{names} of {self._place.machines} did not come to {self._place.address}:{self._place.port + 1} "
                    f"in {MEET:.0f} s; each machine runs the same command with a --machine-rank of its own"
                )
            if waited > _SAYS and not said:
                self._console.print(f"waits for {names} of {self._place.machines}")
                said = True
            server.settimeout(1.0)
            try:
                connection = server.accept()[0]
            except TimeoutError:
                continue
            connection.settimeout(10.0)
            self._admit(connection)

    def _admit(self, connection: socket.socket) -> None:
        line = Line(connection)
        connection.settimeout(10.0)  # for the first line
        first = next(line.messages(), {})
        connection.settimeout(None)
        number = first.get("machine")
        if type(number) is not int or not 0 < number < self._place.machines:
            line.close()  # not one of ours
            return
        wrong = ""
        if number in self._lines:
            wrong = f"two machines were started with --machine-rank {number}"
        elif first.get("command") != self._command:
            wrong = f"machine {number} has another recipe, other overrides or another launch file than machine 0"
        if wrong:
            line.send(refused=wrong)
            line.close()
            raise LaunchError(wrong)
        self._lines[number] = line

    def _listen(self, number: int, line: Line) -> None:
        """A thread for each machine: notes what it says."""
        for message in line.messages():
            if type(message.get("ended")) is int:
                self._note(self._ended, number, message["ended"])
            elif type(message.get("left")) is int:
                self._note(self._left, number, message["left"])
        if number not in self._left:
            self._note(self._left, number, 1)

    def _note(self, codes: dict[int, int], number: int, code: int) -> None:
        with self._changed:
            codes[number] = code
            if code and self._running is not None and self._failed is None:
                self._failed = (number, code)
                timer = threading.Timer(PATIENCE, self._give_up, [self._running])
                timer.daemon = True
                timer.start()
            self._changed.notify_all()

    def _give_up(self, stage: Running) -> None:
        """Ends our part of a stage that has not noticed by itself that another part has failed."""
        if self._running is stage:
            stage.send(signal.SIGTERM)

    def started(self, name: str, begin: Callable[[int], Running], descriptor: int) -> Running:
        """Has a stage started on all machines. Returns this machine's part."""
        with self._changed:
            self._ended.clear()
            self._failed = None
            for line in self._lines.values():
                line.send(stage=name)
            self._running = begin(descriptor)
        return self._running

    def settled(self, code: int) -> int:
        """Waits until a stage has ended on all machines, after it has ended here with `code`. Returns the exit code of
        the part that failed first."""
        with self._changed:
            self._running = None
            first = self._failed
            for asked in (None, signal.SIGTERM, signal.SIGKILL):
                if asked is not None:
                    for line in self._lines.values():
                        line.send(signal=int(asked))
                if self._changed.wait_for(
                    lambda: self._lines.keys() <= self._ended.keys() | self._left.keys(), PATIENCE
                ):
                    break
            failed = [(number, found) for number, found in self._ended.items() if found]
        if first is None and not code and failed:
            first = failed[0]
        if first is None:
            return code
        self._console.print(f"  machine {first[0]} ended first, with exit code {first[1]}; its output says why")
        return first[1]

    def gone(self) -> int | None:
        """The exit code of a machine that has ended before the others; None if all are there."""
        for number, code in self._left.items():
            self._console.print(f"machine {number} has ended, so this one does, too; the same command goes on")
            return code
        return None

    def _end(self, code: int) -> None:
        for line in self._lines.values():
            line.send(end=code)
            line.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(self.code if value is None else _code_of(value))


def _code_of(error: BaseException) -> int:
    """The exit code of the command that `error` ends."""
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0
    if isinstance(error, GateError):
        return 3
    return 2 if isinstance(error, UserError) else 1


def follow(recipe: Recipe, place: Place, command: str, start_of: Callable[[str], Start], logs: Path) -> int:
    """Takes part on a machine that is not the first: starts what that one says. Returns its exit code.

    Args:
        command: as for `Others`.
        start_of: gives the way to start a section.
        logs: folder of the run's logs.

    Raises:
        LaunchError: the first machine cannot be reached, or refuses this one.
    """
    console, supervisor = Screen(), Supervisor()
    me = f"machine {place.number} of {place.machines}"
    with supervisor.forwarding():
        line = Line(_connected(place, lambda: console.print(f"{me} waits for {place.address}:{place.port + 1}")))
        try:
            line.send(machine=place.number, command=command)
            inbox: queue.Queue[dict[str, Any]] = queue.Queue()
            threading.Thread(target=_listen, args=(line, inbox, supervisor), daemon=True).start()
            while True:
                message = _next(inbox)
                if "refused" in message:
                    raise LaunchError(str(message["refused"]))
                if "end" in message:
                    return int(message["end"])
                name = message.get("stage")
                if name not in recipe.sections:
                    console.print(f"{me}: machine 0 is gone; the same command goes on")
                    return 128 + supervisor.signals[0] if supervisor.signals else 1
                console.print(f"{me} takes part in {name}")
                ended = supervisor.run(start_of(name), logs / f"{name}.{place.number}.log")
                if ended.code:
                    console.print(f"{me}: {name} ended with exit code {ended.code} after {ended.seconds:.0f} s")
                line.send(ended=ended.code)
        except SystemExit as end:
            line.send(left=end.code)
            raise
        finally:
            line.close()


def _next(inbox: "queue.Queue[dict[str, Any]]") -> dict[str, Any]:
    """The next message. The wait is short, because Python handles a signal that comes just before a wait after it."""
    while True:
        with suppress(queue.Empty):
            return inbox.get(timeout=1.0)


def _connected(place: Place, waits: Callable[[], None]) -> socket.socket:
    begun, said = time.monotonic(), False
    while True:
        try:
            return socket.create_connection((place.address, place.port + 1), timeout=10.0)
        except OSError as error:
            waited = time.monotonic() - begun
            if waited > MEET:
                raise LaunchError(
                    f"machine 0 cannot be reached at {place.address}:{place.port + 1} ({error.strerror or error}); "
                    "--main-process-ip and --main-process-port are the same on all machines, and this port and the one "
                    "before it have to be open between them"
                ) from error
            if waited > _SAYS and not said:
                waits()
                said = True
            time.sleep(0.5)


def _listen(line: Line, inbox: "queue.Queue[dict[str, Any]]", supervisor: Supervisor) -> None:
    """A thread: passes signals on at once and everything else to the main thread."""
    for message in line.messages():
        if type(message.get("signal")) is int:
            supervisor.send(message["signal"])
        else:
            inbox.put(message)
    inbox.put({})
    time.sleep(PATIENCE)
    supervisor.send(signal.SIGTERM)  # to a part of a stage that has not noticed that the first machine is gone
