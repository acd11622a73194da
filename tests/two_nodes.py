"""Two machines for tests: network namespaces that are joined by a virtual cable, which can be cut. Needs root."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Node:
    """One machine: a network namespace with one interface."""

    name: str
    interface: str
    address: str


@dataclass(frozen=True)
class Nodes:
    """Two machines and the cable between them."""

    root: Path
    nodes: tuple[Node, Node]

    def cut(self) -> None:
        """Cuts the cable: nothing arrives any more, and neither side is told."""
        _ip("-n", self.nodes[0].name, "link", "set", self.nodes[0].interface, "down")

    def mend(self) -> None:
        """Joins the cable again."""
        _ip("-n", self.nodes[0].name, "link", "set", self.nodes[0].interface, "up")

    def launch(self, launch: str, module: str, *arguments: object) -> "list[subprocess.Popen[str]]":
        """Starts `accelerate launch` on both, with one process each."""
        command = ["accelerate", "launch", "--config_file", self._file(launch), "--num_machines", "2"]
        command += ["--num_processes", "2", "--machine_rank", "RANK", "--main_process_ip", self.nodes[0].address]
        return self.start(*command, "--main_process_port", "29577", "-m", module, *arguments)

    def run(self, launch: str, *arguments: object) -> "list[subprocess.Popen[str]]":
        """Starts `baton run` on both, with the launch file's processes on each."""
        command = ["baton", "run", "--launch", self._file(launch), "--num-machines", "2", "--machine-rank", "RANK"]
        command += ["--main-process-ip", self.nodes[0].address, "--main-process-port", "29579"]
        return self.start(*command, *arguments)

    def start(self, program: str, *arguments: object) -> "list[subprocess.Popen[str]]":
        """Starts a program of this Python's environment on both; RANK in its arguments is the number of the node."""
        return [self.start_on(number, program, *arguments) for number in range(2)]

    def start_on(self, number: int, program: str, *arguments: object) -> "subprocess.Popen[str]":
        """Starts the program on one of them."""
        node = self.nodes[number]
        own = [str(number) if argument == "RANK" else str(argument) for argument in arguments]
        return subprocess.Popen(
            ["ip", "netns", "exec", node.name, str(Path(sys.executable).parent / program), *own],
            cwd=self.root,
            env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": node.interface},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def _file(self, launch: str) -> str:
        return str(self.root / "recipes" / "launch" / f"{launch}.yaml")


def ended(launched: "Sequence[subprocess.Popen[str]]") -> tuple[list[int], list[str]]:
    """Waits for both. Returns their exit codes and their output."""
    output = [process.communicate(timeout=900)[0] for process in launched]
    return [process.returncode for process in launched], output


@contextmanager
def two_nodes(root: Path) -> Iterator[Nodes]:
    """Two machines inside the context. Skips the test where they cannot be made."""
    mine = str(os.getpid())
    nodes = Nodes(root, (Node(f"a{mine}", f"va{mine}", "10.231.7.1"), Node(f"b{mine}", f"vb{mine}", "10.231.7.2")))
    try:
        for node in nodes.nodes:
            _ip("netns", "add", node.name)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', error)}")
    try:
        first, second = nodes.nodes
        _ip(*f"-n {first.name} link add {first.interface} type veth peer".split(), second.interface)
        _ip(*f"-n {first.name} link set {second.interface} netns {second.name}".split())
        for node in nodes.nodes:
            _ip(*f"-n {node.name} address add {node.address}/24 dev {node.interface}".split())
            for interface in ("lo", node.interface):
                _ip(*f"-n {node.name} link set {interface} up".split())
        yield nodes
    finally:
        for node in nodes.nodes:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", node.name)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
