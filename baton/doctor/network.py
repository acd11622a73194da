"""How the processes of a launch file find each other: variables, interfaces, the place where they meet."""

import ipaddress
import os
import socket
from collections.abc import Iterable

import psutil

from baton.doctor.finding import Finding, fault, ok, warning
from handoff.errors import UserError
from training.engines.launch import check_environment
from training.engines.launch_file import LaunchFile

_ENVIRONMENT, _NETWORK, _MEETING = "environment", "network", "meeting"
_SECONDS = 3.0
"""How long another machine has to answer."""
_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"


def check_variables() -> list[Finding]:
    """Looks for variables that an earlier job has left in the environment."""
    try:
        check_environment(launched=False)
    except UserError as error:
        return [fault(_ENVIRONMENT, str(error))]
    left = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    if left:
        told = ", ".join(f"{name}={os.environ[name]}" for name in left)
        return [
            warning(_ENVIRONMENT, f"it has {told}, which a launcher sets by itself, and which would turn one process "
                    f"into one that waits for others: `unset {' '.join(left)}`")
        ]  # fmt: skip
    return [ok(_ENVIRONMENT, "no variable of an earlier job")]


def check_network(launch: LaunchFile | None) -> list[Finding]:
    """Checks the interfaces that variables name and, of a launch file, the place where its processes meet."""
    found = _check_named_interfaces(1 if launch is None else launch.machines)
    if launch is not None and launch.machines > 1:
        found += _check_own_name(launch)
    if not found:
        named = [f"{name}={os.environ[name]}" for name in (_GLOO, _NCCL) if name in os.environ]
        found.append(
            ok(_NETWORK, ", ".join([f"this is {socket.gethostname()} with {', '.join(_interfaces())}", *named]))
        )
    if launch is not None and launch.request.processes > 1:
        found += _check_meeting(launch)
    return found


def _interfaces() -> list[str]:
    """Names of the interfaces that are up."""
    return [name for name, state in psutil.net_if_stats().items() if state.isup]


def _addresses() -> dict[str, str]:
    """Address -> interface of this machine."""
    families = (socket.AF_INET, socket.AF_INET6)
    return {
        entry.address.partition("%")[0]: name
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    }


def _check_named_interfaces(machines: int) -> list[Finding]:
    found, here = [], _interfaces()
    for variable in (_GLOO, _NCCL):
        named = os.environ.get(variable, "")
        if not named or named.startswith("^"):  # NCCL: every interface but these
            continue
        names = [name for name in named.removeprefix("=").split(",") if name]
        exact = variable == _GLOO or named.startswith("=")
        meant = [one for one in here for name in names if (one == name if exact else one.startswith(name))]
        missing = [name for name in names if not any(one == name if exact else one.startswith(name) for one in here)]
        if missing and (exact or not meant):
            found.append(
                fault(_NETWORK, f"{variable}={named}, and this machine has no interface {missing[0]} that is up: it "
                      f"has {', '.join(here)}; export {variable} with one of these, or unset it")
            )  # fmt: skip
        elif machines > 1 and meant and all(_is_loopback_interface(one) for one in meant):
            found.append(
                fault(_NETWORK, f"{variable}={named} is the loopback interface, which other machines cannot reach; "
                      f"export {variable} with the interface that leads to them")
            )  # fmt: skip
    return found


def _is_loopback_interface(name: str) -> bool:
    own = [address for address, interface in _addresses().items() if interface == name]
    return bool(own) and all(_is_loopback(address) for address in own)


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address).is_loopback


def _resolved(name: str) -> list[str]:
    """The addresses of a name; none if it does not resolve."""
    try:
        return sorted({str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)})
    except (OSError, UnicodeError):
        return []


def _check_own_name(launch: LaunchFile) -> list[Finding]:
    """gloo tells other machines the address to which this machine's own name resolves, unless an interface is named."""
    if _GLOO in os.environ:
        return []
    name, own = socket.gethostname(), _resolved(socket.gethostname())
    if own and not all(map(_is_loopback, own)):
        return []
    interface = _leads_to(launch.address) or "<the interface that leads to them>"
    what = f"resolves to {own[0]}, the loopback address (see /etc/hosts)" if own else "does not resolve"
    return [
        fault(_NETWORK, f"the name of this machine, {name}, {what}, and other machines would be told to reach it "
              f"there: `export {_GLOO}={interface}`, or give {name} its own address in /etc/hosts")
    ]  # fmt: skip


def _leads_to(address: str) -> str | None:
    """The interface over which an address is reached; None if that is the loopback interface, or not known."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))  # sends nothing
            own = probe.getsockname()[0]
        except OSError:
            return None
    return None if _is_loopback(own) else _addresses().get(own)


def _check_meeting(launch: LaunchFile) -> list[Finding]:
    place = f"{launch.address}:{launch.port}"
    addresses = _resolved(launch.address)
    if not addresses:
        return [
            fault(_MEETING, f"{launch.path}: main_process_ip: {launch.address} does not resolve on this machine; write "
                  "the address of machine 0 there, or give it to accelerate as --main_process_ip")
        ]  # fmt: skip
    if launch.machines > 1 and all(map(_is_loopback, addresses)):
        others = ", ".join(_others(_addresses()))
        mine = f" (this machine has {others})" if launch.machine_rank == 0 and others else ""
        return [
            fault(_MEETING, f"{launch.path}: main_process_ip: {launch.address} is the loopback address, which every "
                  f"machine takes for itself; write the address of machine 0{mine} there, or give it to accelerate as "
                  "--main_process_ip and here as --main-process-ip")
        ]  # fmt: skip
    if launch.machines > 1 and launch.port == 0:
        return [
            fault(_MEETING, f"{launch.path}: main_process_port: 0 is a free port, which each of the {launch.machines} "
                  "machines would choose for itself; write a fixed one, for example 29500")
        ]  # fmt: skip
    if launch.machine_rank > 0:
        return [_check_reachable(launch, place)]
    if launch.machines > 1 and not set(addresses) & _addresses().keys():
        others = ", ".join(_others(_addresses())) or "none"
        return [
            fault(_MEETING, f"{launch.path}: main_process_ip: {launch.address} is not an address of this machine, "
                  f"which has machine_rank 0 (its addresses: {others}); write its own there, or start "
                  "machine_rank 0 on the machine that has it")
        ]  # fmt: skip
    return [_check_port(launch, place)]


def _others(addresses: Iterable[str]) -> list[str]:
    return [address for address in addresses if not _is_loopback(address)]


def _check_port(launch: LaunchFile, place: str) -> Finding:
    if launch.port == 0:
        return ok(_MEETING, f"the processes meet at {launch.address}, at a free port")
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind(("", launch.port))
            trial.listen()
        except OSError as error:
            who = _owner(launch.port)
            return fault(
                _MEETING,
                f"port {launch.port} of this machine cannot be used ({error.strerror}{who}): end what uses it, or "
                f"write another main_process_port in {launch.path}"
                + (", 0 for a free one" if launch.machines == 1 else ""),
            )
    return ok(_MEETING, f"the processes meet at {place}, which is free")


def _owner(port: int) -> str:
    """Who listens at a port, as far as this user may know."""
    try:
        connections = psutil.net_connections("tcp")
        pids = [one.pid for one in connections if one.status == "LISTEN" and one.laddr.port == port and one.pid]
        return f", by process {pids[0]}, {psutil.Process(pids[0]).name()}" if pids else ""
    except (psutil.Error, OSError):
        return ""


def _check_reachable(launch: LaunchFile, place: str) -> Finding:
    try:
        socket.create_connection((launch.address, launch.port), _SECONDS).close()
    except ConnectionRefusedError:
        return ok(_MEETING, f"{launch.address} answers; nothing listens at port {launch.port} before machine 0 starts")
    except OSError as error:
        return fault(
            _MEETING,
            f"{place} cannot be reached from here ({error.strerror or 'no answer'}): check main_process_ip in "
            f"{launch.path}, the cable, and that no firewall drops the port",
        )
    return ok(_MEETING, f"{place} can be reached, and something listens there")
