"""A throw-away Slurm of several nodes on one machine: real daemons, simulated nodes and GPUs, nothing left behind.

Needs root and the packages that `tests/slurm/install.sh` installs; no systemd, no cgroups, no network but loopback.
Debian's slurmd can run several times on one host (`slurmd -N n1`), and a device node that leads to /dev/null passes for
a GPU: it is counted, handed out and shown in CUDA_VISIBLE_DEVICES. By hand:

    python tests/slurm/lab.py up /tmp/lab      # prints the nodes
    python tests/slurm/lab.py down /tmp/lab

The configuration has to lie at /etc/slurm/slurm.conf, because the executor plugin drops SLURM_CONF from the environment
of a job; a machine that already belongs to a cluster is refused.
"""

import argparse
import contextlib
import fcntl
import os
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ETC = Path("/etc/slurm")
FILES = ("slurm.conf", "gres.conf", "cgroup.conf")
DAEMONS = ("slurmctld", "slurmd", "munged", "srun")

SETTINGS = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# else every requeued job would wait 120 s
AuthInfo=cred_expire=10
CryptoType=crypto/munge
StateSaveLocation={folder}/ctld
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
SlurmctldPort=16817
# linuxproc loses processes whose parents have died
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
KillWait=5
MinJobAge=600
Waittime=0
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
# kills on memory without cgroups
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=2
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
GresTypes=gpu
SlurmdParameters=config_overrides
DefMemPerCPU=500
"""

PARTITIONS = """\
PartitionName=main    Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=60 PriorityTier=10 State=UP
PartitionName=requeue Nodes=ALL MaxTime=7-0 DefaultTime=60 PriorityTier=1 PreemptMode=REQUEUE State=UP
PartitionName=cancel  Nodes=ALL MaxTime=7-0 DefaultTime=60 PriorityTier=1 PreemptMode=CANCEL State=UP
"""


@dataclass
class Lab:
    """One Slurm of `nodes` nodes with `cpus` CPUs, `memory` MB and `gpus` simulated GPUs each, kept below `folder`."""

    folder: Path
    nodes: int = 3
    cpus: int = 4
    memory: int = 32000
    gpus: int = 2

    @property
    def names(self) -> list[str]:
        return [f"n{number}" for number in range(1, self.nodes + 1)]

    def up(self) -> None:
        """Start munged if none runs, slurmctld and one slurmd per node; return when all nodes are idle."""
        problem = missing()
        if problem:
            raise RuntimeError(problem)
        self._configure()
        self._start_munge()
        self.start_controller()
        for name in self.names:
            self.start_node(name)
        self.wait_idle()

    def down(self) -> None:
        """Stop every daemon this lab started and remove the links in /etc/slurm."""
        if (self.folder / "slurmctld.pid").exists():
            run("scancel", "--user", "root", check=False)
            wait_until(lambda: not squeue("--states", "running,completing"), 15, quiet=True)
        for pid_file in [*self.folder.glob("slurmd.*.pid"), self.folder / "slurmctld.pid", self.folder / "munged.pid"]:
            stop(pid_file)
        for name in FILES:
            if (ETC / name).is_symlink():
                (ETC / name).unlink()

    def start_controller(self) -> None:
        run("slurmctld")

    def stop_controller(self) -> None:
        stop(self.folder / "slurmctld.pid")

    def start_node(self, name: str) -> None:
        run("slurmd", "-N", name)

    def kill_node(self, name: str) -> None:
        """Lose a node at once: its slurmd is gone, the processes it started run on unseen."""
        stop(self.folder / f"slurmd.{name}.pid", signal.SIGKILL)

    def wait_idle(self) -> None:
        wait_until(lambda: len(set(run("sinfo", "-h", "-N", "-t", "idle", "-o", "%N").split())) == self.nodes, 60)

    def _configure(self) -> None:
        for name in ("ctld", "log", "spool", "dev"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        host, settings, devices = socket.gethostname().split(".")[0], [], []
        for number, name in enumerate(self.names):
            first, last = number * self.gpus, (number + 1) * self.gpus - 1
            for gpu in range(first, last + 1):
                device = self.folder / "dev" / f"gpu{gpu}"
                if not device.exists():
                    os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            settings.append(
                f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={17001 + number} CPUs={self.cpus} "
                f"Boards=1 SocketsPerBoard=1 CoresPerSocket={self.cpus} ThreadsPerCore=1 RealMemory={self.memory} "
                f"Gres=gpu:{self.gpus} State=UNKNOWN\n"
            )
            devices.append(f"NodeName={name} Name=gpu File={self.folder}/dev/gpu[{first}-{last}]\n")
        text = SETTINGS.format(host=host, folder=self.folder)
        (self.folder / "slurm.conf").write_text(text + "".join(settings) + PARTITIONS)
        (self.folder / "gres.conf").write_text("".join(devices))
        (self.folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
        ETC.mkdir(exist_ok=True)
        for name in FILES:
            (ETC / name).unlink(missing_ok=True)
            (ETC / name).symlink_to(self.folder / name)

    def _start_munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge", "munge")
        run("runuser", "-u", "munge", "--", shutil.which("munged") or "/usr/sbin/munged")
        wait_until(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, 20)
        shutil.copyfile("/run/munge/munged.pid", self.folder / "munged.pid")


def missing() -> str:
    """Return why no lab can be started here, or an empty string."""
    if os.geteuid() != 0:
        return "a throw-away Slurm needs root"
    absent = [name for name in DAEMONS if not shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin")]
    if absent:
        return f"{', '.join(absent)} not installed: run tests/slurm/install.sh"
    conf = ETC / "slurm.conf"
    if conf.exists() and not conf.is_symlink():
        return f"{conf} exists: this machine belongs to a cluster"
    try:
        with tempfile.TemporaryDirectory() as folder:
            os.mknod(f"{folder}/gpu", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    except OSError as error:
        return f"simulated GPUs need device nodes, which cannot be made here ({error.strerror})"
    return ""


def run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def clean_environment() -> dict[str, str]:
    """Return the environment without variables of a Slurm that this process may itself run under."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "SRUN_"))}
    return {**kept, "PATH": kept.get("PATH", "") + ":/usr/sbin"}


def squeue(*options: str, form: str = "%i") -> list[str]:
    """Return one line per job."""
    return run("squeue", "--noheader", "--format", form, *options, check=False).split("\n")[:-1]


def stop(pid_file: Path, how: signal.Signals = signal.SIGTERM) -> None:
    """End the daemon whose pid a file holds and wait until it is gone."""
    try:
        pid = int(pid_file.read_text())
        os.kill(pid, how)
    except (FileNotFoundError, ProcessLookupError, ValueError):
        return
    wait_until(lambda: gone(pid), 20, quiet=True)
    pid_file.unlink(missing_ok=True)


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody collects counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition: object, seconds: float, quiet: bool = False) -> bool:
    """Wait until `condition()` is true (error after `seconds`, or False with `quiet`)."""
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        if time.monotonic() > end:
            if quiet:
                return False
            raise TimeoutError(f"not within {seconds} s")
        time.sleep(0.2)
    return True


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Hold the machine's one Slurm: ports and /etc/slurm are taken once."""
    with Path("/run/qpipe-slurm-lab.lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    lab = Lab(arguments.folder.absolute())
    getattr(lab, arguments.action)()
    if arguments.action == "up":
        print(run("sinfo", "-N", "-o", "%N %P %T %c %m %G"), end="")
