"""`baton doctor`: each fault is provoked, found, and named with its mend; nothing is changed."""

import errno
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import time
from email.message import Message
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from baton.doctor import doctor, machine, network, packages, storage
from baton.doctor import recipe as of_recipe
from baton.doctor.finding import Finding, Level
from handoff.errors import UserError
from training.engines import trial
from training.engines.launch import LaunchError, Request
from training.engines.launch_file import LaunchFile, read_launch_file
from training.engines.trial import Report, all_reduce
from training.recipe import load_recipe

TWO = Request("ddp", None, 2, "cpu")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable of a launcher, and no interface by name."""
    for name in list(os.environ):
        if name.startswith(("MASTER_", "GLOO_", "NCCL_")) or name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name)


def file(machines: int = 1, machine_rank: int = 0, address: str = "127.0.0.1", port: int = 0) -> LaunchFile:
    return LaunchFile(Path("launch.yaml"), TWO, machines, machine_rank, address, port)


def wrong(found: list[Finding]) -> list[tuple[str, str]]:
    """(subject, words) of the faults and warnings."""
    return [(one.subject, one.words) for one in found if one.level is not Level.OK]


def only(found: list[Finding], level: Level) -> str:
    """The words of the one finding that is not all right."""
    bad = [one for one in found if one.level is not Level.OK]
    assert [one.level for one in bad] == [level], bad
    return bad[0].words


# ---- versions


def test_the_versions_here_are_right() -> None:
    (found,) = packages.check_packages("deepspeed")
    assert found.level is Level.OK and f"deepspeed {metadata.version('deepspeed')}" in found.words


def test_a_wrong_version_a_missing_package_and_a_wrong_python(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "peft":
            raise metadata.PackageNotFoundError(name)
        return {"trl": "1.9.0", "deepspeed": "0.10.0"}.get(name) or real(name)

    real = metadata.version
    monkeypatch.setattr(packages.metadata, "version", version)
    monkeypatch.setattr(packages.platform, "python_version", lambda: "3.9.1")
    found = packages.check_packages(None)
    told = {one.words.split()[0]: one for one in found}
    assert told["this"].words.startswith("this Python is 3.9.1, and >=3.11 is needed")
    assert "trl is 1.9.0, and trl<1.17,>=1.16 is needed: pip install 'trl<1.17,>=1.16'" in told["trl"].words
    assert told["peft"].words.startswith("peft is not installed")
    assert (told["trl"].level, told["deepspeed"].level) == (Level.FAULT, Level.WARNING)
    needed = [one for one in packages.check_packages("deepspeed") if one.words.startswith("deepspeed")]
    assert [one.level for one in needed] == [Level.FAULT]


def test_without_a_checkout_the_installed_package_says_what_is_needed(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages, "_PROJECT", tmp_path / "pyproject.toml")
    monkeypatch.setattr(packages.metadata, "requires", lambda name: ["torch>=9", "ninja>=99; extra == 'deepspeed'"])
    about = Message()
    about["Requires-Python"], about["Provides-Extra"] = ">=3.11", "deepspeed"
    monkeypatch.setattr(packages.metadata, "metadata", lambda name: about)
    assert [one.words.split()[0] for one in packages.check_packages("deepspeed")] == ["torch", "ninja"]
    assert [one.level for one in packages.check_packages(None)] == [Level.FAULT, Level.WARNING]


# ---- network


def test_variables_that_an_earlier_job_left(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong(network.check_variables()) == []
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    assert only(network.check_variables(), Level.WARNING).endswith("`unset MASTER_ADDR`")
    monkeypatch.setenv("WORLD_SIZE", "8")
    words = only(network.check_variables(), Level.FAULT)
    assert "WORLD_SIZE=8" in words and "`unset WORLD_SIZE`" in words


@pytest.mark.parametrize(
    ("variable", "value", "machines", "fault"),
    [
        ("GLOO_SOCKET_IFNAME", "nowhere0", 1, "no interface nowhere0 that is up: it has"),
        ("GLOO_SOCKET_IFNAME", "lo,nowhere0", 1, "no interface nowhere0 that is up: it has"),
        ("GLOO_SOCKET_IFNAME", "lo", 1, None),
        ("GLOO_SOCKET_IFNAME", "lo", 2, "is the loopback interface, which other machines cannot reach"),
        ("NCCL_SOCKET_IFNAME", "nowhere", 1, "no interface nowhere that is up"),
        ("NCCL_SOCKET_IFNAME", "=l", 1, "no interface l that is up"),
        ("NCCL_SOCKET_IFNAME", "l,nowhere", 1, None),  # names are beginnings, and one of them is enough
        ("NCCL_SOCKET_IFNAME", "^docker", 2, None),
    ],
)
def test_interfaces_that_variables_name(monkeypatch, variable: str, value: str, machines: int, fault) -> None:
    monkeypatch.setenv(variable, value)
    found = network._check_named_interfaces(machines)
    if fault is None:
        assert found == []
    else:
        words = only(found, Level.FAULT)
        assert f"{variable}={value}" in words and fault in words and f"export {variable}" in words


@pytest.mark.parametrize(
    ("addresses", "fault"),
    [(["127.0.1.1"], "resolves to 127.0.1.1, the loopback address (see /etc/hosts)"), ([], "does not resolve"),
     (["10.1.2.3"], None)],
)  # fmt: skip
def test_the_name_of_a_machine_must_lead_to_it_from_others(monkeypatch, addresses: list[str], fault) -> None:
    monkeypatch.setattr(network.socket, "gethostname", lambda: "trapped")
    resolve(monkeypatch, {"trapped": addresses})
    found = network._check_own_name(file(2))
    if fault is None:
        assert found == []
        return
    words = only(found, Level.FAULT)
    assert fault in words and "`export GLOO_SOCKET_IFNAME=" in words
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert network._check_own_name(file(2)) == []


def resolve(monkeypatch: pytest.MonkeyPatch, names: dict[str, list[str]]) -> None:
    """Makes these names resolve to these addresses, or not at all; others as before."""
    real = socket.getaddrinfo

    def getaddrinfo(name: str, port: object, *rest: object) -> list[tuple]:
        if name not in names:
            return real(name, port, *rest)
        if not names[name]:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in names[name]]

    monkeypatch.setattr(network.socket, "getaddrinfo", getaddrinfo)


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has the address 10.1.2.3."""
    monkeypatch.setattr(network, "_addresses", lambda: {"127.0.0.1": "lo", "10.1.2.3": "eth0"})


@pytest.mark.parametrize(
    ("launch", "fault"),
    [
        (file(1, 0, "nohost"), "main_process_ip: nohost does not resolve on this machine; write the address"),
        (file(2, 0, "127.0.0.1", 29500), "which every machine takes for itself; write the address of machine 0 (this "
                                         "machine has 10.1.2.3) there"),
        (file(2, 1, "127.0.0.1", 29500), "which every machine takes for itself; write the address of machine 0 there"),
        (file(2, 0, "10.1.2.3", 0), "main_process_port: 0 is a free port, which each of the 2 machines"),
        (file(2, 0, "10.9.9.9", 29500), "10.9.9.9 is not an address of this machine, which has machine_rank 0 (its "
                                        "addresses: 10.1.2.3)"),
    ],
)  # fmt: skip
def test_where_processes_cannot_meet(monkeypatch, own: None, launch: LaunchFile, fault: str) -> None:
    resolve(monkeypatch, {"nohost": []})
    assert fault in only(network._check_meeting(launch), Level.FAULT)


def test_a_port_that_is_taken_and_one_that_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = only(network._check_meeting(file(port=port)), Level.FAULT)
        assert words.startswith(f"port {port} of this machine cannot be used (Address already in use")
        assert f"by process {os.getpid()}" in words and "another main_process_port in launch.yaml, 0 for" in words
    assert wrong(network._check_meeting(file(port=port))) == []
    assert wrong(network._check_meeting(file(port=0))) == []


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (None, None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),  # machine 0 has not started yet
        (TimeoutError("timed out"), "cannot be reached from here (no answer): check main_process_ip in launch.yaml"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "cannot be reached from here (No route to host)"),
    ],
)
def test_another_machine_must_reach_the_first(monkeypatch, own: None, answer: OSError | None, fault) -> None:
    def connect(place: tuple[str, int], timeout: float) -> object:
        assert place == ("10.1.2.4", 29500) and timeout < 10
        if answer is not None:
            raise answer
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(network.socket, "create_connection", connect)
    found = network._check_meeting(file(2, 1, "10.1.2.4", 29500))
    if fault is None:
        assert wrong(found) == []
    else:
        assert fault in only(found, Level.FAULT)


# ---- storage and clock


def test_a_folder_that_can_be_used_is_left_as_it_was(tmp_path: Path) -> None:
    assert wrong(storage.check_storage(tmp_path / "runs" / "small", 1)) == []
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "set another output_root" in only(storage.check_storage(tmp_path / "file" / "runs", 1), Level.FAULT)
    refused = OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(storage.tempfile, "mkdtemp", lambda *args, **keys: (_ for _ in ()).throw(refused))
    words = only(storage.check_storage(tmp_path, 1), Level.FAULT)
    assert "cannot be written (Read-only file system)" in words and "set another output_root" in words


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ("os.fsync", OSError(errno.EINVAL, "Invalid argument"), "cannot be forced onto the disk (Invalid argument)"),
        ("pathlib.Path.rename", OSError(errno.EXDEV, "Invalid cross-device link"), "cannot be renamed, or a file"),
        ("fcntl.flock", OSError(errno.ENOLCK, "No locks available"), "this file system has no locks"),
        ("fcntl.flock", None, "its locks keep nobody out"),
    ],
)
def test_a_file_system_that_lacks_what_saved_states_need(monkeypatch, tmp_path: Path, call, error, words) -> None:
    def broken(*args: object) -> None:
        if error is not None:
            raise error

    monkeypatch.setattr(call, broken)
    assert words in only(storage.check_storage(tmp_path, 1), Level.FAULT)
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def test_several_machines_need_a_folder_that_all_of_them_see(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "_file_system", lambda folder: "ext4")
    words = only(storage.check_storage(tmp_path, 2), Level.WARNING)
    assert "is a disk of this machine, and 2 machines have to share the folder: set an output_root" in words
    monkeypatch.setattr(storage, "_file_system", lambda folder: "nfs4")
    found = storage.check_storage(tmp_path, 2)
    assert wrong(found) == [] and f"it has number {tmp_path.stat().st_ino}" in found[0].words


@pytest.mark.parametrize(("apart", "level"), [(-1000.0, Level.FAULT), (20.0, Level.WARNING)])
def test_a_clock_that_differs_from_the_files(monkeypatch, tmp_path: Path, apart: float, level: Level) -> None:
    real = time.time
    monkeypatch.setattr(storage.time, "time", lambda: real() + apart)
    words = only(storage.check_storage(tmp_path, 1), level)
    assert f"{abs(apart):.0f} s apart" in words and "set the clock by NTP" in words


def test_a_clock_of_another_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert storage._check_year(time.time()).level is Level.OK
    for now in (86400.0, time.time() + 40 * 365 * 86400):
        assert storage._check_year(now).level is Level.FAULT


def test_a_disk_with_little_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage, "free_bytes", lambda folder: 3 * 2**20)
    words = only(storage.check_storage(tmp_path, 1), Level.WARNING)
    assert words.startswith("3.0 MiB free in") and "set an output_root on another disk" in words


# ---- the machine


@pytest.mark.parametrize(
    ("limits", "mend"), [((256, 4096), "`ulimit -n 4096`"), ((256, 256), "`ulimit -n 544` as root")]
)
def test_few_open_files(monkeypatch: pytest.MonkeyPatch, limits: tuple[int, int], mend: str) -> None:
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: limits)
    words = only(machine.check_limits(2), Level.WARNING)
    assert words.startswith("a process may open 256 files") and words.endswith(mend)


def test_little_shared_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    size = SimpleNamespace(total=64 * 2**20, free=60 * 2**20)
    monkeypatch.setattr(machine.resource, "getrlimit", lambda which: (65536, 65536))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: size)
    assert "docker run --shm-size" in only(machine.check_limits(2), Level.WARNING)
    assert wrong(machine.check_limits(1)) == []


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Makes the driver know one GPU with this many MiB taken."""

    def made(taken: int) -> None:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\necho 'NVIDIA L4, 23034, {taken}, 550.54'\n")
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")

    return made


def test_gpus(card) -> None:
    (found,) = machine.check_gpus(None, Report())
    assert found.level is Level.OK and found.words.startswith("none")
    card(0)
    assert "was built without CUDA: install the build" in only(machine.check_gpus(None, Report()), Level.FAULT)
    words = only(machine.check_gpus(None, Report(cuda="13.0")), Level.FAULT)
    assert "built for CUDA 13.0 and cannot use them with driver 550.54: update the driver" in words
    usable = Report(cuda="12.6", gpus=[{"name": "NVIDIA L4", "memory": 23034 * 2**20, "bf16": True}])
    (found,) = machine.check_gpus(None, usable)
    assert found.words == "1: NVIDIA L4 with 22.5 GiB, driver 550.54, CUDA 12.6"
    card(9000)
    assert "9000 of 23034 MiB of GPU 0 (NVIDIA L4) are taken" in only(machine.check_gpus(None, usable), Level.WARNING)


def test_what_the_trial_has_found() -> None:
    launch = file()
    failed = Report(fault="no compiler: apt-get install g++")
    assert only(machine.check_gpus(launch, failed), Level.FAULT) == failed.fault
    words = only(machine.check_gpus(launch, Report(reduce_fault="process 1 did not take part")), Level.FAULT)
    assert words.startswith("process 1 did not take part: look for a firewall")
    words = only(machine.check_gpus(launch, Report(left_behind=["/x/lock"])), Level.WARNING)
    assert words.startswith("/x/lock was left by a build that was killed") and words.endswith("`rm /x/lock`")


def test_a_trial_that_hangs_or_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], timeout: float, **keys: object) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(machine.subprocess, "run", hangs)
    assert "did not end within" in str(machine.tried(file(), reduce=True).fault)
    broken = subprocess.CompletedProcess([], 1, "", "Traceback\nImportError: no torch\n")
    monkeypatch.setattr(machine.subprocess, "run", lambda *args, **keys: broken)
    assert machine.tried(file(), reduce=True).fault == "its trial failed: ImportError: no torch"


def test_an_all_reduce_that_works() -> None:
    took, fault = all_reduce(TWO, 2, "127.0.0.1", seconds=60)
    assert fault is None and took is not None


def test_an_all_reduce_with_a_process_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    real = trial._take_part

    def takes_part(engine) -> object:
        if engine.data_rank == 1:
            time.sleep(600)
        return real(engine)

    monkeypatch.setattr(trial, "_take_part", takes_part)
    took, fault = all_reduce(TWO, 2, "127.0.0.1", seconds=1)
    assert took is None and fault is not None
    # The other one waits for it, and may give up in the same second.
    assert re.fullmatch(r"process (0, )?1 of 2 did not get through it at 127\.0\.0\.1:\d+ within 1 s", fault)


def test_an_all_reduce_whose_processes_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    took, fault = all_reduce(TWO, 2, "127.0.0.1", seconds=60)
    assert took is None and fault is not None and "Unable to find address for: nowhere0" in fault


# ---- a recipe


SMALL = """
name: small
output_root: {folder}/runs
stages:
  sft:
    parent: {parent}
    data: [{{source: file, path: {folder}/{data}}}]
    train: {{global_batch_size: 3, max_steps: 2}}
"""


def test_what_a_recipe_lacks(monkeypatch: pytest.MonkeyPatch, micro_recipe: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    parent = load_recipe(micro_recipe).run_dir / "pretrain"
    path.write_text(SMALL.format(folder=tmp_path, parent=parent, data="rows.jsonl"))
    assert wrong(of_recipe.check_recipe(load_recipe(path), None, Report())) == []
    words = only(of_recipe.check_recipe(load_recipe(path), file(), Report()), Level.FAULT)
    assert "2 processes cannot share evenly" in words
    monkeypatch.setattr(of_recipe, "free_disk", lambda folder: 1000)
    words = only(of_recipe.check_recipe(load_recipe(path), None, Report()), Level.FAULT)
    assert "1000 bytes are free: free some space" in words
    monkeypatch.undo()
    gpu = {"name": "Tiny", "memory": 2**20, "bf16": True}
    words = only(of_recipe.check_recipe(load_recipe(path), None, Report(gpus=[gpu])), Level.FAULT)
    assert words.startswith("sft takes ") and "--fit` says what to change" in words
    (tmp_path / "empty").mkdir()
    path.write_text(SMALL.format(folder=tmp_path, parent=tmp_path / "empty", data="no.jsonl"))
    found = of_recipe.check_recipe(load_recipe(path), None, Report())
    assert [subject for subject, _ in wrong(found)] == ["models", "data", "plan"]


# ---- the command


def launch_file(folder: Path, text: str) -> Path:
    path = folder / "launch.yaml"
    path.write_text(text)
    return path


def test_the_launch_file_is_read_with_accelerates_defaults(root: Path, tmp_path: Path) -> None:
    read = read_launch_file(root / "recipes" / "launch" / "ddp_2nodes.yaml")
    assert (read.machines, read.processes_here, read.address, read.port) == (2, 8, "127.0.0.1", 29500)
    assert read.request == Request("ddp", None, 16, "cuda")
    plain = read_launch_file(launch_file(tmp_path, "distributed_type: FSDP\nnum_processes: 4\n"))
    assert (plain.machines, plain.machine_rank, plain.port, plain.request.name) == (1, 0, 29500, "fsdp2")


def test_mistakes_of_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--launch nothing\.yaml: no such file"):
        doctor(None, (), Path("nothing.yaml"))
    two = launch_file(tmp_path, "distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\n")
    with pytest.raises(UserError, match="--machine-rank 2: with 2 machines it is a number from 0 to 1"):
        doctor(None, (), two, machine_rank=2, main_process_ip="10.1.2.3")
    with pytest.raises(LaunchError, match="distributed_type: missing"):
        doctor(None, (), launch_file(tmp_path, "num_processes: 2\n"))


def test_what_can_be_tried_on_other_machines_only(monkeypatch, own: None, tmp_path: Path, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine, "tried", lambda launch, *, reduce: Report(reduced=0.1 if reduce else None))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", network._interfaces()[-1])
    two = launch_file(tmp_path, "distributed_type: MULTI_GPU\nnum_machines: 2\nnum_processes: 2\ngpu_ids: '-1,-1'\n")
    assert doctor(None, (), two, main_process_ip="10.1.2.3") == 0
    said = capsys.readouterr().out
    where = "--num-machines 2 --machine-rank N --main-process-ip 10.1.2.3 --main-process-port 29500"
    assert f"  baton doctor --launch {two} {where}\n" in said
    where = "--num_machines 2 --num_processes 2 --machine_rank N --main_process_ip 10.1.2.3 --main_process_port 29500"
    assert f"--config_file {two} {where} -m training.engines.trial\n" in said
    assert said.endswith(": nothing is in the way of a training\n")
    assert doctor(None, (), two, main_process_ip="127.0.0.1") == 1  # the loopback address: no all-reduce is tried
    said = capsys.readouterr().out
    assert "FAULT   meeting" in said and "all-reduce  " not in said


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed needs a compiler")
def test_the_command_finds_a_lock_left_behind_and_imports_no_torch(root: Path, tmp_path: Path) -> None:
    """Everything for real: two processes of DeepSpeed's launch file, the lock of a killed build, nothing changed."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    code = (
        "import sys\nfrom baton.cli import app\n"
        "try:\n    app(sys.argv[1:], standalone_mode=False)\n"
        "except SystemExit as end:\n"
        "    print(end.code, [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])\n"
    )
    launch = root / "recipes" / "launch" / "cpu2_zero2.yaml"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", "--launch", str(launch)],
        cwd=tmp_path,
        env=os.environ | {"TORCH_EXTENSIONS_DIR": str(lock.parent.parent), "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 []", done.stdout + done.stderr
    assert [line for line in lines if line.startswith(f"warning build       {lock} was left by a build")], done.stdout
    assert any(line.startswith("ok      all-reduce  between processes of this machine over gloo") for line in lines)
    assert lock.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["extensions"]
