"""A Slurm cluster of this machine alone for tests: its own controller, node and authentication, in a folder."""

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo")
# Without cgroups, accounting and a mail program. A job in `urgent` preempts one in `main`, which has a minute to save.
CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
MailProg=/bin/true
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=ALL State=UP PriorityTier=2
"""


@dataclass(frozen=True)
class Cluster:
    """The running cluster."""

    environment: dict[str, str]
    root: Path

    def ask(self, *command: object) -> str:
        """What a command of Slurm prints."""
        return subprocess.run(
            list(map(str, command)), cwd=self.root, env=self.environment, check=True, capture_output=True, text=True
        ).stdout.strip()

    def field(self, job: str, name: str) -> str:
        """One value of what `scontrol show job` says, e.g. of JobState."""
        return self.ask("scontrol", "show", "job", job).split(f"{name}=")[1].split()[0]

    def idle(self) -> bool:
        """Whether the node waits for jobs."""
        with suppress(subprocess.CalledProcessError):
            return "idle" in self.ask("sinfo", "--noheader")
        return False


@contextmanager
def slurm_cluster(root: Path, folder: Path) -> Iterator[Cluster]:
    """The cluster inside the context. Skips the test where Slurm is not installed."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    programs = {name: shutil.which(name, path=path) for name in PROGRAMS}
    if missing := [name for name, found in programs.items() if found is None]:
        pytest.skip(f"no {', '.join(missing)} here; Debian: apt install slurm-wlm munge")
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(64))
    key.chmod(0o400)
    controller, node = free_ports(2)
    config = folder / "slurm.conf"
    host = socket.gethostname().split(".")[0]
    config.write_text(
        CONFIG.format(
            host=host, folder=folder, user=getpass.getuser(), cpus=os.cpu_count(), controller=controller, node=node
        )
    )
    files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    own = [f"--{option}={folder}/munge.{ending}" for option, ending in files.items()]
    environment = {**os.environ, "SLURM_CONF": str(config)}
    with ExitStack() as stack:
        for program, *arguments in (
            ("munged", "--foreground", "--force", *own),
            ("slurmctld", "-D", "-c", "-f", str(config)),
            ("slurmd", "-D", "-f", str(config)),
        ):
            stack.enter_context(_running([programs[program], *arguments], environment, folder / f"{program}.said"))
            if program == "munged":
                _until(lambda: (folder / "munge.socket").exists(), folder)
        cluster = Cluster(environment, root)
        _until(cluster.idle, folder)
        yield cluster


@contextmanager
def _running(command: Sequence[str | None], environment: dict[str, str], said: Path) -> Iterator[None]:
    with said.open("w") as output:
        process = subprocess.Popen(
            [part for part in command if part is not None], env=environment, stdout=output, stderr=output
        )
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _until(true: Callable[[], bool], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not true():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text()[-500:]}" for path in folder.glob("*.said"))
            pytest.fail(f"Slurm does not start:\n{logs}")
        time.sleep(0.1)


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
