"""`baton run` on several machines: how the runners find each other and agree (baton/together.py). Both are here."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from baton import together
from baton.supervisor import Start
from baton.together import Others, digest, follow
from handoff.errors import UserError
from tests.slurm_cluster import free_ports
from training.engines.launch import LaunchError
from training.engines.machines import Place, place_of
from training.recipe import Recipe, load_recipe
from training.terminal import Screen

LAUNCH = "distributed_type: {kind}\nnum_processes: {processes}\nnum_machines: {machines}\n"


def launch_file(folder: Path, kind: str = "MULTI_GPU", processes: int = 8, machines: int = 1) -> Path:
    path = folder / "launch.yaml"
    path.write_text(LAUNCH.format(kind=kind, processes=processes, machines=machines))
    return path


# ---- the place


def test_the_place_is_given_by_options_or_by_the_launch_file(tmp_path: Path) -> None:
    launch = launch_file(tmp_path, machines=2)
    with launch.open("a") as file:
        file.write("machine_rank: 1\nmain_process_ip: first\nmain_process_port: 4000\n")
    assert place_of(launch) == Place(2, 1, "first", 4000)
    assert place_of(launch, machine_rank=0, main_process_ip="other", main_process_port=None) == Place(
        2, 0, "other", 4000
    )
    alone = launch_file(tmp_path)
    assert place_of(alone) is None and place_of(None) is None and place_of(None, num_machines=1) is None
    assert place_of(alone, num_machines=3, machine_rank=2, main_process_ip="first") == Place(3, 2, "first", 29500)


@pytest.mark.parametrize(
    ("machines", "options", "found"),
    [
        (1, {"num_machines": 2, "machine_rank": 2, "main_process_ip": "x"}, "--machine-rank 2: .* from 0 to 1"),
        (1, {"num_machines": 2}, "--main-process-ip is missing"),
        (1, {"num_machines": 2, "main_process_ip": "x", "main_process_port": 80}, "--main-process-port 80: choose"),
        (2, {"num_machines": 1}, "is for several machines, and the command says one"),
    ],
)
def test_an_impossible_place_is_refused(tmp_path: Path, machines: int, options: dict, found: str) -> None:
    with pytest.raises(LaunchError, match=found):
        place_of(launch_file(tmp_path, machines=machines), **options)
    with pytest.raises(LaunchError, match="--num-machines needs --launch"):
        place_of(None, num_machines=2)


def test_a_launch_file_for_one_machine_serves_for_several(tmp_path: Path) -> None:
    place = Place(4, 3, "first", 4000)
    expected = "--num_machines 4 --num_processes 32 --machine_rank 3 --main_process_ip first --main_process_port 4000"
    assert place.arguments(launch_file(tmp_path)) == expected.split()
    assert place.arguments(launch_file(tmp_path, processes=32, machines=4)) == expected.split()
    assert place.arguments(launch_file(tmp_path, kind="DEEPSPEED"))[-2:] == [
        "--deepspeed_multinode_launcher",
        "standard",
    ]
    for wrong, found in (
        ({"machines": 2}, "num_machines: 2, and the command says 4"),
        ({"machines": 4, "processes": 6}, "num_processes: 6 processes cannot be shared evenly by 4 machines"),
        ({"kind": "NO", "processes": 1}, "starts one process, and 4 machines were asked for"),
    ):
        with pytest.raises(LaunchError, match=found):
            place.arguments(launch_file(tmp_path, **wrong))


# ---- the runners


class Part:
    """This machine's part of a stage: it ends with a code when it is allowed to, or by a signal."""

    def __init__(self, code: int, allowed: threading.Event | None = None) -> None:
        self._code = code
        self._allowed = allowed or threading.Event()
        if allowed is None:
            self._allowed.set()

    def send(self, signum: int) -> None:
        """Ends it by the signal."""
        self._code = 128 + signum
        self._allowed.set()

    def wait(self) -> int:
        """Its exit code."""
        assert self._allowed.wait(30)
        return self._code


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\nstages: {tokenizer: {data: [{source: world, kind: documents}]}}\n")
    return load_recipe(path, [f"output_root={tmp_path / 'runs'}"])


@pytest.fixture
def port() -> int:
    while True:  # the next one is used, too
        (found,) = free_ports(1)
        with socket.socket() as one, socket.socket() as other:
            try:
                one.bind(("127.0.0.1", found))
                other.bind(("127.0.0.1", found + 1))
            except OSError:
                continue
            return found


class FirstMachine(threading.Thread):
    """The first of two machines, in a thread. `work` is what it does when both are there; `found` what came of it."""

    def __init__(self, port: int, work: Callable[[Others], int]) -> None:
        super().__init__(daemon=True)
        self._others = Others(Place(2, 0, "127.0.0.1", port), "same", Screen(quiet=True))
        self._work = work
        self.found: int | BaseException | None = None
        self.start()

    def run(self) -> None:
        """The thread."""
        try:
            with self._others as others:
                self.found = others.code = self._work(others)
        except BaseException as error:
            self.found = error


def second(recipe: Recipe, port: int, part: Part | None = None, command: str = "same") -> int:
    """The exit code of the second machine."""
    start = Start(["x"], lambda descriptor: part or Part(0))
    return follow(recipe, Place(2, 1, "127.0.0.1", port), command, lambda name: start, recipe.run_dir / "logs")


def run_stage(others: Others, own: Part) -> int:
    return others.settled(others.started("tokenizer", lambda descriptor: own, 1).wait())


def test_both_run_a_stage_and_end_with_the_same_code(recipe, port, capfd):
    first = FirstMachine(port, lambda others: run_stage(others, Part(0)) or run_stage(others, Part(0)))
    assert second(recipe, port) == 0
    first.join(30)
    assert first.found == 0
    assert capfd.readouterr().out.count("machine 1 of 2 takes part in tokenizer") == 2
    assert len((recipe.run_dir / "logs" / "tokenizer.1.log").read_text().splitlines()) == 2


def test_a_part_that_fails_ends_the_one_that_has_not_noticed(recipe, port, monkeypatch):
    """The exit code is that of the part that failed first."""
    monkeypatch.setattr(together, "PATIENCE", 0.2)
    for codes in ((2, None), (None, 2)):
        parts = [Part(0, threading.Event()) if code is None else Part(code) for code in codes]
        first = FirstMachine(port, lambda others: run_stage(others, parts[0]))  # noqa: B023
        assert second(recipe, port, parts[1]) == 2
        first.join(30)
        assert first.found == 2


def test_other_recipes_do_not_run_together(recipe, port):
    first = FirstMachine(port, lambda others: 0)
    with pytest.raises(LaunchError, match="machine 1 has another recipe, other overrides or another launch file"):
        second(recipe, port, command="another")
    first.join(30)
    assert isinstance(first.found, LaunchError) and "machine 1 has another recipe" in str(first.found)


def test_what_a_run_depends_on_is_compared(recipe, tmp_path):
    launch = launch_file(tmp_path)
    before = digest(recipe, launch)
    assert digest(load_recipe(recipe.path, recipe.overrides), launch) == before
    assert digest(load_recipe(recipe.path, [*recipe.overrides, "tokenizer.vocab_size=300"]), launch) != before
    assert digest(recipe, launch_file(tmp_path, processes=4)) != before


def test_a_mistake_on_the_first_machine_ends_the_other_with_its_code(recipe, port):
    def refuse(others: Others) -> int:
        raise UserError("no")

    first = FirstMachine(port, refuse)
    assert second(recipe, port) == 2
    first.join(30)
    assert isinstance(first.found, UserError)


def test_a_first_machine_that_is_gone_ends_the_other(recipe, port, capfd):
    server = socket.create_server(("127.0.0.1", port + 1))
    threading.Thread(target=lambda: server.accept()[0].close(), daemon=True).start()
    assert second(recipe, port) == 1
    server.close()
    assert "machine 0 is gone; the same command goes on" in capfd.readouterr().out


def test_a_signal_between_two_stages_ends_both(recipe, port):
    def wait_for_its_end(others: Others) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 30
        while (code := others.gone()) is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return code

    first = FirstMachine(port, wait_for_its_end)
    with pytest.raises(SystemExit) as end:
        second(recipe, port)
    assert end.value.code == 143
    first.join(30)
    assert first.found == 143


def test_strangers_are_sent_away(recipe, port):
    first = FirstMachine(port, lambda others: 0)
    for said in (b"GET / HTTP/1.1\r\n\r\n", b'{"machine": 7}\n', b"[1]\n", b'{"machine": true}\n'):
        with together._connected(Place(2, 1, "127.0.0.1", port), lambda: None) as stranger:
            stranger.sendall(said)
            assert stranger.recv(100) == b""
    with socket.create_connection(("127.0.0.1", port + 1)) as double:
        double.sendall(json.dumps({"machine": 1, "command": "other"}).encode() + b"\n")
        assert b"refused" in double.recv(1000)
    first.join(30)
    assert isinstance(first.found, LaunchError)


def test_machines_that_do_not_come_are_named(recipe, port, monkeypatch):
    monkeypatch.setattr(together, "MEET", 0.1)
    first = FirstMachine(port, lambda others: 0)
    first.join(30)
    assert "machine 1 of 2 did not come to 127.0.0.1:" in str(first.found)
    with pytest.raises(LaunchError, match=r"machine 0 cannot be reached at 127\.0\.0\.1:"):
        second(recipe, port)


def test_a_port_in_use_is_an_error_of_the_first_machine(port):
    with socket.create_server(("", port + 1)):
        first = FirstMachine(port, lambda others: 0)
        first.join(30)
    assert isinstance(first.found, LaunchError) and f"--main-process-port {port}: port {port + 1}" in str(first.found)


def test_a_command_without_a_launch_file_is_refused(root, tmp_path, recipe):
    command = [sys.executable, "-m", "baton", "run", str(recipe.path), "--num-machines", "2"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--num-machines needs --launch" in done.stderr
